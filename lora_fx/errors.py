"""Every error that leaves this package.

    LoraFxError
    ├── ConfigError    a LoraConfig, or a file that holds one, says something that cannot be meant
    ├── TargetError    a pattern matched nothing, or something that cannot be adapted
    ├── GraphError     a model cannot be traced, or a graph is not of a form we can edit
    ├── AdapterError   adapter files and the graph do not fit each other
    ├── FoldError      folding would give a wrong, lossy-without-saying-so or non-finite weight
    └── ExportError    an ONNX file cannot be written, read, run or trusted

Each message states the fact, its context and the call that mends it.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class LoraFxError(Exception):
    """Base class: `except LoraFxError` catches whatever lora_fx and exporters refuse."""


class ConfigError(LoraFxError, ValueError):
    """A configuration value is unknown, of the wrong type, out of range, or not supported."""


class TargetError(LoraFxError, ValueError):
    """What the configuration asks for is not in the graph, or cannot be adapted there."""


class GraphError(LoraFxError, RuntimeError):
    """The model cannot be traced, or the graph is not one that the passes can edit."""


class AdapterError(LoraFxError, ValueError):
    """Adapter name, adapter files and graph do not fit each other."""


class FoldError(LoraFxError, RuntimeError):
    """Folding, or taking it back, is not possible without giving a wrong result."""


class ExportError(LoraFxError, RuntimeError):
    """An ONNX file cannot be written, read or run as asked."""


class LoraFxWarning(UserWarning):
    """The result is right, but it is probably not what was hoped for."""


def warn(message: str) -> None:
    """Warn at the line of the user's own code that called in, however deep it was noticed.

    (`skip_file_prefixes` of `warnings.warn` does this from Python 3.12 on.)
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN_PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, LoraFxWarning, stacklevel=level)


# torch stands between a user's gm.train() and ours.
_OWN_PACKAGES = ("lora_fx", "exporters", "torch")


def closest(word: str, possibilities: Iterable[str], n: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"` for the nearest names, or an empty string."""
    names = list(dict.fromkeys(possibilities))
    near = difflib.get_close_matches(word, names, n=n, cutoff=0.5)
    if not near:  # a suffix typed alone scores low against a long path, so compare last segments too
        by_tail: dict[str, str] = {}
        for name in names:
            by_tail.setdefault(name.rpartition(".")[2], name)
        tails = difflib.get_close_matches(word.rpartition(".")[2], by_tail, n=n, cutoff=0.5)
        near = [by_tail[tail] for tail in tails]
    return _meant(near)


def closest_ending(word: str, paths: Iterable[str]) -> str:
    """As `closest`, for a word that means every path which ends with it: endings of as many components come first.

    So `q_prj` is told `q_proj`, and not the path of one of forty layers.
    """
    paths, components = list(paths), word.count(".") + 1
    endings = dict.fromkeys(".".join(path.split(".")[-components:]) for path in paths)
    near = difflib.get_close_matches(word, endings)
    return _meant(near) if near else closest(word, paths)


def _meant(near: list[str]) -> str:
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
