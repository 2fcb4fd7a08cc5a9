"""The note, in an adapter's file, on parts of packed projections; without torch."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .adapter_files import KEY_OF_BIAS, KEYS
from .errors import AdapterError

METADATA = "lora_fx_parts"
_B = KEYS[1]


def part_wholes(described: str | None) -> set[str]:
    """Paths of the weights that a file has in parts."""
    return set() if described is None else set(parsed_parts(described))


def part_keys(described: str | None) -> set[str]:
    """The keys that a file with parts may hold beside those of whole weights."""
    if described is None:
        return set()
    paths = [whole + entry["part"] for whole, entries in parsed_parts(described).items() for entry in entries]
    return {f"{path}.{end}" for path in paths for end in (_B, KEY_OF_BIAS)}


def parsed_parts(described: str) -> dict[str, list[dict[str, Any]]]:
    """{whole weight: its parts}.

    Raises:
        AdapterError: if the description cannot be read.
    """
    try:
        found = json.loads(described)
        for entries in found.values():
            for entry in entries:
                numbers = [entry["start"], entry["stop"], entry["r"]]
                if not re.fullmatch(r"\[[^\]]+\]", entry["part"]) or not all(type(n) is int for n in numbers):
                    raise ValueError(f"{entry!r} is no part")
                if not 0 < abs(float(entry["lora_alpha"])) < math.inf or entry["r"] < 1:
                    raise ValueError(f"{entry!r} has no scaling")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"the file's metadata {METADATA!r} cannot be read: {error}; save it again") from error
    result: dict[str, list[dict[str, Any]]] = found
    return result
