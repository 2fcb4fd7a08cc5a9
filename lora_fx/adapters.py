"""Save adapters to PEFT's files and load them, both ways and strictly."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import fx

from .adapter_files import (
    CONFIG_FILE,
    KEY_OF_ROWS,
    KEYS,
    PREFIX,
    TURNED,
    WEIGHTS_FILE,
    checked_path,
    config_text,
    open_adapter,
)
from .adapter_integrity import BLANK_SEAL, OURS, WRITER, Integrity, sealed
from .adapter_tensors import (
    doubled_keys,
    is_base_tensor,
    named_tensors,
    prefixes_of,
    read_tensors,
    shapes_of,
    stacked_tensors,
    targets_of,
)
from .atomic import replace_in_directory
from .attributes import get_attribute, holds_values, why_no_values
from .base_fingerprint import check_base, note_of_base
from .base_note import KEY
from .config import LoraConfig
from .errors import AdapterError, ConfigError, closest, warn
from .full_training import module_paths
from .graph_module import LoraGraphModule, check_editable, checked_graph_module, record_of
from .initialization import start_of
from .injection import Adapter, NewAdapter, batches_seen, check_adapter_name, inject_new
from .layouts import Kernel
from .matching import matches_names, matches_suffix
from .packed_files import Stacked, unstack, without_parts
from .packed_notes import METADATA, part_keys, part_wholes
from .parameters import find_adapter
from .plan import Plan, PlannedSite, plan_adapters
from .sharding import on_first_process, settle
from .sites import find_sites
from .tables import some_of

_HALVES = (torch.float16, torch.bfloat16)


def save_adapter(gm: fx.GraphModule, directory: str | os.PathLike[str], *, adapter_name: str = "default") -> None:
    """Write one adapter as PEFT's adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(model, directory)` loads it, and computes what the graph computes.

    Where parameters are spread over processes (`fully_shard`), all of them call this: each gathers one tensor after the
    other, the first writes, and if it cannot, all of them raise.

    Args:
        gm: an injected graph.
        directory: made if it is not there. Both files are replaced in one step, and sealed: hashes of them, and a note
            on the base's weights, stand in the metadata, and are verified when they are read.

    Batch norms of the base that were trained in train mode have other statistics than the base that the files will be
    loaded on, which a warning tells.

    Raises:
        AdapterError: if there is no such adapter, a value is NaN or Inf, or the directory cannot be written.
    """
    gm = checked_graph_module(gm)
    settle(gm)
    if record_of(gm).batched is not None:
        check_editable(gm)
    adapter = find_adapter(gm, adapter_name)
    for name, tensor in named_tensors(gm, adapter):
        if not holds_values(tensor):
            raise AdapterError(f"{name!r} {why_no_values(tensor)} to save; load the weights first: bind_weights")
    stacked = stacked_tensors(gm, adapter)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in stacked.tensors.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key!r} of adapter {adapter_name!r} holds NaN or Inf and is not saved; train it anew")
    path = checked_path(directory)
    _warn_of_statistics(gm, adapter)
    changes = (
        _exact_targets(gm, adapter) | _exact_modules(gm, adapter) | _as_plain(adapter) | _patterns(adapter, stacked)
    )
    config = config_text(adapter.config, **changes).encode("utf-8")
    base = note_of_base(gm, adapter.plan)
    metadata = {"format": "pt", WRITER: OURS} | stacked.metadata | BLANK_SEAL | ({} if base is None else {KEY: base})
    metadata |= _turned(adapter)

    def write() -> None:
        weights = sealed(save(tensors, metadata=metadata), config)
        try:
            replace_in_directory(path, {WEIGHTS_FILE: weights, CONFIG_FILE: config})
        except OSError as error:
            raise AdapterError(f"the adapter cannot be written to {str(path)!r}: {error}") from error

    on_first_process(gm, write)


def _warn_of_statistics(gm: fx.GraphModule, adapter: Adapter) -> None:
    """A base that training has moved is not the base that the files will meet."""
    counts = {name: count for name, count in batches_seen(gm).items() if name not in adapter.trained}
    moved = [name.rpartition(".")[0] for name, count in counts.items() if adapter.batches.get(name, count) != count]
    if moved:
        warn(
            f"training has moved the statistics of {some_of(moved)}, which are the base's and not in the adapter's "
            "files: over another copy of the base it computes something else. Name batch norms in modules_to_save, or "
            "trace the model with them in eval()"
        )


def load_adapter(
    gm: fx.GraphModule,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    mha_out_proj: Literal["twice", "once"] = "twice",
    integrity: Integrity = "checked",
) -> LoraGraphModule:
    """A new graph module with the adapter of `directory` injected; `gm` is untouched.

    Args:
        gm: a graph module of the base model, with or without other adapters.
        directory: what PEFT's `save_pretrained` or `save_adapter` wrote; a PEFT directory of several
            adapters is searched for the sub-directory `adapter_name`.
        adapter_name: the name it gets here.
        mha_out_proj: how the adapter of an nn.MultiheadAttention's output projection is meant. PEFT 0.21 applies it
            twice (peft#3774), and so did the training of what it saved: "twice" computes what PEFT computes, and warns;
            "once" takes the file at its word.
        adapter_dtype: of A and B; None keeps the file's on a 16-bit base and takes at least the base's else.
        integrity: "checked" verifies what the file notes of its bytes, its configuration and its base, if it does;
            "required" refuses files without such notes, as PEFT's are; "ignored" does not look.

    Raises:
        AdapterError: if files are missing or broken, not those that were saved together, of another base model, or
            any tensor is missing, unexpected, of another shape, or not finite.
        ConfigError, TargetError: if the configuration cannot be followed in this graph.
    """
    gm = checked_graph_module(gm)
    check_adapter_name(adapter_name)
    files = open_adapter(directory, adapter_name, integrity)
    folder, config, metadata = files.folder, files.config, files.metadata
    _check_start(config, folder)
    if mha_out_proj not in ("twice", "once"):
        raise AdapterError(f"mha_out_proj={mha_out_proj!r} must be 'twice' or 'once'")
    tensors = read_tensors(files)
    described = metadata.get(METADATA)
    own = {key: tensors.pop(key) for key in part_keys(described) if key in tensors}
    plan, tensors = _in_groups(gm, _plan_for(gm, config, tensors, part_wholes(described)), tensors)
    plan, tensors = unstack(plan, tensors, described, own)
    if KEY in metadata and integrity != "ignored":
        check_base(gm, plan, metadata[KEY], repr(str(folder)))
    dtype = adapter_dtype or _dtype_for(plan, tensors)
    result = inject_new(gm, NewAdapter(adapter_name, plan, dtype, draws=False))
    adapter = record_of(result).adapters[adapter_name]
    doubled = doubled_keys(plan) if mha_out_proj == "twice" else set()
    if doubled and metadata.get(WRITER) != OURS:
        warn(
            f"PEFT applies {min(doubled)!r} twice (peft#3774), so its adapter is read doubled, which computes what "
            "PEFT computes; load_adapter(..., mha_out_proj='once') takes the file at its word"
        )
    with torch.no_grad():
        for key, target in targets_of(result, adapter).items():
            target.copy_(tensors[key] * (2 if key in doubled else 1))
    return result


def _check_start(config: LoraConfig, folder: Path) -> None:
    """What an adapter takes out of the base must be computable from the base alone."""
    start = start_of(config)
    if start is not None and str(config.init_lora_weights).startswith("pissa_niter"):
        raise ConfigError(
            f"{str(folder / CONFIG_FILE)!r}: init_lora_weights={config.init_lora_weights!r} drew the start of A and B "
            "at random, and PEFT took it out of the base; nobody can draw it again. Save the adapter as plain LoRA: "
            "model.save_pretrained(directory, path_initial_model_for_weight_conversion=...). lora_fx.save_adapter "
            "always does"
        )
    if start is not None and start.changes_base and start.calibration is not None:
        raise ConfigError(
            f"{str(folder / CONFIG_FILE)!r}: the adapter was started by init_lora_weights={start.name!r}, from data "
            "that is not in its file, and PEFT took the start out of the base; save it as plain LoRA: "
            "model.save_pretrained(directory, path_initial_model_for_weight_conversion=...). lora_fx.save_adapter "
            "always does"
        )


def _turned(adapter: Adapter) -> dict[str, str]:
    """The note on weights that lie the other way round, for those who have the base's files and no graph."""
    names = set[str]()
    for target in adapter.plan.targets:
        layout = target.site.layout.whole
        is_turned = layout.is_transposed if isinstance(layout, Kernel) else layout.stored_in_out
        if is_turned and not target.site.is_lookup:
            names |= {target.site.weight, f"{target.site.whole_path}.weight"}
    return {TURNED: json.dumps(sorted(names))} if names else {}


def _patterns(adapter: Adapter, stacked: Stacked) -> dict[str, object]:
    """rank_pattern and alpha_pattern of whole weights; those that parts were stacked to come first, and so count."""
    if not stacked.metadata:
        return {}
    config = replace(adapter.config, **_as_plain(adapter))
    kept = without_parts(config, adapter.plan)
    return {
        "rank_pattern": stacked.rank_pattern | kept["rank_pattern"],
        "alpha_pattern": stacked.alpha_pattern | kept["alpha_pattern"],
    }


def _in_groups(
    gm: fx.GraphModule, plan: Plan, tensors: dict[str, torch.Tensor]
) -> tuple[Plan, dict[str, torch.Tensor]]:
    """PEFT's A of convolutions with groups as ours has it; where it mixes the groups, the plan says so."""
    prefixes, targets, tensors = prefixes_of(gm, plan), [], dict(tensors)
    for target in plan.targets:
        layout, key = target.site.layout, f"{prefixes[target.site.path]}{KEYS[0]}"
        if isinstance(layout, Kernel) and layout.groups > 1 and not layout.is_transposed:
            grouped = layout.grouped(tensors[key])
            if grouped is not None:
                tensors[key] = grouped
            elif plan.config.use_dora:
                raise AdapterError(
                    f"{key!r} mixes the groups of a convolution, whose kernel keeps them apart, and use_dora needs the "
                    "norms of the kernel; PEFT 0.21 divides by those of another matrix. The file means no weight"
                )
            else:
                target = replace(target, site=replace(target.site, layout=replace(layout, mixes_groups=True)))
        targets.append(target)
    return replace(plan, targets=tuple(targets)), tensors


def _as_plain(adapter: Adapter) -> dict[str, Any]:
    """What changes in the configuration of an adapter that is saved without its start: twice the rank, same scaling."""
    config = adapter.config
    start = start_of(config)
    if start is None or not start.changes_base or start.name == "loftq":
        return {}
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "init_lora_weights": True,
        "r": 2 * config.r,
        "lora_alpha": factor * config.lora_alpha,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        str(start.field or "corda_config"): None,
    }


