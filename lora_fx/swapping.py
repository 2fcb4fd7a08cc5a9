"""Other values for an adapter that is there: in place, so that nothing is traced, written or compiled again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from .adapter_files import KEY_OF_BIAS, KEYS, KEYS_OF_LOOKUPS, open_adapter
from .adapter_integrity import Integrity
from .adapter_tensors import (
    check_finite,
    doubled_keys,
    in_one_spelling,
    is_base_tensor,
    prefixes_of,
    read_tensors,
    targets_of,
)
from .attributes import get_attribute, get_parameter
from .base_fingerprint import check_base
from .base_note import KEY
from .config import LoraConfig
from .errors import AdapterError, closest
from .graph_module import LoraGraphModule, check_editable, checked_graph_module
from .initialization import start_of
from .injection import ADAPTER_DTYPES, Adapter, AdapterSite
from .layouts import Kernel
from .packed_files import take_apart
from .parameters import find_adapter
from .plan import scaling_at
from .sharding import MARK, check_not_sharded

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]


def swap_adapter(
    gm: fx.GraphModule,
    adapter_name: str,
    source: Source,
    *,
    mha_out_proj: Literal["twice", "once"] = "twice",
    finite: bool = False,
    integrity: Integrity = "checked",
) -> LoraGraphModule:
    """Give an injected adapter the values of another one of the same shape; `gm` itself is changed and given back.

    The parameters stay the same objects, and the graph the same code: torch.compile and optimizers go on with them.

    Args:
        gm: an injected graph.
        adapter_name: which of its adapters; it need not count at the moment.
        source: an adapter directory, PEFT's or ours, or {key of PEFT's file: tensor}, such as
            `peft.get_peft_model_state_dict` gives. A directory says how A and B are scaled: where that differs from the
            graph, B is multiplied with the quotient. A mapping is scaled as the graph is.
        mha_out_proj: see `load_adapter`.
        finite: the caller knows that a mapping holds no NaN and no Inf, so that they are not looked for; that is a
            third of the time. A directory is always looked through.
        integrity: of a directory, see `load_adapter`.

    Raises:
        AdapterError: if there is no such adapter, or any tensor is missing, unexpected, of another shape, or not
            finite; nothing is changed then.
        ConfigError: if the directory's configuration cannot be followed.
        GraphError: if the graph is folded in place.
    """
    gm = checked_graph_module(gm)
    check_editable(gm)
    adapter = find_adapter(gm, adapter_name)
    assert isinstance(gm, LoraGraphModule)
    if mha_out_proj not in ("twice", "once"):
        raise AdapterError(f"mha_out_proj={mha_out_proj!r} must be 'twice' or 'once'")
    config = None
    if isinstance(source, Mapping) and _swap_known(gm, adapter, source, finite=finite):
        return gm
    check_not_sharded(gm, "other values cannot be copied into it")
    if isinstance(source, Mapping):
        where = "the mapping"
        for key, tensor in source.items():
            if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
                raise AdapterError(f"{where} holds {key!r}: {type(tensor).__name__}; it must map keys to tensors")
        tensors = in_one_spelling(source, where)
        if not finite:
            check_finite(tensors, where)
    else:
        files = open_adapter(source, adapter_name, integrity)
        where, config = repr(str(files.folder)), files.config
        _check_config(adapter, config, where)
        if KEY in files.metadata and integrity != "ignored":
            check_base(gm, adapter.plan, files.metadata[KEY], where)
        tensors = read_tensors(files)
    _bring_into_form(gm, adapter, tensors, config, where)
    targets = targets_of(gm, adapter)
    starts = _starts(gm, adapter, tensors, config)
    _check_names(gm, tensors, targets, where)
    _check_shapes(tensors, targets, where)
    if mha_out_proj == "twice":
        tensors |= {key: tensors[key] * 2 for key in doubled_keys(adapter.plan)}
    pairs = [(target, tensors[key]) for key, target in targets.items()] + starts
    with torch.no_grad():
        torch._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])
    if isinstance(source, Mapping):
        _remember(gm, adapter, source, pairs)
    return gm


@dataclass(frozen=True)
class _Known:
    """Keys of a mapping whose tensors went into the graph as they are, and where to; so that next time no key is read.

    Attributes:
        steps: (number of a module, name of its child): the ways to all modules that hold parameters, each module once.
            The graph module is number 0, and each step gives the next number.
        places: {key: number of the module that holds the parameter, and the parameter's name there}.
        shapes: of the parameters.
    """

    steps: list[tuple[int, str]]
    places: dict[str, tuple[int, str]]
    shapes: list[torch.Size]

    @classmethod
    def of(cls, names: dict[str, str], shapes: list[torch.Size]) -> _Known:
        """Of parameters by their dotted names."""
        numbers: dict[tuple[str, ...], int] = {(): 0}
        steps: list[tuple[int, str]] = []
        places: dict[str, tuple[int, str]] = {}
        for key, name in names.items():
            *path, last = name.split(".")
            for end in range(1, len(path) + 1):
                if tuple(path[:end]) not in numbers:
                    steps.append((numbers[tuple(path[: end - 1])], path[end - 1]))
                    numbers[tuple(path[:end])] = len(steps)
            places[key] = numbers[tuple(path)], last
        return cls(steps, places, shapes)

    def parameters(self, gm: fx.GraphModule) -> list[torch.Tensor] | None:
        """Those of `gm`, in the order of `places`; None if one of them is spread over processes."""
        modules: list[Any] = [gm]
        for number, name in self.steps:
            modules.append(modules[number]._modules[name])
        targets = [modules[number]._parameters[name] for number, name in self.places.values()]
        is_spread = any(MARK in module.__dict__ for module in modules)
        return None if is_spread or {type(target) for target in targets} != {nn.Parameter} else targets


_KNOWN: WeakKeyDictionary[Adapter, _Known] = WeakKeyDictionary()


def _remember(
    gm: fx.GraphModule,
    adapter: Adapter,
    source: Mapping[str, torch.Tensor],
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Keep where each key went, if every tensor went as it was into a parameter of the adapter's own."""
    target_of = {id(value): target for target, value in pairs}
    names = {id(p): name for name, p in gm.named_parameters() if "lora_" in name}
    if len(target_of) != len(source) or not all(id(tensor) in target_of for tensor in source.values()):
        return
    targets = {key: target_of[id(tensor)] for key, tensor in source.items()}
    if all(id(target) in names for target in targets.values()):
        shapes = [target.shape for target in targets.values()]
        _KNOWN[adapter] = _Known.of({key: names[id(target)] for key, target in targets.items()}, shapes)


def _swap_known(gm: fx.GraphModule, adapter: Adapter, source: Mapping[str, torch.Tensor], *, finite: bool) -> bool:
    """Swap a mapping whose keys are remembered and whose tensors fit; False, and nothing done, for any other."""
    known = _KNOWN.get(adapter)
    if known is None or known.places.keys() != source.keys():
        return False
    values = [source[key] for key in known.places]
    if not all(isinstance(value, torch.Tensor) for value in values) or [v.shape for v in values] != known.shapes:
        return False
    if not {value.dtype for value in values} <= set(ADAPTER_DTYPES):
        return False
    targets = known.parameters(gm)
    if targets is None:
        return False
    if not finite:
        check_finite(source, "the mapping")
    with torch.no_grad():
        torch._foreach_copy_(targets, values)
    return True


def _check_config(adapter: Adapter, config: LoraConfig, where: str) -> None:
    """What is not told by the tensors must be as in the graph."""
    mine, theirs = start_of(adapter.config), start_of(config)
    changes = theirs is not None and theirs.changes_base
    if changes and (mine != theirs or (theirs is not None and theirs.calibration is not None)):
        raise AdapterError(
            f"{where} was started by init_lora_weights={config.init_lora_weights!r}, which took something out of the "
            f"base, and adapter {adapter.name!r} was not; load it as an adapter of its own"
        )
    if config.trainable_token_indices != adapter.config.trainable_token_indices:
        raise AdapterError(
            f"{where} trains the rows {config.trainable_token_indices!r} of embeddings, and adapter {adapter.name!r} "
            f"{adapter.config.trainable_token_indices!r}; load it as an adapter of its own"
        )


def _bring_into_form(
    gm: fx.GraphModule, adapter: Adapter, tensors: dict[str, torch.Tensor], config: LoraConfig | None, where: str
) -> None:
    """Tensors of a file as the graph has them: parts, kernels of groups, tied sites once, the graph's scaling."""
    factors = {site.path: 2 if site.start_a is not None else 1 for site in adapter.sites.values()}
    take_apart(adapter.plan, tensors, {t.site.path: factors[t.site.path] * t.r for t in adapter.plan.targets})
    prefixes = prefixes_of(gm, adapter.plan)
    for target in adapter.plan.targets:
        if adapter.sites[target.site.path].is_turned:
            _take_turned(adapter, adapter.sites[target.site.path], target.shares_with, prefixes, tensors, where)
    for target in adapter.plan.targets:
        site = adapter.sites[target.site.path]
        a, b = (prefixes[site.path] + key for key in (KEYS_OF_LOOKUPS if site.is_lookup else KEYS))
        layout = site.layout
        if isinstance(layout, Kernel) and layout.groups > 1 and not layout.mixes_groups and a in tensors:
            tensors[a] = _grouped(layout, tensors[a], a, where)
        if config is None:
            continue
        # A file scales the parts of a weight as one, by the scaling of the first.
        whole = replace(target.site, path=target.site.whole_path, part="")
        first = next(t for t in adapter.plan.targets if t.site.whole_path == whole.path)
        ratio = scaling_at(whole, config) / first.scaling
        for key in (b, prefixes[site.path] + KEY_OF_BIAS):
            if key in tensors and ratio != 1:
                tensors[key] = tensors[key] * ratio


def _grouped(layout: Kernel, a: torch.Tensor, key: str, where: str) -> torch.Tensor:
    if a.shape[1:] != (layout.in_features, *layout.extent):
        return a  # its shape is refused like any other
    found = layout.grouped(a)
    if found is None:
        raise AdapterError(
            f"{where}: {key!r} mixes the {layout.groups} groups of its convolution, and the graph keeps them apart; "
            "load it as an adapter of its own"
        )
    return found


def _take_turned(
    adapter: Adapter,
    site: AdapterSite,
    owner_path: str | None,
    prefixes: dict[str, str],
    tensors: dict[str, torch.Tensor],
    where: str,
) -> None:
    """A tied site has the tensors of its owner: what the file says of it must be the same."""
    assert owner_path is not None
    owner = adapter.sites[owner_path]
    own = [prefixes[site.path] + key for key in (KEYS_OF_LOOKUPS if site.is_lookup else KEYS)]
    theirs = [prefixes[owner.path] + key for key in (KEYS_OF_LOOKUPS if owner.is_lookup else KEYS)]
    if all(key not in tensors for key in own) or any(key not in tensors for key in theirs):
        return
    turned = owner.layout.turn(*(tensors[key] for key in theirs))
    held = [tensors.pop(key, None) for key in own]
    if not all(value is not None and torch.equal(value, other) for value, other in zip(held, turned, strict=True)):
        raise AdapterError(
            f"{where} holds different adapters for {site.path!r} and {owner.path!r}, which share one here; "
            "load it as an adapter of its own"
        )


def _starts(
    gm: fx.GraphModule, adapter: Adapter, tensors: dict[str, torch.Tensor], config: LoraConfig | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(buffer, value) of what is taken off again, which a plain adapter of twice the rank says."""
    prefixes = prefixes_of(gm, adapter.plan)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for site in adapter.sites.values():
        if site.start_a is None or site.start_b is None or site.is_turned:
            continue
        keys = [prefixes[site.path] + key for key in (KEYS_OF_LOOKUPS if site.is_lookup else KEYS)]
        r = len(get_parameter(gm, site.lora_a))
        a, b = (tensors.get(key) for key in keys)
        if a is None or b is None or len(a) != 2 * r or b.shape[1] != 2 * r:
            continue
        tensors[keys[0]], tensors[keys[1]] = a[:r], b[:, :r]
        for name, value in ((site.start_a, a[r:]), (site.start_b, -b[:, r:])):
            buffer = get_attribute(gm, name)
            assert isinstance(buffer, torch.Tensor)
            found.append((buffer, value))
    return found


def _check_names(
    gm: fx.GraphModule, tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], where: str
) -> None:
    missing = [key for key in targets if key not in tensors]
    unexpected = [key for key in tensors if key not in targets and not is_base_tensor(gm, key, tensors[key])]
    for keys, others, word in ((missing, unexpected, "lacks"), (unexpected, missing, "holds, beside the adapter's,")):
        if keys:
            raise AdapterError(
                f"{where} {word} {keys[0]!r} ({len(keys)} of {len(targets)} tensors in all).{closest(keys[0], others)} "
                "Is it an adapter of the same sites? load_adapter takes one of others"
            )


def _check_shapes(tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], where: str) -> None:
    for key, target in targets.items():
        if tensors[key].shape != target.shape:
            raise AdapterError(
                f"{where}: {key!r} has the shape {tuple(tensors[key].shape)}, and the adapter here "
                f"{tuple(target.shape)}; only values of the same rank can be swapped, load_adapter takes others"
            )
