"""trace: what the model does in each mode, the graph does; with the model's own types, tensors and free dimensions."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import zoo
from torch import fx, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from zoo import BY_NAME, SMALL, Case, assert_same_bits, bits, fingerprint, run, traced

import lora_fx
from lora_fx import GraphError, LoraConfig, LoraFxWarning

TRACED = [pytest.param(case, id=case.name) for case in SMALL if "trace" in case.tracers]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", TRACED)
def test_both_modes_are_the_models_own(case: Case, training: bool) -> None:
    """Bit for bit under the same seed. Eager's fused fast path of the encoder layer is another kernel."""
    model, arguments = case.model(), case.arguments(seed=5)
    gm = copy.deepcopy(traced(case)).train(training)
    gm.load_state_dict(model.state_dict())  # whoever ran the shared graph in train mode moved its running statistics
    expected, actual = run(model.train(training), arguments), run(gm, arguments)
    if case.name in ("encoder_layer", "multi_head") and not training:
        assert zoo.distance(expected, actual) < zoo.tolerance(case, torch.float32)
    else:
        assert_same_bits(expected, actual)


@pytest.mark.parametrize("case", TRACED)
def test_switching_modes_back_and_forth_changes_nothing(case: Case) -> None:
    gm, arguments = copy.deepcopy(traced(case)), case.arguments()
    first = {mode: run(gm.train(mode), arguments) for mode in (True, False)}
    for mode in (False, False, True, True, False):
        gm.train(mode)
        assert gm.training == mode
        if "modes" not in case.name:  # batch norm's statistics have moved
            assert_same_bits(run(gm, arguments), first[mode])


def test_training_moves_the_same_statistics_and_the_same_dropout() -> None:
    case = BY_NAME["modes_both"]
    model, arguments = case.model(), case.arguments()
    twin = copy.deepcopy(model)
    gm = lora_fx.trace(twin, *arguments).train()
    for seed in range(3):
        assert_same_bits(run(model.train(), arguments, seed), run(gm, arguments, seed))
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert model.norm.num_batches_tracked == 3
    assert_same_bits(run(model.eval(), arguments), run(gm.eval(), arguments))


def test_gradients_are_the_models_own() -> None:
    for name in ("modes_both", "attention", "mlp"):
        case = BY_NAME[name]
        model, arguments = case.model().train(), case.arguments()
        gm = lora_fx.trace(copy.deepcopy(model), *arguments)
        assert gm.training
        zoo.loss_of(model, arguments).backward()
        zoo.loss_of(gm, arguments).backward()
        theirs = dict(model.named_parameters())
        for parameter_name, parameter in gm.named_parameters():
            assert torch.equal(parameter.grad, theirs[parameter_name].grad), parameter_name


def test_parameters_and_buffers_are_the_models_own() -> None:
    for case in SMALL:
        if "trace" in case.tracers:
            model = case.model()
            gm = lora_fx.trace(model, *case.arguments(), dynamic_shapes=None)
            own = dict(model.named_parameters(remove_duplicate=False))
            assert {n: id(p) for n, p in gm.named_parameters(remove_duplicate=False)}.items() <= {
                n: id(p) for n, p in own.items()
            }.items()
            assert set(map(id, gm.parameters())) == set(map(id, model.parameters()))
            assert set(gm.state_dict()) <= set(model.state_dict())


def test_a_mixed_model_keeps_its_modes_and_its_flags() -> None:
    model = zoo.Modes().train()
    model.norm.eval()
    model.fc1.weight.requires_grad_(False)
    before = fingerprint(model)
    gm = lora_fx.trace(model, torch.randn(5, 7))
    assert fingerprint(model) == before
    assert not gm.get_parameter("fc1.weight").requires_grad
    assert gm.get_parameter("fc2.weight").requires_grad


