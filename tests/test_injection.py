"""inject: where A and B stand, what they start as, what is frozen, and what happens to hard cases of PEFT."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import zoo
from torch import fx, nn
from torch.nn import functional as F
from zoo import BY_NAME, STACK, distance, folded, injected, lora_tensors, randomise, run, traced

import lora_fx
from lora_fx import AdapterError, GraphError, LoraConfig, LoraFxWarning, TargetError
from lora_fx.applications import Reading, read_applications
from lora_fx.graph_module import record_of


def test_names_shapes_and_dtypes() -> None:
    gm = injected(STACK, traced(STACK), targets=["q_proj"], rank_pattern={"layers.1.q_proj": 2})
    shapes = {name: tuple(p.shape) for name, p in lora_tensors(gm).items()}
    assert shapes == {
        "body.layers.0.q_proj.lora_A.default.weight": (3, 7),
        "body.layers.0.q_proj.lora_B.default.weight": (7, 3),
        "body.layers.1.q_proj.lora_A.default.weight": (2, 7),
        "body.layers.1.q_proj.lora_B.default.weight": (7, 2),
    }
    stored = injected(BY_NAME["addmm"], traced(BY_NAME["addmm"]), targets=["c_attn"])
    assert [tuple(p.shape) for p in lora_tensors(stored).values()] == [(3, 7), (11, 3)]


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(base, given, expected) -> None:
    case = BY_NAME["mlp"]
    gm = lora_fx.inject(traced(case, "trace", base), LoraConfig(target_modules=["fc1"]), adapter_dtype=given)
    assert {p.dtype for p in lora_tensors(gm).values()} == {expected}
    out = run(randomise(gm), case.arguments(base))
    assert out[0].dtype == base
    coarsest = base if torch.finfo(base).eps > torch.finfo(expected).eps else expected
    assert distance(out, run(lora_fx.fold(gm), case.arguments(base))) <= zoo.tolerance(case, coarsest)


@pytest.mark.parametrize("kind", [True, "gaussian", False])
def test_initial_values(kind) -> None:
    gm = lora_fx.trace(nn.Linear(997, 499).eval(), torch.randn(3, 997))
    gm = lora_fx.inject(gm, LoraConfig(target_modules=[""], r=31, init_lora_weights=kind))
    a, b = lora_fx.lora_parameters(gm)
    if kind == "gaussian":
        assert abs(float(a.detach().std()) * 31 - 1) < 0.03
        assert abs(float(a.detach().mean())) < 0.002
    else:
        bound = 1 / math.sqrt(997)
        assert 0.99 * bound < float(a.detach().abs().max()) <= bound
        assert abs(float(a.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.02
    if kind is False:
        bound = 1 / math.sqrt(31)
        assert 0.99 * bound < float(b.detach().abs().max()) <= bound
    else:
        assert not b.detach().any()


def test_the_same_seed_gives_the_same_adapter() -> None:
    gm = traced(STACK)
    torch.manual_seed(7)
    first = injected(STACK, gm)
    torch.manual_seed(7)
    second = injected(STACK, gm)
    assert not lora_fx.compare_graphs(first, second)


def test_base_is_frozen_shared_and_its_flags_come_back() -> None:
    model = BY_NAME["mlp"].model()
    model.fc1.bias.requires_grad_(False)
    gm = lora_fx.trace(model, *BY_NAME["mlp"].arguments())
    adapted = injected(BY_NAME["mlp"], gm)
    own = {id(p) for p in lora_tensors(adapted).values()}
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == own
    assert {id(p) for p in lora_fx.lora_parameters(adapted)} == own
    assert model.fc1.weight.requires_grad
    assert adapted.get_parameter("fc1.weight").data_ptr() == model.fc1.weight.data_ptr()
    twice = injected(BY_NAME["mlp"], adapted, name="second")
    result = lora_fx.fold(twice)
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in model.parameters()]


def test_scaling_is_the_explicit_delta() -> None:
    """W + s·B·A in float64, for every option that changes s or the shape."""
    for options in ({}, {"use_rslora": True}, {"rank_pattern": {"fc1": 2}}, {"alpha_pattern": {"fc1": 11}}):
        case = BY_NAME["mlp"]
        gm = traced(case, "trace", torch.float64)
        adapted = randomise(injected(case, gm, **options))
        model = case.model(torch.float64)
        r, alpha = (2 if "rank_pattern" in options else 3), (11 if "alpha_pattern" in options else 5)
        with torch.no_grad():
            for name, rank, a in (("fc1", r, alpha), ("fc2", 3, 5)):
                scaling = a / math.sqrt(rank) if "use_rslora" in options else a / rank
                low, up = (adapted.get_parameter(f"{name}.lora_{half}.default.weight") for half in "AB")
                assert low.shape[0] == rank
                model.get_submodule(name).weight += scaling * up @ low
        x = case.arguments(torch.float64)
        assert distance(run(model, x), run(adapted, x)) < zoo.tolerance(case, torch.float64)
        assert distance(run(model, x), run(lora_fx.fold(adapted), x)) < zoo.tolerance(case, torch.float64)


def test_two_adapters_add_up() -> None:
    case = BY_NAME["mlp"]
    gm, x = traced(case, "trace", torch.float64), case.arguments(torch.float64)
    both = injected(case, injected(case, gm), name="second", r=2, lora_alpha=7)
    randomise(randomise(both), "second")
    assert lora_fx.adapter_names(both) == ("default", "second")
    model = case.model(torch.float64)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            for adapter, scaling in (("default", 5 / 3), ("second", 7 / 2)):
                low, up = (both.get_parameter(f"{name}.lora_{half}.{adapter}.weight") for half in "AB")
                model.get_submodule(name).weight += scaling * up @ low
    assert distance(run(model, x), run(both, x)) < 2 * zoo.tolerance(case, torch.float64)
    assert [len(lora_fx.lora_parameters(both, name)) for name in ("default", "second", None)] == [4, 4, 8]


def test_dropout_acts_in_training_only_and_on_the_adapter_only() -> None:
    case = BY_NAME["functional"]
    gm, x = traced(case), case.arguments()
    adapted = injected(case, gm, lora_dropout=0.5)
    for mode in (True, False):  # B = 0
        zoo.assert_same_bits(run(zoo.frozen(gm), x), run(adapted.train(mode), x))
    randomise(adapted)
    assert distance(run(adapted.train(), x, seed=1), run(adapted, x, seed=2)) > 0.01
    zoo.assert_same_bits(run(adapted.eval(), x, seed=1), run(adapted, x, seed=2))
    zoo.assert_same_bits(run(adapted.train(), x, seed=1), run(adapted, x, seed=1))


def test_dropout_has_the_probability_that_was_asked_for() -> None:
    gm = lora_fx.trace(nn.Linear(7, 5, bias=False).eval(), torch.randn(3, 7))
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=[""], r=7, lora_dropout=0.3))).train()
    x = torch.zeros(4001, 7)
    x[:, 0] = 1
    with torch.no_grad():
        delta = adapted(x) - gm(x)
    dropped = float((delta.abs().sum(1) < 1e-6).float().mean())
    assert abs(dropped - 0.3) < 0.03


def test_fields_of_peft_and_mappings_are_taken() -> None:
    import peft

    gm = traced(BY_NAME["mlp"])
    for config in (
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc1"]),
        {"r": 3, "lora_alpha": 5, "target_modules": ["fc1"]},
        lora_fx.make_plan(gm, LoraConfig(r=3, lora_alpha=5, target_modules=["fc1"])),
    ):
        adapted = lora_fx.inject(gm, config)
        assert [tuple(p.shape) for p in lora_fx.lora_parameters(adapted)] == [(3, 7), (11, 3)]


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("", "letters, digits"),
        ("a.b", "letters, digits"),
        ("../x", "letters, digits"),
        ("a b", "letters, digits"),
        ("x" * 65, "1 to 64"),
        ("ä", "letters, digits"),
        ("x\n", "letters, digits"),
        (3, "letters, digits"),
        (None, "letters, digits"),
        ("forward", "attribute of every torch module"),
        ("training", "attribute of every torch module"),
        ("parameters", "attribute of every torch module"),
        ("class", "word of Python"),
    ],
)
def test_adapter_names_are_checked(name, fragment: str) -> None:
    with pytest.raises(AdapterError, match=fragment):
        lora_fx.inject(traced(BY_NAME["mlp"]), LoraConfig(target_modules=["fc1"]), adapter_name=name)


@pytest.mark.parametrize("name", ["weight", "fc1", "default", "lora_A", "0", "a-b", "_x", "bias"])
def test_awkward_adapter_names_work(name: str, tmp_path) -> None:
    """PEFT loses keys when an adapter is called like a module (5.0 #17)."""
    case = BY_NAME["mlp"]
    gm, x = traced(case), case.arguments()
    both = injected(case, injected(case, gm, name="default" if name != "default" else "other"), name=name)
    randomise(both, name)
    expected = run(both, x)
    lora_fx.save_adapter(both, tmp_path, adapter_name=name)
    zoo.assert_same_bits(expected, run(lora_fx.load_adapter(gm, tmp_path, adapter_name=name), x))
    assert distance(expected, run(lora_fx.fold(both), x)) < zoo.tolerance(case, torch.float32)


def test_a_user_attribute_in_the_way_is_refused() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Module()
            self.fc.weight = nn.Parameter(torch.randn(5, 7))
            self.fc.lora_A = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return F.linear(x, self.fc.weight) * self.fc.lora_A.sum()

    gm = lora_fx.trace(Taken().eval(), torch.randn(3, 7))
    with pytest.raises(GraphError, match=r"already has an attribute 'fc\.lora_A'.*rename it"):
        lora_fx.inject(gm, LoraConfig(target_modules=["fc"]))


def test_the_plan_must_be_of_this_graph() -> None:
    plan = lora_fx.make_plan(traced(BY_NAME["called_twice"]), LoraConfig(target_modules=["out"]))
    renamed = lora_fx.trace(_Renamed().eval(), torch.randn(3, 7))
    with pytest.raises(TargetError, match=r"the plan is of another graph.*7 → 5 there and 11 → 5 here.*make_plan"):
        lora_fx.inject(renamed, plan)
    with pytest.raises(TargetError, match=r"the plan is of another graph: it has a site 'out', this one has not"):
        lora_fx.inject(traced(BY_NAME["mlp"]), plan)


class _Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.out(self.fc(x).tanh())


# Trained in full ------------------------------------------------------------------------------------


def test_modules_to_save_are_copies_of_the_bases_tensors() -> None:
    model = STACK.model()
    gm = lora_fx.trace(model, *STACK.arguments())
    adapted = injected(STACK, gm, targets=["up"], modules_to_save=["head", "norm"])
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("head.") or ".norm." in n}
    assert all(adapted.get_parameter(n).data_ptr() != model.get_parameter(n).data_ptr() for n in trained)
    with torch.no_grad():
        adapted.get_parameter("head.weight").add_(1)
    zoo.assert_same_bits(run(model, STACK.arguments()), run(gm, STACK.arguments()))
    plan = record_of(adapted).adapters["default"].plan
    assert any(s.path == "head" and "modules_to_save" in s.reason for s in plan.skipped)


