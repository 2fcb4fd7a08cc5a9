"""How a compiled graph reads its tensors: all in one go, out of the dictionaries that modules keep them in.

fx writes `self.model.embed.weight` for each parameter, and each dot calls `nn.Module.__getattr__`: with adapters, that
is more calls than there are kernels. The code that runs (see `generated_code.py`) asks once instead.
Where each tensor lies is remembered with the way to it, and looked up again if a module on the way was exchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

# The attribute under which a graph module keeps its `Places`, by the names that are asked for.
PLACES = "_tensor_places"

_VARIABLE = "_tensors_of_self"
COUNTER = re.compile(r"# COUNTER: (\d+)\n")  # what fx writes before each node, and takes out again


@dataclass(frozen=True)
class Places:
    """Where tensors lie, for as long as the modules on the way are the same.

    Attributes:
        root: the dictionary of submodules that the ways start from; each copy and replica has one of its own.
        links: (a module, its dictionary of submodules, a name, what stood there).
        slots: (a module, its class, "_parameters" or "_buffers", that dictionary, a name), one for each tensor; None if
            one of them is kept in another way, as parametrized weights are.
    """

    root: dict[str, Any]
    links: tuple[tuple[dict[str, Any], dict[str, Any], str, Any], ...]
    slots: tuple[tuple[Any, type, str, dict[str, Any], str], ...] | None

    @classmethod
    def of(cls, gm: nn.Module, names: tuple[str, ...]) -> Places:
        """Walk the way to each tensor."""
        links: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any], str, Any]] = {}
        slots = []
        for name in names:
            *path, last = name.split(".")
            owner: Any = gm
            for part in path:
                attributes, children = owner.__dict__, owner._modules
                owner = children.get(part)
                links[id(children), part] = attributes, children, part, owner
                if not isinstance(owner, nn.Module):
                    return cls(gm._modules, tuple(links.values()), None)
            kind = next((each for each in ("_parameters", "_buffers") if last in owner.__dict__[each]), None)
            if kind is None or hasattr(type(owner), last) or type(owner).__getattr__ is not nn.Module.__getattr__:
                return cls(gm._modules, tuple(links.values()), None)
            slots.append((owner, type(owner), kind, owner.__dict__[kind], last))
        return cls(gm._modules, tuple(links.values()), tuple(slots))

    def values(self, gm: nn.Module) -> list[Any] | None:
        """The tensors as they are now; None if a way, or how one of them is kept, is another. Loops, not calls."""
        if self.slots is None or gm._modules is not self.root:
            return None
        try:
            for attributes, children, part, child in self.links:
                if children[part] is not child or attributes["_modules"] is not children:
                    return None
            for owner, kind_of_owner, kind, tensors, name in self.slots:
                attributes = owner.__dict__
                if name in attributes or attributes[kind] is not tensors or owner.__class__ is not kind_of_owner:
                    return None
            return [tensors[name] for _, _, _, tensors, name in self.slots]
        except KeyError:
            return None


def read(gm: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """What attribute access gives for each of the dotted names."""
    if _is_traced():
        return _by_attributes(gm, names)
    known = gm.__dict__.setdefault(PLACES, {})
    values: list[Any] | None = known[names].values(gm) if names in known else None
    if values is None:
        known[names] = Places.of(gm, names)
        values = known[names].values(gm)
    return _by_attributes(gm, names) if values is None else values


def _by_attributes(gm: nn.Module, names: tuple[str, ...]) -> list[Any]:
    values = []
    for name in names:
        value: Any = gm
        for part in name.split("."):
            value = getattr(value, part)
        values.append(value)
    return values


def _is_traced() -> bool:
    """Compilers and tracers know a module's tensors by how they are read."""
    return torch.compiler.is_compiling() or is_fx_symbolic_tracing() or torch._C._get_tracing_state() is not None


def nodes_to_bind(gm: fx.GraphModule, graph: fx.Graph) -> dict[int, str]:
    """{number of the node: name} of all tensors that are read; none if a module that is called may exchange them."""
    found = {}
    for number, node in enumerate(graph.nodes):
        if node.name == _VARIABLE:
            return {}
        if node.op == "call_module" and not type(gm.get_submodule(str(node.target))).__module__.startswith("torch."):
            return {}
        if node.op == "get_attr" and _is_tensor(gm, str(node.target)):
            found[number] = str(node.target)
    return found


def _is_tensor(gm: nn.Module, name: str) -> bool:
    owner: Any = gm
    *path, last = name.split(".")
    for part in path:
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
    return isinstance(owner, nn.Module) and (last in owner._parameters or last in owner._buffers)


def _header(nodes: dict[int, str]) -> str:
    return f"{_VARIABLE} = self._tensors_of({tuple(nodes.values())!r}); "


def with_one_read(body: list[str], nodes: dict[int, str]) -> list[str]:
    """fx's lines with these reads out of one list, by `gm._tensors_of`; as they were, if fx writes otherwise."""
    lines, number = list(body), -1
    places = {number: place for place, number in enumerate(nodes)}
    for at, line in enumerate(body):
        counted = COUNTER.fullmatch(line)
        number = int(counted[1]) if counted else number
        if counted or number not in places:
            continue
        name, is_read, _ = line.partition(" = ")
        place = places.pop(number)
        if not is_read or place != len(nodes) - len(places) - 1:
            return list(body)
        lines[at] = f"{'' if place else _header(nodes)}{name} = {_VARIABLE}[{place}]"
    return list(body) if places else lines
