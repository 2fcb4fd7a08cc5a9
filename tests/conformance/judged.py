"""The small models that PEFT is compared on: those of its own matrix (module names and shapes alike), and some more.

`explicit` is the judge of all of them: the base with its weights replaced by W + ΔW, worked out here from an adapter's
files. It shares no line with lora_fx or PEFT, so it also says which of them is wrong.

Inputs are PEFT's `arange(90).view(9, 10)`. Where a model takes numbers rather than ids they are brought to [-1, 1),
so that no softmax and no ReLU is saturated and every element of every delta shows in the output.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import Case

import lora_fx

# PEFT's matrix ------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        return self.sm(self.lin1(self.drop(self.relu(self.lin0(X)))))


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        nn.init.normal_(self.conv1d.weight, std=0.5)  # 0.02 as it comes, which hides everything behind lin0's bias
        nn.init.constant_(self.conv1d.bias, 1.0)  # so that the tokens of the matrix get through the ReLU
        self.relu = nn.ReLU()
        self.flat = nn.Flatten()
        self.lin0 = nn.Linear(10, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        return self.sm(self.lin0(self.flat(self.relu(self.conv1d(self.emb(X))))))


class ConvHead(nn.Module):
    """The input in another shape, a convolution, ReLU, and a linear on all that comes out of it."""

    def __init__(self, name: str, conv: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.add_module(name, conv)
        self.relu, self.flat = nn.ReLU(), nn.Flatten()
        with torch.no_grad():
            features = self.flat(conv(torch.zeros(shape))).shape[1]
        self.lin0 = nn.Linear(features, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        X = X.reshape(self.shape)
        return self.sm(self.lin0(self.flat(self.relu(self.get_submodule(self.name)(X)))))


class Conv3dHead(ConvHead):
    """PEFT's volume: the same picture three times."""

    def forward(self, X):
        return super().forward(torch.stack([X] * 3, dim=-1))


class Conv2dGroups(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.lin0 = nn.Linear(90, 288)
        self.conv2d = conv
        self.relu, self.flat = nn.ReLU(), nn.Flatten()
        side = 3 + 2 * int(conv.padding[0]) - 2
        self.lin1 = nn.Linear(conv.out_channels * side * side, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        X = self.lin0(X.flatten()).reshape(2, 16, 3, 3)
        return self.sm(self.lin1(self.flat(self.relu(self.conv2d(X)))))


class Mha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.relu = nn.ReLU()
        self.flat = nn.Flatten()
        self.lin0 = nn.Linear(10, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        return self.sm(self.lin0(self.flat(self.relu(self.mha(X, X, X)[0]))))


class ParameterLinear(nn.Module):
    """x @ W + b, with W stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, X):
        return X @ self.weight + self.bias


class MlpUsingParameters(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = ParameterLinear(10, 20), ParameterLinear(20, 2)


# More that is worth judging on -----------------------------------------------------------------------


class Mix(nn.Module):
    """Three linears of which the middle one has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(10, 13), nn.Linear(13, 11, bias=False), nn.Linear(11, 3)

    def forward(self, X):
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(X)))))


class ScaledEmbedding(nn.Embedding):
    """As in transformers: a table whose module multiplies its rows; PEFT knows the attribute's name."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Embeddings(nn.Module):
    """One table with a padding row, and one that is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Embedding(90, 7, padding_idx=3)
        self.scaled = ScaledEmbedding(90, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, X):
        return self.out(torch.tanh(self.padded(X) + self.scaled(X)))


class TiedLm(nn.Module):
    """Embedding and head of one tensor, with the names by which PEFT knows them; no PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(90, 7)
        self.fc = nn.Linear(7, 7)
        self.lm_head = nn.Linear(7, 90, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, X):
        return self.lm_head(torch.tanh(self.fc(self.embed_tokens(X))))


class Experts(nn.Module):
    """Matrices of all experts in one parameter, stored (E, out, in); every expert sees every token."""

    def __init__(self, count: int = 3, inner: int = 7, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # PEFT asks for it
        up, down = (count, inner, 10), (count, 10, inner)
        self.up = nn.Parameter(torch.randn(down if is_transposed else up) / 3)
        self.down = nn.Parameter(torch.randn(up if is_transposed else down) / 3)

    def forward(self, X):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        every = X.expand(up.shape[0], *X.shape)
        return torch.bmm(torch.tanh(torch.bmm(every, up)), down).sum(0)


class ExpertsMlp(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 10)
        self.experts = Experts(is_transposed=is_transposed)
        self.head = nn.Linear(10, 2)

    def forward(self, X):
        return self.head(self.experts(torch.tanh(self.lin0(X))))


_MOE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 31,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_MOE))


def gpt_oss() -> nn.Module:
    sizes = _MOE | {"pad_token_id": 0, "layer_types": ["full_attention"]}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def tied_llama() -> nn.Module:
    sizes = {k: v for k, v in _MOE.items() if "experts" not in k} | {"head_dim": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


# Inputs --------------------------------------------------------------------------------------------


def numbers(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(90).view(9, 10).to(dtype) / 45 - 1,), {}


def ids(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(90).view(9, 10),), {}


def tokens(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": torch.arange(3, 17).view(2, 7), "use_cache": False}


def _case(name: str, make: Any, sites: str, inputs: Any = numbers, **options: Any) -> Case:
    return Case(name, make, tuple(sites.split()), inputs=inputs, tracers=("trace",), **{"linears": 4} | options)


def _conv(name: str, conv: Any, shape: tuple[int, ...], label: str | None = None) -> Case:
    return _case(label or name, lambda: ConvHead(name, conv(), shape), f"{name} lin0")


def _alive() -> nn.Module:
    """PEFT's one channel, with a bias that lets it through the ReLU."""
    conv = nn.Conv1d(1, 1, 2)
    nn.init.constant_(conv.bias, 0.05)
    return conv


