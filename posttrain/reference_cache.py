"""A reference model's log-probabilities on disk: written in chunks, resumed where a pass stopped, refused if stale."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn

from posttrain.modeling import causal_lm

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHUNK_ROWS = 1024

# what a config says of where a model lies, of its training and of its generation
_WITHOUT_EFFECT = frozenset(
    ["_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id",
     "bos_token_id", "eos_token_id", "output_router_logits", "router_aux_loss_coef"]
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """What cached numbers depend on.

    Args:
        weights: hash of the reference model.
        data: hash of the tokenised rows.
        statistics: which numbers, in words.
        precision: in which they were computed, in words.
    """

    weights: str
    data: str
    statistics: str
    precision: str

    @property
    def digest(self) -> str:
        """One hash of all."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def hash_weights(model: nn.Module, adapter: str | None = None) -> str:
    """A hash of all weights, buffers and settings that a model's log-probabilities depend on; a gigabyte a second.

    A model with adapters, seen without them, has the hash of the model they were put on. Under ZeRO-3 every process
    has to call this at once.

    Args:
        model: a causal LM, or PEFT's wrapper around one.
        adapter: the one of its adapters that is switched on; None for the model without.
    """
    base = causal_lm(model)
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    off = set(configs) - {adapter}
    settings = {key: value for key, value in base.config.to_diff_dict().items() if key not in _WITHOUT_EFFECT}
    if adapter is not None:
        config = configs[adapter]
        settings["adapter"] = {key: getattr(config, key, None) for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    named = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    names = {_plain(name): name for name in named if not off & set(name.split("."))}
    for plain in sorted(names):
        tensor = named[names[plain]]
        with _gathered(tensor):
            digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _plain(name: str) -> str:
    """A parameter's name without the wrappers that adapters put around its module."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_rows(dataset: Dataset, columns: Sequence[str]) -> str:
    """A hash of the token ids of all rows, in their order.

    Args:
        dataset: tokenised.
        columns: lists of ids.
    """
    digest = hashlib.sha256(" ".join(columns).encode())
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=CHUNK_ROWS):
        for name in columns:
            column = batch[name].combine_chunks()
            lists = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
            digest.update(lists.value_lengths().cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
            digest.update(lists.flatten().cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def folder_beside(dataset: Dataset, output_dir: str | Path) -> Path:
    """Where a data set's numbers are kept: beside its own cache files, or in the run's folder where it has none."""
    files = dataset.cache_files
    if files and datasets.is_caching_enabled() and os.access(Path(files[0]["filename"]).parent, os.W_OK):
        return Path(files[0]["filename"]).parent
    return Path(output_dir) / "reference_cache"


class ReferenceCache:
    """Columns of numbers for the rows of one data set, in a folder of their own.

    Args:
        folder: made where it is missing.
        fingerprint: of what the numbers depend on.
        rows: of the data set.
        chunk_rows: rows in a file; what an interrupted pass loses at most.

    Raises:
        ValueError: the folder holds numbers of another fingerprint; what differs is named.

    Chunks carry the fingerprint in their names, so that runs which start in one folder at once never read each other's.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, rows: int, chunk_rows: int = CHUNK_ROWS) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.chunks = [range(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]
        self._check()

    def _check(self) -> None:
        found, mine = self._manifest(), asdict(self.fingerprint)
        if found is None:
            return
        said = {
            "weights": "another reference model (its weights or settings differ)",
            "data": "other rows (their tokens, number or order differ)",
            "statistics": f"{found.get('statistics')}, where the objective needs {mine['statistics']}",
            "precision": f"numbers computed in {found.get('precision')}, where this run has {mine['precision']}",
        }
        stale = [said[item.name] for item in fields(self.fingerprint) if found.get(item.name) != mine[item.name]]
        if stale:
            raise ValueError(
                f"the reference cache {str(self.folder)!r} is stale: it is of {' and of '.join(stale)}; remove that "
                "folder to compute it anew, or set reference_cache to another one."
            )

    def _manifest(self) -> dict[str, str] | None:
        path = self.folder / MANIFEST
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def missing(self) -> list[range]:
        """The chunks of rows that are not there yet, or of which the folder does not say what they are."""
        known = self._manifest() == asdict(self.fingerprint)
        return [chunk for chunk in self.chunks if not (known and self._file(chunk).exists())]

    def start(self) -> None:
        """Make the folder and say in it what the numbers will be of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.fingerprint), indent=2) + "\n"
        self._replace(self.folder / MANIFEST, text.encode())

    def write(self, chunk: range, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keep a chunk's columns: numbers in float64, or lists of them in float32, one a row."""
        arrays = {
            name: pa.array(values, pa.list_(pa.float32()) if isinstance(values[0], list) else pa.float64())
            for name, values in columns.items()
        }
        table = pa.table(arrays)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        self._replace(self._file(chunk), memoryview(sink.getvalue()))

    def join(self, dataset: Dataset) -> Dataset:
        """The data set with the columns beside its own; they stay on disk."""
        parts = [Dataset.from_file(str(self._file(chunk))) for chunk in self.chunks]
        return concatenate_datasets([dataset, concatenate_datasets(parts)], axis=1)

    def _file(self, chunk: range) -> Path:
        return self.folder / f"{self.fingerprint.digest[:16]}-{chunk.start:09d}-{chunk.stop:09d}.arrow"

    def _replace(self, path: Path, content: bytes | memoryview) -> None:
        # an interrupted write leaves no half file, and other processes may write the same at the same time
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)