def test_bias_trains_what_it_says() -> None:
    gm = traced(STACK)
    own = {n for n, _ in gm.named_parameters() if n.endswith(".bias")}
    for mode, expected in (
        ("none", set()),
        ("all", own),
        ("lora_only", {f"body.layers.{i}.q_proj.bias" for i in (0, 1)}),
    ):
        adapted = injected(STACK, gm, targets=["q_proj", "up"], bias=mode)
        assert {n for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n} == expected


def test_a_tensor_is_trained_in_full_by_one_adapter() -> None:
    first = injected(STACK, traced(STACK), targets=["up"], modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"adapter 'default' already trains 'head\.(bias|weight)' in full"):
        injected(STACK, first, "second", ["up"], modules_to_save=["head"])


def test_a_tied_tensor_is_not_trained_in_full_alone() -> None:
    with pytest.raises(TargetError, match=r"(lm_head|embed).*is tied with.*Train both"):
        injected(BY_NAME["tied_head"], traced(BY_NAME["tied_head"]), targets=["fc"], modules_to_save=["lm_head"])
    both = injected(
        BY_NAME["tied_head"], traced(BY_NAME["tied_head"]), targets=["fc"], modules_to_save=["lm_head", "embed"]
    )
    weights = {
        id(p) for n, p in both.named_parameters(remove_duplicate=False) if n in ("lm_head.weight", "embed.weight")
    }
    assert len(weights) == 1