# Outputs --------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    pytree.register_dataclass(Output)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y,
        lambda y: (y, y + 1),
        lambda y: [y],
        lambda y: {"b": y, "a": y + 1},
        lambda y: OrderedDict(b=y, a=y + 1),
        lambda y: Pair(y, y + 1),
        lambda y: Output(y, y + 1),
        lambda y: Output(y),
        lambda y: (y, None, 3, "text", {"n": [y]}),
    ],
)
def test_outputs_have_the_models_own_types(make) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return make(self.fc(x))

    model, x = Model().eval(), torch.randn(3, 7)
    expected = model(x)
    gm = lora_fx.inject(lora_fx.trace(model, x), LoraConfig(target_modules=["fc"]))
    for graph in (lora_fx.trace(model, x), gm, lora_fx.fold(gm)):
        actual = graph(x)
        assert type(actual) is type(expected)
        assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
        if isinstance(expected, dict):
            assert list(actual) == list(expected)


# Free dimensions ------------------------------------------------------------------------------------


def test_auto_leaves_free_what_the_model_leaves_free() -> None:
    gm = traced(BY_NAME["attention"])
    for shape in ((1, 1, 14), (2, 3, 14), (5, 11, 14), (1, 3, 14)):
        x = torch.randn(shape)
        assert zoo.distance(run(BY_NAME["attention"].model(), ((x,), {})), run(gm, ((x,), {}))) < 1e-6
    assert lora_fx.trace_record(gm).dimension_names == ({0: "batch", 1: "sequence"},)


def test_a_batch_of_one_is_no_constant() -> None:
    gm = lora_fx.trace(zoo.Mlp().eval(), torch.randn(1, 7))
    assert gm(torch.randn(5, 7)).shape == (5, 5)
    assert gm(torch.randn(1, 7)).shape == (1, 5)
    assert lora_fx.trace_record(gm).args[0].shape == (1, 7)


def test_the_callers_names_are_kept() -> None:
    batch, length = Dim("rows", min=1, max=64), Dim("length", min=2, max=64)
    model, x = BY_NAME["attention"].model(), torch.randn(2, 3, 14)
    for shapes in (({0: batch, 1: length},), {"x": {0: batch, 1: length}}, {"x": (batch, length, None)}):
        gm = lora_fx.trace(model, x, dynamic_shapes=shapes)
        assert lora_fx.trace_record(gm).dimension_names == ({0: "rows", 1: "length"},)
        assert lora_fx.trace_record(lora_fx.inject(gm, LoraConfig(target_modules=["out"]))).dimension_names == (
            {0: "rows", 1: "length"},
        )


def test_none_is_static() -> None:
    gm = lora_fx.trace(zoo.Mlp().eval(), torch.randn(3, 7), dynamic_shapes=None)
    assert lora_fx.trace_record(gm).dimension_names == ({},)
    with pytest.raises(Exception, match=r"(?i)guard|shape|expected"):
        gm(torch.randn(5, 7))


def test_a_fixed_dimension_falls_back_with_a_warning_or_is_left_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x, y):
            return self.fc(x) + y

    gm = lora_fx.trace(Fixed().eval(), (torch.randn(3, 7), torch.randn(5)))
    assert lora_fx.trace_record(gm).dimension_names == ({0: "batch"}, {})
    assert gm(torch.randn(11, 7), torch.randn(5)).shape == (11, 5)