PICTURE = (2, 5, 3, 3)
CASES = {
    case.name: case
    for case in (
        _case("mlp", Mlp, "lin0 lin1"),
        _case("emb_conv1d", EmbConv1D, "emb conv1d lin0", ids),
        _conv("conv1d", _alive, (9, 1, 10)),
        _conv("conv2d", lambda: nn.Conv2d(5, 10, 3), PICTURE),
        _case("conv2d_groups", lambda: Conv2dGroups(nn.Conv2d(16, 16, 3, groups=8)), "lin0 conv2d lin1"),
        _case("conv2d_groups2", lambda: Conv2dGroups(nn.Conv2d(16, 32, 3, padding=1, groups=2)), "lin0 conv2d lin1"),
        _case("conv3d", lambda: Conv3dHead("conv3d", nn.Conv3d(5, 10, 3), (2, 5, 3, 3, 3)), "conv3d lin0"),
        _case("mha", Mha, "mha.in_proj_weight mha.out_proj lin0", linears=8),
        _case("mlp_using_parameters", MlpUsingParameters, "lin0 lin1"),
        _case("mix", Mix, "lin0 lin1 head"),
        _conv("conv2d", lambda: nn.Conv2d(5, 7, (2, 1), stride=(1, 2), padding=(1, 0)), PICTURE, "conv2d_strided"),
        _conv("conv1d", lambda: nn.Conv1d(2, 3, 3, padding="same", bias=False), (9, 2, 5), "conv1d_same"),
        _case("embeddings", Embeddings, "padded scaled out", ids),
        _case("tied_lm", TiedLm, "embed_tokens fc lm_head", ids, unties=True),
        _case("experts", ExpertsMlp, "lin0 experts.up experts.down head"),
        _case("experts_transposed", lambda: ExpertsMlp(True), "lin0 experts.up experts.down head"),
        _case("mixtral", mixtral, "", tokens, linears=9),
        _case("gpt_oss", gpt_oss, "", tokens, linears=9),
        _case("tied_llama", tied_llama, "", tokens, linears=9, unties=True),
    )
}


def moved(gm: Any, size: float = 0.2, name: str = "default") -> Any:
    """The graph, with every trained tensor of an adapter moved away from where it starts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm, name):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise * size).to(parameter.dtype))
    return gm


# The judge -------------------------------------------------------------------------------------------

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?:^|\.)(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)$"
)


def explicit(model: nn.Module, directory: Path, *, out_proj_times: float = 2.0) -> nn.Module:
    """A copy of `model` whose weights are those that the adapter in `directory` makes of them.

    Args:
        model: the base.
        directory: of adapter_config.json and adapter_model.safetensors.
        out_proj_times: how often nn.MultiheadAttention's out_proj gets its delta; PEFT's files mean twice.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    config = json.loads((directory / "adapter_config.json").read_text())
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        name = key.removeprefix(_PREFIX)
        if match := _PART.search(name):
            parts.setdefault(name[: match.start()], {})[match[1]] = tensor.double()
        elif not name.endswith("base_layer.weight"):  # which PEFT adds for heads, and which says nothing new
            _tensor(model, name.replace(".base_layer.", ".")).copy_(tensor)
    changed = []
    for path, part in parts.items():
        if (rows := part.pop("token_adapter.trainable_tokens_delta", None)) is not None:
            indices = config["trainable_token_indices"]
            chosen = indices if isinstance(indices, list) else next(v for k, v in indices.items() if path.endswith(k))
            weight = model.get_submodule(path).weight
            weight[chosen] = rows.to(weight.dtype)
        if part:
            changed.append(_changed(model, path, part, config, out_proj_times))
    for owner, name, value in changed:  # after all are worked out: tied ones start from one W
        setattr(owner, name, nn.Parameter(value.to(getattr(owner, name).dtype), requires_grad=False))
    return model


