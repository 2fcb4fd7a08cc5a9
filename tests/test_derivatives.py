"""Chains that are made again: their derivatives are autograd's. Functions in place of overloads: they run the same."""

from __future__ import annotations

import dis
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from test_optimization import BERT, GPT2, LLAMA, adapted, gradients
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import STACK

import lora_fx
from lora_fx import direct_calls
from lora_fx.graph_module import record_of
from lora_fx.rewrites.chains import Chain
from lora_fx.rewrites.group_call import function_of
from lora_fx.rewrites.group_operands import Group, Linear, Term
from lora_fx.rewrites.straight_group import StraightGroup

aten = torch.ops.aten
ROWS, WIDTH = 5, 8


def chain_of(function: Callable[..., torch.Tensor], *inputs: Any) -> Chain:
    """What torch.export makes of a function, as a chain."""

    class Module(nn.Module):
        def forward(self, *args: Any) -> torch.Tensor:
            return function(*args)

    exported = torch.export.export(Module(), inputs).graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in exported.nodes:
        if node.op == "output":
            graph.output(copies[node.args[0][0]])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return Chain(graph)


def values(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def layer_norm_by_itself(a: torch.Tensor) -> torch.Tensor:
    n = F.layer_norm(a, (WIDTH,))
    return F.silu(n) * n


def gelu_as_gpt2_writes_it(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


SQUARE = (ROWS, WIDTH)
FORMULAS: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "silu": (lambda a, b: F.silu(a) * b, [SQUARE, SQUARE]),
    "gelu": (F.gelu, [SQUARE]),
    "gelu of tanh": (lambda a: F.gelu(a, approximate="tanh"), [SQUARE]),
    "gelu by hand": (gelu_as_gpt2_writes_it, [SQUARE]),
    "relu squared": (lambda a: F.relu(a) ** 2, [SQUARE]),
    "mish": (F.mish, [SQUARE]),
    "hardswish": (F.hardswish, [SQUARE]),
    "sigmoid": (lambda a: a * torch.sigmoid(1.702 * a), [SQUARE]),
    "exp": (lambda a, b: torch.exp(-a) - b, [SQUARE, SQUARE]),
    "difference": (lambda a, b: a - b * 2.0, [SQUARE, SQUARE]),
    "quotient": (lambda a: (a + 1.0) / 3.0, [SQUARE]),
    "twice the same": (lambda a: a * a + a, [SQUARE]),
    "spread": (lambda a, b: a * b + b, [SQUARE, (1, WIDTH)]),
    "spread from fewer dimensions": (lambda a, b: b - a * b, [SQUARE, (WIDTH,)]),
    "layer_norm": (lambda a, w, b: F.layer_norm(a, (WIDTH,), w, b, 1e-6) * 2.0, [SQUARE, (WIDTH,), (WIDTH,)]),
    "layer_norm alone": (lambda a: F.layer_norm(a, (WIDTH,)), [SQUARE]),
    "layer_norm of a sum": (lambda a, b: F.gelu(F.layer_norm(a + b, (WIDTH,))), [SQUARE, SQUARE]),
    "layer_norm of four arguments": (lambda a, b: torch.layer_norm(a, (WIDTH,), b) * 2.0, [SQUARE, (WIDTH,)]),
    "gated layer_norm": (lambda a, b: F.layer_norm(a, (WIDTH,)) * (1 + torch.tanh(b)) + b, [SQUARE, SQUARE]),
    "layer_norm twice": (lambda a: F.layer_norm(F.layer_norm(a, (WIDTH,)), (WIDTH,)) * a, [SQUARE]),
    "through truth": (lambda a, b: F.relu(a).bool().to(b.dtype) * b + a, [SQUARE, SQUARE]),
    "through integers": (lambda a, b: (3 * a).int().to(b.dtype) * b * a, [SQUARE, SQUARE]),
    "layer_norm times its own": (layer_norm_by_itself, [SQUARE]),
    "view": (lambda a, b: F.gelu(a).view(WIDTH, ROWS).unsqueeze(0).reshape(b.shape) * b, [SQUARE, SQUARE]),
    "cast": (lambda a, b: (a.float() * 2.0).to(a.dtype) * b, [SQUARE, SQUARE]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_derivative_is_what_autograd_finds(name: str, dtype: torch.dtype) -> None:
    function, shapes = FORMULAS[name]
    inputs = values(*shapes, dtype=dtype)
    wanted = [place for place, shape in enumerate(shapes) if not ("layer_norm" in name and shape == (WIDTH,))]
    chain = chain_of(function, *inputs)
    leaves = [t.clone().requires_grad_(place in wanted) for place, t in enumerate(inputs)]
    x = function(*leaves)
    gradient = values(tuple(x.shape), dtype=x.dtype)[0].flip(0)
    expected = torch.autograd.grad(x, [leaves[place] for place in wanted], gradient)
    derivative = chain.derivative(wanted)
    assert derivative is not None
    assert derivative.fits(inputs)
    again, kept = derivative.again(*inputs)
    found = derivative.back(gradient, *kept)
    assert torch.equal(again, x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    unread, kept = chain.derivative(wanted, gives_x=False).again(*inputs)  # type: ignore[union-attr]
    assert unread is None
    assert all(torch.equal(a, b) for a, b in zip(found, derivative.back(gradient, *kept), strict=True))


UNARY: list[Callable[..., torch.Tensor]] = [
    F.silu, F.gelu, torch.tanh, torch.sigmoid, F.relu, torch.neg, F.mish, F.hardswish, lambda t: t**2, lambda t: t**3.0,
    lambda t: F.layer_norm(t, (WIDTH,)), lambda t: t * 0.5, lambda t: (t + 1.0) / 2.0, lambda t: torch.exp(-t * t),
    lambda t: t.float().double(), lambda t: t.view(WIDTH, ROWS).reshape(ROWS, WIDTH),
]  # fmt: skip
BINARY: list[Callable[..., torch.Tensor]] = [torch.add, torch.mul, torch.sub]


def at_random(seed: int) -> Callable[..., torch.Tensor]:
    """A function of three inputs, the last of one row, in which values are read again and again."""

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        dice = random.Random(seed)
        known = list(inputs)
        for _ in range(dice.randint(2, 9)):
            of = dice.choice(UNARY + 4 * BINARY)
            whole = [t for t in known if t.shape == SQUARE]
            known.append(of(dice.choice(whole), dice.choice(known)) if of in BINARY else of(dice.choice(whole)))
        return known[-1]

    return function


@pytest.mark.parametrize("seed", range(60))
def test_chains_at_random(seed: int) -> None:
    function, inputs = at_random(seed), values(SQUARE, SQUARE, (1, WIDTH))
    wanted = random.Random(-seed).sample(range(3), k=random.Random(seed).randint(1, 3))
    leaves = [t.clone().requires_grad_(place in wanted) for place, t in enumerate(inputs)]
    derivative = chain_of(function, *inputs).derivative(wanted)
    assert derivative is not None
    x, (gradient,) = function(*leaves), values(SQUARE)
    again, kept = derivative.again(*inputs)
    assert torch.equal(again, x)
    if not x.requires_grad:
        return
    expected = torch.autograd.grad(x, [leaves[place] for place in wanted], gradient, allow_unused=True)
    for one, other in zip(derivative.back(gradient, *kept), expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [F.softplus, F.elu, lambda a: 1.0 / a, lambda a: a.mean(-1, keepdim=True) * a, lambda a: a * a.detach()],
    ids=["softplus", "elu", "reciprocal", "mean", "detach"],
)
def test_what_has_no_formula_is_left_to_autograd(function: Callable[..., torch.Tensor]) -> None:
    assert chain_of(function, *values(SQUARE)).derivative([0]) is None


def test_complex_chains_are_left_to_autograd() -> None:
    turned = torch.polar(torch.ones(ROWS, WIDTH // 2), torch.arange(ROWS * WIDTH / 2).view(ROWS, -1)).to(
        torch.complex128
    )
    inputs = torch.view_as_complex(values((ROWS, WIDTH // 2, 2))[0]), turned
    assert chain_of(torch.mul, *inputs).derivative([0]) is None


def test_norm_weights_that_are_trained_are_left_to_autograd() -> None:
    chain = chain_of(lambda a, w: F.layer_norm(a, (WIDTH,), w), *values(SQUARE, (WIDTH,)))
    assert chain.derivative([0]) is not None
    assert chain.derivative([0, 1]) is None


def test_a_chain_in_another_dtype_than_it_was_traced_in() -> None:
    """Parameters may be cast after the trace: then the formulas do not apply, and autograd finds the same."""
    chain = chain_of(lambda a, b: F.silu(a) * b, *values(SQUARE, SQUARE, dtype=torch.float32))
    group = function_of(Group((Linear("linear", False, (Term(2.0),)),), inputs=2, chain=chain))
    one, other, weight, a, b = values(SQUARE, SQUARE, (4, WIDTH), (2, WIDTH), (4, 2))
    derivative = chain.derivative([0, 1])
    assert derivative is not None
    assert not derivative.fits([one, other])
    leaves = [t.requires_grad_() for t in (one, other, a, b)]
    (y,) = group(False, one, other, weight, a, b)
    x = F.silu(one) * other
    expected = F.linear(x, weight) + F.linear(F.linear(x, a), b) * 2.0
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [LLAMA, GPT2], ids=str)
def test_no_chain_of_a_decoder_asks_autograd(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = lora_fx.optimize(adapted(case, torch.float32))
    loss = zoo.loss_of(optimized, case.arguments(torch.float32))

    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("autograd was asked")

    monkeypatch.setattr(torch.autograd, "grad", asked)
    loss.backward()
    assert all(parameter.grad is not None for parameter in lora_fx.lora_parameters(optimized))


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if not isinstance(a, torch.Tensor)]
        self.calls.append((func, plain))
        return func(*args, **(kwargs or {}))


X, Y = values((2, 4, 6), (2, 4, 6), dtype=torch.float32)
M, N = values((4, 6), (6, 4), dtype=torch.float32)
MASK = torch.arange(48).view(2, 4, 6) % 3 == 0
EXAMPLES: dict[Any, list[tuple[Any, ...]]] = {
    aten.add.Tensor: [(X, Y), (X, 2), (X, 0.5)],
    aten.addmm.default: [(values((4,))[0].float(), M, N)],
    aten.bmm.default: [(X, Y.mT)],
    aten.cat.default: [([X, Y], -1), ([X, Y],)],
    aten.contiguous.default: [(X.mT,)],
    aten.conv2d.default: [(values((1, 2, 5, 5))[0], values((3, 2, 3, 3))[0], None, [2, 2], [1, 1], [1, 1], 1)],
    aten.cos.default: [(X,)],
    aten.div.Tensor: [(X, Y), (X, 3)],
    aten.dropout.default: [(X, 0.5, False), (X, 0.5, True)],
    aten.embedding.default: [(M, torch.tensor([1, 3])), (M, torch.tensor([1, 3]), 0)],
    aten.exp.default: [(X,)],
    aten.expand.default: [(X[:, :1], [2, 4, -1])],
    aten.flatten.using_ints: [(X, 1), (X, 0, 1), (X,)],
    aten.gelu.default: [(X,)],
    aten.layer_norm.default: [(X, [6], M[0], M[1], 1e-6), (X, [6])],
    aten.linear.default: [(X, M), (X, M, M[:, 0])],
    aten.masked_fill.Scalar: [(X, MASK, -1.0)],
    aten.matmul.default: [(X, Y.mT), (X, N)],
    aten.mean.dim: [(X, [-1], True), (X, [0, 1])],
    aten.mm.default: [(M, N)],
    aten.mul.Tensor: [(X, Y), (X, 2.5)],
    aten.neg.default: [(X,)],
    aten.permute.default: [(X, [2, 0, 1])],
    aten.pow.Tensor_Scalar: [(X, 2), (X.abs(), 0.5)],
    aten.relu.default: [(X,)],
    aten.reshape.default: [(X, [8, -1]), (X.mT, [8, 6])],
    aten.rsqrt.default: [(X.abs(),)],
    aten.scaled_dot_product_attention.default: [(X, Y, X), (X, Y, X, None, 0.0, True)],
    aten.select.int: [(X, 1, 2)],
    aten.sigmoid.default: [(X,)],
    aten.silu.default: [(X,)],
    aten.sin.default: [(X,)],
    aten.softmax.int: [(X, -1), (X.bfloat16(), -1, torch.float32)],
    aten.sqrt.default: [(X.abs(),)],
    aten.squeeze.dim: [(X[:, :1], 1), (X, 0)],
    aten.sub.Tensor: [(X, Y), (X, 2)],
    aten.sum.dim_IntList: [(X, [-1], True), (X, [0])],
    aten.t.default: [(M,)],
    aten.tanh.default: [(X,)],
    aten.to.dtype: [(X, torch.bfloat16), (X, torch.float32)],
    aten.transpose.int: [(X, 1, 2)],
    aten.type_as.default: [(X, Y.double()), (X, Y)],
    aten.unsqueeze.default: [(X, 1)],
    aten.view.default: [(X, [2, -1, 3])],
    aten.where.self: [(MASK, X, Y)],
}


def recorded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    torch.manual_seed(0)
    recorder = Recorder()
    with recorder:
        result = function(*args)
    return result, recorder.calls


@pytest.mark.parametrize("overload", direct_calls.FUNCTIONS, ids=str)
def test_a_function_runs_what_its_overload_runs(overload: Any) -> None:
    for args in EXAMPLES[overload]:
        expected, wanted = recorded(overload, args)
        found, calls = recorded(direct_calls.function_for(overload), args)
        assert calls == wanted
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        assert found._is_view() == expected._is_view()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", [LLAMA, GPT2, BERT], ids=str)
def test_the_code_that_runs_calls_functions_and_the_code_to_read_is_that_of_fx(case: zoo.Case) -> None:
    plain = adapted(case, torch.float32)
    for gm in (plain, lora_fx.optimize(plain)):
        assert gm.code == as_fx_writes_it(gm)
        names = {"view", "transpose", "linear"} - ({"linear"} if gm is not plain else set())
        assert names <= {*type(gm).forward.__code__.co_names}
        assert not names & called_as_overloads(gm)


def as_fx_writes_it(gm: Any) -> str:
    """Of the graph that is compiled."""
    lowering = record_of(gm).lowering
    return (gm.graph if lowering is None else lowering(gm, gm.graph)).python_code("self").src


def called_as_overloads(gm: Any) -> set[str]:
    """The operators that the code which runs calls as torch.ops.aten.NAME."""
    steps = [(i.opname, i.argval) for i in dis.get_instructions(type(gm).forward)]
    return {
        name
        for (_, first), (kind, name) in itertools.pairwise(steps)
        if first == "aten" and kind in ("LOAD_ATTR", "LOAD_METHOD")
    }


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("y = torch.ops.aten.add.Tensor(x, 2)", "y = torch.add(x, 2)"),
        ("y = torch.ops.aten.view.default(x, [a, -1])", "y = x.view([a, -1])"),
        ("y = torch.ops.aten.contiguous.default(x)", "y = x.contiguous()"),
        ("y : torch.Tensor = torch.ops.aten.linear.default(x, w)", "y : torch.Tensor = torch._C._nn.linear(x, w)"),
        ("y = torch.ops.aten.add.Tensor(x, z, alpha = 2)", None),
        ("y = torch.ops.aten.erf.default(x)", None),
        ("y = torch.ops.aten.to.dtype(x, torch.float64, False, False, torch.contiguous_format)", None),
        ("y = something_else(torch.ops.aten.add.Tensor(x, 2))", None),
    ],
)
def test_lines_that_are_not_fxs_stay(line: str, written: str | None) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    overload = aten.view.default if "view" in line else aten.contiguous.default if "contiguous" in line else None
    overload = overload or (aten.linear.default if "linear" in line else aten.add.Tensor)
    overload = aten.erf.default if "erf" in line else aten.to.dtype if "to.dtype" in line else overload
    arguments = (x, torch.float64, False, False, torch.contiguous_format) if "to.dtype" in line else (x,)
    graph.call_function(overload, arguments, {"alpha": 2} if "alpha" in line else {})
    body = ["# COUNTER: 0\n", "# COUNTER: 1\n", line, ";  x = None\n"]
    assert direct_calls.with_direct_calls(body, graph) == [*body[:2], written or line, body[3]]


def test_a_graph_is_traced_symbolically_as_it_runs() -> None:
    plain = adapted(STACK, torch.float32).eval()
    again = fx.symbolic_trace(plain)
    arguments = STACK.arguments(torch.float32)
    assert zoo.distance(zoo.run(again, arguments), zoo.run(plain, arguments)) == 0


# Straight groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, GPT2, BERT, STACK], ids=str)
def test_a_straight_group_computes_what_any_group_does(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapted(case)
    calls: list[str] = []
    for way in ("forward", "backward"):
        real = getattr(StraightGroup, way)
        monkeypatch.setattr(StraightGroup, way, lambda *args, real=real, way=way: calls.append(way) or real(*args))
    loss, straight = gradients(lora_fx.optimize(plain), case.arguments(torch.float64))
    assert calls.count("forward") == calls.count("backward") > 0
    monkeypatch.setattr(StraightGroup, "of", lambda *args: None)
    again, general = gradients(lora_fx.optimize(plain), case.arguments(torch.float64))
    assert torch.equal(loss, again)
    assert straight.keys() == general.keys()
    assert all(torch.equal(straight[name], general[name]) for name in straight)


@pytest.mark.parametrize(
    "change", ["none", "another dtype", "A of another dtype", "an unused result", "frozen B", "another rank"]
)
def test_what_is_not_as_usual_is_left_to_any_group(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(tuple(Linear("linear", False, (Term(2.0),)) for _ in range(2)))
    x, w1, w2, a1, b1, a2, b2 = values(
        SQUARE, (4, WIDTH), (6, WIDTH), (2, WIDTH), (4, 2), (3, WIDTH), (6, 3), dtype=torch.float64
    )
    called = function_of(group)
    narrow = (lambda t: t.float()) if change == "another dtype" else lambda t: t
    for turn in range(2):  # the second in the same call, which remembers what the first was like
        if turn and change == "another rank":
            a1, b1, a2, b2 = a2, values((4, 3))[0], a1, values((6, 2))[0]
        leaves = [narrow(t).clone().requires_grad_() for t in (a1, b1, a2, b2)]
        if change == "A of another dtype":
            leaves[::2] = [leaf.detach().float().requires_grad_() for leaf in leaves[::2]]
        leaves[1].requires_grad_(change != "frozen B")
        own = x.clone().requires_grad_()
        y, z = called(False, own, w1, *leaves[:2], w2, *leaves[2:])
        p, q, r, s = (leaf.double() for leaf in leaves)
        wanted = [F.linear(own, w1) + own @ p.t() @ q.t() * 2.0, F.linear(own, w2) + own @ r.t() @ s.t() * 2.0]
        pairs = [(y, wanted[0]), (z, wanted[1])][: 1 if change == "an unused result" else 2]
        inputs = [leaf for leaf in (own, *leaves) if leaf.requires_grad]
        found = torch.autograd.grad([one.sum() for one, _ in pairs], inputs, allow_unused=True)
        expected = torch.autograd.grad([other.sum() for _, other in pairs], inputs, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-5)
        torch.testing.assert_close(y, wanted[0], rtol=1e-6, atol=1e-6)
