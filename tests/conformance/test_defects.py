"""Where PEFT 0.21.2 is wrong (peft-reference.md, 5.0): here the result is W + ΔW, or a refusal that says why.

The judge is `models.explicit`, a copy of the base whose weights are replaced. Wherever that is cheap, a test also
shows that PEFT still has the defect, so that the table says nothing that is no longer so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from judged import CASES, Mha, combined, explicit, moved
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from test_peft import talkative
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from zoo import assert_same_bits, bits, distance

import lora_fx
from lora_fx import ConfigError, FoldError, GraphError, LoraFxError, LoraFxWarning, TargetError

# number → (what PEFT gets wrong, what becomes of it here)
DEFECTS: dict[int, tuple[str, str]] = {
    1: ("nn.MultiheadAttention: out_proj's delta is applied twice", "right"),
    2: ("nn.TransformerEncoderLayer: no effect in eval", "right"),
    3: ("all-linear: out_proj of an encoder has no effect and no gradient", "right"),
    4: ("nn.MultiheadAttention: the base drifts with every forward", "right"),
    5: ("convolutions: dilation and padding_mode are not A's", "right"),
    6: ("nn.Conv3d with a kernel of one: merge fails", "right"),
    7: ("grouped convolutions cannot be merged", "right"),
    8: ("a parametrised weight: the merge is lost", "refused"),
    9: ("a weight that is applied by a function: no effect until merged", "right"),
    10: ("a subclass of nn.Linear with a forward of its own: taken for a linear", "right"),
    11: ("nn.Embedding with max_norm: merged is not unmerged", "refused"),
    12: ("one module under two names: adapted under one", "right"),
    13: ("one parameter of two modules: both deltas are merged into it", "right"),
    14: ("a tied head: merged twice", "right"),
    15: ("layer_replication: all deltas are merged into one weight", "refused"),
    16: ("target_parameters on a parametrised 3-D parameter: outputs grow", "refused"),
    17: ("an adapter that is called like a module: keys are dropped", "right"),
    18: ("hot swap: alpha_pattern is ignored, embeddings fail", "right"),
    19: ("lazy modules: the adapter has no shape", "refused"),
}
_TESTED: dict[int, str] = {}
DOUBLE = torch.float64
BOUND = 8 * zoo.default_tolerance(DOUBLE)


def defect(number: int, outcome: str) -> Callable[[Any], Any]:
    """This test is the one of a defect, and shows that outcome."""
    assert DEFECTS[number][1] == outcome

    def noted(test: Any) -> Any:
        _TESTED[number] = test.__name__
        return test

    return noted


def test_every_defect_has_a_test() -> None:
    assert _TESTED.keys() == DEFECTS.keys()
    assert set(range(1, 20)) == set(DEFECTS)


def test_the_readme_shows_this_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert "".join(f"| {number} | {what} | {outcome} |\n" for number, (what, outcome) in DEFECTS.items()) in text


# The parts that the tests are made of -------------------------------------------------------------------


class Between(nn.Module):
    """A module between two linears, so that nothing is linear in it alone."""

    def __init__(self, inner: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(7, features)
        self.m = inner
        self.out = nn.Linear(outputs, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.m(torch.tanh(self.lin(x)))))


class Convolved(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return torch.tanh(self.conv(x))


def doubles(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().to(DOUBLE).eval()


def out(model: nn.Module, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    return zoo.run(model, (args, kwargs))


def assert_right(
    gm: Any, judge: nn.Module, args: tuple[Any, ...], *, unties: bool = False, bound: float = BOUND, **kwargs: Any
) -> Any:
    """Unfolded in both modes, and folded, `gm` computes what the judge computes, which is not the base."""
    folded = zoo.expected_warning("untied" if unties else None)
    with folded:
        merged = lora_fx.fold(gm)
    for training in (True, False):
        expected = out(judge.train(training), *args, **kwargs)
        assert distance(expected, out(gm.train(training), *args, **kwargs)) <= bound, training
        assert distance(expected, out(merged.train(training), *args, **kwargs)) <= bound, training
    with lora_fx.disable_adapters(gm):
        assert distance(expected, out(gm, *args, **kwargs)) > 1e4 * bound
    return merged


def adapted(model: nn.Module, args: tuple[Any, ...], directory: Path, targets: Any, **options: Any) -> Any:
    """Our graph of the model with an adapter that is not at its start, which is saved too."""
    config = lora_fx.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
    gm = moved(lora_fx.inject(lora_fx.trace(model, args), config))
    lora_fx.save_adapter(gm, directory)
    return gm


def pefts(model: nn.Module, directory: Path) -> Any:
    """PEFT's model of the same base and the same file."""
    with talkative():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()


