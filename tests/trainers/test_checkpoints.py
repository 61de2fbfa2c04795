"""A reference that follows the policy, in the checkpoints of a run."""

import pytest
import torch
from safetensors.torch import load_file

from posttrain.trainers.checkpoints import REFERENCE_FILE
from tests.trainers.preference_step import build


def following(folder, steps=4, **options):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6, "learning_rate": 0.05}
    return build(folder, batch=4, max_steps=steps, save_strategy="steps", save_steps=2, **{**settings, **options})


def test_a_reference_that_follows_goes_on_where_it_was(tmp_path):
    whole = following(tmp_path / "whole")
    whole.train()
    following(tmp_path / "parts", steps=2).train()
    resumed = following(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name in ("ref_model", "model"):
        expected, found = (getattr(one, name).state_dict() for one in (whole, resumed))
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)
    saved = load_file(tmp_path / "parts" / "checkpoint-2" / REFERENCE_FILE)
    assert not torch.equal(saved["lm_head.weight"], resumed.ref_model.lm_head.weight)


def test_a_checkpoint_without_the_reference_is_refused(tmp_path):
    following(tmp_path, steps=2, sync_ref_model=False).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / REFERENCE_FILE).exists()
    with pytest.raises(ValueError, match=f"holds no {REFERENCE_FILE}.*set sync_ref_model to false"):
        following(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_a_sharded_reference_is_not_resumed(tmp_path):
    following(tmp_path, steps=2).train()
    trainer = following(tmp_path)
    next(trainer.ref_model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="that FSDP or ZeRO-3 shards is not kept"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
