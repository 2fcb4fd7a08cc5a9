"""What is trained as it is beside A and B: the tensors of modules_to_save, and biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from .aliasing import overlapping_names
from .attributes import get_attribute
from .config import LoraConfig
from .errors import TargetError, closest_ending
from .graph_module import record_of
from .matching import matches_suffix
from .quantized import has_quantized
from .sites import Site

# What PEFT's wrappers for these tasks train in full, whether or not modules_to_save says so.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def saved_modules(gm: fx.GraphModule, config: LoraConfig, every_pattern_hits: bool) -> list[str]:
    """Paths of the modules that modules_to_save means: exact or dotted suffix."""
    entries, heads = config.modules_to_save or (), _TASK_HEADS.get(config.task_type or "", ())
    if not entries and not heads:
        return []
    paths = module_paths(gm)
    saved: list[str] = []
    # In a file of PEFT's, an entry means every module whose name ends with it, dotted or not.
    means = matches_suffix if every_pattern_hits else str.endswith
    for entry in (*entries, *(head for head in heads if head in paths)):
        found = [path for path in paths if means(path, entry)]
        if not found and every_pattern_hits:
            raise TargetError(
                f"modules_to_save {entry!r} names no module with parameters.{closest_ending(entry, paths)} "
                "Leave it out, or name one of the model's"
            )
        saved.extend(found)
    return saved


def module_paths(gm: fx.GraphModule) -> list[str]:
    """Names of the base's modules that hold parameters or buffers, themselves or in their parts."""
    paths: dict[str, None] = {}
    named = (*dict(gm.named_parameters(remove_duplicate=False)), *dict(gm.named_buffers()))
    adapters = _names_of_adapters(gm)
    for name in (name for name in named if name not in adapters):
        parts = name.split(".")
        if name.rpartition(".")[0] not in paths:
            paths |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return list(paths)


def saved_tensors(gm: fx.GraphModule, saved: list[str]) -> Iterator[str]:
    """Names of the parameters and buffers of these modules.

    Raises:
        TargetError: if one of them stores a weight in a few bits.
    """
    if not saved:
        return
    for path in saved:
        module: Any = get_attribute(gm, path)
        if has_quantized(module):
            raise TargetError(
                f"modules_to_save trains {path!r} in full, and a weight of it is stored in a few bits, which no "
                "optimizer can move; leave it out, and give it A and B: name it in target_modules"
            )
    adapters = _names_of_adapters(gm)
    for name in gm.state_dict():  # parameters and buffers, under each of their names
        if name not in adapters and any(name.startswith(f"{module}.") for module in saved):
            yield name


def _names_of_adapters(gm: fx.GraphModule) -> set[str]:
    """A and B of adapters that are there already, which belong to no module of the base."""
    members = (member for adapter in record_of(gm).adapters.values() for member in adapter.members)
    return {name for member in members for name in member.attributes}


def biases_of(gm: fx.GraphModule, config: LoraConfig, chosen: list[Site]) -> Iterator[str]:
    """Names of the biases that `bias` trains: all of the model, or those of the sites."""
    if config.bias == "all":
        names = dict(gm.named_parameters(remove_duplicate=False))
        yield from (name for name in names if name == "bias" or name.endswith(".bias"))
    elif config.bias == "lora_only":
        yield from (site.bias for site in chosen if site.bias is not None)


def check_trained(gm: fx.GraphModule, trained: tuple[str, ...]) -> None:
    """Tied tensors are trained together or not at all."""
    if not trained:
        return
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    names = overlapping_names(parameters)
    for name in trained:
        if name not in parameters:
            continue
        twins = [n for n in names[name] if n not in trained]
        if twins:
            raise TargetError(
                f"{name} is to be trained in full, but is tied with {', '.join(twins)}, which is not. Train both, "
                "or give the module its own tensor before tracing: "
                f"model.{name} = torch.nn.Parameter(model.{name}.detach().clone())"
            )
