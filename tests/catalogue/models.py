"""Models and graphs that cannot be traced, adapted, or folded; and those that other tools get wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from catalogue.harness import IDS, TARGETS, Case, World, same
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora_fx

X = torch.linspace(-1, 1, 28).reshape(4, 7)


class Around(nn.Module):
    """One module, and something around it."""

    def __init__(self, inner: nn.Module, forward: Callable[[Any, torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.fc, self._forward = inner, forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x) if self._forward is None else self._forward(self, x)


def round_trip(model: nn.Module, x: torch.Tensor = X, targets: Any = ("fc",), **options: Any) -> bool:
    """Injected, moved, folded: folded computes what adapted did, and something else than the base."""
    model = model.eval()
    gm = lora_fx.trace(model, (x,))
    plain = gm(x)
    adapted = lora_fx.inject(gm, {"r": 2, "target_modules": list(targets), **options}).eval()
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted):
            parameter.add_(torch.linspace(-0.5, 0.7, parameter.numel()).reshape(parameter.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folded = lora_fx.fold(adapted)
        return same(folded(x), adapted(x)) and not same(folded(x), plain) and same(plain, model(x))


def refused(model: nn.Module, x: torch.Tensor = X, targets: Any = ("fc",)) -> object:
    round_trip(model, x, targets)
    return False


def weight_norm() -> nn.Module:
    return Around(parametrizations.weight_norm(nn.Linear(7, 7)))


def spectral_norm() -> nn.Module:
    return Around(parametrizations.spectral_norm(nn.Linear(7, 7)))


def pruned() -> nn.Module:
    layer = nn.Linear(7, 7)
    prune.l1_unstructured(layer, "weight", 0.3)
    return Around(layer)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.1


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.words, self.fc, self.head = nn.Embedding(13, 7), nn.Linear(7, 7), nn.Linear(7, 13, bias=False)
        if how == "parameter":
            self.head.weight = self.words.weight
        else:
            self.head.weight = nn.Parameter(self.words.weight.detach().view(13, 7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.words(ids)))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 7)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Fused(nn.Module):
    """q is a view of the rows of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q = nn.Linear(7, 21, bias=False), nn.Linear(7, 7, bias=False)
        self.q.weight = nn.Parameter(self.qkv.weight.detach()[:7])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)[..., :7] + self.q(x)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.at(x, x, x, need_weights=False)[0]


def hooked(kind: str) -> nn.Module:
    model = Around(nn.Linear(7, 7))
    if kind == "pre":
        model.fc.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    elif kind == "post":
        model.fc.register_forward_hook(lambda m, args, out: out * 3)
    else:
        model.register_forward_hook(lambda m, args, out: out + 1)
    return model


def frozen_batch_norm(world: World) -> object:
    """Statistics move in training, as they do in the model; files that go without them say so."""
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)).eval()
    gm = lora_fx.inject(lora_fx.trace(model, (X,)), {"r": 2, "target_modules": ["0"]})
    gm.train()(X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_fx.save_adapter(gm, world.here / "moved")
    return any("modules_to_save" in str(each.message) for each in caught)


def lazy() -> object:
    return lora_fx.trace(nn.LazyLinear(3), (X,))


def meta(world: World) -> object:
    with torch.device("meta"):
        model = Around(nn.Linear(7, 7))
    gm = lora_fx.inject(lora_fx.trace(model.eval(), (X.to("meta"),)), {"r": 2, "target_modules": ["fc"]})
    lora_fx.save_adapter(gm, world.here / "meta")
    return False


def meta_fold(world: World) -> object:
    with torch.device("meta"):
        model = Around(nn.Linear(7, 7))
    lora_fx.fold(lora_fx.inject(lora_fx.trace(model.eval(), (X.to("meta"),)), {"r": 2, "target_modules": ["fc"]}))
    return False


def non_finite(value: float) -> nn.Module:
    model = Around(nn.Linear(7, 7))
    with torch.no_grad():
        model.fc.weight[0, 0] = value
    return model


def integers() -> nn.Module:
    model = Around(nn.Linear(7, 7, bias=False), lambda self, x: x @ self.fc.weight.float().t())
    model.fc.weight = nn.Parameter(torch.ones(7, 7, dtype=torch.int8), requires_grad=False)
    return model


def expanded() -> nn.Module:
    model = Around(nn.Linear(7, 7, bias=False))
    model.fc.weight = nn.Parameter(torch.randn(1, 7).expand(7, 7))
    return model


def noise() -> nn.Module:
    return Around(nn.Linear(7, 7), lambda self, x: self.fc(x) + torch.rand(1))


def exported(world: World) -> object:
    program = torch.export.export(world.model, (IDS,))
    lora_fx.inject(program, {"r": 2, "target_modules": TARGETS})
    return False


def exported_module(world: World) -> object:
    gm = torch.export.export(world.model, (IDS,)).module()
    return same(lora_fx.inject(gm, {"r": 2, "target_modules": TARGETS})(IDS), world.model(IDS))


def in_train(world: World) -> object:
    model = nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.5)).train()
    gm = lora_fx.trace(model, (X,))
    return same(gm.eval()(X), model.eval()(X))


