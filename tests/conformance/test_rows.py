"""PEFT's own matrix of models and configurations, and more rows of the same form, both ways.

A row is a model and the options of a LoraConfig. PEFT writes and we read, we write and PEFT reads, and beside both
stands `models.explicit`, the base with its weights replaced by W + ΔW, so that a mistake they share is seen too.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from judged import CASES, combined, explicit, moved
from safetensors.torch import load_file, save_file
from test_peft import peft_model, talkative
from torch import nn
from zoo import Case, assert_same_bits, bits, distance, run, tolerance, traced

import lora_fx
from lora_fx import ConfigError, FoldError, LoraFxError, LoraFxWarning

MLP, EMB = ["lin0", "lin1"], ["emb", "conv1d"]


@dataclass(frozen=True)
class Row:
    """One line of the matrix.

    Attributes:
        model: name in models.CASES.
        options: of peft.LoraConfig; r is PEFT's 8 if not given.
        dtype: of the base; float64 where PEFT allows it, because there a mistake cannot hide behind rounding.
        says: what lora_fx warns of when it takes a file of PEFT's.
        peft_merges: PEFT's own merge works and is right.
        is_peft_right: PEFT computes W + ΔW unfolded; where it does not, it judges nothing.
        folds: a file of PEFT's has a weight to fold into.
        unties: folding has to untie a weight.
        changes_base: the initialisation takes something out of the base; it is saved as an adapter of twice the rank.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    says: str | None = None
    peft_merges: bool = True
    is_peft_right: bool = True
    folds: bool = True
    unties: bool = False
    changes_base: bool = False

    @property
    def case(self) -> Case:
        return CASES[self.model]

    @property
    def bound(self) -> float:
        return tolerance(self.case, self.dtype)

    @property
    def x(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.case.arguments(self.dtype)

    def base(self) -> nn.Module:
        return self.case.model(self.dtype)

    def graph(self) -> Any:
        return traced(self.case, "trace", self.dtype)

    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(**self.options)


def _row(model: str, targets: Any, **more: Any) -> Row:
    """A row from options of PEFT's and attributes of the row, mixed."""
    flags = {name: more.pop(name) for name in list(more) if name in Row.__dataclass_fields__}
    return Row(model, {"target_modules": targets, **more}, **flags)


def _mha(targets: list[str]) -> Row:
    # PEFT's merge adds out_proj's delta once more on top of the two (5.0 #1), and is no judge
    return _row("mha", targets, says="out_proj", peft_merges=False)


def _grouped(model: str, **options: Any) -> Row:
    return _row(model, ["conv2d"], peft_merges=False, folds=False, **options)


# PEFT's test_custom_models.py, in its order and with its ranks
PEFT_ROWS: dict[str, Row] = {
    "mlp_1": _row("mlp", "lin0"),
    "mlp_2": _row("mlp", ["lin0"]),
    "mlp_3": _row("mlp", ["lin1"]),
    "mlp_4": _row("mlp", MLP),
    "mlp_5": _row("mlp", ["lin0"], modules_to_save=["lin1"]),
    "mlp_6": _row("mlp", ["lin0"], lora_alpha=4, lora_dropout=0.1),
    "mlp_7_dora": _row("mlp", ["lin0"], use_dora=True),
    "mlp_8_dora": _row("mlp", MLP, use_dora=True),
    "mlp_9_dora": _row("mlp", "lin1", use_dora=True, lora_alpha=32),
    "mica": _row("mlp", ["lin0"], r=4, init_lora_weights="mica", dtype=torch.float32),
    "emb_1": _row("emb_conv1d", ["conv1d"]),
    "emb_2": _row("emb_conv1d", ["emb"]),
    "emb_3": _row("emb_conv1d", EMB),
    "emb_1_dora": _row("emb_conv1d", ["conv1d"], use_dora=True),
    "emb_2_dora": _row("emb_conv1d", ["emb"], use_dora=True),
    "emb_3_dora": _row("emb_conv1d", EMB, use_dora=True),
    "trainable_tokens": _row("emb_conv1d", ["conv1d"], trainable_token_indices={"emb": [0, 10]}),
    "conv1d": _row("conv1d", ["conv1d"]),
    "conv1d_dora": _row("conv1d", ["conv1d"], use_dora=True),
    "conv2d_1": _row("conv2d", ["conv2d"]),
    "conv2d_2": _row("conv2d", ["conv2d", "lin0"]),
    "conv2d_1_dora": _row("conv2d", ["conv2d"], use_dora=True),
    "conv2d_2_dora": _row("conv2d", ["conv2d", "lin0"], use_dora=True),
    "conv2d_groups": _grouped("conv2d_groups"),
    "conv2d_groups2": _grouped("conv2d_groups2"),
    # PEFT takes the norm of W plus a matrix of the right size whose entries stand at the wrong places
    "conv2d_groups_dora": _grouped("conv2d_groups", use_dora=True, is_peft_right=False),
    "conv2d_groups2_dora": _grouped("conv2d_groups2", use_dora=True, is_peft_right=False),
    "conv3d_1": _row("conv3d", ["conv3d"]),
    "conv3d_2": _row("conv3d", ["conv3d", "lin0"]),
    "conv3d_1_dora": _row("conv3d", ["conv3d"], use_dora=True),
    "conv3d_2_dora": _row("conv3d", ["conv3d", "lin0"], use_dora=True),
    "mlp_lora_bias": _row("mlp", MLP, lora_bias=True, lora_alpha=32),
    "conv2d_lora_bias": _row("conv2d", ["conv2d"], lora_bias=True, lora_alpha=32),
    "conv3d_lora_bias": _row("conv3d", ["conv3d"], lora_bias=True, lora_alpha=32),
    "mha_1": _mha(["mha"]),
    "mha_2": _mha(["mha", "lin0"]),
    "parameter_1": _row("mlp_using_parameters", [], target_parameters=["lin0.weight"]),
    "parameter_2": _row("mlp", ["lin0"], target_parameters=["lin1.weight"]),
}
# The rows of PEFT's matrix whose options lora_fx refuses: the option, and its value.
REFUSED: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "kasa": ("kasa_config", lambda: peft.KasaConfig(), {"target_modules": ["lin0"]}),
    **{
        f"velora_{kind}": ("velora_config", lambda kind=kind: peft.VeloraConfig(num_groups=2, init_type=kind), {})
        for kind in ("random", "batch_average", "batch_average_once")
    },
    "monteclora": ("monteclora_config", lambda: peft.MontecloraConfig(num_samples=2), {}),
    "bd_lora_a": ("use_bdlora", lambda: peft.BdLoraConfig(target_modules_bd_a=["lin0"], nblocks=2), {}),
    "bd_lora_b": ("use_bdlora", lambda: peft.BdLoraConfig(target_modules_bd_b=["lin0"], nblocks=2), {}),
    "bd_lora_both": (
        "use_bdlora",
        lambda: peft.BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
        {"target_modules": MLP},
    ),
}
_TIED = ["embed_tokens", "lm_head"]
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_UNTIED = {"unties": True, "peft_merges": False}
MORE_ROWS: dict[str, Row] = {
    "rslora": _row("mix", MLP, r=3, lora_alpha=5, use_rslora=True),
    "patterns": _row(
        "mix", ["lin0", "lin1", "head"], lora_alpha=5, rank_pattern={"lin1": 3, "^head": 2}, alpha_pattern={"lin0": 2.5}
    ),
    "rslora_patterns": _row(
        "conv2d", ["conv2d", "lin0"], use_rslora=True, rank_pattern={"conv2d": 3}, alpha_pattern={"lin.": 11}
    ),
    "bias_all": _row("mix", ["lin0"], r=3, bias="all"),
    "bias_lora_only": _row("mix", ["lin0", "lin1"], r=3, bias="lora_only"),
    "bias_lora_only_conv": _row("conv2d", ["conv2d"], r=3, bias="lora_only"),
    "gaussian": _row("mix", MLP, r=3, init_lora_weights="gaussian"),
    "random": _row("mix", MLP, r=3, init_lora_weights=False),
    "random_conv": _row("conv2d_strided", ["conv2d"], r=3, init_lora_weights=False),
    "random_emb": _row("emb_conv1d", EMB, r=3, init_lora_weights=False),
    "orthogonal": _row("mix", MLP, r=4, init_lora_weights="orthogonal"),
    "pissa": _row(
        "mix", ["lin0", "head"], r=2, lora_alpha=3, init_lora_weights="pissa", dtype=torch.float32, changes_base=True
    ),
    "pissa_rslora": _row(
        "mix",
        ["lin0"],
        r=3,
        lora_alpha=2,
        init_lora_weights="pissa",
        use_rslora=True,
        dtype=torch.float32,
        changes_base=True,
    ),
    "olora": _row(
        "mix", ["lin0", "head"], r=2, lora_alpha=3, init_lora_weights="olora", dtype=torch.float32, changes_base=True
    ),
    "dora_rslora": _row("mix", ["lin0", "lin1"], r=3, lora_alpha=5, use_rslora=True, use_dora=True),
    "dora_patterns": _row("mix", MLP, use_dora=True, rank_pattern={"lin0": 2}, alpha_pattern={"lin1": 2.5}),
    "dora_random": _row("mix", ["lin0"], r=3, use_dora=True, init_lora_weights=False),
    "lora_bias_rslora": _row("mlp", MLP, r=3, lora_bias=True, use_rslora=True, alpha_pattern={"lin1": 3}),
    "conv_strided": _row("conv2d_strided", ["conv2d"], r=3),
    "conv_strided_dora": _row("conv2d_strided", ["conv2d"], r=3, use_dora=True),
    "conv_same": _row("conv1d_same", ["conv1d"], r=3),
    "embeddings": _row("embeddings", ["padded", "scaled"], r=3, lora_alpha=5),
    "tokens_and_saved": _row(
        "emb_conv1d", ["conv1d"], trainable_token_indices={"emb": [7, 3]}, modules_to_save=["lin0"]
    ),
    "parameters_patterns": _row(
        "mlp_using_parameters",
        [],
        target_parameters=["lin0.weight", "lin1.weight"],
        rank_pattern={"lin0.weight": 3},
        alpha_pattern={"lin1.weight": 5},
    ),
    "experts": _row("experts", [], r=3, target_parameters=["experts.up", "experts.down"]),
    "experts_one": _row("experts", ["lin0"], r=3, lora_alpha=5, target_parameters=["experts.down"]),
    "experts_transposed": _row("experts_transposed", [], r=2, target_parameters=["experts.down", "experts.up"]),
    "mixtral": _row("mixtral", ["q_proj"], r=3, target_parameters=_EXPERTS, dtype=torch.float32),
    "gpt_oss": _row("gpt_oss", [], r=2, target_parameters=_EXPERTS, dtype=torch.float32),
    "tied_both": _row("tied_lm", _TIED, r=3, **_UNTIED),
    "tied_embedding": _row("tied_lm", ["embed_tokens"], r=3, **_UNTIED),
    "tied_head": _row("tied_lm", ["lm_head"], r=3, **_UNTIED),
    # PEFT's merge gives W + 2ΔW (5.0 #14)
    "tied_as_one": _row("tied_llama", _TIED, r=3, ensure_weight_tying=True, peft_merges=False),
    "tied_as_one_by_head": _row("tied_llama", ["lm_head"], r=3, ensure_weight_tying=True, peft_merges=False),
    "tied_tokens": _row("tied_llama", ["q_proj"], r=3, trainable_token_indices=[1, 5]),
}
ROWS = PEFT_ROWS | MORE_ROWS