def test_ids_and_masks_have_one_batch_and_one_sequence() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(11, 7), nn.Linear(7, 5)

        def forward(self, input_ids, attention_mask=None):
            return self.fc(self.embed(input_ids) * attention_mask.unsqueeze(-1))

    ids = torch.randint(0, 11, (2, 3))
    gm = lora_fx.trace(Masked().eval(), kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert lora_fx.trace_record(gm).dimension_names == ({0: "batch", 1: "sequence"},) * 2


def test_the_record() -> None:
    case = BY_NAME["structured"]
    (pair,), kwargs = case.arguments()
    gm = lora_fx.trace(case.model(), (pair,), kwargs)
    record = lora_fx.trace_record(gm)
    assert record.model_class == "Structured"
    assert torch.equal(record.args[0]["a"], pair["a"])
    assert torch.equal(record.kwargs["extra"], kwargs["extra"])
    pair["a"].zero_()  # a copy was kept
    assert record.args[0]["a"].abs().max() > 0
    assert record.dimension_names == ({0: "batch"},) * 3
    assert lora_fx.trace_record(fx.symbolic_trace(zoo.Mlp())) is None


def test_buffers_keep_their_persistence() -> None:
    model = BY_NAME["mixed"].model()
    gm = lora_fx.trace(model, *BY_NAME["mixed"].arguments())
    injected = lora_fx.inject(gm, LoraConfig(target_modules=["fc"]))
    for graph in (gm, lora_fx.fold(injected), copy.deepcopy(gm)):
        assert set(graph.state_dict()) == set(model.state_dict())
    for tracer in ("symbolic", "export", "strict"):
        raw = traced(BY_NAME["mixed"], tracer)
        adapted = lora_fx.inject(raw, LoraConfig(target_modules=["fc"]))
        assert set(lora_fx.fold(adapted).state_dict()) == set(raw.state_dict())


# What cannot be traced ------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class Unregistered:
    def __init__(self, value) -> None:
        self.value = value


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        return Unregistered(self.fc(x))


class TrainBranch(nn.Module):
    """Can be traced in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        y = self.fc(x)
        return y * 2 if self.training and y.sum() > 0 else y


class DynamicCache:
    """As transformers calls it."""


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        return self.fc(x), DynamicCache()


UNTRACEABLE = [
    (
        lambda: lora_fx.trace(Decoder(), torch.randn(3, 7)),
        ["Decoder cannot be traced by torch.export: it returns a key/value cache; pass use_cache=False"],
    ),
    (lambda: lora_fx.trace(Branch(), torch.randn(3, 7)), ["Branch cannot be traced by torch.export", "torch.cond"]),
    (lambda: lora_fx.trace(Opaque(), torch.randn(3, 7)), ["Opaque cannot be traced", "register"]),
    (
        lambda: lora_fx.trace(zoo.Mlp(), ()),
        ["example inputs do not fit Mlp.forward(x)", "lora_fx.trace(model, args, kwargs)"],
    ),
    (lambda: lora_fx.trace(zoo.Mlp(), (), {"y": torch.ones(1)}), ["example inputs do not fit Mlp.forward"]),
    (lambda: lora_fx.trace(zoo.Mlp(), torch.randn(3, 5)), ["Mlp cannot be traced by torch.export", "RuntimeError"]),
    (lambda: lora_fx.trace(nn.LazyLinear(5), torch.randn(3, 7)), ["'weight' is not initialised", "run the model once"]),
    (lambda: lora_fx.trace(lambda x: x, torch.randn(3)), ["trace takes a torch.nn.Module, not function"]),
    (
        lambda: lora_fx.trace(fx.symbolic_trace(zoo.Mlp()), torch.randn(3, 7)),
        ["traced already", "straight to find_sites"],
    ),
    (lambda: lora_fx.trace(zoo.Mlp(), torch.randn(3, 7), tracer="jit"), ["tracer='jit'", "'export' or 'symbolic'"]),
    (
        lambda: lora_fx.trace(Branch(), torch.randn(3, 7), tracer="symbolic"),
        ["symbolic_trace cannot trace Branch", "lora_fx.trace(model, args, kwargs)"],
    ),
    (
        lambda: lora_fx.trace(zoo.Mlp(), torch.randn(3, 7), dynamic_shapes={"x": {1: Dim("d")}}),
        ["Mlp cannot be traced", 'dynamic_shapes="auto"'],
    ),
    (
        lambda: lora_fx.trace(zoo.Mlp(), torch.randn(3, 7), dynamic_shapes={"y": {0: Dim("d")}}),
        ["Mlp cannot be traced"],
    ),
    (lambda: lora_fx.trace(zoo.Mlp(), torch.randn(3, 7), dynamic_shapes=3), ["Mlp cannot be traced"]),
]


@pytest.mark.parametrize(("call", "fragments"), UNTRACEABLE)
def test_a_model_that_cannot_be_traced_gets_an_error_that_says_what_to_do(call, fragments: list[str]) -> None:
    with pytest.raises(GraphError) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1200


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    for model in (Branch().train(), Opaque().eval(), TrainBranch().train()):
        model.fc.training = False
        before = fingerprint(model)
        with pytest.raises(GraphError):
            lora_fx.trace(model, torch.randn(3, 7))
        with pytest.raises(GraphError):
            lora_fx.trace(model, torch.randn(3, 7), tracer="symbolic")
        assert fingerprint(model) == before


def test_a_model_that_can_be_traced_in_one_mode_only_says_so_when_it_matters() -> None:
    gm = lora_fx.trace(TrainBranch().eval(), torch.randn(3, 7))
    assert gm(torch.randn(3, 7)).shape == (3, 5)
    with pytest.raises(GraphError, match=r"no train\(\) form.*could not be traced"):
        gm.train()
    assert not gm.training
    with pytest.raises(GraphError, match=r"no train\(\) form"):
        lora_fx.inject(gm, LoraConfig(target_modules=["fc"])).train()


def test_layers_left_out_at_random_are_named_as_what_cannot_be_traced() -> None:
    class Layerdrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x):
            return x if self.training and torch.rand([]) < 0.1 else self.fc(x)

    gm = lora_fx.trace(Layerdrop().eval(), torch.randn(3, 7))
    with pytest.raises(GraphError, match=r"no train\(\) form.*Set layerdrop to 0"):
        gm.train()


def test_a_graph_exported_in_eval_mode_warns_when_it_is_trained() -> None:
    gm = lora_fx.inject(traced(BY_NAME["mlp"], "export"), LoraConfig(target_modules=["fc1"]))
    with pytest.warns(LoraFxWarning, match=r"exported in eval mode: dropout.*lora_fx\.trace\(model, args\)"):
        gm.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fx.inject(traced(BY_NAME["functional"], "export"), LoraConfig(target_modules=["w"])).train()


def test_the_symbolic_tracer_shares_the_parameters_and_not_the_modules() -> None:
    model = zoo.Mlp().eval()
    gm = lora_fx.trace(model, torch.randn(3, 7), tracer="symbolic")
    gm.train()
    assert not any(module.training for module in model.modules())
    assert gm.get_parameter("fc1.weight") is model.fc1.weight
    x = torch.randn(5, 7)
    assert_same_bits(run(model.train(), ((x,), {})), run(gm, ((x,), {})))


def test_a_branch_on_the_mode_survives_symbolic_tracing() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return F.relu(self.fc(x)) if self.training else self.fc(x)

    model, x = Branching().eval(), torch.randn(3, 7)
    gm = lora_fx.trace(model, x, tracer="symbolic")
    for mode in (True, False):
        assert torch.equal(gm.train(mode)(x), model.train(mode)(x))


def test_a_trace_survives_deepcopy_with_its_modes() -> None:
    case = BY_NAME["modes_both"]
    gm = lora_fx.trace(case.model(), *case.arguments())
    twin = copy.deepcopy(gm)
    assert not set(map(id, twin.parameters())) & set(map(id, gm.parameters()))
    for mode in (True, False):
        assert_same_bits(run(gm.train(mode), case.arguments()), run(twin.train(mode), case.arguments()))
    assert bits(gm.get_parameter("fc1.weight")) == bits(twin.get_parameter("fc1.weight"))


# Code that is compiled already ----------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (1, True), (0.0, -0.0), (2, 3)])
def test_a_graph_edited_by_hand_is_compiled_anew(old: object, new: object) -> None:
    class Scaled(nn.Module):
        def forward(self, x):
            return x * old

    gm = copy.deepcopy(lora_fx.trace(Scaled(), torch.ones(2, dtype=torch.int64)))
    node = next(node for node in gm.graph.nodes if old in node.args)
    node.args = (node.args[0], new)
    gm.recompile()
    assert repr(new) in gm.code
    x = torch.ones(2, dtype=torch.int64)
    assert gm(x).dtype == (x * new).dtype
    assert torch.equal(gm(x), x * new)


def test_a_copy_is_not_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = lora_fx.trace(nn.Linear(3, 4), torch.randn(2, 3))
    calls: list[str] = []
    real = torch.fx.Graph.python_code
    monkeypatch.setattr(torch.fx.Graph, "python_code", lambda *a, **k: calls.append("") or real(*a, **k))
    twin = copy.deepcopy(gm)
    assert not calls
    assert twin.code == gm.code
    # torch.compile counts what it compiled by code objects, so that each copy needs its own
    assert type(twin).forward.__code__ is not type(gm).forward.__code__


# The form of a call ---------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 7)

    def forward(self, x, mask=None, flag=False, extras=None):
        y = self.fc(x) if mask is None else self.fc(x) * mask
        y = y * 2 if flag else y
        return y if extras is None else y + sum(extras.values())


def test_an_input_without_a_place_in_the_graph_is_refused() -> None:
    x, mask = torch.randn(3, 7), torch.rand(3, 7)
    gm = lora_fx.inject(lora_fx.trace(Masked().eval(), (x, None), {"flag": False}), LoraConfig(target_modules=["fc"]))
    gm = lora_fx.fold(copy.deepcopy(gm))  # passes and copies keep the check
    gm(x, None, flag=False)
    with pytest.raises(GraphError, match="traced with None for input 'mask' and has no place for a tensor"):
        gm(x, mask, flag=False)
    with pytest.raises(GraphError, match="traced with False for input 'flag' and has no place for True"):
        gm(x, None, flag=True)
    with pytest.raises(GraphError, match="traced without input 'labels'; it takes x, mask, flag"):
        gm(x, None, flag=False, labels=x)
    with pytest.raises(GraphError, match="called without input 'flag', which it was traced with"):
        gm(x, None)
    with pytest.raises(GraphError, match="4 positional inputs; it takes x, mask, flag"):
        gm(x, None, False, x)
    gm = lora_fx.trace(Masked().eval(), (x, None), {"extras": {"a": x}})
    with pytest.raises(GraphError, match="input 'extras' has another structure"):
        gm(x, None, extras={"a": x, "b": x})


def test_one_tensor_given_for_two_inputs_is_two_inputs() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    gm = lora_fx.trace(model, (x, x, x))
    q, k, v = torch.randn(3, 2, 3, 8)
    torch.testing.assert_close(gm(q, k, v)[0], model(q, k, v)[0])


def test_a_batch_of_one_that_is_another_branch_stays_one() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x):
            return self.fc(x) * 100 if x.shape[0] == 1 else self.fc(x)

    model, x = Single().eval(), torch.randn(1, 7)
    with pytest.warns(lora_fx.LoraFxWarning, match="takes batches of one only"):
        gm = lora_fx.trace(model, (x,))
    assert torch.equal(gm(x), model(x))


def test_inputs_that_cannot_be_doubled_are_traced_as_they_are() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.fc = nn.GRU(7, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x, h):
            return self.fc(self.gru(x, h)[0])

    model, inputs = Recurrent().eval(), (torch.randn(1, 4, 7), torch.randn(1, 1, 5))
    with pytest.warns(lora_fx.LoraFxWarning, match="takes batches of one only"):
        gm = lora_fx.trace(model, inputs)
    torch.testing.assert_close(gm(*inputs), model(*inputs))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_a_backward_that_the_graph_cannot_hold_is_told(tracer: str) -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return Reverse.apply(self.fc(x))

    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.warns(lora_fx.LoraFxWarning, match="Reverse has a backward of its own"):
        lora_fx.trace(Reversed().eval(), torch.randn(3, 7), tracer=tracer)
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_reentrant_checkpointing_is_told() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=True)

    with pytest.warns(lora_fx.LoraFxWarning, match="use_reentrant=False"):
        lora_fx.trace(Checkpointed().eval(), torch.randn(3, 7).requires_grad_())


@pytest.mark.parametrize(("args", "kwargs"), [(5, None), ((torch.ones(2, 7),), 5), ((torch.ones(2, 7),), {1: 2})])
def test_inputs_that_are_none_are_refused(args, kwargs) -> None:
    with pytest.raises(GraphError, match="must"):
        lora_fx.trace(nn.Linear(7, 5), args, kwargs)


def test_dimensions_of_inputs_that_kwargs_collects_are_free() -> None:
    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x, *rest, scale=1.0, **others):
            return self.fc(x + sum(rest) + sum(others.values())) * scale

    model, x = Collects().eval(), torch.randn(3, 7)
    forward = model.forward
    gm = lora_fx.trace(model, (x, x), {"scale": 2.0, "more": x, "and_more": x})
    assert model.forward == forward
    y = torch.randn(11, 7)
    torch.testing.assert_close(gm(y, y, scale=2.0, more=y, and_more=y), model(y, y, scale=2.0, more=y, and_more=y))
    names = lora_fx.trace_record(gm).dimension_names
    assert [free for free in names if free] == [{0: "batch"}] * 4


@pytest.mark.parametrize("tracer", ["export", "symbolic"])
def test_a_graph_starts_in_the_modes_that_the_model_is_in(tracer: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(7, 7), nn.BatchNorm1d(7)

        def forward(self, x):
            return self.norm(self.fc(x))

    model, x = Normed().train(), torch.randn(5, 7)
    model.norm.eval()  # as it is frozen for detection
    gm = lora_fx.trace(model, (x,), tracer=tracer)
    assert torch.equal(gm(x), model(x))
    gm.eval()
    assert torch.equal(gm(x), copy.deepcopy(model).eval()(x))
    if tracer == "export":
        with pytest.warns(lora_fx.LoraFxWarning, match=r"traced in train mode with 'norm' in eval mode.*keeps that"):
            gm.train()
        assert torch.equal(gm(x), model(x))
    else:  # a symbolic graph calls the modules themselves
        assert torch.equal(gm.train()(x), copy.deepcopy(model).train()(x))


def test_a_batch_of_one_is_compared_without_touching_the_model() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(7, 7), 0
            self.register_buffer("mean", torch.zeros(7))

        def forward(self, x):
            self.calls += 1
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return F.dropout(self.fc(x - self.mean), 0.5, training=True)

    model = Average().eval()
    before = (model.calls, model.mean.clone())
    lora_fx.trace(model, torch.randn(4, 7))
    calls = model.calls
    gm = lora_fx.trace(model, torch.randn(1, 7))
    assert torch.equal(model.mean, before[1])
    assert model.calls - calls <= calls  # exporting runs forward, comparing does not
    assert gm(torch.randn(3, 7)).shape == (3, 7)  # dropout differs by seed only, so the batch is free


def test_inputs_in_another_order_than_the_models_are_given_by_name() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 7)

        def forward(self, x, add=None, mul=None):
            y = self.fc(x)
            y = y if add is None else y + add
            return y if mul is None else y * mul

    model, x, t = Ordered().eval(), torch.randn(3, 7), torch.randn(3, 7)
    gm = lora_fx.trace(model, (x,), {"mul": t})
    assert torch.equal(gm(x, mul=t), model(x, mul=t))
    with pytest.raises(GraphError, match="Give input 2 by name"):
        gm(x, t)


def test_compiling_looks_at_the_form_too() -> None:
    x, mask = torch.randn(3, 7), torch.rand(3, 7)
    gm = lora_fx.trace(Masked().eval(), (x, None))
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None), gm(x, None))
    with pytest.raises(Exception, match="no place for"):
        compiled(x, mask)


def test_mappings_are_read_by_key() -> None:
    x = torch.randn(3, 7)
    gm = lora_fx.trace(Masked().eval(), (x, None), {"extras": {"a": x, "b": 2 * x}})
    from collections import OrderedDict

    assert torch.equal(gm(x, None, extras={"b": 2 * x, "a": x}), gm(x, None, extras=OrderedDict(a=x, b=2 * x)))