def random_peft(model: nn.Module, targets: Any, **options: Any) -> Any:
    """PEFT's model with factors away from their start."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
    with talkative():
        peer = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * 0.3
                parameter.add_(noise.to(parameter.dtype))
    return peer


def merge_gap(peer: Any, *args: Any) -> float:
    """How far PEFT's merged model is from the unmerged one."""
    before = out(peer, *args)
    with talkative():
        return distance(before, out(peer.merge_and_unload(), *args))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)


def by_name(gm: nn.Module, *parts: str) -> torch.Tensor:
    found = [p for name, p in gm.named_parameters() if all(part in name for part in parts)]
    assert len(found) == 1
    return found[0].detach()


# 1 – 4: attention ----------------------------------------------------------------------------------------


@defect(1, "right")
def test_attentions_output_projection_counts_once(tmp_path: Path) -> None:
    model, x = doubles(Mha), numbers(9, 10)
    ours = adapted(model, (x,), tmp_path, ["mha"])
    judge = explicit(model, tmp_path)  # of the file, whose out_proj PEFT counts twice
    merged = assert_right(ours, judge, (x,))
    delta = 6 / 4 * by_name(ours, "out_proj", "lora_B") @ by_name(ours, "out_proj", "lora_A")
    weight = model.mha.out_proj.weight.detach()
    assert distance([weight + delta], [judge.mha.out_proj.weight]) <= BOUND
    assert distance([weight + delta], [merged.get_parameter("mha.out_proj.weight").detach()]) <= BOUND
    # PEFT: what it computes from a file is W + 2ΔW
    peer = pefts(model, tmp_path)
    assert distance(out(judge.eval(), x), out(peer, x)) <= BOUND
    assert distance(out(explicit(model, tmp_path, out_proj_times=1), x), out(peer, x)) > 1e-3


@defect(1, "right")
@pytest.mark.parametrize(("word", "times"), [(None, 2), ("twice", 2), ("once", 1)])
def test_pefts_attention_file_can_be_read_either_way(word: str | None, times: int, tmp_path: Path) -> None:
    model, x = doubles(Mha), numbers(9, 10)
    random_peft(model, ["mha", "lin0"]).save_pretrained(tmp_path)
    options = {} if word is None else {"mha_out_proj": word}
    gm = lora_fx.trace(model, x)
    with zoo.expected_warning("out_proj" if times == 2 else None):
        ours = lora_fx.load_adapter(gm, tmp_path, **options)
    assert_right(ours, explicit(model, tmp_path, out_proj_times=times), (x,))


@defect(2, "right")
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear1", "self_attn"]])
def test_the_encoder_layer_in_eval(targets: list[str], tmp_path: Path) -> None:
    layer = doubles(lambda: nn.TransformerEncoderLayer(14, 2, 11, dropout=0.0, batch_first=True))
    x = numbers(2, 3, 14)
    ours = adapted(layer, (x,), tmp_path, targets)
    assert_right(ours, explicit(layer, tmp_path), (x,))
    assert distance(out(layer, x), out(pefts(layer, tmp_path), x)) == 0.0


