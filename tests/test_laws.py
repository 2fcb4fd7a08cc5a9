"""The laws of lora_fx, each over tracers × models × dtypes, and over the options of the configuration.

Numbers are awkward throughout: prime dimensions, lora_alpha ≠ r, B ≠ 0. Beside each law that compares
numbers stands a test that it can fail. Law 5 is that of the ONNX exporters, law 6 stands in conformance/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from zoo import (
    BY_NAME,
    MODELS,
    SMALL,
    STACK,
    Case,
    assert_same_bits,
    bits,
    codes,
    distance,
    fingerprint,
    folded,
    frozen,
    in_mode,
    injected,
    lora_tensors,
    loss_of,
    randomise,
    run,
    tolerance,
    traced,
)

import lora_fx
from lora_fx import LoraConfig, LoraFxError

ZOO = (*SMALL, *MODELS)
MATRIX = [
    pytest.param(case, tracer, dtype, id=f"{case}-{tracer}-{str(dtype).removeprefix('torch.')}")
    for case in ZOO
    for tracer in case.tracers
    for dtype in (case.dtypes if case in SMALL or tracer == "trace" else case.dtypes[:1])
]
# The large models in the types that train: the law of folding is the one that looks at all four.
LIGHTER = [p for p in MATRIX if p.values[0] in SMALL or p.values[2] in (torch.float32, torch.bfloat16)]
FLOAT32 = [pytest.param(case, tracer, id=f"{case}-{tracer}") for case in ZOO for tracer in case.tracers]
CASES = [pytest.param(case, id=case.name) for case in ZOO]

# Every option that changes what is injected, on a model with layers, biases and a head.
OPTIONS: dict[str, dict[str, Any]] = {
    "rank_stabilised": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.3},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"target_modules": ["q_proj", "up"], "modules_to_save": ["norm", "head"]},
    "patterns": {"rank_pattern": {"up": 2, "layers.1.down": 7}, "alpha_pattern": {"q_proj": 11, "^head": 2.5}},
    "all_linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(q_proj|down)|head"},
    "layers": {"target_modules": ["q_proj", "down"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.up", "head"]},
    "rank_above_size": {"r": 19, "lora_alpha": 7},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.3},
    "lora_bias": {"lora_bias": True, "exclude_modules": ["up"]},  # which has no bias to fold it into
    "mica": {"init_lora_weights": "mica"},
}


def with_options(tracer: str, options: dict[str, Any]) -> fx.GraphModule:
    gm = traced(STACK, tracer)
    return lora_fx.inject(gm, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": STACK.targeted, **options}))


def each_mode(case: Case, tracer: str, gm: fx.GraphModule) -> tuple[bool, ...]:
    """The modes that say different things: graphs from `trace` hold both."""
    return (False, True) if tracer == "trace" else (gm.training,)


# Law 1: injecting is the identity, and leaves its input and the model untouched ---------------------


@pytest.mark.parametrize(("case", "tracer", "dtype"), LIGHTER)
def test_law_1_injecting_is_the_identity(case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    before = fingerprint(gm)
    base, adapted = frozen(gm), injected(case, gm)
    assert fingerprint(gm) == before
    for mode in each_mode(case, tracer, gm):
        if tracer == "trace":
            base.train(mode)
        assert_same_bits(run(base, arguments), run(in_mode(adapted, mode), arguments))


@pytest.mark.parametrize("case", CASES)
def test_law_1_leaves_the_model_untouched(case: Case) -> None:
    model, arguments = case.model(), case.arguments()
    next(model.parameters()).requires_grad_(False)
    for index, module in enumerate(model.modules()):  # modes may be mixed on purpose
        module.training = index == 1
    before, expected = fingerprint(model), run(model.eval(), arguments)
    for index, module in enumerate(model.modules()):
        module.training = index == 1
    tracer = "trace" if "trace" in case.tracers else case.tracers[0]
    gm = lora_fx.trace(model, *arguments) if tracer == "trace" else fx.symbolic_trace(model)
    adapted = randomise(injected(case, gm))
    if not case.name.startswith("modes"):  # batch norm's own statistics are the model's, and move in training
        loss_of(in_mode(adapted, True), arguments).backward()
    folded(case, adapted)
    assert fingerprint(model) == before
    assert_same_bits(run(model.eval(), arguments), expected)


@pytest.mark.parametrize(("case", "tracer", "dtype"), LIGHTER)
def test_law_1_is_not_vacuous(case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    adapted = injected(case, gm)
    base = run(adapted, arguments)
    moved = distance(run(randomise(adapted), arguments), base)
    # 100 × 4 eps of a 16-bit float is beyond 1, which no change reaches: three times the tolerance there.
    assert moved > (100 if (case.computes or dtype).itemsize > 2 else 3) * tolerance(case, dtype)


@pytest.mark.parametrize("tracer", STACK.tracers)
@pytest.mark.parametrize("option", OPTIONS)
def test_law_1_with_every_option(option: str, tracer: str) -> None:
    gm, arguments = traced(STACK, tracer), STACK.arguments()
    before = fingerprint(gm)
    assert_same_bits(run(frozen(gm), arguments), run(with_options(tracer, OPTIONS[option]).eval(), arguments))
    assert fingerprint(gm) == before


# Law 2: one step moves the adapter and nothing else -------------------------------------------------


@pytest.mark.parametrize(("case", "tracer", "dtype"), LIGHTER)
def test_law_2_a_step_moves_all_of_the_adapter_and_nothing_else(case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm = in_mode(randomise(injected(case, traced(case, tracer, dtype)), size=0.3), True)
    before = {name: tensor.detach().clone() for name, tensor in gm.state_dict().items()}
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm), lr=1.0)
    scale = 1 if dtype.itemsize > 2 else 64
    (scale * loss_of(gm, case.arguments(dtype))).backward()
    optimizer.step()
    moved = {name for name, tensor in gm.state_dict().items() if bits(tensor) != bits(before[name])}
    unreached = {n for n in lora_tensors(gm) if any(n.startswith(f"{path}.") for path in case.untrained)}
    statistics = {n for n, _ in gm.named_buffers() if "running_" in n or "num_batches" in n}
    expected = set(lora_tensors(gm)) - unreached
    if case.name == "cond":  # only the branch that was taken
        expected -= {name for name in expected if name.startswith(("a.", "b."))} - moved
        assert any(name.startswith(("a.", "b.")) for name in moved)
    assert moved - statistics == expected


@pytest.mark.parametrize(("case", "tracer"), FLOAT32)
def test_law_2_the_first_step_moves_b_only(case: Case, tracer: str) -> None:
    """A's gradient is B's transpose times something, and B is zero."""
    gm = in_mode(injected(case, traced(case, tracer)), True)
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(gm), lr=0.1, weight_decay=0)
    loss_of(gm, case.arguments()).backward()
    optimizer.step()
    moved = {name for name, b in lora_tensors(gm, "B").items() if b.detach().abs().max() > 0}
    unreached = {name for name in lora_tensors(gm, "B") if any(name.startswith(f"{p}.") for p in case.untrained)}
    missing = set(lora_tensors(gm, "B")) - moved - unreached
    assert all(name.startswith(("a.", "b.")) for name in missing) if case.name == "cond" else not missing
    assert all(p.grad is None for n, p in gm.named_parameters() if n not in lora_tensors(gm))


def test_law_2_trains_what_modules_to_save_and_bias_ask_for() -> None:
    gm = randomise(with_options("trace", OPTIONS["modules_to_save"] | {"bias": "all"})).train()
    before = {name: tensor.detach().clone() for name, tensor in gm.state_dict().items()}
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm), lr=1.0)
    loss_of(gm, STACK.arguments()).backward()
    optimizer.step()
    moved = {name for name, tensor in gm.state_dict().items() if bits(tensor) != bits(before[name])}
    saved = {name for name in before if ".norm." in name or name.startswith("head.") or name.endswith(".bias")}
    assert moved == set(lora_tensors(gm)) | saved


# Law 3: fold after inject gives the graph that was traced -------------------------------------------


@pytest.mark.parametrize(("case", "tracer", "dtype"), LIGHTER)
def test_law_3_fold_takes_inject_back(case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm = traced(case, tracer, dtype)
    adapted = injected(case, gm)
    result = folded(case, adapted)
    assert {n: p.requires_grad for n, p in gm.named_parameters()}.items() <= {
        n: p.requires_grad for n, p in result.named_parameters()
    }.items()
    assert_same_bits(run(gm, case.arguments(dtype)), run(result, case.arguments(dtype)))
    if case.unties:
        assert len(set(result.parameters())) == len(set(gm.parameters())) + 1
        return
    assert codes(result) == codes(gm)
    assert not lora_fx.compare_graphs(gm, result)


@pytest.mark.parametrize("tracer", STACK.tracers)
@pytest.mark.parametrize("option", OPTIONS)
def test_law_3_with_every_option(option: str, tracer: str) -> None:
    gm = traced(STACK, tracer)
    result = lora_fx.fold(with_options(tracer, OPTIONS[option]))
    assert codes(result) == codes(gm)
    assert not lora_fx.compare_graphs(gm, result)


@pytest.mark.parametrize(("case", "tracer"), FLOAT32)
def test_law_3_in_place(case: Case, tracer: str) -> None:
    if case.unties:
        pytest.skip("refused: see test_folding")
    gm = traced(case, tracer)
    private = frozen(gm).requires_grad_(True)  # the zoo's graph is shared, and this test writes into weights
    original = {name: tensor.clone() for name, tensor in private.state_dict().items()}
    adapted = randomise(injected(case, private))
    before = fingerprint(adapted)
    reference = folded(case, adapted)
    assert lora_fx.fold(adapted, inplace=True) is adapted
    assert codes(adapted) == codes(private)
    assert not lora_fx.compare_graphs(adapted, reference).values
    assert not lora_fx.compare_graphs(adapted, private)  # the base it shares tensors with is the merged model
    lora_fx.unfold(adapted)
    assert fingerprint(adapted) == before
    assert all(torch.equal(tensor, original[name]) for name, tensor in private.state_dict().items())


def test_law_3_is_not_vacuous() -> None:
    gm = traced(BY_NAME["mlp"])
    adapted = injected(BY_NAME["mlp"], gm)
    assert codes(adapted) != codes(gm)
    assert lora_fx.compare_graphs(gm, adapted)
    assert lora_fx.compare_graphs(gm, lora_fx.fold(randomise(adapted))).values == ("fc1.weight", "fc2.weight")


# Law 4: folded equals unfolded ----------------------------------------------------------------------


@pytest.mark.parametrize(("case", "tracer", "dtype"), MATRIX)
def test_law_4_folded_equals_unfolded(case: Case, tracer: str, dtype: torch.dtype) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    adapted = randomise(injected(case, gm))
    result = folded(case, adapted)
    for mode in each_mode(case, tracer, gm):
        expected, actual = run(in_mode(adapted, mode), arguments), run(in_mode(result, mode), arguments)
        assert [t.dtype for t in actual] == [t.dtype for t in run(gm, arguments)]
        assert distance(expected, actual) <= tolerance(case, dtype)


@pytest.mark.parametrize(("case", "tracer"), FLOAT32)
def test_law_4_fails_when_one_site_is_not_folded(case: Case, tracer: str) -> None:
    gm, arguments = traced(case, tracer), case.arguments()
    adapted = randomise(injected(case, gm))
    expected = run(adapted, arguments)
    for missing in case.targeted if case in SMALL else case.targeted[::11]:
        result = folded(case, adapted)
        site = next(site for site in lora_fx.find_sites(gm) if site.path == missing)
        weights = dict(result.named_parameters())
        name = next(n for n in (site.weight, *site.tied_with, f"{site.weight}_folded") if n in weights)
        original = dict(gm.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            weights[name].copy_(original.get(site.weight, original.get(name, next(iter(original.values())))))
        if (case.name == "cond" and missing in "ab") or missing == "noise":
            continue  # not on the path that these inputs take
        assert distance(expected, run(result, arguments)) > 2 * tolerance(case, torch.float32), missing


@pytest.mark.parametrize("tracer", STACK.tracers)
@pytest.mark.parametrize("option", OPTIONS)
def test_law_4_with_every_option(option: str, tracer: str) -> None:
    adapted, arguments = randomise(with_options(tracer, OPTIONS[option])).eval(), STACK.arguments()
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted):  # biases and saved modules move too
            parameter.add_(torch.randn_like(parameter) * 0.01)
    expected, base = run(adapted, arguments), run(frozen(traced(STACK, tracer)), arguments)
    assert distance(expected, run(lora_fx.fold(adapted), arguments)) <= tolerance(STACK, torch.float32)
    assert distance(expected, base) > 100 * tolerance(STACK, torch.float32)


@pytest.mark.parametrize(("case", "tracer"), FLOAT32)
def test_law_4_with_two_adapters(case: Case, tracer: str) -> None:
    adapted = injected(case, injected(case, traced(case, tracer)), name="second", r=2, lora_alpha=7, use_rslora=True)
    randomise(randomise(adapted, size=0.5), "second", size=0.5)
    arguments = case.arguments()
    expected = run(adapted, arguments)
    one = folded(case, adapted, adapters="second")
    assert lora_fx.adapter_names(one) == ("default",)
    assert distance(expected, run(one, arguments)) <= tolerance(case, torch.float32)
    assert distance(expected, run(lora_fx.fold(one), arguments)) <= 2 * tolerance(case, torch.float32)
    assert distance(expected, run(folded(case, adapted), arguments)) <= tolerance(case, torch.float32)


# Law 7: all tracers agree on the sites --------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_law_7_all_tracers_agree_on_the_sites(case: Case) -> None:
    found = {tracer: lora_fx.find_sites(traced(case, tracer)) for tracer in case.tracers}
    for sites in found.values():
        assert tuple(site.path for site in sites if site.is_linear) == case.sites
        # A name that nothing in the graph reads is lost in the graphs that users make themselves.
        assert [replace(site, aliases=()) for site in sites if not site.is_on_weight] == [
            replace(site, aliases=()) for site in found[case.tracers[0]] if not site.is_on_weight
        ]


# Law 8: save, then load, is the identity ------------------------------------------------------------


@pytest.mark.parametrize(("case", "tracer", "dtype"), LIGHTER)
def test_law_8_save_and_load_is_the_identity(case: Case, tracer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    gm, arguments = traced(case, tracer, dtype), case.arguments(dtype)
    adapted = randomise(injected(case, gm))
    lora_fx.save_adapter(adapted, tmp_path)
    if case.untrained:
        with pytest.warns(lora_fx.LoraFxWarning, match="no gradient"):
            loaded = lora_fx.load_adapter(gm, tmp_path)
    else:
        loaded = lora_fx.load_adapter(gm, tmp_path)
    assert not lora_fx.compare_graphs(adapted, loaded)
    assert_same_bits(run(adapted, arguments), run(loaded, arguments))
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }


@pytest.mark.parametrize("tracer", STACK.tracers)
@pytest.mark.parametrize("option", OPTIONS)
def test_law_8_with_every_option(option: str, tracer: str, tmp_path: Path) -> None:
    adapted, arguments = randomise(with_options(tracer, OPTIONS[option])), STACK.arguments()
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    lora_fx.save_adapter(adapted, tmp_path)
    loaded = lora_fx.load_adapter(traced(STACK, tracer), tmp_path)
    assert not lora_fx.compare_graphs(adapted, loaded)
    assert_same_bits(run(adapted.eval(), arguments), run(loaded.eval(), arguments))


# Law 9: two injections with disjoint targets equal one with both ------------------------------------


@pytest.mark.parametrize(("case", "tracer"), FLOAT32)
def test_law_9_disjoint_injections_add_up(case: Case, tracer: str) -> None:
    if len(case.targeted) < 2:
        pytest.skip("one site only")
    if case.name == "shared_parameter":
        first, second = ["a", "b"], ["out"]  # a and b are one weight, which has one adapter
    else:
        first, second = case.targeted[::2], case.targeted[1::2]
    gm, arguments = traced(case, tracer), case.arguments()
    both = randomise(injected(case, gm, use_rslora=True))
    split = injected(case, injected(case, gm, targets=first, use_rslora=True), "second", second, use_rslora=True)
    values = lora_tensors(both)
    with torch.no_grad():
        for adapter in ("default", "second"):
            for name, parameter in lora_tensors(split, adapter=adapter).items():
                parameter.copy_(values[name.replace(f".{adapter}.", ".default.")])
    assert_same_bits(run(both, arguments), run(split, arguments))
    assert_same_bits(run(folded(case, both), arguments), run(folded(case, split), arguments))


# Law 10: an error leaves everything as it was -------------------------------------------------------


def _broken_adapter(directory: Path) -> Path:
    gm = injected(BY_NAME["addmm"], traced(BY_NAME["addmm"]))
    lora_fx.save_adapter(gm, directory / "other")
    return directory / "other"


def _with_nan(gm: fx.GraphModule) -> fx.GraphModule:
    with torch.no_grad():
        list(lora_tensors(gm, "B").values())[-1].view(-1)[0] = float("nan")
    return gm


FAILURES = {
    "inject nothing hit": lambda gm, p: lora_fx.inject(
        gm, LoraConfig(target_modules=["fc1", "nope"]), adapter_name="x"
    ),
    "inject bad config": lambda gm, p: lora_fx.inject(gm, {"target_modules": ["fc1"], "r": 0}, adapter_name="x"),
    "inject taken name": lambda gm, p: lora_fx.inject(gm, LoraConfig(target_modules=["fc1"])),
    "inject bad name": lambda gm, p: lora_fx.inject(gm, LoraConfig(target_modules=["fc1"]), adapter_name="a.b"),
    "inject bad dtype": lambda gm, p: lora_fx.inject(
        gm, LoraConfig(target_modules=["fc1"]), adapter_name="x", adapter_dtype=torch.int8
    ),
    "inject other plan": lambda gm, p: lora_fx.inject(
        gm, lora_fx.make_plan(traced(BY_NAME["addmm"]), LoraConfig(target_modules=["c_attn"])), adapter_name="x"
    ),
    "plan": lambda gm, p: lora_fx.make_plan(gm, LoraConfig(target_modules="nope")),
    "fold unknown": lambda gm, p: lora_fx.fold(gm, adapters=["nope"]),
    "fold bad accumulate": lambda gm, p: lora_fx.fold(gm, accumulate=torch.float16),
    "fold NaN": lambda gm, p: lora_fx.fold(_with_nan(gm)),
    "fold NaN in place": lambda gm, p: lora_fx.fold(_with_nan(gm), inplace=True),
    "unfold": lambda gm, p: lora_fx.unfold(gm),
    "save NaN": lambda gm, p: lora_fx.save_adapter(_with_nan(gm), p / "new"),
    "save unknown": lambda gm, p: lora_fx.save_adapter(gm, p / "new", adapter_name="nope"),
    "save to a file": lambda gm, p: lora_fx.save_adapter(gm, p / "file"),
    "load nothing": lambda gm, p: lora_fx.load_adapter(gm, p / "nope", adapter_name="x"),
    "load another model's": lambda gm, p: lora_fx.load_adapter(gm, _broken_adapter(p), adapter_name="x"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_law_10_an_error_leaves_everything_as_it_was(failure: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    gm = randomise(injected(BY_NAME["mlp"], traced(BY_NAME["mlp"]), lora_dropout=0.1))
    gm = _with_nan(gm) if "NaN" in failure else gm
    base = fingerprint(traced(BY_NAME["mlp"]))
    before = fingerprint(gm)
    with pytest.raises(LoraFxError):
        FAILURES[failure](gm, tmp_path)
    assert fingerprint(gm) == before
    assert fingerprint(traced(BY_NAME["mlp"])) == base
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "not a directory"
