"""The note on the base in an adapter's file, and which values of a weight are in it; without torch."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import AdapterError

KEY = "lora_fx.base"
NOTED = 4  # values of each weight
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
UNREADABLE = f"the note on the base model ({KEY}) cannot be read"


@lru_cache(maxsize=64)
def places_of(size: int, count: int) -> NDArray[np.int64]:
    """Where up to `count` of `size` values stand, from the first to the last, evenly spread; not to be written to."""
    return np.rint(np.linspace(0, max(size - 1, 0), min(count, size))).astype(np.int64)


def encoded(values: NDArray[np.float32]) -> str:
    """Values as a note has them."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def decoded(text: str) -> NDArray[np.float32]:
    """What `encoded` made a text of.

    Raises:
        ValueError: if it did not.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4")


def read_note(note: str, where: str) -> tuple[NDArray[np.float32], str, dict[str, Any]]:
    """(NOTED values of each adapted weight, one weight after the other; the coarsest of their types; all fields).

    Raises:
        AdapterError: if the note cannot be read.
    """
    try:
        fields = json.loads(note)
        return decoded(fields["values"]), str(fields["dtype"]), dict(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{where}: {UNREADABLE}: {error}; save it again") from error


def noted_values(note: str | None, where: str) -> tuple[NDArray[np.float32], str] | None:
    """(weights, NOTED) values, and the coarsest of their types; None if there is no note that can tell.

    Raises:
        AdapterError: if the note cannot be read.
    """
    if note is None:
        return None
    values, dtype, _ = read_note(note, where)
    return None if dtype not in EPS or len(values) % NOTED else (values.reshape(-1, NOTED), dtype)


def is_noted(noted: tuple[NDArray[np.float32], str], values: NDArray[np.float32], dtype: str) -> bool:
    """Whether one of several rows of values, of a weight of that type, is among those of a note."""
    theirs, their_dtype = noted
    eps = max(EPS[dtype], EPS[their_dtype])
    apart = np.abs(values[:, None] - theirs) > eps * np.maximum(np.abs(values[:, None]), np.abs(theirs))
    return not bool(apart.any(axis=-1).all())
