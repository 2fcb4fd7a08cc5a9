"""Sites: every spelling of an applied parameter, what is shared with what, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from zoo import BY_NAME, SMALL, STACK, Case, exported, injected, randomise, traced

import lora_fx
from lora_fx import GraphError, LoraConfig, LoraFxWarning, Site, TargetError
from lora_fx.layouts import Experts, Matrix
from lora_fx.sites import Sites

# name → {path: (op, in, out, stored (in, out), calls)}
SPELLINGS = {
    "mlp": {"fc1": ("linear", 7, 11, False, 1), "fc2": ("linear", 11, 5, False, 1)},
    "functional": {"w": ("linear", 7, 11, False, 1), "inner": ("linear", 11, 5, False, 1)},
    "module_weight": {"fc": ("linear", 7, 11, False, 1)},
    "addmm": {"c_attn": ("addmm", 7, 11, True, 1), "c_proj": ("addmm", 11, 5, True, 1)},
    "addmm_factors": {"": ("addmm", 7, 11, True, 1)},
    "products": {
        "at": ("matmul", 7, 11, True, 1),
        "matmul": ("matmul", 11, 13, False, 1),
        "method": ("matmul", 13, 5, True, 1),
        "mm": ("mm", 5, 17, True, 1),
        "left": ("matmul", 3, 2, False, 1),
        "left_t": ("matmul", 2, 11, True, 1),
    },
    "transposed": {
        "a": ("matmul", 7, 11, False, 1),
        "b": ("matmul", 11, 13, False, 1),
        "c": ("linear", 13, 5, True, 1),
        "d": ("linear", 5, 17, True, 1),
        "e": ("linear", 17, 3, True, 1),
    },
    "vector": {"mv": ("mv", 7, 11, False, 1), "matmul": ("matmul", 11, 5, False, 1)},
    "einsum": {
        "a": ("einsum", 7, 11, False, 1),
        "b": ("einsum", 11, 13, True, 1),
        "c": ("einsum", 13, 5, False, 1),
        "d": ("einsum", 3, 2, True, 1),
    },
    "called_twice": {"fc": ("linear", 7, 7, False, 2), "out": ("linear", 7, 5, False, 1)},
    "shared_module": {"a": ("linear", 7, 7, False, 2), "out": ("linear", 7, 5, False, 1)},
    "multi_head": {
        "attn.in_proj_weight": ("linear", 14, 42, False, 1),
        "attn.out_proj": ("linear", 14, 14, False, 1),
        "fc": ("linear", 14, 5, False, 1),
    },
}


@pytest.mark.parametrize(
    ("case", "tracer"),
    [pytest.param(BY_NAME[name], t, id=f"{name}-{t}") for name in SPELLINGS for t in BY_NAME[name].tracers],
)
def test_spellings(case: Case, tracer: str) -> None:
    sites = lora_fx.find_sites(traced(case, tracer))
    found = {s.path: (s.op, s.in_features, s.out_features, s.fan_in_fan_out, s.calls) for s in sites}
    assert found == SPELLINGS[case.name]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SMALL])
def test_an_injected_graph_has_the_same_sites(case: Case) -> None:
    for tracer in case.tracers:
        gm = traced(case, tracer)
        assert lora_fx.find_sites(injected(case, gm)) == lora_fx.find_sites(gm)


def test_ties_and_aliases() -> None:
    module = lora_fx.find_sites(traced(BY_NAME["shared_module"]))[0]
    assert (module.aliases, module.tied_with, module.names) == (("b",), (), ("a", "b"))
    a, b, out = lora_fx.find_sites(traced(BY_NAME["shared_parameter"]))
    assert (a.tied_with, b.tied_with, out.tied_with) == (("b.weight",), ("a.weight",), ())
    embed, _, head = lora_fx.find_sites(traced(BY_NAME["tied_head"]))
    assert (embed.op, embed.fan_in_fan_out, embed.tied_with) == ("embedding", True, ("lm_head.weight",))
    assert (head.path, head.weight, head.tied_with, head.is_output_head) == (
        "lm_head",
        "lm_head.weight",
        ("embed.weight",),
        True,
    )


@pytest.mark.parametrize(("start", "tied"), [(5, ((), ())), (4, (("k",), ("q",)))])
def test_views_of_one_storage_are_tied_if_they_overlap(start: int, tied: tuple[tuple[str, ...], ...]) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage = torch.randn(12, 7)
            self.q, self.k = nn.Parameter(storage[:5]), nn.Parameter(storage[start:])

        def forward(self, x):
            return F.linear(x, self.q), F.linear(x, self.k)

    for tracer in zoo.TRACERS:
        q, k = lora_fx.find_sites(zoo.trace_with(tracer, Fused().eval(), (torch.randn(3, 7),), {}))
        assert (q.tied_with, k.tied_with) == tied


def test_layer_numbers_biases_and_heads() -> None:
    sites = lora_fx.find_sites(traced(STACK))
    assert [site.layer_index for site in sites] == [0, 0, 0, 1, 1, 1, None]
    assert [site.bias for site in sites[:3]] == ["body.layers.0.q_proj.bias", None, "body.layers.0.down.bias"]
    assert [site.path for site in sites if site.is_output_head] == ["head"]
    assert [site.dtype for site in sites] == [torch.float32] * 7


@pytest.mark.parametrize("tracer", zoo.EXPORTED)
def test_sub_graphs(tracer: str) -> None:
    frozen, fc = lora_fx.find_sites(traced(BY_NAME["no_grad"], tracer))
    assert (frozen.gets_gradient, fc.gets_gradient) == (False, True)
    assert [site.path for site in lora_fx.find_sites(traced(BY_NAME["cond"], tracer))] == ["c", "a", "b"]


def test_find_all_linear_names() -> None:
    assert lora_fx.find_all_linear_names(traced(STACK)) == ["down", "q_proj", "up"]
    assert lora_fx.find_all_linear_names(traced(BY_NAME["tied_head"])) == ["fc"]
    names = lora_fx.find_all_linear_names(traced(BY_NAME["multi_head"]))
    assert names == ["attn.in_proj_weight", "out_proj"] or names == ["in_proj_weight", "out_proj"]


def test_find_all_linear_names_never_means_the_head() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Module()
            self.body.out = nn.Linear(7, 7)
            self.out = nn.Linear(7, 5)

        def forward(self, x):
            return self.out(torch.tanh(self.body.out(x)))

    gm = lora_fx.trace(Model().eval(), torch.randn(3, 7))
    plan = lora_fx.make_plan(gm, LoraConfig(target_modules=lora_fx.find_all_linear_names(gm)))
    assert [target.site.path for target in plan.targets] == ["body.out"]


@pytest.mark.parametrize(
    ("after", "is_head"),
    [
        (lambda y: y, True),
        (lambda y: F.softmax(y, -1), True),
        (lambda y: F.log_softmax(y, -1).unsqueeze(0), True),
        (lambda y: torch.sigmoid(y).squeeze(-1), True),
        (lambda y: y * 0.5, True),
        (lambda y: 30 * torch.tanh(y / 30), True),
        (lambda y: (y, y.shape[0]), True),
        (lambda y: torch.tanh(y), False),
        (lambda y: F.relu(y), False),
        (lambda y: F.layer_norm(y, (5,)), False),
        (lambda y: y * y, False),
    ],
)
def test_what_may_stand_between_a_head_and_the_output(after, is_head: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return after(self.fc(x))

    for tracer in ("trace", "symbolic"):
        gm = zoo.trace_with(tracer, Model().eval(), (torch.randn(3, 7),), {})
        assert lora_fx.find_sites(gm)[0].is_output_head == is_head, tracer


@pytest.mark.parametrize("tracer", ["trace", "symbolic"])
def test_a_head_may_have_a_stored_bias_added_that_is_cast_first(tracer: str) -> None:
    class Bart(nn.Module):  # as in its lm_head with final_logits_bias
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gate = nn.Linear(7, 5), nn.Linear(7, 5)
            self.register_buffer("final_logits_bias", torch.randn(1, 5))

        def forward(self, x):
            return self.fc(x) + self.final_logits_bias.to(x.device), self.gate(x) + x.sum().to(x.dtype)

    gm = zoo.trace_with(tracer, Bart().eval(), (torch.randn(3, 7),), {})
    assert [site.path for site in lora_fx.find_sites(gm) if site.is_output_head] == ["fc"]


def test_a_grouped_product_with_scales_is_none_to_adapt() -> None:
    """The weight is what its scales make of it, and not the parameter."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    arguments = (x, weight, graph.placeholder("scale_a"), graph.placeholder("scale_b"))
    graph.output((graph.call_function(torch.ops.aten._scaled_grouped_mm.default, arguments),))
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(2, 16, 16))
    assert [site.op for site in lora_fx.find_sites(fx.GraphModule(root, graph))] != ["grouped_mm"]