def rows(condition: Callable[[Row], bool] = lambda row: True) -> Any:
    named = [pytest.param(row, id=name) for name, row in ROWS.items() if condition(row)]
    return pytest.mark.parametrize("row", named)


def test_the_table_holds_all_of_pefts_rows() -> None:
    assert len(PEFT_ROWS) + len(REFUSED) == 46
    assert len(ROWS) >= 70


# What the tests do with a row -------------------------------------------------------------------------


@contextmanager
def only(pattern: str | None) -> Iterator[None]:
    """The warning that the row calls for, and no other, but for the layout flag that PEFT writes into its files."""
    with zoo.expected_warning(pattern), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the graph counts", LoraFxWarning)
        yield


def injected(row: Row, gm: Any = None, name: str = "default") -> Any:
    """Ours, as it starts."""
    gm = row.graph() if gm is None else gm
    with only(None):
        return lora_fx.inject(gm, row.config(), adapter_name=name)


def theirs(row: Row, directory: Path) -> peft.PeftModel:
    """PEFT's model with every trained tensor moved, saved."""
    model = peft_model(row.case, {**row.options}, row.dtype)
    with talkative():
        model.save_pretrained(directory)
    return model


def load(row: Row, directory: Path, **options: Any) -> Any:
    with only(row.says):
        return lora_fx.load_adapter(row.graph(), directory, **options)