# What PEFT gets wrong in silence ---------------------------------------------------------------------


def explicit(case: zoo.Case, adapted: fx.GraphModule, targets: dict[str, str]) -> nn.Module:
    """The model with W + s·B·A written into its weights in float64: {site path: weight's name in the model}."""
    model = case.model(torch.float64)
    sites = record_of(adapted).adapters["default"].sites
    with torch.no_grad():
        for path, weight in targets.items():
            site = sites[path]
            low, up = (adapted.get_parameter(n).double() for n in (site.lora_a, site.lora_b))
            delta = site.scaling * up @ low
            model.get_parameter(weight).add_(delta.T if site.layout.stored_in_out else delta)
    return model


HARD = [
    # (case, targets, {path: the model's weight}), in PEFT's list of defects:
    ("multi_head", ["out_proj"], {"attn.out_proj": "attn.out_proj.weight"}),  # 1, 3
    ("encoder_layer", ["linear1", "linear2"], {f"layer.linear{i}": f"layer.linear{i}.weight" for i in (1, 2)}),  # 2
    ("module_weight", ["fc"], {"fc": "fc.weight"}),  # 9
    ("subclasses", ["scaled"], {"scaled": "scaled.weight"}),  # 10
    ("shared_module", ["a"], {"a": "a.weight"}),  # 12
    ("shared_module", ["b"], {"a": "a.weight"}),  # 12
    ("shared_parameter", ["a", "b"], {"a": "a.weight"}),  # 13
    ("called_twice", ["fc"], {"fc": "fc.weight"}),
    ("addmm_factors", [""], {"": "weight"}),
    ("products", ["left", "left_t", "mm"], {n: n for n in ("left", "left_t", "mm")}),
    ("transposed", ["c", "d", "e"], {n: n for n in ("c", "d", "e")}),
    ("einsum", ["a", "b", "c", "d"], {n: n for n in "abcd"}),
]


