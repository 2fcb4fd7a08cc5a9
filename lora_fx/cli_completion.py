"""What a shell completes for options whose values a model decides. Headers are read, torch is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer


def complete_target(context: typer.Context, incomplete: str) -> list[str]:
    """Last components of the modules in MODEL that have a matrix, and `all-linear`."""
    # Before an option that has no value yet, click leaves arguments unassigned.
    given = (context.params.get("model"), *context.args)
    model = next((Path(word) for word in given if word is not None and Path(word).is_dir()), None)
    names = {"all-linear"} if model is None else {"all-linear", *_modules_of(model)}
    return sorted(name for name in names if name.startswith(incomplete))


def _modules_of(directory: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    for shard in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 — a safe_open is no mapping
                    module, _, kind = name.rpartition(".")
                    if kind == "weight" and len(file.get_slice(name).get_shape()) == 2:
                        yield module.rpartition(".")[2]
        except (SafetensorError, OSError):  # a shell that completes says nothing of broken files
            continue