def fold(row: Row, gm: Any, **options: Any) -> Any:
    with zoo.expected_warning("untied" if row.unties else None):
        return lora_fx.fold(gm, **options)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """But for the base's own weight, which PEFT adds for embeddings and heads and which says nothing new."""
    held = load_file(directory / "adapter_model.safetensors")
    return {key: tensor for key, tensor in held.items() if not key.endswith(".base_layer.weight")}


def written(gm: Any, directory: Path, name: str = "default") -> dict[str, torch.Tensor]:
    lora_fx.save_adapter(gm, directory, adapter_name=name)
    return tensors_of(directory)


def state_of(gm: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in gm.state_dict().items()}


def assert_weights(folded: nn.Module, reference: nn.Module, bound: float) -> None:
    """Weight for weight, where both have the name: outputs can hide what no input reaches."""
    mine, expected = folded.state_dict(), reference.state_dict()
    both = mine.keys() & expected.keys()
    assert both
    for name in both:
        assert distance([expected[name] + 0.0], [mine[name] + 0.0]) <= bound or not expected[name].any(), name


# The matrix --------------------------------------------------------------------------------------------


@rows(lambda row: row.is_peft_right)
def test_peft_writes_and_we_read(row: Row, tmp_path: Path) -> None:
    model = theirs(row, tmp_path)
    expected, judge = run(model, row.x), explicit(row.base(), tmp_path)
    reference = run(judge, row.x)
    assert distance(reference, run(row.base(), row.x)) > 100 * row.bound
    assert distance(reference, expected) <= row.bound
    ours = load(row, tmp_path)
    assert distance(expected, run(ours, row.x)) <= row.bound
    if not row.folds:
        with pytest.raises(FoldError, match="conv2d"):
            lora_fx.fold(ours)
        return
    folded = fold(row, ours)
    assert distance(reference, run(folded, row.x)) <= row.bound
    assert_weights(folded, judge, row.bound)
    if row.peft_merges:
        with talkative():
            merged = run(model.merge_and_unload(), row.x)
        assert distance(merged, run(folded, row.x)) <= row.bound