@pytest.mark.parametrize(
    ("case", "tracer", "targets", "weights"),
    [
        pytest.param(BY_NAME[name], tracer, targets, weights, id=f"{name}-{targets[0]}-{tracer}")
        for name, targets, weights in HARD
        for tracer in BY_NAME[name].tracers
        if not (targets == ["b"] and tracer in ("symbolic", "strict"))  # the second name is not in those graphs
    ],
)
def test_the_explicit_weight_is_the_judge(case, tracer, targets, weights) -> None:
    x = case.arguments(torch.float64)
    base = case.model(torch.float64)
    adapted = randomise(injected(case, traced(case, tracer, torch.float64), targets=targets))
    expected = run(explicit(case, adapted, weights), x)
    bound = zoo.tolerance(case, torch.float64)
    assert distance(expected, run(adapted, x)) <= bound
    assert distance(expected, run(folded(case, adapted), x)) <= bound
    assert distance(expected, run(base, x)) > 100 * bound


@pytest.mark.parametrize("tracer", zoo.TRACERS)
def test_one_of_two_modules_with_one_weight(tracer: str) -> None:
    """5.0 #13: PEFT's merge changes the other module too."""
    case = BY_NAME["shared_parameter"]
    x, gm = case.arguments(torch.float64), traced(case, tracer, torch.float64)
    adapted = randomise(injected(case, gm, targets=["b"]))
    model = case.model(torch.float64)
    model.b.weight = nn.Parameter(model.a.weight.detach().clone())
    low, up = (
        lora_tensors(adapted, "A")["b.lora_A.default.weight"],
        lora_tensors(adapted, "B")["b.lora_B.default.weight"],
    )
    with torch.no_grad():
        model.b.weight += 5 / 3 * up @ low
    with pytest.warns(LoraFxWarning, match="tied with a.weight.*untied"):
        result = lora_fx.fold(adapted)
    bound = zoo.tolerance(case, torch.float64)
    assert distance(run(model, x), run(adapted, x)) <= bound
    assert distance(run(model, x), run(result, x)) <= bound
    zoo.assert_same_bits([result.get_parameter("a.weight")], [gm.get_parameter("a.weight")])