def combined(model: nn.Module, directories: Mapping[Path, float]) -> nn.Module:
    """W + Σ weight · (W' − W) over several adapters."""
    base, result = model.state_dict(), copy.deepcopy(model)
    total = {name: tensor.double() for name, tensor in base.items()}
    for directory, weight in directories.items():
        for name, tensor in explicit(model, directory).state_dict().items():
            total[name] = total[name] + weight * (tensor.double() - base[name].double())
    result.load_state_dict(total)
    return result


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _scaling(config: Mapping[str, Any], path: str, r: int) -> float:
    alphas = (
        alpha for key, alpha in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", path)
    )
    alpha = next(alphas, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config["use_rslora"] else r)


def _changed(
    model: nn.Module, path: str, part: dict[str, torch.Tensor], config: Mapping[str, Any], out_proj_times: float
) -> tuple[nn.Module, str, torch.Tensor]:
    """(module, name, new value) for the adapter of one path."""
    depth = len(re.findall(r"\.base_layer(?=\.base_layer|$)", path))
    times = out_proj_times if ".base_layer.out_proj" in path else 1.0
    path = path.replace(".base_layer", "")
    a = part.get("lora_A.weight", part.get("lora_embedding_A"))
    b = part.get("lora_B.weight", part.get("lora_embedding_B"))
    assert a is not None
    assert b is not None
    module, name = _parameter(model, path, depth, config.get("target_parameters") or ())
    if name:
        delta = _of_parameter(module, name, a, b, config, path)
        return module, name, getattr(module, name).double() + delta
    scaling, out_axis = _scaling(config, path, a.shape[0]) * times, 0
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        assert a.shape[1] == module.in_channels, "PEFT's A sees all inputs, whatever the groups"
        _ungroup(module)
        delta = torch.einsum("or,r...->o...", _dense(b.flatten(1), a.shape[0]), a)
    elif isinstance(module, nn.Embedding | Conv1D):
        delta, out_axis = (b @ a).T, 1
    else:
        delta = b @ a
    weight = getattr(module, name).double()
    weight = weight - _taken_out(weight, config["init_lora_weights"], a.shape[0], scaling)
    weight = weight + scaling * delta
    if (bias := part.get("lora_B.bias")) is not None:
        module.bias.add_((scaling * bias).to(module.bias.dtype))
    if (magnitude := part.get("lora_magnitude_vector")) is not None:
        others = [axis for axis in range(weight.dim()) if axis != out_axis]
        shape = [-1 if axis == out_axis else 1 for axis in range(weight.dim())]
        weight = weight / torch.linalg.vector_norm(weight, dim=others, keepdim=True) * magnitude.reshape(shape)
    return module, name, weight


def _parameter(model: nn.Module, path: str, depth: int, targets: Sequence[str]) -> tuple[nn.Module, str | None]:
    """The module of a path, and its parameter if the path means one rather than the module's weight."""
    owner, _, last = path.rpartition(".")
    if isinstance(getattr(model.get_submodule(owner), last, None), nn.Parameter):  # lora_fx's own names
        return model.get_submodule(owner), last
    module = model.get_submodule(path)
    ends = tuple(f".{target}" for target in targets)
    named = [name for name, _ in module.named_parameters(recurse=False) if f".{path}.{name}".endswith(ends)]
    return module, named[len(named) - 1 - depth] if named else None  # the first of them is the innermost


def _of_parameter(
    module: nn.Module, name: str, a: torch.Tensor, b: torch.Tensor, config: Mapping[str, Any], path: str
) -> torch.Tensor:
    weight, full = getattr(module, name), path if path.endswith(f".{name}") else f"{path}.{name}"
    if weight.dim() == 2:
        return _scaling(config, full, a.shape[0]) * (b @ a)
    experts = weight.shape[0]
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    order = "eio" if getattr(module, "is_transposed", False) else "eoi"
    return _scaling(config, full, a.shape[1]) * torch.einsum(f"ore,eri->{order}", b, a)


def _ungroup(conv: nn.Module) -> None:
    """Make the convolution one without groups that computes the same: PEFT's A sees all inputs."""
    groups, weight = conv.groups, conv.weight
    if groups == 1:
        return
    dense = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
    for group, rows in enumerate(torch.arange(weight.shape[0]).chunk(groups)):
        dense[rows, group * weight.shape[1] : (group + 1) * weight.shape[1]] = weight[rows]
    conv.groups, conv.weight = 1, nn.Parameter(dense, requires_grad=False)


def _dense(b: torch.Tensor, r: int) -> torch.Tensor:
    """B (out, r / groups) as (out, r)."""
    dense = b.new_zeros(b.shape[0], r)
    for group, rows in enumerate(torch.arange(b.shape[0]).chunk(r // b.shape[1])):
        dense[rows, group * b.shape[1] : (group + 1) * b.shape[1]] = b[rows]
    return dense


def _taken_out(weight: torch.Tensor, init: object, r: int, scaling: float) -> torch.Tensor | float:
    """What PEFT took out of the base when it made the adapter."""
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :r] * s[:r] @ vh[:r]
    if init == "olora":
        q, right = torch.linalg.qr(weight)
        return scaling * q[:, :r] @ right[:r]
    return 0.0