@defect(3, "right")
def test_all_linear_on_an_encoder(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(14, 2, 11, dropout=0.0, batch_first=False)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model, x = doubles(make), numbers(2, 3, 14)
    ours = adapted(model, (x,), tmp_path, "all-linear")
    assert_right(ours, explicit(model, tmp_path), (x,))
    zoo.loss_of(ours.train(), ((x,), {})).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert sum("out_proj" in name for name in gradients) == 4
    assert all(grad is not None and bool(grad.any()) for grad in gradients.values())
    peer = random_peft(model, "all-linear")
    zoo.loss_of(peer.train(), ((x,), {})).backward()
    untrained = [name for name, p in peer.named_parameters() if p.requires_grad and p.grad is None]
    assert sum("out_proj" in name for name in untrained) == 4


@defect(4, "right")
def test_the_base_does_not_drift(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Mha().to(torch.bfloat16).eval()
    x = numbers(9, 10).to(torch.bfloat16)
    ours = adapted(model, (x,), tmp_path, ["mha"])
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    first = out(ours, x)
    for _ in range(20):
        assert_same_bits(first, out(ours, x))
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before
    peer = pefts(model, tmp_path)
    for _ in range(20):
        out(peer, x)
    assert bits(peer.base_model.model.mha.base_layer.in_proj_weight) != before["mha.in_proj_weight"]


# 5 – 7: convolutions -------------------------------------------------------------------------------------

# module, input, options; and whether PEFT's forward fails ("fails") or its merge differs
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], str]] = {
    "dilation": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2), (2, 2, 11), {}, "fails"),
    "dilation_2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2)), (2, 2, 7, 5), {}, "fails"),
    "dilation_same": (lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 2, 11), {}, "differs"),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 7), {}, "differs"),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 11), {}, "differs"),
    "replicate": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 3, 3), {}, "differs"),
    "circular_dora": (
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        (2, 2, 11),
        {"use_dora": True},
        "differs",
    ),
}


@defect(5, "right")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dilation_and_padding_mode(name: str, tmp_path: Path) -> None:
    conv, shape, options, how = CONVOLUTIONS[name]
    model, x = doubles(lambda: Convolved(conv())), numbers(*shape)
    ours = adapted(model, (x,), tmp_path, ["conv"], **options)
    judge = explicit(model, tmp_path)
    assert_right(ours, judge, (x,))
    peer = pefts(model, tmp_path)
    if how == "fails":
        with pytest.raises(RuntimeError, match="size"):
            out(peer, x)
    else:
        assert distance(out(judge, x), out(peer, x)) > 1e-3


@defect(6, "right")
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 2)])
def test_a_kernel_of_one(kernel: tuple[int, ...], tmp_path: Path) -> None:
    model, x = doubles(lambda: Convolved(nn.Conv3d(2, 3, kernel))), numbers(2, 2, 3, 4, 5)
    ours = adapted(model, (x,), tmp_path, ["conv"])
    assert_right(ours, explicit(model, tmp_path), (x,))
    with pytest.raises(RuntimeError, match="size"), talkative():
        pefts(model, tmp_path).merge_and_unload()


@defect(7, "right")
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (lambda: nn.Conv1d(6, 10, 3, groups=2), (2, 6, 7)),
        (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, bias=False), (2, 4, 5, 6)),  # depthwise
        (lambda: nn.Conv3d(4, 6, (1, 2, 2), groups=2, padding=1), (2, 4, 3, 3, 3)),
    ],
    ids=["1d", "depthwise", "3d"],
)
def test_groups(conv: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    model, x = doubles(lambda: Convolved(conv())), numbers(*shape)
    ours = adapted(model, (x,), tmp_path, ["conv"])
    assert_right(ours, explicit(model, tmp_path), (x,))
    with pytest.raises(NotImplementedError), talkative():
        pefts(model, tmp_path).merge_and_unload()


@defect(7, "right")
def test_a_rank_that_the_groups_cannot_share(tmp_path: Path) -> None:
    model, x = doubles(lambda: Convolved(nn.Conv1d(6, 10, 3, groups=2))), numbers(2, 6, 7)
    with pytest.raises((ConfigError, TargetError), match=r"conv.*3|3.*conv"):
        lora_fx.inject(lora_fx.trace(model, x), lora_fx.LoraConfig(r=3, target_modules=["conv"]))


@defect(7, "right")
def test_a_file_whose_a_mixes_the_groups(tmp_path: Path) -> None:
    """PEFT's own: unfolded it computes what PEFT computes, and there is no grouped weight to fold it into."""
    model, x = doubles(lambda: Convolved(nn.Conv1d(6, 10, 3, groups=2))), numbers(2, 6, 7)
    peer = random_peft(model, ["conv"])
    peer.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(lora_fx.trace(model, x), tmp_path)
    expected = out(explicit(model, tmp_path), x)
    assert distance(expected, out(peer, x)) <= BOUND
    assert distance(expected, out(ours, x)) <= BOUND
    with pytest.raises(FoldError, match="conv"):
        lora_fx.fold(ours)


# 8 – 11: modules that are more than their weight ----------------------------------------------------------


@defect(8, "refused")
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, "old"], ids=["weight", "spectral", "old"]
)
def test_a_parametrised_weight(norm: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():  # without a gradient, or the old one cannot be copied
        warnings.simplefilter("ignore", FutureWarning)  # which is deprecated
        norm = nn.utils.weight_norm if norm == "old" else norm
        model = doubles(lambda: Between(norm(nn.Linear(5, 6)), 5, 6))
    x = numbers(4, 7)
    gm = lora_fx.trace(model, x)
    with pytest.raises(LoraFxError, match="'m'"):
        lora_fx.inject(gm, lora_fx.LoraConfig(target_modules=["m", "out"]))
    peer = random_peft(model, ["m"])
    with talkative():
        peer.save_pretrained(tmp_path)
    with pytest.raises(LoraFxError, match="'m'"):
        lora_fx.load_adapter(gm, tmp_path)
    assert merge_gap(peer, x) > 1e-3


@defect(8, "refused")
def test_the_parameter_behind_a_parametrised_weight_can_be_adapted(tmp_path: Path) -> None:
    model, x = doubles(lambda: Between(parametrizations.weight_norm(nn.Linear(5, 6)), 5, 6)), numbers(4, 7)
    ours = adapted(model, (x,), tmp_path, ["m.parametrizations.weight.original1"])
    assert_right(ours, explicit(model, tmp_path), (x,))


class Applied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(x, self.lin.weight, self.lin.bias)))


