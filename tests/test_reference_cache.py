"""Fingerprints that see what changes the numbers and nothing else; chunks that come back as they were written."""

import dataclasses
import json

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from posttrain.reference_cache import MANIFEST, Fingerprint, ReferenceCache, folder_beside, hash_rows, hash_weights
from tests import tiny

FINGERPRINT = Fingerprint("w", "d", "summed at temperature 1", "float32")


def adapted(rank=2, seed=0, **options):
    config = LoraConfig(r=rank, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **options)
    return get_peft_model(tiny.model(seed=seed, tie_word_embeddings=False), config)


def test_a_hash_of_weights_sees_every_number():
    model = tiny.model()
    first = hash_weights(model)
    assert first == hash_weights(tiny.model())
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.data.view(-1)
        kept = flat[-1].item()
        flat[-1] = kept + 1e-3
        assert hash_weights(model) != first
        flat[-1] = kept
    assert hash_weights(model) == first


def test_a_hash_of_weights_sees_settings_that_change_logits_and_no_others():
    first = hash_weights(tiny.model())
    assert hash_weights(tiny.model(rms_norm_eps=1e-3)) != first
    assert hash_weights(tiny.model(dtype=torch.bfloat16)) != first
    other = tiny.model()
    other.config._name_or_path, other.config.use_cache = "elsewhere", False
    assert hash_weights(other) == first


def test_adapters_that_are_off_leave_the_hash_alone_and_those_that_are_on_do_not():
    plain = hash_weights(tiny.model(tie_word_embeddings=False))
    assert hash_weights(adapted(2)) == hash_weights(adapted(3)) == plain
    kept = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    assert hash_weights(get_peft_model(tiny.model(tie_word_embeddings=False), kept)) == plain
    model = adapted(2)
    on = hash_weights(model, "default")
    assert on != plain
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.add_(1)
    assert hash_weights(model, "default") != on and hash_weights(model) == plain
    assert hash_weights(adapted(2, lora_alpha=99), "default") != on


def test_a_hash_of_rows_sees_ids_their_order_and_where_a_list_ends():
    def of(*rows):
        return hash_rows(Dataset.from_dict({"a": [row[0] for row in rows], "b": [row[1] for row in rows]}), ["a", "b"])

    first = of(([1], [2, 3]), ([4], [5]))
    assert first == of(([1], [2, 3]), ([4], [5]))
    others = [
        of(([1, 2], [3]), ([4], [5])),
        of(([4], [5]), ([1], [2, 3])),
        of(([1], [2, 3]), ([4], [6])),
        of(([1], [2, 3])),
        of(([1], [2]), ([3, 4], [5])),
        of(([1], [2]), ([4], [3, 5])),
    ]
    assert len({first, *others}) == 7


def test_a_hash_of_rows_is_of_the_rows_and_not_of_how_they_are_stored():
    ids = [[i, i + 1] for i in range(9)]
    whole = Dataset.from_dict({"a": ids, "other": list(range(9))})
    chosen = whole.filter(lambda row: row["other"] % 2 == 0)
    assert hash_rows(chosen, ["a"]) == hash_rows(Dataset.from_dict({"a": ids[::2]}), ["a"])
    parts = datasets.concatenate_datasets([whole.select(range(4)), whole.select(range(4, 9))])
    assert hash_rows(parts, ["a"]) == hash_rows(whole, ["a"])


def test_chunks_come_back_in_order_with_every_digit(tmp_path):
    cache = ReferenceCache(tmp_path / "train", FINGERPRINT, rows=5, chunk_rows=2)
    assert cache.missing() == [range(2), range(2, 4), range(4, 5)]
    sums = [-1234.56789012345678, -0.1, -3.0, -1e-9, -2.0 / 3]
    tokens = [[-0.1], [-0.2, -0.3], [-1.0], [-4.0, -5.0, -6.0], [-7.0]]
    cache.start()
    for chunk in reversed(cache.chunks):
        cache.write(chunk, {"sums": [sums[row] for row in chunk], "tokens": [tokens[row] for row in chunk]})
    joined = ReferenceCache(tmp_path / "train", FINGERPRINT, rows=5, chunk_rows=2).join(
        Dataset.from_dict({"row": list(range(5))}).filter(lambda row: True)
    )
    assert joined["row"][:] == list(range(5)) and joined["sums"][:] == sums
    assert [len(row) for row in joined["tokens"]] == [1, 2, 1, 3, 1]
    assert torch.equal(torch.tensor(joined["tokens"][3]), torch.tensor(tokens[3]))


def test_what_is_there_is_not_missing_and_a_half_file_is(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT, rows=4, chunk_rows=2)
    cache.start()
    cache.write(range(2, 4), {"sums": [0.0, 1.0]})
    (tmp_path / f"{cache._file(range(2)).name}.17.partial").write_bytes(b"half")
    again = ReferenceCache(tmp_path, FINGERPRINT, rows=4, chunk_rows=2)
    assert again.missing() == [range(2)]


def test_two_runs_that_start_in_one_folder_read_their_own_chunks(tmp_path):
    other = dataclasses.replace(FINGERPRINT, weights="other")
    caches = [ReferenceCache(tmp_path, one, rows=4, chunk_rows=2) for one in (FINGERPRINT, other)]
    for cache in caches:
        cache.start()
        assert cache.missing() == cache.chunks
    for chunk in caches[0].chunks:
        for number, cache in enumerate(caches):
            cache.write(chunk, {"sums": [float(number)] * 2})
    for number, cache in enumerate(caches):
        assert cache.join(Dataset.from_dict({"row": list(range(4))}))["sums"][:] == [number] * 4


def test_chunks_without_their_manifest_are_missing(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT, rows=2)
    cache.start()
    cache.write(range(2), {"sums": [0.0, 1.0]})
    assert not cache.missing()
    (tmp_path / MANIFEST).unlink()
    assert ReferenceCache(tmp_path, FINGERPRINT, rows=2).missing() == [range(2)]
    other = ReferenceCache(tmp_path, dataclasses.replace(FINGERPRINT, weights="other"), rows=2)
    other.start()
    assert other.missing() == [range(2)]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", "another reference model"),
        ("data", "other rows"),
        ("statistics", "summed at temperature 1, where the objective needs changed"),
        ("precision", "computed in float32, where this run has changed"),
    ],
)
def test_a_stale_folder_is_refused_and_what_differs_is_named(tmp_path, part, message):
    ReferenceCache(tmp_path, FINGERPRINT, rows=4).start()
    changed = dataclasses.replace(FINGERPRINT, **{part: "changed"})
    with pytest.raises(ValueError, match=message) as caught:
        ReferenceCache(tmp_path, changed, rows=4)
    others = {"another reference model", "other rows", "where the objective needs", "where this run has"}
    assert sum(other in str(caught.value) for other in others) == 1 and "remove that folder" in str(caught.value)
    assert changed.digest != FINGERPRINT.digest
    assert json.loads((tmp_path / MANIFEST).read_text()) == dataclasses.asdict(FINGERPRINT)


def test_numbers_lie_beside_the_data_set_s_own_cache_files(tmp_path, monkeypatch):
    rows = Dataset.from_dict({"a": [1, 2]})
    assert folder_beside(rows, tmp_path / "run") == tmp_path / "run" / "reference_cache"
    rows.save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert folder_beside(saved, tmp_path / "run") == tmp_path / "saved"
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: False)
    assert folder_beside(saved, tmp_path / "run") == tmp_path / "run" / "reference_cache"
