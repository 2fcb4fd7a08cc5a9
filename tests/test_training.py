"""Training an injected graph as any module: loops, compile, autocast, state dicts, copies, devices and dtypes."""

from __future__ import annotations

import copy
import io
import types
import warnings

import pytest
import torch
import zoo
from torch import fx, nn
from torch.utils import _pytree as pytree
from zoo import (
    BY_NAME,
    STACK,
    assert_same_bits,
    bits,
    distance,
    injected,
    lora_tensors,
    loss_of,
    randomise,
    run,
    traced,
)

import lora_fx
from lora_fx import AdapterError, LoraConfig

MLP = BY_NAME["mlp"]


class Reference(nn.Module):
    """LoRA as a module, by the book."""

    def __init__(
        self, base: nn.Linear, low: torch.Tensor, up: torch.Tensor, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(dropout)
        self.low, self.up = nn.Parameter(low.detach().clone()), nn.Parameter(up.detach().clone())

    def forward(self, x):
        return self.base(x) + self.scaling * (self.dropout(x) @ self.low.T @ self.up.T)


def with_references(adapted: fx.GraphModule, dropout: float = 0.0) -> nn.Module:
    model = MLP.model(torch.float64)
    model.requires_grad_(False)
    tensors = lora_tensors(adapted)
    for name in ("fc1", "fc2"):
        low, up = (tensors[f"{name}.lora_{half}.default.weight"] for half in "AB")
        setattr(model, name, Reference(model.get_submodule(name), low, up, 5 / 3, dropout))
    return model


def train(module: nn.Module, parameters, steps: int = 5, case: zoo.Case = MLP, dtype=torch.float32) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module, case.arguments(dtype, seed=step), seed=step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_loop_is_the_reference_implementations(dropout: float) -> None:
    """The same losses and the same adapter after five steps of AdamW, the model's dropout included."""
    gm = injected(MLP, traced(MLP, "trace", torch.float64), lora_dropout=dropout)
    randomise(gm).train()
    model = with_references(gm, dropout).train()
    ours = train(gm, lora_fx.lora_parameters(gm), dtype=torch.float64)
    theirs = train(model, [p for p in model.parameters() if p.requires_grad], dtype=torch.float64)
    if not dropout:  # the order in which the masks are drawn differs
        assert ours == pytest.approx(theirs, rel=1e-10)
        for name in ("fc1", "fc2"):
            reference = model.get_submodule(name)
            torch.testing.assert_close(gm.get_parameter(f"{name}.lora_A.default.weight"), reference.low)
            torch.testing.assert_close(gm.get_parameter(f"{name}.lora_B.default.weight"), reference.up)
    assert ours[-1] != ours[0]


@pytest.mark.parametrize("case", [pytest.param(BY_NAME[n], id=n) for n in ("stack", "einsum", "products", "attention")])
def test_training_lowers_the_loss(case: zoo.Case) -> None:
    gm = injected(case, traced(case), init_lora_weights="gaussian").eval()
    losses = []
    optimizer = torch.optim.Adam(lora_fx.lora_parameters(gm), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(gm, case.arguments())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_checkpointing_a_run_resumes_it_bit_for_bit() -> None:
    """state_dict of graph and optimizer, through a file, into a freshly injected graph."""

    def steps(gm: fx.GraphModule, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            loss_of(gm, STACK.arguments(seed=step), seed=step).backward()
            optimizer.step()

    first = injected(STACK, traced(STACK)).train()
    optimizer = torch.optim.AdamW(lora_fx.lora_parameters(first), lr=0.01)
    steps(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(first, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    private = copy.deepcopy(traced(STACK))  # load_state_dict writes into the base too
    second = injected(STACK, private).train()
    second_optimizer = torch.optim.AdamW(lora_fx.lora_parameters(second), lr=0.01)
    second.load_state_dict(saved["model"])
    second_optimizer.load_state_dict(saved["optimizer"])
    steps(second, second_optimizer, range(3, 6))
    assert not lora_fx.compare_graphs(first, second)


def test_state_dict_is_the_bases_and_the_adapters() -> None:
    gm = traced(STACK)
    adapted = injected(STACK, gm, lora_dropout=0.1)
    assert set(adapted.state_dict()) == set(gm.state_dict()) | set(lora_tensors(adapted))
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict(gm.state_dict())
    adapted.load_state_dict(adapted.state_dict())


def test_deepcopy_is_independent() -> None:
    case = BY_NAME["modes_both"]
    gm = randomise(injected(case, traced(case)))
    twin = copy.deepcopy(gm)
    expected = run(gm.eval(), case.arguments())
    assert_same_bits(expected, run(twin.eval(), case.arguments()))
    assert not set(map(id, gm.parameters())) & set(map(id, twin.parameters()))
    assert lora_fx.adapter_names(twin) == ("default",)
    assert {n: p.requires_grad for n, p in gm.named_parameters()} == {
        n: p.requires_grad for n, p in twin.named_parameters()
    }
    train(twin.train(), lora_fx.lora_parameters(twin), steps=2, case=case)
    assert distance(run(twin.eval(), case.arguments()), expected) > 1e-3
    result = lora_fx.fold(twin)
    assert distance(run(twin, case.arguments()), run(result, case.arguments())) < zoo.tolerance(case, torch.float32)
    assert zoo.codes(lora_fx.fold(gm)) == zoo.codes(result)
    assert_same_bits([twin.get_parameter("fc1.weight")], [gm.get_parameter("fc1.weight")])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["mlp", "stack", "attention", "modes_both", "called_twice"])
def test_torch_compile(name: str, backend: str) -> None:
    case = BY_NAME[name]
    gm, x = randomise(injected(case, traced(case))), case.arguments()
    torch._dynamo.reset()
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    for mode in (False, True, False):
        gm.train(mode)
        if name == "modes_both" and mode:
            continue  # its statistics would move between the two calls
        expected = run(gm, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = run(compiled, x)
        assert distance(expected, actual) <= zoo.tolerance(case, torch.float32)
    gm.eval()
    loss_of(gm, x).backward()
    expected = {n: p.grad.clone() for n, p in lora_tensors(gm).items() if p.grad is not None}
    assert expected
    gm.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss_of(compiled, x).backward()
    for parameter_name, gradient in expected.items():
        torch.testing.assert_close(gm.get_parameter(parameter_name).grad, gradient)


def test_torch_compile_with_inductor() -> None:
    gm, x = randomise(injected(MLP, traced(MLP))).eval(), MLP.arguments()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = run(torch.compile(gm), x)
    assert distance(run(gm, x), actual) <= zoo.tolerance(MLP, torch.float32)


@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tracer", ["trace", "symbolic"])
def test_autocast(tracer: str, base: torch.dtype, adapter_dtype) -> None:
    for name in ("mlp", "stack", "addmm"):
        case = BY_NAME[name]
        gm = lora_fx.inject(
            traced(case, tracer, base), LoraConfig(target_modules=case.targeted, r=3), adapter_dtype=adapter_dtype
        )
        randomise(gm).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = run(case.model(base), case.arguments(base))
            out = run(gm, case.arguments(base))
            merged = run(lora_fx.fold(gm), case.arguments(base))
            loss = loss_of(gm, case.arguments(base))
        assert out[0].dtype == expected[0].dtype, name
        assert distance(out, merged) <= zoo.tolerance(case, torch.bfloat16)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_tensors(gm).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tracer", ["trace", "symbolic", "export"])
@pytest.mark.parametrize("name", ["mlp", "stack", "attention", "einsum", "addmm"])
def test_moving_an_injected_graph_to_another_dtype(name: str, tracer: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    if tracer not in case.tracers:
        pytest.skip("not traced so")
    gm = randomise(injected(case, copy.deepcopy(traced(case, tracer))))
    expected = run(gm.eval(), case.arguments())
    gm = gm.to(dtype)
    out = run(gm.eval(), case.arguments(dtype))
    assert out[0].dtype == dtype
    coarsest = dtype if dtype.itemsize < 4 else torch.float32
    assert distance(expected, out) <= 2 * zoo.tolerance(case, coarsest)
    assert distance(out, run(lora_fx.fold(gm), case.arguments(dtype))) <= zoo.tolerance(case, dtype)


def test_moving_to_a_dtype_keeps_training_possible() -> None:
    gm = injected(MLP, copy.deepcopy(traced(MLP))).to(torch.float64).train()
    losses = train(gm, lora_fx.lora_parameters(gm), dtype=torch.float64)
    assert losses[-1] != losses[0]
    assert {p.dtype for p in gm.parameters()} == {torch.float64}


def test_moving_to_meta_and_back_to_the_cpu() -> None:
    gm = injected(MLP, copy.deepcopy(traced(MLP)))
    assert gm.to("cpu") is gm
    meta = copy.deepcopy(gm).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in zoo.SMALL if "trace" in case.tracers])
def test_the_laws_on_a_gpu(case: zoo.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default for convolutions

    def moved(value):
        return torch.utils._pytree.tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, value)

    x = moved(case.arguments())
    gm = lora_fx.trace(case.model().cuda(), *x)
    adapted = injected(case, gm)
    assert {p.device.type for p in adapted.parameters()} == {"cuda"}
    base = run(zoo.frozen(gm), x)
    assert all(torch.equal(a, b) for a, b in zip(base, run(adapted, x), strict=True))
    randomise(adapted)
    expected = run(adapted, x)
    assert distance(expected, run(zoo.folded(case, adapted), x)) <= 4 * zoo.tolerance(case, torch.float32)
    assert distance(expected, base) > 1e-2
    cpu = randomise(injected(case, traced(case)))
    cpu.load_state_dict(adapted.state_dict())
    assert distance(expected, moved(run(cpu, case.arguments()))) < 1e-2
    loss_of(adapted.train(), x).backward()


# What is trainable ----------------------------------------------------------------------------------


def test_lora_parameters() -> None:
    gm = injected(STACK, traced(STACK), targets=["up"], modules_to_save=["head"], bias="all")
    parameters = lora_fx.lora_parameters(gm)
    assert len({id(p) for p in parameters}) == len(parameters)
    assert {id(p) for p in parameters} == {id(p) for p in gm.parameters() if p.requires_grad}
    both = injected(STACK, gm, "second", ["down"])
    assert len(lora_fx.lora_parameters(both, "second")) == 4
    assert len(lora_fx.lora_parameters(both)) == len(parameters) + 4


def test_one_weight_has_one_adapter() -> None:
    gm = injected(BY_NAME["shared_parameter"], traced(BY_NAME["shared_parameter"]), targets=["a", "b"])
    assert len(lora_fx.lora_parameters(gm)) == 2
    assert len(lora_tensors(gm)) == 4


def test_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    gm = injected(MLP, traced(MLP))
    added = 3 * (7 + 11) + 3 * (11 + 5)
    total = 7 * 11 + 11 + 11 * 5 + 5
    assert lora_fx.trainable_parameters(gm) == (added, added + total)
    lora_fx.print_trainable_parameters(gm)
    share = 100 * added / (added + total)
    assert capsys.readouterr().out == (
        f"trainable params: {added} || all params: {added + total} || trainable%: {share:.4f}\n"
    )
    assert lora_fx.trainable_parameters(traced(BY_NAME["tied_head"]))[1] == 17 * 7 + 7 * 7 + 7


def test_lora_parameters_of_nothing() -> None:
    with pytest.raises(AdapterError, match=r"no adapter.*lora_fx\.inject\(gm, config\)"):
        lora_fx.lora_parameters(traced(MLP))
    with pytest.raises(AdapterError, match="no adapter 'defualt'; it has 'default'. Did you mean 'default'"):
        lora_fx.lora_parameters(injected(MLP, traced(MLP)), "defualt")


def test_the_base_never_moves_over_a_long_run() -> None:
    """PEFT's attention merges and unmerges at every call, and its base drifts (5.0 #4)."""
    case = BY_NAME["multi_head"]
    gm = randomise(injected(case, traced(case, "trace", torch.bfloat16)))
    before = {n: bits(p) for n, p in gm.named_parameters() if "lora" not in n}
    train(gm.train(), lora_fx.lora_parameters(gm), steps=20, case=case, dtype=torch.bfloat16)
    assert {n: bits(p) for n, p in gm.named_parameters() if "lora" not in n} == before


class Casting(nn.Module):
    """What is read behind a cast that is none in float32 must not read the cast in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x):
        h = self.fc1(x)
        wide = h.to(torch.float32)
        return self.fc2((wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(h.dtype)) + h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["casting", "llama", "qwen3", "gpt2", "bert"])
def test_a_traced_graph_in_another_dtype_is_the_model_in_that_dtype(name: str, dtype: torch.dtype) -> None:
    if name == "casting":
        model, arguments = Casting().eval(), ((torch.randn(3, 7),), {})
    else:
        model, arguments = BY_NAME[name].model(), BY_NAME[name].arguments()
    source = copy.deepcopy(model)
    gm = lora_fx.trace(source, *arguments)
    config = LoraConfig(target_modules=["fc1", "fc2"] if name == "casting" else BY_NAME[name].targeted)
    adapted = lora_fx.inject(gm, config).to(dtype)
    model.to(dtype)

    def moved(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    args, kwargs = pytree.tree_map(moved, arguments)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))[0]
        got = pytree.tree_leaves(adapted(*args, **kwargs))[0]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=float(expected.abs().max()) * 4 * torch.finfo(dtype).eps)


def test_what_replaces_forward_on_the_instance_follows_the_mode() -> None:
    """As Accelerate does for autocast: it holds the function that was shown, and has to call the one that is."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.5), torch.nn.Linear(7, 3))
    gm = lora_fx.inject(lora_fx.trace(model, torch.randn(4, 5)), LoraConfig(r=2, target_modules="all-linear"))
    randomise(gm).train()
    x = torch.randn(4, 5)
    expected = copy.deepcopy(gm).eval()(x)
    calls = []

    def wrapped(self, *args, held=gm.forward.__func__):
        calls.append(1)
        return held(self, *args)

    gm.forward = types.MethodType(wrapped, gm)
    assert not torch.equal(gm(x), gm(x))
    assert torch.equal(gm.eval()(x), expected)
    assert torch.equal(gm.eval()(x), expected)
    assert not torch.equal(gm.train()(x), gm(x))
    count = len(calls)
    assert count == 6
    with lora_fx.disable_adapters(gm.eval()):
        assert torch.equal(gm(x), model.eval()(x))
    assert torch.equal(gm(x), expected)
    assert torch.equal(copy.deepcopy(gm)(x), expected)  # a copy has its own
    torch.testing.assert_close(lora_fx.fold(gm)(x), expected)
    assert len(calls) == count + 2
