"""Writing a folded transformers model: whole or not at all, with the files that go along with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from .atomic import replace_directory, temporary_beside
from .checks import output_error
from .cli_paths import resolved
from .errors import FoldError
from .fold_history import RECORD
from .hf_checkpoint import untied_config
from .hf_folding import HfFold
from .hf_models import HfModel, load_model

# What goes along with a folded model. Weights in any other format would be the base's, unfolded, so this is a
# list of what is copied and not of what is not.
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".bpe"}


def save_folded(
    loaded: HfModel,
    outcome: HfFold,
    out: Path,
    *,
    dtype: str | None,
    history: Mapping[str, object] | None = None,
) -> None:
    """Write the model directory OUT, in place only when it is whole.

    Args:
        loaded: the model, with the folded tensors.
        outcome: of folding into it; where weights were untied, the written files are loaded and run as a check.
        out: a new directory, an empty one, or one to replace.
        dtype: that the model was asked to be in; None leaves what the config says.
        history: which adapters the directory comes to hold, as `fold_history` notes it.

    Raises:
        FoldError: if what was written does not load as what was folded. OUT is as it was then.
        OSError, SafetensorError: if it cannot be written. OUT is as it was then.
    """
    target = resolved(out)
    with temporary_beside(target) as temporary:
        folder = temporary / "model"
        loaded.model.save_pretrained(folder)
        _write_config(loaded, outcome, folder, dtype)
        _copy_companions(loaded.directory, folder)
        if history is not None:
            (folder / RECORD).write_text(json.dumps(history, indent=2) + "\n", "utf-8")
        if outcome.untied:
            _check_reloaded(loaded, outcome, folder)
        if not target.is_dir():
            _move(folder, target)
        elif temporary.parent == target or not replace_directory(folder, target):
            _exchange_entries(folder, target, temporary)


def _write_config(loaded: HfModel, outcome: HfFold, folder: Path, dtype: str | None) -> None:
    """The source's own configs, with what folding changed: transformers spells them anew, and adds to them.

    What older releases and other programs read, `torch_dtype` and `rope_theta` for example, would be gone.
    """
    source = loaded.directory / "config.json"
    original = json.loads(source.read_text("utf-8"))
    config = dict(original)
    name = type(loaded.model).__name__
    if name not in (config.get("architectures") or []):
        config["architectures"] = [name]
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if outcome.untied:
        config = untied_config(config)
    if config == original:
        shutil.copyfile(source, folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    generation = loaded.directory / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / "generation_config.json")


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, preprocessor and pooling files, also one directory down; the new model's own files stay."""
    for file in [*source.glob("*"), *source.glob("[!.]*/*")]:
        target = folder / file.relative_to(source)
        is_wanted = file.suffix in _COPIED_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(file, target)


def _check_reloaded(loaded: HfModel, outcome: HfFold, folder: Path) -> None:
    """Some classes tie, or scale by whether they tie, whatever the files hold."""
    again = load_model(folder, loaded.task_type)
    with torch.no_grad():
        error = output_error(outcome.expected, again.model(**loaded.inputs))
    if not error <= outcome.bound:
        raise FoldError(
            f"{type(loaded.model).__name__} cannot be saved with {', '.join(map(repr, outcome.untied))} untied: "
            f"loaded again, its outputs differ by {error:.3g}. Export it instead (lora-fx export), or train an "
            "adapter that does not target the tied weight"
        )


def _move(folder: Path, target: Path) -> None:
    missing = [place for place in target.parents if not place.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, target)
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def _exchange_entries(folder: Path, target: Path, temporary: Path) -> None:
    """Replace what a directory holds. The directory itself stays: it is a mount, or where the user stands."""
    old = temporary / "old"
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    moves = [(entry, old / entry.name) for entry in target.iterdir() if entry != temporary]
    moves += [(entry, target / entry.name) for entry in folder.iterdir()]
    try:
        for here, there in moves:
            os.rename(here, there)
            moved.append((here, there))
    except BaseException:
        for here, there in reversed(moved):
            os.rename(there, here)
        raise