@pytest.mark.parametrize("tracer", zoo.TRACERS)
def test_a_tied_head_is_untied_on_fold(tracer: str) -> None:
    """5.0 #14: PEFT's merge is wrong in every configuration."""
    case = BY_NAME["tied_head"]
    x, gm = case.arguments(torch.float64), traced(case, tracer, torch.float64)
    adapted = randomise(injected(case, gm, targets=["lm_head"]))
    model = case.model(torch.float64)
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    low, up = lora_fx.lora_parameters(adapted)
    with torch.no_grad():
        model.lm_head.weight += 5 / 3 * up @ low
    with pytest.warns(LoraFxWarning, match="'lm_head.weight' was tied with embed.weight.*untied it"):
        result = lora_fx.fold(adapted)
    bound = zoo.tolerance(case, torch.float64)
    assert distance(run(model, x), run(adapted, x)) <= bound
    assert distance(run(model, x), run(result, x)) <= bound
    zoo.assert_same_bits([dict(result.named_parameters(remove_duplicate=False))["embed.weight"]], [model.embed.weight])
    assert set(result.state_dict()) >= {"embed.weight", "lm_head.weight"}


def test_tied_blocks_that_are_views_of_one_storage() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage = torch.randn(12, 7, dtype=torch.float64)
            self.q, self.k = nn.Parameter(storage[:5]), nn.Parameter(storage[5:])

        def forward(self, x):
            return F.linear(x, self.q), F.linear(x, self.k)

    x = torch.randn(3, 7, dtype=torch.float64)
    gm = lora_fx.trace(Fused().eval(), x)
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=["q"], r=3, lora_alpha=5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraFxWarning)
        result = lora_fx.fold(adapted)
    assert distance(run(adapted, ((x,), {})), run(result, ((x,), {}))) < 1e-14
    zoo.assert_same_bits([result.get_parameter("k")], [gm.get_parameter("k")])


def test_rank_above_the_size_and_zero_sizes() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return self.fc(x)

    gm = lora_fx.trace(Empty().eval(), torch.randn(3, 7))
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=["fc"], r=64, lora_alpha=3)))
    x = ((torch.randn(0, 7),), {})
    assert run(adapted, x)[0].shape == (0, 5)
    x = ((torch.randn(3, 7),), {})
    assert distance(run(adapted, x), run(lora_fx.fold(adapted), x)) < 1e-5


def test_expanded_weights_are_copied_on_fold() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    model[0].weight = nn.Parameter(torch.randn(1, 7).expand(5, 7))
    x = torch.randn(3, 7)
    gm = lora_fx.trace(model, x)
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=["0"])))
    assert distance([adapted(x).detach()], [lora_fx.fold(adapted)(x).detach()]) < 1e-5
    with pytest.raises(lora_fx.FoldError, match="overlap in memory"):
        lora_fx.fold(adapted, inplace=True)