@rows(lambda row: row.dtype is torch.float64 and row.is_peft_right and row.model not in ("tied_lm", "tied_llama"))
def test_pefts_file_in_float32(row: Row, tmp_path: Path) -> None:
    """The type that is used."""
    row = replace(row, dtype=torch.float32)
    expected = run(theirs(row, tmp_path), row.x)
    ours = load(row, tmp_path)
    assert {p.dtype for p in lora_fx.lora_parameters(ours)} == {torch.float32}
    assert distance(expected, run(ours, row.x)) <= row.bound
    if row.folds:
        assert distance(run(explicit(row.base(), tmp_path), row.x), run(fold(row, ours), row.x)) <= row.bound


@rows()
def test_we_write_and_peft_reads(row: Row, tmp_path: Path) -> None:
    ours = moved(injected(row))
    expected, held = run(ours, row.x), written(ours, tmp_path)
    assert distance(expected, run(row.base(), row.x)) > 100 * row.bound
    judge = explicit(row.base(), tmp_path)
    assert distance(expected, run(judge, row.x)) <= row.bound
    folded = fold(row, ours)
    assert distance(expected, run(folded, row.x)) <= row.bound
    if row.folds:  # the judge's kernels have no groups
        assert_weights(folded, judge, row.bound)
    with talkative():
        model = peft.PeftModel.from_pretrained(row.base(), tmp_path).eval()
    if row.is_peft_right:
        assert distance(expected, run(model, row.x)) <= row.bound
    with talkative():
        model.save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == held.keys()
    assert_same_bits([again[key] for key in held], list(held.values()))