def test_sites_print_as_a_table() -> None:
    text = str(lora_fx.find_sites(traced(BY_NAME["tied_head"])))
    assert "fc       linear     7 → 7" in text
    assert "tied with embed.weight; output head" in text
    assert "(root)" in str(lora_fx.find_sites(traced(BY_NAME["root"])))
    assert "stored (in, out)" in str(lora_fx.find_sites(traced(BY_NAME["addmm"])))
    assert "called 2 times; also named b" in str(lora_fx.find_sites(traced(BY_NAME["shared_module"])))


# What is no site ------------------------------------------------------------------------------------


def _wn() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(7, 11))


def _pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(7, 11), "weight", 0.3)


def _old_wn() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(7, 11))


class Wrapped(nn.Module):
    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc
        self.other = nn.Linear(7, 11)

    def forward(self, x):
        return self.fc(x) + self.other(x)


@pytest.mark.parametrize("tracer", zoo.TRACERS)
@pytest.mark.parametrize("make", [_wn, _pruned, _old_wn, lambda: parametrizations.spectral_norm(nn.Linear(7, 11))])
def test_a_computed_weight_is_refused_not_adapted_in_vain(make, tracer: str) -> None:
    """PEFT adapts it, and loses the adapter when it merges (5.0 #8)."""
    try:
        gm = zoo.trace_with(tracer, Wrapped(make()).eval(), (torch.randn(3, 7),), {})
    except Exception as error:  # strict export and symbolic_trace cannot take all of them
        pytest.skip(f"torch cannot trace it: {type(error).__name__}")
    assert [site.path for site in lora_fx.find_sites(gm) if site.is_linear] == ["other"]
    with pytest.raises(TargetError, match=r"'fc', which cannot be adapted: its weight .*exclude_modules=\['fc'\]"):
        lora_fx.make_plan(gm, LoraConfig(target_modules=["fc", "other"]))
    with pytest.warns(LoraFxWarning, match="all-linear leaves out 'fc'"):
        plan = lora_fx.make_plan(gm, LoraConfig(target_modules=r"all-linear"))
    assert any("cannot be adapted" in skipped.reason for skipped in plan.skipped)