def _exact_targets(gm: fx.GraphModule, adapter: Adapter) -> dict[str, object]:
    """target_modules that mean the same sites to PEFT, which reads "all-linear" and `None` its own way."""
    config = adapter.config
    sites = [target.site for target in adapter.plan.targets]
    if isinstance(config.target_modules, tuple) and not any(site.aliases or site.part for site in sites):
        return {}
    paths = list(dict.fromkeys(site.whole_path for site in sites))
    others = {site.path for site in find_sites(gm)} - set(paths)
    if any(matches_names(other, paths) for other in others):
        return {"target_modules": "|".join(re.escape(path) for path in paths)}
    return {"target_modules": sorted(paths), "exclude_modules": None}


def _exact_modules(gm: fx.GraphModule, adapter: Adapter) -> dict[str, object]:
    """modules_to_save by whole names: PEFT takes an entry for every module whose name ends with it."""
    if not adapter.config.modules_to_save:
        return {}
    entries = adapter.config.modules_to_save
    paths = dict.fromkeys(name.rpartition(".")[0] for name in adapter.saved)
    saved = [path for path in paths if any(matches_suffix(path, entry) for entry in entries)]
    clashes = [other for other in module_paths(gm) if other not in saved and other.endswith(tuple(saved))]
    if clashes:
        warn(
            f"PEFT takes an entry of modules_to_save for every module whose name ends with it, so it will look for "
            f"{clashes[0]!r} in the file too, and refuse it; lora_fx.load_adapter reads it. Rename one of the modules"
        )
    return {"modules_to_save": saved or None}