@rows(lambda row: not row.changes_base)
def test_the_files_of_both_hold_the_same_keys_and_shapes(row: Row, tmp_path: Path) -> None:
    theirs(row, tmp_path / "theirs")
    held = written(injected(row), tmp_path / "ours")
    expected = tensors_of(tmp_path / "theirs")
    assert {k: (t.shape, t.dtype) for k, t in held.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
    ours, peers = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for key in (
        *("r", "lora_alpha", "use_dora", "lora_bias", "use_rslora", "bias", "init_lora_weights", "peft_type"),
        *("target_parameters", "trainable_token_indices", "rank_pattern", "alpha_pattern", "modules_to_save"),
    ):
        mine, their = (fields.get(key) or None for fields in (ours, peers))
        if key == "target_parameters" and their is not None:  # a set to PEFT
            mine, their = sorted(mine), sorted(their)
        assert mine == their, key


@rows()
def test_only_the_adapter_is_trained(row: Row) -> None:
    gm = row.graph()
    users = state_of(gm)
    ours = moved(injected(row)).train()  # from B = 0 a float32 A would not move at all
    trained = [p for p in lora_fx.lora_parameters(ours) if p.requires_grad]
    assert trained
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {id(p) for p in trained}
    before, others = [bits(p) for p in trained], state_of(ours)
    own = {name for name, p in ours.named_parameters(remove_duplicate=False) if p.requires_grad}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        zoo.loss_of(ours, row.x, seed=step).backward()
        optimizer.step()
    assert all(old != bits(p) for old, p in zip(before, trained, strict=True))
    after = state_of(ours)
    assert {name for name in after if after[name] != others[name]} == own
    assert state_of(gm) == users


@rows()
def test_a_disabled_adapter_is_the_base(row: Row) -> None:
    ours = moved(injected(row))
    base, on = run(zoo.frozen(row.graph()), row.x), run(ours, row.x)
    assert distance(base, on) > 100 * row.bound
    with lora_fx.disable_adapters(ours):
        assert_same_bits(base, run(ours, row.x))
    assert_same_bits(on, run(ours, row.x))


@rows(lambda row: row.options.get("init_lora_weights") is not False)
def test_a_fresh_adapter_is_the_base(row: Row) -> None:
    gm, ours = row.graph(), injected(row)
    assert distance(run(gm, row.x), run(ours, row.x)) <= row.bound


@rows()
def test_fold_gives_the_same_each_time_and_can_be_taken_back(row: Row) -> None:
    gm = zoo.frozen(row.graph())  # a copy: folding in place writes into it
    ours = moved(injected(row, gm))
    on, state = run(ours, row.x), state_of(ours)
    first, second = fold(row, ours), fold(row, ours)
    assert state_of(first) == state_of(second)
    assert first.code == second.code
    assert_same_bits(run(first, row.x), run(second, row.x))
    assert state_of(ours) == state
    assert_same_bits(on, run(ours, row.x))
    with pytest.raises(FoldError, match="nothing to fold"):
        lora_fx.fold(first)
    if row.unties:
        return
    assert first.code == gm.code
    assert set(first.state_dict()) == set(gm.state_dict())
    folded = lora_fx.fold(ours, inplace=True)
    assert_same_bits(run(first, row.x), run(folded, row.x))
    back = lora_fx.unfold(folded)
    assert state_of(back) == state
    assert_same_bits(on, run(back, row.x))


@rows()
def test_save_and_load_is_the_identity(row: Row, tmp_path: Path) -> None:
    ours = moved(injected(row))
    held = written(ours, tmp_path / "first")
    back = load(replace(row, says=None), tmp_path / "first")  # our own file has nothing to say
    again = written(back, tmp_path / "second")
    assert again.keys() == held.keys()
    assert_same_bits([again[key] for key in held], list(held.values()))
    on = run(ours, row.x)
    if row.changes_base:  # an adapter of twice the rank: the same function, other sums
        assert distance(on, run(back, row.x)) <= row.bound
    else:
        assert_same_bits(on, run(back, row.x))


@rows(lambda row: not row.is_peft_right)
def test_a_file_that_means_no_weight_is_refused(row: Row, tmp_path: Path) -> None:
    """DoRA on a grouped convolution whose A mixes the groups: PEFT divides by the norm of another matrix."""
    theirs(row, tmp_path)
    with pytest.raises(LoraFxError, match="conv2d"):
        lora_fx.load_adapter(row.graph(), tmp_path)


# Rows whose options are refused ------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "value", "options"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(
    option: str, value: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES["mlp"]
    config = {"r": 4, "target_modules": ["lin0"], **options, option: value()}
    with talkative():
        peft.get_peft_model(case.model(), peft.LoraConfig(**config)).save_pretrained(tmp_path)
    gm = traced(case)
    for attempt in (
        lambda: lora_fx.load_adapter(gm, tmp_path),
        lambda: lora_fx.inject(gm, peft.LoraConfig(**config)),
        lambda: lora_fx.inject(gm, config),
        lambda: lora_fx.LoraConfig(**config),
    ):
        with pytest.raises(ConfigError, match=option):
            attempt()


# Several adapters --------------------------------------------------------------------------------------

# PEFT's MULTIPLE_ACTIVE_ADAPTERS, and its MIXED_ADAPTER row: model, the options of either, and
# which choices PEFT itself can show
EACH = [["one"], ["other"]]
ALL = [["one", "other"], *EACH]
MULTIPLE: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "same": ("mlp", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}, ALL),
    "different": ("mlp", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}, ALL),
    "tokens_same": (
        "emb_conv1d",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5]}},
        EACH,
    ),
    "tokens_different": (
        "emb_conv1d",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [80, 4]}},
        EACH,
    ),
    "parameter_same": (
        "mlp_using_parameters",
        {"target_modules": [], "target_parameters": ["lin0.weight"]},
        {"target_modules": [], "target_parameters": ["lin0.weight"], "r": 3},
        ALL,
    ),
    "parameter_different": (
        "mlp_using_parameters",
        {"target_modules": [], "target_parameters": ["lin0.weight"]},
        {"target_modules": [], "target_parameters": ["lin1.weight"]},
        [],
    ),
    "mixed": ("mlp", {"target_modules": ["lin0"], "r": 8}, {"target_modules": ["lin0"], "r": 16}, ALL),
    "dora_and_plain": ("mlp", {"target_modules": ["lin0"], "use_dora": True}, {"target_modules": MLP, "r": 3}, ALL),
    "convolution": ("conv2d", {"target_modules": ["conv2d"], "lora_alpha": 3}, {"target_modules": ["conv2d"]}, ALL),
    "embedding": ("emb_conv1d", {"target_modules": EMB}, {"target_modules": ["emb"], "r": 2}, ALL),
}


def two(name: str, tmp_path: Path) -> tuple[Row, Row, Any]:
    """Both adapters, moved, in one graph and in one directory each."""
    model, one, other, _ = MULTIPLE[name]
    first, second = Row(model, one), Row(model, other)
    ours = moved(injected(second, moved(injected(first, name="one"), name="one"), "other"), 0.3, "other")
    for adapter in ("one", "other"):
        lora_fx.save_adapter(ours, tmp_path / adapter, adapter_name=adapter)
    return first, second, ours