class NoSites(nn.Module):
    """Products and layers that are no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3)
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("table", torch.randn(7, 5))
        self.batched = nn.Parameter(torch.randn(2, 5, 5))
        self.scale = nn.Parameter(torch.randn(5, 5))

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids)))
        y = x @ x.transpose(1, 2)
        x = torch.bmm(y, x)
        x = F.linear(x, self.table.T @ self.table)
        x = torch.einsum("bij,bjk->bik", x, self.batched) if x.shape[-1] == x.shape[-2] else x * self.scale.sum()
        return x + torch.einsum("ij,bij->bij", self.scale, x)


@pytest.mark.parametrize("tracer", zoo.EXPORTED)
def test_must_not_fire(tracer: str) -> None:
    ids = torch.randint(0, 11, (2, 3))
    gm = zoo.trace_with(tracer, NoSites().eval(), (ids,), {})
    assert not any(site.is_linear for site in lora_fx.find_sites(gm))
    with pytest.raises(TargetError, match="leaves no site to adapt"), pytest.warns(LoraFxWarning):
        lora_fx.inject(gm, LoraConfig(target_modules="all-linear"))


def test_integer_weights_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(F.linear(x, self.w).float())

    gm = exported(Model().eval(), (torch.ones(2, 7, dtype=torch.int8),), {}, strict=False)
    assert [site.path for site in lora_fx.find_sites(gm)] == ["fc"]
    with pytest.raises(TargetError, match="int8"):
        lora_fx.inject(gm, LoraConfig(target_modules=["fc", "w"]))


def test_hooks_of_a_symbolic_graph_are_refused_and_those_of_an_exported_one_are_in_it() -> None:
    """PEFT adapts beside the hook, and merges to something else (faults B38, B39)."""
    model = zoo.Mlp().eval()
    model.fc1.register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(TargetError, match="forward hooks"):
        lora_fx.inject(fx.symbolic_trace(model), LoraConfig(target_modules=["fc1"]))
    x = torch.randn(3, 7)
    gm = lora_fx.inject(lora_fx.trace(model, x), LoraConfig(target_modules=["fc1"]))
    lora_fx.assert_equivalent(randomise(gm), lora_fx.fold(gm), x)


def test_decomposed_graphs_are_refused() -> None:
    program = torch.export.export(zoo.Mlp().eval(), (torch.randn(3, 7),)).run_decompositions()
    with pytest.raises(GraphError, match=r"decomposed.*before run_decompositions\(\).*lora_fx\.trace\(model, args\)"):
        lora_fx.find_sites(program.module())


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (nn.Linear(3, 5), ["Linear is a plain nn.Module", "lora_fx.trace(model, args, kwargs)"]),
        (3, ["not int", "lora_fx.trace(model, args)"]),
        (None, ["not NoneType"]),
    ],
)
def test_other_things_are_refused(given, fragments: list[str]) -> None:
    for verb in (lora_fx.find_sites, lora_fx.find_all_linear_names, lora_fx.fold, lora_fx.unfold, lora_fx.trace_record):
        with pytest.raises(GraphError) as caught:
            verb(given)
        assert all(fragment in str(caught.value) for fragment in fragments)


def test_an_exported_program_is_refused_with_the_call_to_make() -> None:
    program = torch.export.export(zoo.Mlp().eval(), (torch.randn(3, 7),))
    with pytest.raises(GraphError, match=r"ExportedProgram.*ep\.module\(\).*lora_fx\.trace\(model, args\)"):
        lora_fx.find_sites(program)
    with pytest.raises(GraphError, match=r"ExportedProgram.*ep\.module\(\)"):
        lora_fx.trace(program, torch.randn(3, 7))


def test_sites_are_plain_values() -> None:
    first, second = (lora_fx.find_sites(traced(STACK, tracer)) for tracer in ("trace", "export"))
    assert hash(first) == hash(second)
    assert first == second
    assert replace(first[0], path="x") != first[0]


def test_a_convolution_whose_kernel_is_computed_is_refused_by_its_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = parametrizations.weight_norm(nn.Conv1d(3, 5, 2)), nn.Linear(5, 7)

        def forward(self, x):
            return self.fc(self.conv(x).transpose(1, 2)).tanh()

    gm = lora_fx.trace(Model().eval(), torch.randn(2, 3, 5))
    with pytest.raises(TargetError, match="'conv', which cannot be adapted: its weight is computed"):
        lora_fx.make_plan(gm, LoraConfig(target_modules=["conv"]))
    plan = lora_fx.make_plan(gm, LoraConfig(target_modules="all-linear"))  # no linear, so no warning
    assert [target.site.path for target in plan.targets] == ["fc"]


# What a site says -------------------------------------------------------------------------------------


def site(path: str, **fields: Any) -> Site:
    plain = {"op": "linear", "weight": f"{path}.weight", "layout": Matrix(5, 7), "bias": None, "dtype": torch.float32}
    return Site(path, **(plain | {"layer_index": None, "calls": 1} | fields))


def headed(path: str, inputs: int = 7) -> Site:
    return site(path, layout=Matrix(5, inputs), bias=f"{path}.bias", is_output_head=True)


EXPERTS = {"op": "bmm", "is_linear": False}
ON_WEIGHT = {"is_linear": False, "is_on_weight": True}
SITES = {
    "tied_head": [
        site("embed", op="embedding", layout=Matrix(17, 7, True), is_linear=False, tied_with=("lm_head.weight",)),
        site("fc", layout=Matrix(7, 7), bias="fc.bias"),
        site("lm_head", layout=Matrix(17, 7), tied_with=("embed.weight",), is_output_head=True),
    ],
    "shared_module": [site("a", layout=Matrix(7, 7), bias="a.bias", calls=2, aliases=("b",)), headed("out")],
    "multi_head": [
        site(
            "attn.in_proj_weight",
            weight="attn.in_proj_weight",
            layout=Matrix(42, 14),
            attention="attn",
            parts=((0, 14), (14, 28), (28, 42)),
        ),
        site("attn.out_proj", layout=Matrix(14, 14), bias="attn.out_proj.bias", attention="attn"),
        headed("fc", 14),
    ],
    "no_grad": [site("frozen", layout=Matrix(7, 7), bias="frozen.bias", gets_gradient=False), headed("fc")],
    "experts": [
        site("gate_up", weight="gate_up", layout=Experts((3, 11, 7)), **EXPERTS),
        site("down", weight="down", layout=Experts((3, 11, 5), stored_in_out=True), calls=3, **EXPERTS),
    ],
    "unread": [
        site("place", op="slice", weight="place", layout=Experts((1, 5, 7)), **ON_WEIGHT),
        site("lstm.weight_ih_l0", op="lstm", weight="lstm.weight_ih_l0", layout=Matrix(20, 7), **ON_WEIGHT),
        site("lstm.weight_hh_l0", op="lstm", weight="lstm.weight_hh_l0", layout=Matrix(20, 5), **ON_WEIGHT),
        site("pair", op="bilinear", layout=Experts((3, 5, 7)), bias="pair.bias", **ON_WEIGHT),
    ],
}


@pytest.mark.parametrize("name", SITES)
def test_every_field_of_the_sites(name: str) -> None:
    assert list(lora_fx.find_sites(traced(BY_NAME[name]))) == SITES[name]


def test_what_follows_from_the_fields_of_a_site() -> None:
    plain, lookup = site("a"), site("a", op="embedding", layout=Matrix(5, 7, True))
    assert (plain.in_features, plain.out_features, plain.fan_in_fan_out, plain.size) == (7, 5, False, "7 → 5")
    assert (lookup.in_features, lookup.out_features, lookup.fan_in_fan_out, lookup.size) == (5, 7, True, "5 → 7")
    assert [site("a", layout=Experts((count, 5, 7))).size for count in (1, 2)] == ["7 → 5", "2 × 7 → 5"]
    assert (plain.is_lookup, lookup.is_lookup) == (False, True)
    assert [each.takes_dropout for each in (plain, lookup, site("a", is_on_weight=True))] == [True, False, False]
    assert plain.names == ("a",)
    assert site("a", aliases=("b",), attention="attn").names == ("a", "b", "attn")
    assert (plain.whole_path, site("a[q]", part="[q]").whole_path) == ("a", "a")


@pytest.mark.parametrize(
    ("fields", "cells"),
    [
        ({}, []),
        ({"layer_index": 3}, ["3"]),
        ({"layout": Matrix(7, 5, True)}, ["stored (in, out)"]),
        ({"layout": Matrix(7, 5, True), "is_linear": False}, []),  # a lookup's table always is
        ({"is_on_weight": True}, ["adapted on the weight"]),
        ({"calls": 2}, ["called 2 times"]),
        ({"tied_with": ("b", "c")}, ["tied with b, c"]),
        ({"parts": ((0, 2), (2, 5))}, ["packs gate, up"]),
        ({"parts": ((0, 1), (1, 2), (2, 3), (3, 5))}, ["packs 4 parts"]),
        ({"aliases": ("b", "c")}, ["also named b, c"]),
        ({"is_output_head": True, "gets_gradient": False}, ["output head; under no_grad"]),
    ],
    ids=str,
)
def test_remarks(fields: dict[str, Any], cells: list[str]) -> None:
    row = str(Sites([site("a", **fields)])).splitlines()[2]
    assert re.split(r" {2,}", row) == ["a", "linear", "7 → 5", "float32", *cells]


def by_symbols(forward: Callable[[Any, torch.Tensor], Any], **attributes: Any) -> tuple[Site, ...]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, x):
            return forward(self, x)

    return lora_fx.find_sites(fx.symbolic_trace(Model()))


def test_a_weight_that_an_unread_op_takes_too_is_what_the_linear_makes_of_it() -> None:
    for forward in (
        lambda self, x: torch.cumsum(self.fc.weight, 0)[-1].sum() + self.fc(x),
        lambda self, x: self.fc(x) + torch.cumsum(self.fc.weight, 0)[-1].sum(),
    ):
        (found,) = by_symbols(forward, fc=nn.Linear(7, 5))
        assert (found.op, found.is_linear, found.is_on_weight, found.calls) == ("linear", True, False, 2)


def test_an_embedding_is_no_output_head() -> None:
    (found,) = by_symbols(lambda self, ids: self.words(ids), words=nn.Embedding(5, 7))
    assert not found.is_output_head


class Applies(nn.Module):
    """Parameters of the names that are given, which may be an attention's or not, and each is applied by itself."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names.split():
            size = 9 if name.endswith("in_proj_weight") else 3
            value = nn.Linear(3, 3, bias=False) if name == "out_proj" else nn.Parameter(torch.randn(size, 3))
            setattr(self, name, value)

    def forward(self, x):
        return [F.linear(x, weight) for weight in self.parameters()]


