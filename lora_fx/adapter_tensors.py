"""The tensors of an adapter by the keys of PEFT's file, and in the form that they have there."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load
from torch import fx

from .adapter_files import (
    KEY_OF_BIAS,
    KEY_OF_MAGNITUDE,
    KEYS,
    KEYS_OF_LOOKUPS,
    AdapterFiles,
    TensorKey,
    is_left_behind,
    parse_key,
)
from .attributes import get_attribute, get_parameter
from .config import LoraConfig
from .dora import magnitude_shape
from .errors import AdapterError
from .injection import ADAPTER_DTYPES, Adapter
from .layouts import Kernel, Part, without_start
from .packed_files import Stacked, stack
from .parameters import trained_tensor
from .plan import Plan, PlannedSite
from .sharding import whole
from .sites import Site


def targets_of(gm: fx.GraphModule, adapter: Adapter) -> dict[str, torch.Tensor]:
    """{normalised key: the tensor of the graph that it goes to}."""
    return {_spelling(name, ""): tensor for name, tensor in named_tensors(gm, adapter)}


def named_tensors(gm: fx.GraphModule, adapter: Adapter) -> Iterable[tuple[str, torch.Tensor]]:
    """(key, tensor of the graph) of all that the adapter trains; parts of weights under paths of their own."""
    prefixes = prefixes_of(gm, adapter.plan)
    for member in adapter.members:
        for key, attribute in member.tensors.items():
            yield prefixes[member.path] + key, get_parameter(gm, attribute)
    wrapped = {site.applied for site in adapter.sites.values()}
    for name in adapter.saved:
        path, _, last = name.rpartition(".")
        # PEFT keeps an adapted module's own parameters in its base_layer.
        yield f"{path}.base_layer.{last}" if path in wrapped else name, trained_tensor(gm, name)


def prefixes_of(gm: fx.GraphModule, plan: Plan) -> dict[str, str]:
    """{site: what its keys start with}. PEFT nests what it wraps more than once in `base_layer`s.

    Of several parameters of one module that target_parameters means, the first registered is the innermost. The output
    projection of nn.MultiheadAttention lies inside the wrapper of the packed one.
    """
    paths = [*(target.site.path for target in plan.targets), *(rows.site.path for rows in plan.tokens)]
    prefixes = {path: f"{path}." if path else "" for path in paths}
    wrapped: dict[str, list[Site]] = {}
    for site in (target.site for target in plan.targets if target.by_parameter):
        wrapped.setdefault(site.weight.rpartition(".")[0], []).append(site)
    if wrapped:
        order = {name: i for i, (name, _) in enumerate(gm.named_parameters(remove_duplicate=False))}
    for module, sites in wrapped.items():
        if module:  # PEFT cannot adapt parameters of the root: those keep our own form
            sites.sort(key=lambda site: -order.get(site.weight, 0))
            prefixes |= {site.path: f"{module}." + "base_layer." * depth for depth, site in enumerate(sites)}
    for attention in _whole_attentions(plan):
        prefixes[f"{attention}.in_proj_weight".lstrip(".")] = f"{attention}.".lstrip(".")
        prefixes[f"{attention}.out_proj".lstrip(".")] = f"{attention}.base_layer.out_proj.".lstrip(".")
    return prefixes


def _whole_attentions(plan: Plan) -> list[str]:
    """The nn.MultiheadAttention modules that are adapted as PEFT adapts them: both projections."""
    sites = [t.site for t in plan.targets if t.site.attention is not None and not t.by_parameter and not t.site.part]
    packed = {site.attention for site in sites if site.weight.endswith("in_proj_weight")}
    return sorted({str(site.attention) for site in sites if site.path.endswith("out_proj")} & packed)


def doubled_keys(plan: Plan) -> set[str]:
    """The keys of B that PEFT counts twice: output projections of nn.MultiheadAttention (peft#3774)."""
    return {f"{attention}.base_layer.out_proj.lora_B.weight".lstrip(".") for attention in _whole_attentions(plan)}


def shapes_of(target: PlannedSite, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """{end of a key: the tensor's shape} of one site."""
    layout = target.site.layout
    a, b = KEYS_OF_LOOKUPS if target.site.is_lookup else KEYS
    a_shape = layout.dense_shape(target.r) if isinstance(layout, Kernel) else layout.a_shape(target.r)
    shapes = {a: a_shape, b: layout.b_shape(target.r)}
    if config.lora_bias:
        shapes[KEY_OF_BIAS] = (layout.out_features,)
    if config.use_dora:
        shapes[KEY_OF_MAGNITUDE] = magnitude_shape(layout)
    return shapes


def normalised(key: TensorKey) -> str:
    """One spelling for keys with and without PEFT's prefix, adapter name and base_layer."""
    if key.end is None:
        return key.path
    return f"{key.path}.{key.end}".lstrip(".")


def stacked_tensors(gm: fx.GraphModule, adapter: Adapter, *, shares: bool = False) -> Stacked:
    """The tensors as PEFT has them, contiguous, on the CPU; unless it `shares`, none has another's memory."""
    doubled = doubled_keys(adapter.plan)
    named = {key: whole(tensor.detach()) for key, tensor in named_tensors(gm, adapter)}
    named |= _without_starts(gm, adapter) | _dense_kernels(gm, adapter)
    named |= _turned_copies(gm, adapter, named)
    tensors = {name: target.detach().cpu().contiguous() for name, target in named.items()}
    tensors |= {name: tensors[name] * 0.5 for name in tensors.keys() & doubled}
    if not shares:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    norms: dict[str, torch.Tensor] = {}
    for site in adapter.sites.values() if adapter.config.use_dora else ():
        if not isinstance(site.layout, Part):
            continue
        weight = whole(get_parameter(gm, site.weight).detach()).cpu()
        norms[site.applied] = torch.linalg.vector_norm(weight.float(), dim=int(not site.layout.stored_in_out))
    return stack(adapter.plan, tensors, norms)


def _without_starts(gm: fx.GraphModule, adapter: Adapter) -> dict[str, torch.Tensor]:
    """A and B of sites that take something off again, as the plain adapter of twice the rank that they are."""
    found: dict[str, torch.Tensor] = {}
    prefixes = prefixes_of(gm, adapter.plan)
    for site in adapter.sites.values():
        if site.start_a is None or site.start_b is None:
            continue
        names = (site.lora_a, site.lora_b, site.start_a, site.start_b)
        values = [whole(get_attribute(gm, name).detach()) for name in names]
        keys = KEYS_OF_LOOKUPS if site.is_lookup else KEYS
        found |= {prefixes[site.path] + key: whole for key, whole in zip(keys, without_start(*values), strict=True)}
    return found


def _turned_copies(gm: fx.GraphModule, adapter: Adapter, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A and B of tied sites that take those of another site turned, as PEFT's ensure_weight_tying writes them."""
    prefixes = prefixes_of(gm, adapter.plan)
    found: dict[str, torch.Tensor] = {}
    for target in adapter.plan.targets:
        if target.shares_with is None or not adapter.sites[target.site.path].is_turned:
            continue
        owner = adapter.sites[target.shares_with]
        a, b = (named[prefixes[owner.path] + key].detach() for key in (KEYS_OF_LOOKUPS if owner.is_lookup else KEYS))
        keys = KEYS_OF_LOOKUPS if target.site.is_lookup else KEYS
        turned = owner.layout.turn(a, b)
        found |= {prefixes[target.site.path] + key: value for key, value in zip(keys, turned, strict=True)}
    return found


def _dense_kernels(gm: fx.GraphModule, adapter: Adapter) -> dict[str, torch.Tensor]:
    """A of convolutions with groups, with the zeros between the groups that PEFT expects."""
    prefixes = prefixes_of(gm, adapter.plan)
    return {
        f"{prefixes[site.path]}{KEYS[0]}": site.layout.dense(whole(get_parameter(gm, site.lora_a).detach()))
        for site in adapter.sites.values()
        if isinstance(site.layout, Kernel) and site.layout.groups > 1
    }


def read_tensors(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """{key in one spelling: tensor} of a file.

    Raises:
        AdapterError: if a tensor is not finite, of a type that no adapter has, or there twice.
    """
    tensors = load(bytes(files.weights))  # which are bytes already, and are not copied
    if not tensors:
        raise AdapterError(f"{files.where} holds no tensor; save the adapter again")
    found = in_one_spelling(tensors, files.where)
    check_finite(found, files.where)
    return found


def in_one_spelling(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Tensors by keys without PEFT's prefix, adapter names and base_layer.

    Raises:
        AdapterError: if two keys mean one tensor and differ, or a tensor is of a type that no adapter has.
    """
    found: dict[str, torch.Tensor] = {}
    spelled: dict[str, str] = {}
    for key, tensor in tensors.items():
        if is_left_behind(key):
            continue
        name = _spelling(key, where)
        if ".lora_" in key and tensor.dtype not in ADAPTER_DTYPES:
            raise AdapterError(
                f"{where}: {key!r} is {tensor.dtype}; adapters are float32, float16 or bfloat16; save it so"
            )
        if name in found and not torch.equal(found[name], tensor):
            raise AdapterError(f"{where}: {spelled[name]!r} and {key!r} mean the same tensor; keep one of them")
        found[name], spelled[name] = tensor, key
    return found


@functools.lru_cache(maxsize=1 << 14)
def _spelling(key: str, where: str) -> str:
    return normalised(parse_key(key, where))


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise AdapterError if any of them holds NaN or Inf."""
    values = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.numel()]
    if not values:
        return
    # Finite norms have finite elements; one that overflows is looked at once more, element by element.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(values, 2)])
    if bool(torch.isfinite(norms).all()):
        return
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{where}: {key!r} holds NaN or Inf; train it again, or take an earlier one")


def is_base_tensor(gm: fx.GraphModule, key: str, tensor: torch.Tensor) -> bool:
    """Whether a file's tensor is the base's own, and so says nothing."""
    own = get_attribute(gm, key)
    return (
        isinstance(own, torch.Tensor) and own.shape == tensor.shape and torch.equal(own.cpu().to(tensor.dtype), tensor)
    )