@pytest.mark.parametrize("name", MULTIPLE)
def test_several_adapters_add_up(name: str, tmp_path: Path) -> None:
    row, _, ours = two(name, tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    for choice, weights in (
        (["one", "other"], {one: 1.0, other: 1.0}),
        ("one", {one: 1.0}),
        ("other", {other: 1.0}),
        ({"one": 0.5, "other": -1.5}, {one: 0.5, other: -1.5}),
        (["one", "other"], {one: 1.0, other: 1.0}),
    ):
        expected = run(combined(row.base(), weights), row.x)
        lora_fx.set_adapters(ours, choice)
        assert distance(expected, run(ours, row.x)) <= row.bound, choice
        assert distance(expected, run(lora_fx.fold(ours), row.x)) <= row.bound, choice
    with lora_fx.disable_adapters(ours):
        assert distance(run(row.base(), row.x), run(ours, row.x)) <= row.bound
    assert distance(expected, run(ours, row.x)) <= row.bound
    assert lora_fx.adapter_names(lora_fx.delete_adapter(ours, "one")) == ("other",)


@pytest.mark.parametrize("name", [name for name, (*_, choices) in MULTIPLE.items() if choices])
def test_several_adapters_as_in_peft(name: str, tmp_path: Path) -> None:
    row, _, ours = two(name, tmp_path)
    with talkative():
        model = peft.PeftModel.from_pretrained(row.base(), tmp_path / "one", adapter_name="one").eval()
        model.load_adapter(tmp_path / "other", adapter_name="other")
    for choice in MULTIPLE[name][-1]:
        with talkative():
            model.base_model.set_adapter(choice)
        lora_fx.set_adapters(ours, choice)
        assert distance(run(model, row.x), run(ours, row.x)) <= row.bound
    with model.disable_adapter(), lora_fx.disable_adapters(ours):
        assert distance(run(model, row.x), run(ours, row.x)) <= row.bound


def test_pefts_two_adapters_in_one_directory(tmp_path: Path) -> None:
    """The mixed row, written by PEFT: r 8 and r 16 on one module."""
    model, one, other, _ = MULTIPLE["mixed"]
    row = Row(model, one)
    peer = peft_model(row.case, one, row.dtype)
    with talkative():
        peer.add_adapter("other", peft.LoraConfig(**other))
        nn.init.normal_(peer.base_model.model.lin0.lora_B["other"].weight)
        peer.base_model.set_adapter(["default", "other"])
        peer.eval().save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(row.graph(), tmp_path)
    ours = lora_fx.load_adapter(ours, tmp_path / "other", adapter_name="other")
    expected = run(peer, row.x)
    assert distance(expected, run(ours, row.x)) <= row.bound
    assert distance(expected, run(combined(row.base(), {tmp_path: 1, tmp_path / "other": 1}), row.x)) <= row.bound
    assert distance(expected, run(lora_fx.fold(ours), row.x)) <= row.bound


# Where adapters start: PEFT's test_initialization.py -----------------------------------------------------


class Wide(nn.Module):
    """Large enough for statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(500, 48), nn.Conv2d(24, 32, 3, padding=1)
        self.linear = nn.Linear(48, 40)

    def forward(self, ids):
        return self.linear(self.conv(self.embed(ids).reshape(-1, 24, 1, 2)).reshape(len(ids), -1)[:, :48])


WIDE = Case("wide", Wide, ("embed", "conv", "linear"), inputs=lambda dtype: ((torch.arange(90).view(9, 10),), {}))
_PATHS = {
    "linear": ("linear.lora_A.weight", "linear.lora_B.weight"),
    "conv": ("conv.lora_A.weight", "conv.lora_B.weight"),
    "embed": ("embed.lora_embedding_A", "embed.lora_embedding_B"),
}


def started(case: Case, options: dict[str, Any], tmp_path: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """The tensors of a fresh adapter, by path: ours and PEFT's."""
    ours = lora_fx.inject(traced(case), peft.LoraConfig(**options))
    mine = written(ours, tmp_path / "ours")
    with talkative():
        model = peft.get_peft_model(case.model(), peft.LoraConfig(**options))
        model.save_pretrained(tmp_path / "theirs")
    peers = tensors_of(tmp_path / "theirs")
    return tuple({key.removeprefix("base_model.model."): t for key, t in each.items()} for each in (mine, peers))


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_random_starts_are_distributed_as_pefts(init: bool | str, tmp_path: Path) -> None:
    """Same zeros, same bounds, and means and deviations that agree within five standard errors."""
    options = {"r": 32, "target_modules": list(_PATHS), "init_lora_weights": init}
    mine, peers = started(WIDE, options, tmp_path)
    for key in (key for keys in _PATHS.values() for key in keys):
        a, b = mine[key].double(), peers[key].double()
        assert bool(a.any()) == bool(b.any()), key
        if not b.any():
            continue
        error = 5 / math.sqrt(a.numel())
        assert abs(float(a.mean())) <= error * float(b.std()), key
        assert float(a.std() / b.std()) == pytest.approx(1, abs=1.5 * error), key
        # a uniform one ends at its bound; a normal one does not
        assert float(a.abs().max() / a.std()) == pytest.approx(float(b.abs().max() / b.std()), rel=0.25), key


@pytest.mark.parametrize(
    ("init", "path", "expected"),
    [
        (True, "linear", 1 / math.sqrt(48)),
        (True, "conv", 1 / math.sqrt(24 * 9)),
        (False, "linear", 1 / math.sqrt(48)),
    ],
)
def test_the_bound_of_a_uniform_start(init: bool, path: str, expected: float, tmp_path: Path) -> None:
    options = {"r": 32, "target_modules": [path], "init_lora_weights": init}
    for tensors in started(WIDE, options, tmp_path):
        assert 0.98 * expected < float(tensors[f"{path}.lora_A.weight"].abs().max()) <= expected


def test_what_starts_at_zero(tmp_path: Path) -> None:
    """B of linears and convolutions, but A of embeddings, whose B is normal with deviation 1."""
    for init in (True, "gaussian"):
        mine, _ = started(
            WIDE, {"r": 32, "target_modules": list(_PATHS), "init_lora_weights": init}, tmp_path / str(init)
        )
        for key in ("linear.lora_B.weight", "conv.lora_B.weight", "embed.lora_embedding_A"):
            assert not mine[key].any()
        assert float(mine["embed.lora_embedding_B"].std()) == pytest.approx(1, abs=0.1)
    assert float(mine["linear.lora_A.weight"].std()) == pytest.approx(1 / 32, rel=0.1)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_starts_from_the_weights_own_directions(init: str, use_rslora: bool, tmp_path: Path) -> None:
    """A and B are PEFT's but for the signs of the directions; the file holds them and, negated, their start."""
    case = CASES["mix"]
    options = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["lin0", "lin1"],
        "init_lora_weights": init,
        "use_rslora": use_rslora,
    }
    mine, peers = started(case, options, tmp_path)
    assert mine.keys() == peers.keys()
    for path in ("lin0", "lin1"):
        a, b = (peers[f"{path}.lora_{half}.weight"] for half in "AB")
        whole_a, whole_b = (mine[f"{path}.lora_{half}.weight"] for half in "AB")
        assert whole_a.shape == (6, a.shape[1])
        assert whole_b.shape == (b.shape[0], 6)
        assert distance([a.abs()], [whole_a[:3].abs()]) < 1e-5
        assert distance([b.abs()], [whole_b[:, :3].abs()]) < 1e-5
        assert distance([b @ a], [whole_b[:, :3] @ whole_a[:3]]) < 1e-5
        assert torch.equal(whole_a[3:], whole_a[:3])
        assert torch.equal(whole_b[:, 3:], -whole_b[:, :3])
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 6)
    assert lora_fx.LoraConfig.from_peft(config).scaling == pytest.approx(5 / (math.sqrt(3) if use_rslora else 3))