def symbolic_dropout(world: World) -> object:
    model = Around(nn.Linear(7, 7), lambda self, x: nn.functional.dropout(self.fc(x), 0.5, self.training)).train()
    gm = lora_fx.inject(torch.fx.symbolic_trace(model), {"r": 2, "target_modules": ["fc"]})
    gm.eval()
    return False


RIGHT: dict[str, Callable[[], bool]] = {
    "a view of a fused weight": lambda: round_trip(Fused(), targets=["q"]),
    "one linear": lambda: round_trip(Around(nn.Linear(7, 7))),
    "the root is the linear": lambda: round_trip(nn.Linear(7, 5), targets=[""]),
    "a transposed weight": lambda: round_trip(_transposed()),
    "a subclass with a forward of its own": lambda: round_trip(Around(Scaled(7, 7))),
    "a hook before": lambda: round_trip(hooked("pre")),
    "a hook behind": lambda: round_trip(hooked("post")),
    "a hook on the root": lambda: round_trip(hooked("root")),
    "tied parameters": lambda: round_trip(Tied("parameter"), IDS, ["fc"]),
    "tied parameters, adapted": lambda: round_trip(Tied("parameter"), IDS, ["head"]),
    "tied storages, adapted": lambda: round_trip(Tied("storage"), IDS, ["head"]),
    "a module of two names": lambda: round_trip(TwoNames(), targets=["a"]),
    "an embedding with padding": lambda: round_trip(Around(nn.Embedding(13, 7, padding_idx=0)), IDS),
    "a convolution that pads in a circle": lambda: round_trip(
        Around(nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")), torch.randn(2, 4, 9)
    ),
    "a dilated convolution, padded to the same": lambda: round_trip(
        Around(nn.Conv2d(4, 6, 3, padding="same", dilation=2)), torch.randn(2, 4, 9, 9)
    ),
    "a transposed convolution": lambda: round_trip(Around(nn.ConvTranspose1d(4, 6, 3)), torch.randn(2, 4, 9)),
    "a convolution in groups": lambda: round_trip(Around(nn.Conv1d(4, 6, 3, groups=2)), torch.randn(2, 4, 9)),
    "attention's output": lambda: round_trip(Attention(), torch.randn(2, 5, 8), ["at.out_proj"]),
    "an encoder layer": lambda: round_trip(
        Around(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), torch.randn(2, 5, 8), ["linear1", "linear2"]
    ),
    "the weight read directly": lambda: round_trip(
        Around(nn.Linear(7, 7), lambda self, x: nn.functional.linear(x, self.fc.weight))
    ),
    "a name with lora_ in it": lambda: round_trip(nn.Sequential(_named("flora_head")), targets=["flora_head"]),
    "a rank above the width": lambda: round_trip(Around(nn.Linear(7, 7)), r=64),
    "a vector": lambda: round_trip(Around(nn.Linear(7, 7)), torch.randn(7)),
    "no rows": lambda: _no_rows(),
    "bfloat16": lambda: _dtype(torch.bfloat16),
    "float16": lambda: _dtype(torch.float16),
    "float64": lambda: round_trip(Around(nn.Linear(7, 7)).double(), X.double()),
}  # fmt: skip


def _transposed() -> nn.Module:
    model = Around(nn.Linear(7, 7, bias=False))
    model.fc.weight = nn.Parameter(torch.randn(7, 7).t())
    return model


def _named(name: str) -> Any:
    from collections import OrderedDict

    return OrderedDict({name: nn.Linear(7, 7)})


def _no_rows() -> bool:
    gm = lora_fx.trace(Around(nn.Linear(7, 7)).eval(), (X,))
    return tuple(lora_fx.inject(gm, {"r": 2, "target_modules": ["fc"]})(X[:0]).shape) == (0, 7)


def _dtype(dtype: torch.dtype) -> bool:
    model = Around(nn.Linear(7, 7)).to(dtype).eval()
    gm = lora_fx.trace(model, (X.to(dtype),))
    adapted = lora_fx.inject(gm, {"r": 2, "target_modules": ["fc"]}).eval()
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(adapted):
            parameter.add_(0.25)
    eps = torch.finfo(dtype).eps
    return same(lora_fx.fold(adapted)(X.to(dtype)).float(), adapted(X.to(dtype)).float(), 8 * eps)


def _beside(fold_of_one: bool, symbolic: bool) -> object:
    """A linear whose weight is read by something that is not adapted: W + ΔW is for the linear alone."""
    model = Around(
        nn.Linear(7, 7), lambda self, x: self.fc(x) + torch.ops.aten.detach.default(self.fc.weight)[0]
    ).eval()
    gm: Any = torch.fx.symbolic_trace(model) if symbolic else lora_fx.trace(model, (X,))
    for name in ("one", "two"):
        gm = lora_fx.inject(gm, {"r": 2, "target_modules": ["fc"]}, adapter_name=name)
        with torch.no_grad():
            for parameter in lora_fx.lora_parameters(gm, name):
                parameter.add_(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded = lora_fx.fold(gm, adapters="one" if fold_of_one else None)
        return same(folded(X), gm(X)) and same(lora_fx.fold(folded)(X) if fold_of_one else folded(X), gm(X))


CASES = [
    *(Case(f"model/{name}", lambda w, f=f: f()) for name, f in RIGHT.items()),
    Case("model/weight_norm", lambda w: refused(weight_norm()), ("fc",)),
    Case("model/spectral_norm", lambda w: refused(spectral_norm()), ("fc",)),
    Case("model/pruned", lambda w: refused(pruned()), ("fc",)),
    Case("model/max_norm", lambda w: refused(Around(nn.Embedding(13, 7, max_norm=1.0)), IDS), ("renorm",)),
    Case("model/int8 weights", lambda w: refused(integers()), ("fc",)),
    Case("model/NaN in the base", lambda w: refused(non_finite(float("nan"))), ("base weight", "fc")),
    Case("model/Inf in the base", lambda w: refused(non_finite(float("inf"))), ("base weight", "fc")),
    Case("model/no linear", lambda w: refused(Around(nn.LayerNorm(7))), ("fc",)),
    Case("model/no parameter", lambda w: refused(Around(nn.ReLU())), ("fc",)),
    Case("model/on the meta device, saved", meta, ("meta",)),
    Case("model/on the meta device, folded", meta_fold, ("meta",)),
    Case("model/lazy", lambda w: lazy(), ("lazy",)),
    Case("model/a weight that is read beside its linear", lambda w: _beside(False, False)),
    Case("model/the same, one adapter of two folded", lambda w: _beside(True, False), ("fc.weight", "'two'")),
    Case("model/the same, symbolic", lambda w: _beside(False, True), ("fc.weight", "its module")),
    Case("trace/a branch on data", lambda w: refused(Branch()), ("Branch",)),
    Case("trace/no inputs", lambda w: lora_fx.trace(w.model), ("Small", "trace(model, args")),
    Case("trace/too many inputs", lambda w: lora_fx.trace(w.model, (IDS, IDS)), ("Small",)),
    Case("trace/an input of another name", lambda w: lora_fx.trace(w.model, (), {"idz": IDS}), ("forward(ids",)),
    Case("trace/no model", lambda w: lora_fx.trace(3, (IDS,)), ("int",)),
    Case("trace/a class", lambda w: lora_fx.trace(nn.Linear, (IDS,)), ("Linear",)),
    Case("trace/arguments of a wrong kind", lambda w: lora_fx.trace(w.model, 5), ("args=5",)),
    Case("trace/keywords of a wrong kind", lambda w: lora_fx.trace(w.model, (IDS,), [1]), ("kwargs=[1]",)),
    Case("trace/dynamic shapes of a wrong kind", lambda w: lora_fx.trace(w.model, (IDS,), dynamic_shapes="all"),
         ("dynamic_shapes",)),
    Case("trace/an exported program", exported, ("ExportedProgram", "module()")),
    Case("trace/an exported program's module", exported_module),
    Case("trace/in train", in_train),
    Case("trace/symbolic, dropout frozen in train", symbolic_dropout, ("train",)),
    Case("trace/a plain module", lambda w: lora_fx.inject(w.model, {"r": 2}), ("lora_fx.trace",)),
    Case("model/statistics of a frozen base", frozen_batch_norm, changes=True),
]  # fmt: skip
