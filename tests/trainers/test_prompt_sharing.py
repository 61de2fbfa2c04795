"""PreferenceTrainer with pairs in one row, against a row for every completion."""

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from posttrain import PreferenceTrainer
from posttrain.config import from_tree
from tests import tiny
from tests.modeling import families
from tests.trainers.step import Gradients

PAIRS = [
    {
        "prompt": "abcdefgh"[: 1 + i] + "=",
        "chosen": "0123456789"[: 1 + i % 3],
        "rejected": "9876543210"[: 1 + (2 * i) % 5],
    }
    for i in range(8)
]


def trainer(folder, shared_prefix, model=None, dtype=torch.float32, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    return PreferenceTrainer(
        tiny.model(dtype) if model is None else model,
        args=DPOConfig(str(folder), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny.tokenizer(),
        shared_prefix=shared_prefix,
        callbacks=[Gradients()],
        **options,
    )


def trained(folder, shared_prefix, objective):
    found = trainer(folder, shared_prefix, objective=objective)
    # away from the reference, where every log-ratio is 0
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))
    found.train()
    gradients = next(one for one in found.callback_handler.callbacks if isinstance(one, Gradients)).found
    return gradients, found.state.log_history[0]["loss"], found.evaluate()["eval_loss"]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "tdpo", {"name": "nll", "role": "chosen"}])
def test_gradients_and_losses_are_those_of_separate_rows(tmp_path, objective):
    expected, loss, evaluated = trained(tmp_path / "separate", False, objective)
    found, shared_loss, shared_evaluated = trained(tmp_path / "shared", True, objective)
    assert shared_loss == pytest.approx(loss, rel=1e-5) and shared_evaluated == pytest.approx(evaluated, rel=1e-4)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), name


def test_the_collator_lays_out_what_the_setting_says(tmp_path):
    rows = [{"prompt_ids": [3] * 9, "chosen_ids": [4, 5], "rejected_ids": [6]}]
    for setting, shape in ((True, (1, 12)), (False, (2, 11)), ("auto", (1, 12))):
        built = trainer(tmp_path / str(setting), setting)
        batch = built.data_collator(rows)
        assert batch["input_ids"].shape == shape, setting
        assert batch["side"].targets.tolist() == [4, 5, 6]
        assert batch["side"].num_tokens == 21 and batch["side"].batch_row.tolist() == [0, 0]
    # a short prompt does not pay
    assert built.data_collator([{**rows[0], "prompt_ids": [3], "chosen_ids": [4] * 90}])["input_ids"].shape[0] == 2


def test_a_model_with_windows_is_refused_where_sharing_is_asked_for(tmp_path):
    model = families.model("mistral", sliding_window=8, vocab_size=len(tiny.VOCABULARY)).float()
    with pytest.raises(ValueError, match=r"shared_prefix.*MistralForCausalLM looks no further back"):
        trainer(tmp_path, True, model)
    assert trainer(tmp_path, "auto", model).data_collator.shares_prompts is None


def test_the_trial_runs_before_the_first_step(tmp_path):
    built = trainer(tmp_path, "auto")
    rotary = built.model.model.rotary_emb.forward
    built.model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(RuntimeError, match="shared_prefix is not exact here"):
        built.train()


class SeesItsNeighbour(torch.nn.Module):
    """A layer that looks at the position before in the row, as a convolution or a token shift does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        found = self.inner(hidden)
        return found + torch.nn.functional.pad(found, (0, 0, 1, 0))[:, :-1]


def test_a_layout_that_the_trial_refuses_leaves_no_trace_in_the_cache(tmp_path):
    found = []
    for setting in (True, False):
        model = tiny.model()
        model.model.layers[0].mlp = SeesItsNeighbour(model.model.layers[0].mlp)
        built = trainer(tmp_path, setting, model, reference="cached", reference_cache=tmp_path / str(setting))
        found.append(built.train_dataset["rejected_reference_sum_logp"][:])
        if setting:
            assert built.data_collator.shares_prompts is not None
            with pytest.raises(RuntimeError, match="shared_prefix is not exact here"):
                built.train()
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_settings(tmp_path):
    with pytest.raises(ValueError, match="shared_prefix is 'yes'; give auto, true or false"):
        trainer(tmp_path, "yes")
    with pytest.raises(ValueError, match="shared_prefix is 'yes'; give auto, true or false"):
        from_tree({"method": "preference", "shared_prefix": "yes"})
    with pytest.raises(ValueError, match="method supervised has no pairs"):
        from_tree({"shared_prefix": True})
    assert from_tree({"method": "preference", "objective": "dpo", "shared_prefix": True}).shared_prefix is True