def test_pissa_by_subspace_iteration(tmp_path: Path) -> None:
    """Random, but close to the whole decomposition; the output is the base's to the last digits."""
    case = CASES["mix"]
    options = {"r": 3, "target_modules": ["lin0", "lin1"]}
    fast = lora_fx.inject(traced(case), lora_fx.LoraConfig(**options, init_lora_weights="pissa_niter_200"))
    whole = lora_fx.inject(traced(case), lora_fx.LoraConfig(**options, init_lora_weights="pissa"))
    x = case.arguments()
    assert distance(run(traced(case), x), run(fast, x)) <= tolerance(case, torch.float32)
    halves = [written(gm, tmp_path / str(i)) for i, gm in enumerate((fast, whole))]
    for path in ("lin0", "lin1"):
        key = "base_model.model.{}.lora_{}.weight".format
        fast_product, whole_product = (h[key(path, "B")][:, :3] @ h[key(path, "A")][:3] for h in halves)
        assert distance([whole_product], [fast_product]) < 1e-3


def test_pissa_takes_the_rank_of_the_pattern(tmp_path: Path) -> None:
    case = CASES["mix"]
    options = {
        "r": 3,
        "target_modules": ["lin0", "lin1"],
        "init_lora_weights": "pissa",
        "rank_pattern": {"lin1": 2},
        "alpha_pattern": {"lin0": 7},
    }
    row = Row("mix", options, dtype=torch.float32)
    ours = moved(injected(row))
    held = written(ours, tmp_path)
    assert held["base_model.model.lin1.lora_A.weight"].shape[0] == 4
    with talkative():
        model = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert distance(run(ours, row.x), run(model, row.x)) <= row.bound
    assert distance(run(ours, row.x), run(load(row, tmp_path), row.x)) <= row.bound


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converts_on_saving_loads(init: str, tmp_path: Path) -> None:
    """PEFT's own way to plain LoRA, `path_initial_model_for_weight_conversion`."""
    row = Row("mix", {"r": 3, "target_modules": ["lin0", "head"], "init_lora_weights": init}, dtype=torch.float32)
    with talkative():
        model = peft.get_peft_model(row.base(), row.config()).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = init
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        expected = run(model, row.x)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = lora_fx.load_adapter(row.graph(), tmp_path / "plain")
    assert distance(expected, run(ours, row.x)) <= row.bound
    assert distance(expected, run(lora_fx.fold(ours), row.x)) <= row.bound


