"""Package data: the embedded base model that every default runs on."""

from pathlib import Path


def tiny_base_path() -> Path:
    """Folder of the embedded base (model and tokenizer), as `from_pretrained` takes it."""
    return Path(__file__).parent / "tiny_base"