def _plan_for(
    gm: fx.GraphModule, config: LoraConfig, tensors: dict[str, torch.Tensor], in_parts: Collection[str]
) -> Plan:
    """The plan that takes exactly the file's tensors; weights `in_parts` are no attentions that PEFT would know."""
    plan = plan_adapters(gm, config, every_pattern_hits=False)
    plan = replace(
        plan, targets=tuple(_apart(target) if target.site.path in in_parts else target for target in plan.targets)
    )
    expected = _expected(gm, plan)
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    # PEFT adds the whole base weight of adapted embeddings and heads; equal to the base it says nothing.
    unexpected = [key for key in unexpected if not is_base_tensor(gm, key, tensors[key])]
    if missing:
        raise AdapterError(
            f"the file lacks {len(missing)} of {len(expected)} tensors that its configuration asks for: "
            f"{some_of(map(repr, missing), 4)}.{closest(missing[0], unexpected)} Is this adapter of this model?"
        )
    if unexpected:
        raise AdapterError(
            f"the file holds {len(unexpected)} tensors for which this graph has no place: "
            f"{some_of(map(repr, unexpected), 4)}."
            f"{closest(unexpected[0], expected)} make_plan(gm, config) shows what is adapted, and why the rest is not"
        )
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise AdapterError(
                f"{key!r} has the shape {tuple(tensors[key].shape)}, but this graph takes {shape}: "
                "another rank (see r and rank_pattern in adapter_config.json) or another model"
            )
    prefixes = prefixes_of(gm, plan)
    if not all(_says_the_same(prefixes, plan, target, tensors) for target in plan.targets):
        warn(
            "the file holds different adapters for sites that share one tied weight; each keeps its own, and "
            "folding will untie them"
        )
        return plan_adapters(gm, config, every_pattern_hits=False, share_tied=False)
    return plan


