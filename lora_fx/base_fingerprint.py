"""Which base an adapter was trained over, noted in its file: base models of one architecture fit, and mean nothing.

Hashing all of a large model takes longer than loading its adapter, so a part of each adapted weight is hashed, spread
evenly over it. A base in another type of number is another hash, and the same base: some values go into the note, too,
which then have to agree within the rounding of the coarser of the two.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator

import torch
from torch import fx

from .attributes import get_attribute
from .errors import AdapterError
from .graph_module import record_of
from .plan import Plan

KEY = "lora_fx.base"
_HASHED, _NOTED = 1024, 4  # values of each weight


def note_of_base(gm: fx.GraphModule, plan: Plan) -> str | None:
    """What `check_base` compares with; None if the weights hold no values (meta device)."""
    digest, dtypes, noted = hashlib.sha256(), set[torch.dtype](), []
    for name, weight in _weights(gm, plan):
        if weight.is_meta or not weight.is_floating_point():
            return None
        dtypes.add(weight.dtype)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_spread(weight, _HASHED).view(torch.uint8).numpy().tobytes())
        noted.append(_spread(weight, _NOTED).to(torch.float32))
    values = torch.cat(noted).numpy().astype("<f4").tobytes() if noted else b""
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return json.dumps(
        {
            "sha256": digest.hexdigest(),
            "dtype": str(coarsest).removeprefix("torch."),
            "values": base64.b64encode(values).decode(),
        }
    )


def check_base(gm: fx.GraphModule, plan: Plan, note: str, where: str) -> None:
    """Whether the graph's base is the one of the note.

    Raises:
        AdapterError: if it is another, or the note cannot be read.
    """
    own = note_of_base(gm, plan)
    if own is None:
        return
    try:
        theirs, ours = json.loads(note), json.loads(own)
        if theirs["sha256"] == ours["sha256"]:
            return
        a, b = (_values(fields["values"]) for fields in (theirs, ours))
        eps = max(torch.finfo(getattr(torch, fields["dtype"])).eps for fields in (theirs, ours))
        is_rounded = theirs["dtype"] != ours["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{where}: the note on the base model ({KEY}) cannot be read: {error}; save it again") from (
            error
        )
    names = [name for name, weight in _weights(gm, plan) for _ in range(min(_NOTED, weight.numel()))]
    if len(a) == len(b) == len(names):
        apart = (a - b).abs() > eps * torch.maximum(a.abs(), b.abs())
        if is_rounded and not bool(apart.any()):
            return
        first = int(apart.int().argmax()) if bool(apart.any()) else 0
        which = f"{names[first]!r} is another, for one"
    else:
        which = "other weights are adapted"
    raise AdapterError(
        f"{where} was saved over a base model with other weights ({which}); load that base. If this one is meant, "
        "integrity='ignored' loads the adapter all the same"
    )


def _weights(gm: fx.GraphModule, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapted weights, each once, as the base has them."""
    originals = record_of(gm).originals
    for name in sorted({target.site.weight for target in plan.targets}):
        weight = originals.get(name, get_attribute(gm, name))
        if isinstance(weight, torch.Tensor):
            yield name, weight.detach()


def _spread(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` values, from the first to the last, in the order of the shape, on the CPU."""
    size = weight.numel()
    places = torch.linspace(0, max(size - 1, 0), min(count, size), dtype=torch.float64).round().long()
    return weight[torch.unravel_index(places.to(weight.device), weight.shape)].cpu().contiguous()


def _values(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