@defect(9, "right")
def test_a_weight_that_a_function_applies(tmp_path: Path) -> None:
    model, x = doubles(Applied), numbers(4, 7)
    ours = adapted(model, (x,), tmp_path, ["lin"])
    assert_right(ours, explicit(model, tmp_path), (x,))
    peer = pefts(model, tmp_path)
    assert_same_bits(out(model, x), out(peer, x))
    assert merge_gap(peer, x) > 1e-3


@defect(10, "right")
def test_a_subclass_with_its_own_forward(tmp_path: Path) -> None:
    model, x = doubles(lambda: Between(zoo.ScaledLinear(5, 6), 5, 6)), numbers(4, 7)
    ours = adapted(model, (x,), tmp_path, ["m"])
    assert_right(ours, explicit(model, tmp_path), (x,))
    assert merge_gap(pefts(model, tmp_path), x) > 1e-3


@defect(11, "refused")
def test_an_embedding_that_is_renormalised_in_place(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(11, 5, max_norm=0.7), nn.Linear(5, 3))

    model, ids = doubles(make), torch.arange(6).view(2, 3)
    before = bits(model[0].weight)
    gm = lora_fx.trace(copy.deepcopy(model), ids)
    with pytest.raises(LoraFxError, match=r"'0'.*renorm"):
        lora_fx.inject(gm, lora_fx.LoraConfig(target_modules=["0"]))
    assert bits(model[0].weight) == before
    peer = random_peft(model, ["0"])
    out(peer, ids)  # the base's rows, once renormalised, stay so
    assert merge_gap(peer, ids) > 1e-3


# 12 – 14: what is shared -----------------------------------------------------------------------------------


@defect(12, "right")
@pytest.mark.parametrize("targets", [["a"], ["b"], ["a", "b"]], ids="-".join)
def test_one_module_under_two_names(targets: list[str], tmp_path: Path) -> None:
    model, x = doubles(zoo.SharedModule), numbers(3, 7)
    ours = adapted(model, (x,), tmp_path, targets)
    assert_right(ours, explicit(model, tmp_path), (x,))
    assert merge_gap(random_peft(model, ["a"]), x) > 1e-3


@defect(13, "right")
def test_one_parameter_of_two_modules(tmp_path: Path) -> None:
    model, x = doubles(zoo.SharedParameter), numbers(3, 7)
    ours = adapted(model, (x,), tmp_path, ["a", "b"])
    judge = explicit(model, tmp_path)
    assert torch.equal(judge.a.weight, judge.b.weight)  # one weight, one delta
    merged = assert_right(ours, judge, (x,))
    assert merged.get_parameter("a.weight") is merged.get_parameter("b.weight")
    assert merge_gap(pefts(model, tmp_path), x) > 1e-3