@pytest.mark.parametrize(
    ("names", "own"),
    [
        ("in_proj_weight out_proj", "in_proj_weight out_proj.weight"),
        ("in_proj_weight my_in_proj_weight out_proj", "in_proj_weight out_proj.weight"),
        (
            "q_proj_weight k_proj_weight v_proj_weight out_proj",
            "q_proj_weight k_proj_weight v_proj_weight out_proj.weight",
        ),
        ("in_proj_weight", ""),
        ("out_proj", ""),
        ("q_proj_weight k_proj_weight v_proj_weight", ""),
        ("q_proj_weight v_proj_weight out_proj", ""),
    ],
)
def test_an_attention_is_known_by_all_of_its_parameters(names: str, own: str) -> None:
    """A module of another kind may have some of them: its sites are meant by their own names only."""
    for model, path in ((Applies(names), ""), (nn.Sequential(Applies(names)), "0")):
        for found in lora_fx.find_sites(fx.symbolic_trace(model)):
            name = found.weight.removeprefix("0.")
            assert found.attention == (path if name in own.split() else None)
            assert found.parts == (((0, 3), (3, 6), (6, 9)) if name == "in_proj_weight" and own else ())


def test_only_outputs_of_a_matrix_are_packed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.table = nn.Parameter(torch.randn(2, 7, 6)), nn.Parameter(torch.randn(3, 6))
            self.fc, self.sliced = nn.Linear(7, 6), nn.Parameter(torch.randn(6, 7))

        def forward(self, x):
            experts, table, own = (
                torch.chunk(y, 2, dim=-1) for y in (torch.bmm(x, self.experts), torch.cumsum(self.table, 0), self.fc(x))
            )
            sliced = F.linear(x, self.sliced[:2]).sum() + F.linear(x, self.sliced[2:]).sum()
            return experts[0] * experts[1] * table[0] * table[1] + sliced, own[0], own[1]

    gm = fx.symbolic_trace(Model())
    assert {site.path: site.parts for site in lora_fx.find_sites(gm)} == {
        "experts": (),
        "table": (),
        "fc": ((0, 3), (3, 6)),
        "sliced": ((0, 2), (2, 6)),
    }