def test_orthogonal_starts_beside_the_base(tmp_path: Path) -> None:
    """A and B are not zero, and their product is."""
    case = CASES["mix"]
    for tensors in started(
        case, {"r": 4, "target_modules": ["lin0", "lin1"], "init_lora_weights": "orthogonal"}, tmp_path
    ):
        for path in ("lin0", "lin1"):
            a, b = (tensors[f"{path}.lora_{half}.weight"].double() for half in "AB")
            assert float(a.norm()) > 0.1
            assert float(b.norm()) > 0.1
            assert float((b @ a).abs().max()) < 1e-7
    with pytest.raises(LoraFxError, match=r"even.*3|3.*even"):
        lora_fx.inject(traced(case), lora_fx.LoraConfig(r=3, target_modules=["lin0"], init_lora_weights="orthogonal"))


def test_mica_starts_from_the_smallest_directions(tmp_path: Path) -> None:
    """A is zero, B the last left singular vectors, and only A is trained."""
    case = CASES["mix"]
    options = {"r": 3, "target_modules": ["lin0", "lin1"], "init_lora_weights": "mica"}
    mine, peers = started(case, options, tmp_path)
    for path in ("lin0", "lin1"):
        assert not mine[f"{path}.lora_A.weight"].any()
        b, theirs_b = mine[f"{path}.lora_B.weight"], peers[f"{path}.lora_B.weight"]
        assert distance([theirs_b.abs()], [b.abs()]) < 1e-5
        assert distance([theirs_b @ theirs_b.T], [b @ b.T]) < 1e-5
        weight = case.model().get_parameter(f"{path}.weight").detach()
        assert distance([torch.linalg.svdvals(weight)[-3:]], [(b.T @ weight).norm(dim=1)]) < 1e-5
    ours = lora_fx.inject(traced(case), lora_fx.LoraConfig(**options))
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all("lora_A" in name for name in trained)
    with pytest.raises(LoraFxError, match=r"lin0|mica"):
        lora_fx.inject(traced(case), lora_fx.LoraConfig(r=11, target_modules=["lin0"], init_lora_weights="mica"))


@pytest.mark.parametrize("name", ["mlp_8_dora", "emb_3_dora", "conv2d_2_dora", "conv3d_1_dora", "dora_random"])
def test_magnitudes_start_as_norms(name: str, tmp_path: Path) -> None:
    """Of the columns of W + ΔW: PEFT's to the last digits; with random factors, of ours."""
    row = ROWS[name]
    mine = written(injected(row), tmp_path / "ours")
    with talkative():
        peft.get_peft_model(row.base(), row.config()).save_pretrained(tmp_path / "theirs")
    peers = tensors_of(tmp_path / "theirs")
    magnitudes = [key for key in mine if "magnitude" in key]
    assert magnitudes
    for key in magnitudes:
        assert mine[key].shape == peers[key].shape
        if name != "dora_random":
            assert distance([peers[key]], [mine[key]]) <= row.bound
    # m / ‖W + ΔW‖ is one, so the weight is W + ΔW
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    plain = {key: tensor for key, tensor in mine.items() if key not in magnitudes}
    save_file(plain, tmp_path / "plain" / "adapter_model.safetensors")
    expected = run(explicit(row.base(), tmp_path / "plain"), row.x)
    assert distance(expected, run(load(row, tmp_path / "ours"), row.x)) <= row.bound


def test_trained_tokens_start_as_the_bases_rows(tmp_path: Path) -> None:
    row = ROWS["tokens_and_saved"]
    held = written(injected(row), tmp_path)
    rows_of_base = row.base().emb.weight.detach()[[7, 3]]
    delta = held["base_model.model.emb.token_adapter.trainable_tokens_delta"]
    assert torch.equal(delta, rows_of_base) or torch.equal(delta, rows_of_base[[1, 0]])