@defect(13, "right")
def test_one_of_two_modules_that_share_a_parameter(tmp_path: Path) -> None:
    model, x = doubles(zoo.SharedParameter), numbers(3, 7)
    ours = adapted(model, (x,), tmp_path, ["b"])
    judge = explicit(model, tmp_path)
    merged = assert_right(ours, judge, (x,), unties=True)
    assert torch.equal(merged.get_parameter("a.weight"), model.a.weight)
    assert merge_gap(pefts(model, tmp_path), x) > 1e-3


@defect(13, "right")
def test_pefts_two_adapters_of_one_parameter(tmp_path: Path) -> None:
    """Its file holds one for each module; each module keeps its own."""
    model, x = doubles(zoo.SharedParameter), numbers(3, 7)
    peer = random_peft(model, ["a", "b"])
    peer.save_pretrained(tmp_path)
    gm = lora_fx.trace(model, x)
    with pytest.warns(LoraFxWarning, match="different adapters"):
        ours = lora_fx.load_adapter(gm, tmp_path)
    judge = explicit(model, tmp_path)
    assert distance(out(judge, x), out(peer, x)) <= BOUND
    assert_right(ours, judge, (x,), unties=True)
    assert merge_gap(peer, x) > 1e-3


@defect(14, "right")
@pytest.mark.parametrize(
    ("targets", "is_one"),
    [(["embed_tokens"], False), (["lm_head"], False), (["embed_tokens", "lm_head"], False), (["embed_tokens"], True)],
    ids=["embedding", "head", "both", "as_one"],
)
def test_a_tied_head(targets: list[str], is_one: bool, tmp_path: Path) -> None:
    case = CASES["tied_llama"]
    model, (_, kwargs) = case.model(DOUBLE), case.arguments(DOUBLE)
    with talkative():
        peer = random_peft(model, targets, ensure_weight_tying=is_one)
        peer.save_pretrained(tmp_path)
    judge, base = explicit(model, tmp_path), model.lm_head.weight.detach()
    bound = 2 * BOUND
    assert distance(out(judge, **kwargs), out(peer, **kwargs)) <= bound
    ours = lora_fx.load_adapter(zoo.traced(case, "trace", DOUBLE), tmp_path)
    merged = assert_right(ours, judge, (), unties=not is_one, bound=bound, **kwargs)
    if is_one:  # one weight, and one delta in it
        assert merged.get_parameter("lm_head.weight") is merged.get_parameter("model.embed_tokens.weight")
    with talkative():
        theirs = peer.merge_and_unload()
    assert distance(out(judge, **kwargs), out(theirs, **kwargs)) > 1e-3
    if is_one:
        delta = judge.lm_head.weight - base
        assert distance([base + 2 * delta], [theirs.lm_head.weight.detach()]) <= BOUND


# 15 – 19 ----------------------------------------------------------------------------------------------------


@defect(15, "refused")
def test_layer_replication(tmp_path: Path) -> None:
    case = CASES["tied_llama"]
    options = {"r": 3, "target_modules": ["q_proj"], "layer_replication": [[0, 1], [0, 1]]}
    with talkative():
        peft.get_peft_model(case.model(), peft.LoraConfig(**options)).save_pretrained(tmp_path)
    gm = zoo.traced(case, "trace", DOUBLE)
    for attempt in (
        lambda: lora_fx.LoraConfig(**options),
        lambda: lora_fx.inject(gm, peft.LoraConfig(**options)),
        lambda: lora_fx.load_adapter(gm, tmp_path),
    ):
        with pytest.raises(ConfigError, match="layer_replication"):
            attempt()


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, x):
        return torch.bmm(x.expand(3, *x.shape), self.w.mT).sum(0)


