"""What `init_lora_weights` needs of data, as one value: `calibrate` before `inject`.

EVA takes the principal directions of what a site takes in, CorDA its covariance, LoRA-GA the gradient of a loss with
respect to its weight. EVA also gives the ranks out anew among the sites.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .attributes import check_holds_values
from .config import LoraConfig
from .errors import ConfigError, warn
from .graph_module import checked_graph_module
from .init_options import EvaConfig, init_of
from .plan import Plan, make_plan
from .site_statistics import Loss, SiteStatistics, input_components, input_covariances, weight_gradients
from .tables import Shown, Table


@dataclass(frozen=True, eq=False)
class Calibration(Shown):
    """What `calibrate` found out, for `lora_fx.inject(gm, calibration.config, calibration=calibration)`.

    Attributes:
        config: the configuration; after EVA, with the ranks that the data gave the sites.
        statistics: by site path.
        ranks: {site path: rank}; 0 for sites that `config` now leaves out.
    """

    config: LoraConfig
    statistics: Mapping[str, SiteStatistics]
    ranks: Mapping[str, int]

    def blocks(self) -> tuple[str | Table, ...]:
        """The method, and a row for each site."""
        rows = []
        for path, rank in self.ranks.items():
            explained = self.statistics[path].explained if path in self.statistics else None
            share = "" if explained is None else f"{float(explained[:rank].sum()):.1%}"
            rows.append((path or "(root)", str(rank) if rank else "left out", share))
        header = ("site", "r", "variance explained")
        return f"{self.config.init_lora_weights}", Table(header, rows)


def calibrate(gm: fx.GraphModule, config: object, batches: Iterable[Any], loss: Loss | None = None) -> Calibration:
    """Run `gm` on data, and keep what `config.init_lora_weights` ("eva", "corda" or "lora_ga") needs of it.

    Args:
        gm: a graph module, see `lora_fx.find_sites`; it is left as it was.
        config: a `LoraConfig`, a `peft.LoraConfig`, or a mapping of its fields.
        batches: each a tensor, a tuple or list of positional inputs, or a mapping of inputs by name. What the graph
            has no input for, such as labels, is left to `loss` and to EVA's label mask.
        loss: for "lora_ga", from (output, batch) to one number.

    Raises:
        ConfigError: if the method needs no data, or the data do not suffice.
        TargetError: if a site's inputs cannot be read, and as `make_plan`.
    """
    gm, config = checked_graph_module(gm), LoraConfig.from_peft(config)
    needs = None if isinstance(config.init_lora_weights, bool) else _calibration_of(config.init_lora_weights)
    if needs is None:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} needs no data; inject(gm, config) is enough. 'eva', "
            "'corda' and 'lora_ga' are calibrated"
        )
    if (loss is None) == (needs == "gradient"):
        raise ConfigError(
            "init_lora_weights='lora_ga' needs the gradient of a loss: calibrate(gm, config, batches, loss=...), "
            "a function of (output, batch)"
            if loss is None
            else f"loss is for 'lora_ga'; init_lora_weights={config.init_lora_weights!r} reads inputs. Leave it out"
        )
    plan = make_plan(gm, config)
    check_holds_values(gm, "data tell nothing of it")
    ranks = {target.site.path: target.r for target in plan.targets if target.shares_with is None}
    if loss is not None:
        gradients = weight_gradients(gm, list(ranks), batches, loss)
        found = {path: SiteStatistics(gradient=gradient) for path, gradient in gradients.items()}
    elif needs == "covariance":
        covariances = input_covariances(gm, ranks, batches, sharers=_sharers(plan))
        found = {path: SiteStatistics(covariance=covariance) for path, covariance in covariances.items()}
    else:
        return _calibrate_eva(gm, config, plan, ranks, batches)
    return Calibration(config, found, ranks)


def redistribute(ranks: Mapping[str, int], explained: Mapping[str, torch.Tensor], rho: float) -> dict[str, int]:
    """EVA's ranks: as many as before in all, to the directions that explain most, at most rho · rank to one site.

    Args:
        ranks: {site: rank} as configured.
        explained: {site: explained variance ratios of its directions, the largest first}.
        rho: see `EvaConfig`.
    """
    shares = [
        (float(share), path)
        for path, rank in ranks.items()
        if path in explained
        for share in explained[path][: round(rank * rho)].tolist()
    ]
    shares.sort(key=lambda entry: -entry[0])  # stable: equal shares in the order of the sites
    counts = Counter(path for _, path in shares[: sum(ranks.values())])
    return {path: counts[path] for path in ranks}


def _calibration_of(init_lora_weights: str) -> str | None:
    return None if init_lora_weights == "gaussian" else init_of(init_lora_weights).calibration


# EVA ----------------------------------------------------------------------------------------------


def _calibrate_eva(
    gm: fx.GraphModule, config: LoraConfig, plan: Plan, ranks: dict[str, int], batches: Iterable[Any]
) -> Calibration:
    options = EvaConfig.from_peft(getattr(config, "eva_config", None))
    sizes = {target.site.path: target.site.in_features for target in plan.targets}
    for path, rank in ranks.items():
        if rank > sizes[path]:
            raise ConfigError(
                f"r={rank} is above the {sizes[path]} features that {path!r} takes, and EVA needs a direction for each "
                "rank. Choose a smaller r, for this site alone with rank_pattern"
            )
    counts = {path: min(round(rank * options.rho), sizes[path]) for path, rank in ranks.items()}

    moved: dict[str, float] = {}  # how alike the least alike direction is to that of the batch before

    def shares(found: Mapping[str, SiteStatistics]) -> dict[str, int]:
        explained = {path: site.explained for path, site in found.items() if site.explained is not None}
        return redistribute(ranks, explained, options.rho)

    def is_enough(similarities: Mapping[str, torch.Tensor], found: Mapping[str, SiteStatistics]) -> bool:
        moved.clear()
        moved.update({path: float(similarities[path][:r].min()) for path, r in shares(found).items() if r})
        return all(similarity >= options.tau for similarity in moved.values())

    found = input_components(
        gm,
        counts,
        batches,
        sharers=_sharers(plan),
        mask=lambda batch: _token_mask(batch, options),
        is_enough=is_enough,
    )
    for path, site in found.items():
        known = 0 if site.components is None else len(site.components)
        if known < counts[path]:
            raise ConfigError(
                f"{path!r} took {known} rows of input in all, too few for the {counts[path]} directions that EVA looks "
                "at (r · rho). Give more data, or a smaller r or rho"
            )
    if moved and min(moved.values()) < options.tau:
        path = min(moved, key=moved.__getitem__)
        warn(
            f"EVA read all batches, and directions still moved with the last one: at {path!r} by a similarity of "
            f"{moved[path]:.3f}, below tau={options.tau:g}. Give more batches, or a lower tau"
        )
    new = shares(found)
    kept = {path: _leading(site, new[path]) for path, site in found.items() if new[path]}
    return Calibration(_with_ranks(config, plan, new, options), kept, new)


def _leading(site: SiteStatistics, rank: int) -> SiteStatistics:
    """The first directions, without the memory of the others."""
    parts = (site.components, site.singular_values, site.explained)
    return SiteStatistics(*(None if part is None else part[:rank].clone() for part in parts))


def _sharers(plan: Plan) -> dict[str, list[str]]:
    """{site path: the other sites that its A and B serve}."""
    sharers: dict[str, list[str]] = {}
    for target in plan.targets:
        if target.shares_with is not None:
            sharers.setdefault(target.shares_with, []).append(target.site.path)
    return sharers


def _with_ranks(config: LoraConfig, plan: Plan, ranks: Mapping[str, int], options: EvaConfig) -> LoraConfig:
    """The configuration with a rank for each site; those of rank 0 are left out."""
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    left_out = []
    for target in plan.targets:
        path = target.site.path
        rank = ranks[path if target.shares_with is None else target.shares_with]
        if not rank:
            left_out.append(re.escape(path))
            continue
        alpha = target.lora_alpha * (rank / target.r if options.adjust_scaling_factors else 1)
        if rank != config.r:
            rank_pattern[f"^{re.escape(path)}"] = rank
        if alpha != config.lora_alpha:
            alpha_pattern[f"^{re.escape(path)}"] = alpha
    changes: dict[str, Any] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if left_out:
        changes["exclude_modules"] = "|".join([*_as_expressions(config.exclude_modules), *left_out])
    return dataclasses.replace(config, **changes)


def _as_expressions(names: Sequence[str] | str | None) -> list[str]:
    """Regular expressions for whole names that mean what `exclude_modules` did."""
    if not names:
        return []
    return [f"(?:{names})"] if isinstance(names, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in names]


def _token_mask(batch: Any, options: EvaConfig) -> torch.Tensor | None:
    """(batch, tokens): the tokens that are neither padding nor masked in the labels; None if nothing says so."""
    if not isinstance(batch, Mapping):
        return None
    masks = []
    attention, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(attention, torch.Tensor) and attention.ndim == 2:
        masks.append(attention.bool())
    if options.use_label_mask and isinstance(labels, torch.Tensor) and labels.ndim == 2:
        masks.append(labels != options.label_mask_value)
    if len(masks) == 2 and masks[0].shape == masks[1].shape:
        return masks[0] & masks[1]
    return masks[0] if masks else None