def test_injecting_keeps_the_users_graph_usable() -> None:
    for tracer in zoo.TRACERS:
        gm = copy.deepcopy(traced(STACK, tracer))
        injected(STACK, gm)
        gm.graph.lint()
        gm.recompile()
        assert len(run(gm, STACK.arguments())) == 1


def test_modules_to_save_leaves_another_adapters_parameters_to_it(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 3)).eval()
    gm = lora_fx.trace(model, torch.randn(3, 7))
    one = lora_fx.inject(gm, LoraConfig(target_modules=["1"]), adapter_name="one")
    two = LoraConfig(target_modules=["0"], modules_to_save=["1"])
    both = lora_fx.inject(one, two, adapter_name="two")
    trained = {id(p) for p in lora_fx.lora_parameters(both, "two")}
    assert id(both.get_parameter("1.weight")) in trained
    assert id(both.get_parameter("1.lora_A.one.weight")) not in trained
    lora_fx.save_adapter(both, tmp_path, adapter_name="two")
    lora_fx.load_adapter(gm, tmp_path)


def test_a_plan_of_another_graph_is_refused_for_what_it_trains_in_full() -> None:
    def traced(*names: str) -> lora_fx.LoraGraphModule:
        model = nn.Sequential()
        for name in names:
            model.add_module(name, nn.Linear(7, 7))
        return lora_fx.trace(model.eval(), torch.randn(3, 7))

    plan = lora_fx.make_plan(traced("a", "head"), LoraConfig(target_modules=["a"], modules_to_save=["head"]))
    with pytest.raises(lora_fx.TargetError, match=r"trains 'head.weight' in full"):
        lora_fx.inject(traced("a", "other"), plan)


def test_a_target_means_modules_of_every_kind_that_the_call_reaches() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.attn, self.unused = nn.Conv1d(3, 7, 1), nn.Module(), nn.Linear(7, 7)
            self.attn.proj, self.patch.proj, self.unused.proj = nn.Linear(7, 7), nn.Conv1d(7, 7, 1), nn.Linear(2, 2)

        def forward(self, x):
            return self.attn.proj(self.patch.proj(self.patch(x)).transpose(1, 2))

    gm = lora_fx.trace(Patches().eval(), torch.randn(2, 3, 5))
    plan = lora_fx.make_plan(gm, LoraConfig(target_modules=["proj"]))
    assert [(target.site.path, target.site.op) for target in plan.targets] == [
        ("patch.proj", "conv1d"),
        ("attn.proj", "linear"),
    ]
    plan = lora_fx.make_plan(gm, LoraConfig(target_modules=["proj"], exclude_modules=["patch.proj"]))
    assert [target.site.path for target in plan.targets] == ["attn.proj"]


@pytest.mark.parametrize("planned", [False, True])
def test_the_graph_is_read_once(planned, monkeypatch) -> None:
    gm = lora_fx.trace(nn.Linear(7, 5).eval(), torch.randn(3, 7))
    given = LoraConfig(target_modules=[""])
    given = lora_fx.make_plan(gm, given) if planned else given
    graphs = []

    def counting(of: fx.GraphModule) -> Reading:
        graphs.append(of.graph)
        return read_applications(of)

    for module in ("injection", "plan"):
        monkeypatch.setattr(f"lora_fx.{module}.read_applications", counting)
    result = lora_fx.inject(gm, given)
    assert graphs == [result.graph]


def test_an_optimised_injection_compiles_the_rewritten_graph_alone() -> None:
    gm = lora_fx.trace(nn.Sequential(nn.Linear(7, 5), nn.GELU()), torch.randn(3, 7)).train()
    known = len(record_of(gm).compiled)
    result = lora_fx.inject(gm, LoraConfig(target_modules=["0"]), optimize=True)
    assert [lowering for _, lowering, _ in record_of(result).compiled[known:]] == [record_of(result).lowering]
    assert record_of(result).lowering is not None
