"""Steps of the unlearning trainer on a tiny model, under any launcher; run as a script: ``unlearning_step.py OUT``."""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import SFTConfig

from posttrain.objectives import Loss, declare
from posttrain.trainers.unlearning import UnlearningTrainer
from tests import tiny
from tests.trainers.step import Gradients, config

REFUSALS = ["abc", "xyz", "q"]


@declare(unit="sequences", formula="-(2 / beta) log sigma(-beta logratio)", paper="")
def npo(logratio, *, beta=0.1):
    return Loss(-2 / beta * F.logsigmoid(-beta * logratio))


@declare(unit="sequences", formula="", paper="")
def preference(logratio, refusal_logratio, *, beta=0.1):
    return Loss(-2 / beta * F.logsigmoid(beta * (refusal_logratio - logratio)))


@declare(unit="sequences", formula="-(2 / beta) log sigma(-beta mean_logp)", paper="")
def length_normalised(mean_logp, *, beta=2.5):
    return Loss(-2 / beta * F.logsigmoid(-beta * mean_logp))


@declare(unit="tokens", formula="KL(reference || policy)", paper="")
def kl(forward_kl):
    return Loss(forward_kl)


@declare(unit="tokens", formula="-logp", paper="", role="refusal")
def refused(logp):
    return Loss(-logp)


CONSTRAINT = {"constraint": {"epsilon": 4.0, "step": 0.5, "initial": 2.0}}
# objective and retained rows for each row to forget
CASES = {
    "sum": ({"forget": npo, "retain": "nll", "combine": {"sum": {"forget": 0.5, "retain": 2.0}}}, 0.5),
    "constraint": ({"forget": preference, "retain": [kl, "nll"], "combine": CONSTRAINT}, 3.0),
}


def rows_to_retain() -> list[dict]:
    """Other prompts than those to forget, and longer completions."""
    return [{**row, "prompt": f"z{row['prompt']}", "completion": f"{row['completion']}9"} for row in tiny.rows()]


def data_files(folder: Path) -> dict[str, dict[str, str]]:
    """Rows to forget and to retain as files, and the ``data`` of a configuration that names them."""
    data = {}
    for name, rows in (("forget", tiny.rows()), ("retain", rows_to_retain())):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data[name] = {"path": str(path)}
    return data


def trainer(objective, output: str, batch: int = 8, accumulation: int = 1, *, options=None, **given):
    """An unlearning trainer of a float64 model; its callback keeps the gradients of the last step."""
    settings = {
        "model": tiny.model(torch.float64),
        "forget_dataset": Dataset.from_list(tiny.rows()),
        "retain_dataset": Dataset.from_list(rows_to_retain()),
        "refusals": REFUSALS,
        **given,
    }
    gradients = Gradients()
    args: SFTConfig = config(output, batch, accumulation, **{"max_steps": -1, "num_train_epochs": 1, **(options or {})})
    made = UnlearningTrainer(
        args=args, objective=objective, processing_class=tiny.tokenizer(), callbacks=[gradients], **settings
    )
    made.gradients = gradients
    return made


def disturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Move the trained weights away from those of the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter))


def two_epochs(case: str, batch: int, accumulation: int) -> dict:
    """Gradients of the second of two steps, and what was logged of both."""
    objective, ratio = CASES[case]
    options = {"num_train_epochs": 2, "learning_rate": 0.01}
    with tempfile.TemporaryDirectory() as output:
        made = trainer(copy.copy(objective), output, batch, accumulation, retain_per_forget=ratio, options=options)
        disturb(made.model)
        made.train()
    return {
        "gradients": made.gradients.found,
        "logs": [entry for entry in made.state.log_history if "loss" in entry],
        "dual": made.dual and float(made.dual.value),
        "processes": made.accelerator.num_processes,
    }


def main() -> None:
    """Every case, split over micro-batches and not, on whatever processes there are."""
    found = {(case, batch): two_epochs(case, batch, 4 // batch) for case in CASES for batch in (4, 1)}
    if int(found["sum", 4]["processes"]) != 2:
        raise RuntimeError("two processes are wanted")
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