def _apart(target: PlannedSite) -> PlannedSite:
    return replace(target, site=replace(target.site, attention=None))


def _says_the_same(prefixes: dict[str, str], plan: Plan, target: PlannedSite, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the file has the same adapter for a site as for the one that it shares a tied weight with."""
    if target.shares_with is None:
        return True
    owner = next(other for other in plan.targets if other.site.path == target.shares_with)
    own, owned = (
        [tensors[prefixes[each.site.path] + end] for end in shapes_of(each, plan.config)] for each in (target, owner)
    )
    if owner.site.layout != target.site.layout:
        owned = [*owner.site.layout.turn(*owned[:2]), *owned[2:]]
    return all(torch.equal(mine, theirs) for mine, theirs in zip(own, owned, strict=True))


def _expected(gm: fx.GraphModule, plan: Plan) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    prefixes = prefixes_of(gm, plan)
    for target in plan.targets:
        prefix = prefixes[target.site.path]
        shapes |= {prefix + end: shape for end, shape in shapes_of(target, plan.config).items()}
    for rows in plan.tokens:
        shapes[prefixes[rows.site.path] + KEY_OF_ROWS] = (len(rows.rows), rows.site.out_features)
    for name in plan.trained:
        shapes[name] = tuple(get_attribute(gm, name).shape)
    return shapes


def _dtype_for(plan: Plan, tensors: dict[str, torch.Tensor]) -> torch.dtype:
    saved = next(tensor.dtype for key, tensor in tensors.items() if key.endswith(("lora_A.weight", "lora_embedding_A")))
    base = plan.targets[0].site.dtype
    return saved if base in _HALVES else torch.promote_types(saved, base)
