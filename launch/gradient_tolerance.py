"""What a gradient tolerance buys on real probabilities: the share of tokens that go, what is certified, what is true.

    python launch/gradient_tolerance.py MODEL DATA.jsonl

MODEL is a checkpoint fine-tuned on the data (launch/gsm8k.sh leaves one under runs/gsm8k/nll), DATA rows of GSM8K.
Writes launch/results/gradient_tolerance.{json,md}.
"""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import objectives
from posttrain.kernels import LMHead, record_certificates, vocab_statistics
from posttrain.modeling import VocabRequest, attach
from posttrain.run_record import versions

TOLERANCES = (1e-4, 1e-3, 1e-2, 1e-1)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nll": lambda logp: objectives.get("nll")(logp=logp).values,
    "probability": lambda logp: objectives.get("probability")(logp=logp).values,
    "probability_power (alpha 10)": lambda logp: objectives.get("probability_power")(logp=logp, alpha=10.0).values,
}


def states(model: Any, tokenizer: Any, rows: list[dict[str, str]], tokens: int) -> tuple[Tensor, LMHead, Tensor]:
    """Hidden states, head and targets at the answers' tokens, `tokens` of them."""
    attach(model)
    hidden, targets, head = [], [], None
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer: "
        ids = torch.tensor(tokenizer(prompt + row["answer"])["input_ids"])
        places = torch.arange(len(tokenizer(prompt)["input_ids"]) - 1, len(ids) - 1)
        request = VocabRequest(places, ids[places + 1], return_hidden=True, return_head=True)
        with torch.no_grad():
            output = model(input_ids=ids[None], vocab_request=request)
        hidden.append(output.hidden)
        targets.append(request.targets)
        head = output.head
        if sum(map(len, targets)) >= tokens:
            break
    assert head is not None
    return torch.cat(hidden)[:tokens], head, torch.cat(targets)[:tokens]


def gradients(
    hidden: Tensor, head: LMHead, targets: Tensor, loss: Callable[[Tensor], Tensor], tolerance: float
) -> tuple[tuple[Tensor, ...], list[Any]]:
    hidden = hidden.clone().requires_grad_()
    weight = head.weight.clone().requires_grad_()
    own = LMHead(weight, head.bias, head.scale, head.softcap)
    with record_certificates() as certificates:
        logp = vocab_statistics(hidden, own, targets, ("logp",), gradient_tolerance=tolerance)["logp"]
    return torch.autograd.grad(loss(logp).sum(), (hidden, weight)), certificates


def measure(hidden: Tensor, head: LMHead, targets: Tensor) -> list[dict[str, Any]]:
    found = []
    for name, loss in LOSSES.items():
        exact, _ = gradients(hidden, head, targets, loss, 0.0)
        for tolerance in TOLERANCES:
            near, (certificate,) = gradients(hidden, head, targets, loss, tolerance)
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(near, exact, strict=True)]
            found.append(
                {
                    "objective": name,
                    "tolerance": tolerance,
                    "dropped_share": certificate.dropped.item() / certificate.rows,
                    "head_bound": certificate.head_bound.item(),
                    "head_error": errors[1],
                    "hidden_bound": certificate.hidden_bound.item(),
                    "hidden_error": errors[0],
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def table(rows: list[dict[str, Any]], about: str) -> str:
    lines = [
        about,
        "",
        "| objective | tolerance | tokens left out | head: certified | head: true | hidden: certified | hidden: true |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{row[key]:.2g}" for key in ("head_bound", "head_error", "hidden_bound", "hidden_error")]
        lines.append(
            f"| {row['objective']} | {row['tolerance']:g} | {row['dropped_share']:.1%} | {' | '.join(numbers)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("launch/results/gradient_tolerance"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    hidden, head, targets = states(model, tokenizer, rows, arguments.tokens)
    with torch.no_grad():
        p = vocab_statistics(hidden, head, targets, ("logp",))["logp"].exp()
    quantiles = [round(value, 4) for value in p.quantile(torch.tensor([0.1, 0.5, 0.9, 0.99])).tolist()]
    results = measure(hidden, head, targets)
    about = {
        "date": date.today().isoformat(),
        "machine": f"CPU, {platform.machine()}",
        "versions": versions(),
        "tokens": len(targets),
        "vocabulary": head.weight.shape[0],
        "width": head.weight.shape[1],
        "mean_target_probability": round(p.mean().item(), 4),
        "probability_quantiles_10_50_90_99": quantiles,
        "share_above_0.99": round((p > 0.99).double().mean().item(), 4),
    }
    summary = (
        f"{about['date']}: {about['tokens']} answer tokens, width {about['width']}, vocabulary {about['vocabulary']}, "
        f"mean target probability {about['mean_target_probability']}, above 0.99: {about['share_above_0.99']:.1%}."
    )
    arguments.output.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(table(results, summary))


if __name__ == "__main__":
    main()
