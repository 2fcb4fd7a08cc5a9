"""lora_fx_fold.json: which adapters were folded into a checkpoint, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import LoraConfig
from .errors import FoldError
from .hf_checkpoint import read_json

RECORD = "lora_fx_fold.json"

Entry = dict[str, str | int | float | bool]


def entry_of(data_sha256: str, config: LoraConfig) -> Entry:
    """What is noted of an adapter: sha256 of its tensors' bytes, and what they were multiplied with."""
    return {
        "adapter": data_sha256,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
    }


def refuse_twice(directory: Path, entry: Entry, adapter: Path) -> None:
    """Whether an adapter is not in a checkpoint yet, as far as anybody noted.

    Raises:
        FoldError: if it is, or the note cannot be read.
    """
    if any(isinstance(each, dict) and each.get("adapter") == entry["adapter"] for each in _folds(directory)):
        raise FoldError(
            f"{str(adapter)!r} is folded into {str(directory)!r} already ({RECORD} says so), and folding it again "
            "would count it twice; take the checkpoint as it is, or its base"
        )


def history_with(directory: Path, entry: Entry) -> dict[str, Any]:
    """What the file of a checkpoint says once an adapter is folded in, too."""
    earlier = [each for each in _folds(directory) if each != entry]  # a fold in place may have come this far before
    return {"folds": [*earlier, entry]}


def _folds(directory: Path) -> list[Any]:
    path = directory / RECORD
    if not path.is_file():
        return []
    found = read_json(path, FoldError).get("folds")
    return found if isinstance(found, list) else []