@defect(16, "refused")
def test_a_parametrised_stack_of_matrices(tmp_path: Path) -> None:
    def make() -> nn.Module:
        stacked = Stacked()
        parametrize.register_parametrization(stacked, "w", Doubled())
        return nn.ModuleDict({"experts": stacked})

    model, x = doubles(make), numbers(4, 7)
    model.forward = lambda x: model["experts"](x)
    with pytest.raises(LoraFxError, match=r"experts\.w"):
        lora_fx.inject(lora_fx.trace(model, x), lora_fx.LoraConfig(target_modules=[], target_parameters=["experts.w"]))
    peer = random_peft(nn.Sequential(model["experts"]), [], target_parameters=["0.w"])
    with talkative():
        first, second = out(peer, x), out(peer, x)
    assert distance(first, second) > 1e-3


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(7, 5), nn.Tanh())
        self.dec = nn.Linear(5, 3)

    def forward(self, x):
        return self.dec(self.enc(x))


@defect(17, "right")
def test_an_adapter_that_is_called_like_a_module(tmp_path: Path) -> None:
    model, x = doubles(Halves), numbers(4, 7)
    config = lora_fx.LoraConfig(r=4, lora_alpha=6, target_modules=["enc.0", "dec"])
    one = moved(lora_fx.inject(lora_fx.trace(model, x), config))
    both = moved(lora_fx.inject(one, config, adapter_name="enc"), 0.3, "enc")
    for name in ("default", "enc"):
        lora_fx.save_adapter(both, tmp_path / name, adapter_name=name)
        assert len(load_file(tmp_path / name / "adapter_model.safetensors")) == 4
    assert_right(both, combined(model, {tmp_path / "default": 1.0, tmp_path / "enc": 1.0}), (x,))
    again = lora_fx.load_adapter(lora_fx.trace(model, x), tmp_path / "enc", adapter_name="enc")
    assert_right(again, explicit(model, tmp_path / "enc"), (x,))
    peer = random_peft(model, ["enc.0", "dec"])
    with talkative():
        peer.add_adapter("enc", peft.LoraConfig(r=4, target_modules=["enc.0", "dec"]))
        peer.save_pretrained(tmp_path / "theirs", selected_adapters=["default"])
    assert not any(".enc." in key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))


@defect(18, "right")
@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("mlp", ["lin0", "lin1"], {"alpha_pattern": {"lin0": 16}}),
        ("emb_conv1d", ["emb", "conv1d"], {}),
        ("conv2d", ["conv2d", "lin0"], {"use_rslora": True}),
    ],
    ids=["alpha_pattern", "embedding", "rslora"],
)
def test_values_are_swapped_in_place(name: str, targets: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    case = CASES[name]
    model, x = case.model(DOUBLE), case.arguments(DOUBLE)[0]
    for seed, where in enumerate(("one", "other")):
        peer = random_peft(model, targets, **options)
        with torch.no_grad():
            for parameter in (p for p in peer.parameters() if p.requires_grad):
                parameter.mul_(1 - 0.7 * seed)
        with talkative():
            peer.save_pretrained(tmp_path / where)
    ours = lora_fx.load_adapter(zoo.traced(case, "trace", DOUBLE), tmp_path / "one")
    code, parameters = ours.code, [id(p) for p in ours.parameters()]
    assert_right(ours, explicit(model, tmp_path / "one"), x)
    for source in (tmp_path / "other", tmp_path / "one", load_file(tmp_path / "other" / "adapter_model.safetensors")):
        lora_fx.swap_adapter(ours, "default", source)
        judge = explicit(model, source if isinstance(source, Path) else tmp_path / "other")
        assert_right(ours, judge, x)
        assert (ours.code, [id(p) for p in ours.parameters()]) == (code, parameters)
    if options.get("use_rslora"):
        return
    peer, fault = pefts(model, tmp_path / "one"), None
    try:
        with talkative():
            hotswap_adapter(peer, str(tmp_path / "other"), adapter_name="default")
    except AttributeError as error:
        fault = error
    assert fault is not None or distance(out(judge, *x), out(peer, *x)) > 1e-3


@defect(19, "refused")
def test_lazy_modules(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Between(nn.LazyLinear(6), 5, 6)

    model, x = doubles(make), numbers(4, 7)
    with pytest.raises(GraphError, match=r"m\.weight"):
        lora_fx.trace(model, x)
    with talkative():
        peer = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["m"]))
    with pytest.raises(RuntimeError):
        out(peer, x)
    out(model, x)  # once it has run it is a linear
    ours = adapted(model, (x,), tmp_path, ["m"])
    assert_right(ours, explicit(model, tmp_path), (x,))
