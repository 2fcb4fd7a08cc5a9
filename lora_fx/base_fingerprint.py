"""Which base an adapter was trained over, noted in its file: base models of one architecture fit, and mean nothing.

Hashing all of a large model takes longer than loading its adapter, so a part of each adapted weight is hashed, spread
evenly over it. A base in another type of number is another hash, and the same base: some values go into the note, too,
which then have to agree within the rounding of the coarser of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .attributes import get_attribute, holds_values
from .base_note import NOTED, UNREADABLE, encoded, places_of, read_note
from .errors import AdapterError
from .graph_module import record_of
from .plan import Plan
from .sharding import whole

_HASHED = 1024  # values of each weight


def note_of_base(gm: fx.GraphModule, plan: Plan) -> str | None:
    """What `check_base` compares with; None if the weights hold no values (meta device), or others in few bits.

    An adapter that was trained over few bits is for the weights that they stand for, too.
    """
    digest, dtypes, noted = hashlib.sha256(), set[torch.dtype](), []
    for name, weight in _weights(gm, plan):
        is_plain = holds_values(weight) and not is_traceable_wrapper_subclass(weight)
        if not is_plain or not weight.is_floating_point():
            return None
        dtypes.add(weight.dtype)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_spread(weight, _HASHED).view(torch.uint8).numpy().tobytes())
        noted.append(_spread(weight, NOTED).to(torch.float32))
    values = torch.cat(noted) if noted else torch.empty(0)
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return json.dumps(
        {
            "sha256": digest.hexdigest(),
            "dtype": str(coarsest).removeprefix("torch."),
            "values": encoded(values.numpy()),
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
    b, _, ours = read_note(own, where)
    a, dtype, theirs = read_note(note, where)
    if theirs.get("sha256") == ours["sha256"]:
        return
    known = getattr(torch, dtype, None)
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise AdapterError(f"{where}: {UNREADABLE}: its dtype is {dtype!r}; save it again")
    eps = max(torch.finfo(each).eps for each in (known, getattr(torch, ours["dtype"])))
    is_rounded = dtype != ours["dtype"]
    names = [name for name, weight in _weights(gm, plan) for _ in range(min(NOTED, weight.numel()))]
    if len(a) == len(b) == len(names):
        apart = np.abs(a - b) > eps * np.maximum(np.abs(a), np.abs(b))
        if is_rounded and not apart.any():
            return
        first = int(apart.argmax())
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
            yield name, whole(weight.detach())


def _spread(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` values, from the first to the last, in the order of the shape, on the CPU."""
    places = torch.from_numpy(places_of(weight.numel(), count))
    if weight.is_contiguous():
        return weight.view(-1)[places.to(weight.device)].cpu()
    return weight[torch.unravel_index(places.to(weight.device), weight.shape)].cpu().contiguous()
