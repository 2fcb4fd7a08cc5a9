"""Law 6: what PEFT computes with the same adapter files, lora_fx computes, folded and unfolded.

PEFT is the judge where it is right. Where it is not (see the last section), the explicit W + ΔW is, in
tests/test_injection.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D
from zoo import BY_NAME, Case, distance, injected, randomise, run, tolerance, traced

import lora_fx
from lora_fx import LoraFxError, LoraFxWarning


class ConvMlp(nn.Module):
    """Both kinds of linear, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.norm, self.fc, self.head = (
            Conv1D(11, 7),
            nn.LayerNorm(11),
            nn.Linear(11, 13),
            nn.Linear(13, 5),
        )

    def forward(self, x):
        return self.head(self.fc(self.norm(self.c_attn(x).tanh())).tanh())


CONV = Case("conv_mlp", ConvMlp, ("c_attn", "fc", "head"), shape=(2, 3, 7), linears=3)
JUDGED = {
    "mlp": (BY_NAME["mlp"], ["fc1", "fc2"]),
    "stack": (zoo.STACK, ["q_proj", "up", "down"]),
    "conv_mlp": (CONV, ["c_attn", "fc"]),
    "bert": (BY_NAME["bert"], ["query", "value", "dense"]),
    "gpt2": (BY_NAME["gpt2"], ["c_attn", "c_proj", "c_fc"]),
    "llama": (BY_NAME["llama"], ["q_proj", "v_proj", "down_proj", "lm_head"]),
    "qwen3": (BY_NAME["qwen3"], ["q_proj", "k_proj", "o_proj", "up_proj"]),
    "vit": (BY_NAME["vit"], ["q_proj", "fc1", "fc2"]),
    "mixtral": (BY_NAME["mixtral"], ["q_proj", "o_proj"]),
    "minilm": (BY_NAME["minilm"], ["query", "key", "intermediate.dense"]),
}
# name → (options, the modules that only some models have)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "fractional_alpha": {"r": 7, "lora_alpha": 2.5},
    "dropout": {"lora_dropout": 0.3},
    "random_b": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
}
PARTICULAR: dict[tuple[str, str], dict[str, Any]] = {
    ("stack", "patterns"): {
        "rank_pattern": {"layers.1.up": 7, "down": 2},
        "alpha_pattern": {"^body.layers.0.up": 11, "q_proj": 2.5},
    },
    ("stack", "modules_to_save"): {"modules_to_save": ["head", "norm"]},
    ("stack", "layers"): {"layers_to_transform": [1], "layers_pattern": "layers"},
    ("stack", "expression"): {"target_modules": r".*\.(q_proj|down)"},
    ("stack", "excluded"): {"exclude_modules": ["layers.0.up"]},
    ("bert", "modules_to_save"): {"modules_to_save": ["classifier"], "target_modules": ["query", "value"]},
    ("bert", "task"): {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
    ("bert", "all_linear"): {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ("gpt2", "patterns"): {"rank_pattern": {"h.0.attn.c_proj": 2, "mlp.c_proj": 5}, "alpha_pattern": {"c_fc": 13}},
    ("gpt2", "fan_in_fan_out"): {"fan_in_fan_out": True},
    ("gpt2", "all_linear"): {"target_modules": "all-linear"},
    ("llama", "all_linear"): {"target_modules": "all-linear"},
    ("llama", "task"): {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ("llama", "layers"): {"layers_to_transform": 1, "target_modules": ["up_proj", "gate_proj"]},
    ("qwen3", "all_linear"): {"target_modules": "all-linear"},
    ("vit", "modules_to_save"): {"modules_to_save": ["classifier"], "target_modules": ["q_proj", "v_proj"]},
}
EVERYWHERE = ("plain",)  # every other option on the models that hold every op kind
MATRIX = [
    pytest.param(name, {**OPTIONS[option]}, id=f"{name}-{option}")
    for name in JUDGED
    for option in OPTIONS
    if option in EVERYWHERE or name in ("stack", "conv_mlp", "gpt2")
] + [pytest.param(name, options, id=f"{name}-{option}") for (name, option), options in PARTICULAR.items()]


@contextmanager
def talkative() -> Iterator[None]:
    """PEFT's notes are of no interest, but for the one that says that it did not find what it looked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        yield


def peft_model(case: Case, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """PEFT's model, with every trained tensor moved away from where it starts."""
    with talkative():
        model = peft.get_peft_model(case.model(dtype), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.3 if "lora_B" in name else 0.03
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)
    return model


def full(name: str, options: dict[str, Any]) -> tuple[Case, dict[str, Any]]:
    case, targets = JUDGED[name]
    return case, {"r": 3, "lora_alpha": 5, "target_modules": targets, **options}


def load(case: Case, directory: Path, tracer: str = "trace", dtype: torch.dtype = torch.float32):
    with warnings.catch_warnings():  # fan_in_fan_out and the like: PEFT writes them into the file
        warnings.filterwarnings("ignore", ".*the graph counts", LoraFxWarning)
        return lora_fx.load_adapter(traced(case, tracer, dtype), directory)


@pytest.mark.parametrize(("name", "options"), MATRIX)
def test_peft_writes_and_we_read(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    case, options = full(name, options)
    model, x = peft_model(case, options), case.arguments()
    base, expected = run(case.model(), x), run(model, x)
    with talkative():
        model.save_pretrained(tmp_path)
    ours = load(case, tmp_path)
    bound = tolerance(case, torch.float32)
    assert distance(expected, base) > 100 * bound
    assert distance(expected, run(ours, x)) <= bound
    with talkative():
        merged = run(model.merge_and_unload(), x)
    assert distance(merged, run(lora_fx.fold(ours), x)) <= bound


@pytest.mark.parametrize(("name", "options"), MATRIX)
def test_we_write_and_peft_reads(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    case, options = full(name, options)
    x, config = case.arguments(), lora_fx.LoraConfig.from_peft(peft.LoraConfig(**options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the graph counts", LoraFxWarning)
        ours = randomise(lora_fx.inject(traced(case), config), size=0.7)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(ours):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    expected = run(ours, x)
    lora_fx.save_adapter(ours, tmp_path)
    with talkative():
        model = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    bound = tolerance(case, torch.float32)
    assert distance(expected, run(model, x)) <= bound
    assert distance(expected, run(case.model(), x)) > 100 * bound
    held = set(load_file(tmp_path / "adapter_model.safetensors"))
    with talkative():
        model.save_pretrained(tmp_path / "again")
    again = set(load_file(tmp_path / "again" / "adapter_model.safetensors"))
    # PEFT also writes the base's own weight of an adapted output head, which says nothing new
    assert {key for key in again if not key.endswith(".base_layer.weight")} == held


@pytest.mark.parametrize("name", ["mlp", "conv_mlp", "gpt2", "bert", "llama"])
def test_the_files_of_both_hold_the_same_keys(name: str, tmp_path: Path) -> None:
    """Key for key and shape for shape, on equal configurations."""
    case, options = full(name, {"bias": "all"})
    with talkative():
        peft_model(case, options).save_pretrained(tmp_path / "theirs")
    ours = lora_fx.inject(traced(case), peft.LoraConfig(**options))
    lora_fx.save_adapter(ours, tmp_path / "ours")
    shapes = [
        {
            k: tuple(t.shape)
            for k, t in load_file(tmp_path / who / "adapter_model.safetensors").items()
            if not k.endswith(".base_layer.weight")  # PEFT adds the base's weight of an adapted head
        }
        for who in ("theirs", "ours")
    ]
    assert shapes[0] == shapes[1]
    theirs, mine = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    for key in ("r", "lora_alpha", "bias", "use_rslora", "peft_type", "lora_dropout"):
        assert theirs[key] == mine[key]


@pytest.mark.parametrize("tracer", ["symbolic", "export", "strict"])
@pytest.mark.parametrize("name", ["mlp", "stack", "gpt2", "bert"])
def test_pefts_files_on_every_tracers_graph(name: str, tracer: str, tmp_path: Path) -> None:
    case, options = full(name, {"use_rslora": True})
    if tracer not in case.tracers:
        pytest.skip("not traced so")
    model, x = peft_model(case, options), case.arguments()
    with talkative():
        model.save_pretrained(tmp_path)
    ours = load(case, tmp_path, tracer)
    assert distance(run(model, x), run(ours, x)) <= tolerance(case, torch.float32)
    assert distance(run(model, x), run(lora_fx.fold(ours), x)) <= tolerance(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "stack", "conv_mlp", "gpt2", "llama"])
def test_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case, options = full(name, {})
    model, x = peft_model(case, options, dtype), case.arguments(dtype)
    expected = run(model, x)
    with talkative():
        model.save_pretrained(tmp_path)
    ours = load(case, tmp_path, dtype=dtype)
    assert {p.dtype for p in lora_fx.lora_parameters(ours)} == {
        p.dtype for n, p in model.named_parameters() if "lora_" in n
    }
    assert [t.dtype for t in run(ours, x)] == [t.dtype for t in expected]
    assert distance(expected, run(ours, x)) <= tolerance(case, dtype)
    with talkative():
        merged = run(model.merge_and_unload(safe_merge=True), x)
    assert distance(merged, run(lora_fx.fold(ours), x)) <= tolerance(case, dtype)


def test_modules_to_save_are_written_so_that_peft_means_the_same(tmp_path: Path) -> None:
    """PEFT's rule for modules_to_save has no dot: `norm` would take every `…layernorm` too."""
    case = BY_NAME["llama"]
    ours = randomise(injected(case, traced(case), targets=["q_proj"], modules_to_save=["norm"]))
    with torch.no_grad():
        ours.get_parameter("model.norm.weight").add_(0.3)
    lora_fx.save_adapter(ours, tmp_path)
    with talkative():
        model = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert distance(run(model, case.arguments()), run(ours, case.arguments())) <= tolerance(case, torch.float32)


def test_another_bases_head_in_the_file_is_refused(tmp_path: Path) -> None:
    """PEFT adds the head's base weight to the file, and writes it into whatever base it finds (faults 22)."""
    case, options = full("llama", {"target_modules": ["q_proj", "lm_head"]})
    model = peft_model(case, options)
    with talkative():
        model.save_pretrained(tmp_path / "own")
    assert distance(run(model, case.arguments()), run(load(case, tmp_path / "own"), case.arguments())) <= tolerance(
        case, torch.float32
    )
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight.add_(0.1)
    with talkative():
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(LoraFxError, match="lm_head"):
        load(case, tmp_path / "other")


def test_an_adapter_that_is_not_default(tmp_path: Path) -> None:
    case, options = full("mlp", {})
    with talkative():
        model = peft.get_peft_model(case.model(), peft.LoraConfig(**options), adapter_name="mine").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
    with talkative():
        model.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(traced(case), tmp_path, adapter_name="mine")
    assert lora_fx.adapter_names(ours) == ("mine",)
    assert distance(run(model, case.arguments()), run(ours, case.arguments())) <= tolerance(case, torch.float32)


def test_two_adapters_add_up_as_in_peft(tmp_path: Path) -> None:
    case, options = full("stack", {})
    with talkative():
        model = peft_model(case, options)
        model.add_adapter("second", peft.LoraConfig(**options | {"r": 2, "target_modules": ["up", "head"]}))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B.second" in parameter_name:
                    parameter.normal_(0, 0.3)
        model.base_model.set_adapter(["default", "second"])
        model.eval().save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(traced(case), tmp_path)
    ours = lora_fx.load_adapter(ours, tmp_path / "second", adapter_name="second")
    x = case.arguments()
    assert distance(run(model, x), run(ours, x)) <= tolerance(case, torch.float32)
    assert distance(run(model, x), run(lora_fx.fold(ours), x)) <= tolerance(case, torch.float32)


def test_training_goes_where_pefts_goes(tmp_path: Path) -> None:
    """From the same file, ten steps of AdamW on the same data, without dropout."""
    case = Case("plain", _Plain, ("fc1", "fc2"))
    options = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["fc1", "fc2"],
        "modules_to_save": ["head"],
        "bias": "lora_only",
    }
    model = peft_model(case, options, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
    with talkative():
        model.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(traced(case, "trace", torch.float64), tmp_path).train()
    losses: list[list[float]] = []
    for module, parameters in (
        (model.train(), [p for p in model.parameters() if p.requires_grad]),
        (ours, lora_fx.lora_parameters(ours)),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        losses.append([])
        for step in range(10):
            optimizer.zero_grad()
            loss = zoo.loss_of(module, case.arguments(torch.float64, seed=step))
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] != losses[0][0]


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 11), nn.Linear(11, 13), nn.Linear(13, 5)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(x).tanh()).tanh())


# Where PEFT is not right ----------------------------------------------------------------------------


def test_the_encoder_layers_fast_path(tmp_path: Path) -> None:
    """5.0 #2: in eval PEFT's adapter does nothing, unless torch's fast path is off. Ours always counts."""
    case = BY_NAME["encoder_layer"]
    x = case.arguments()
    model = peft_model(case, {"r": 3, "lora_alpha": 5, "target_modules": ["linear1", "linear2"]})
    with talkative():
        model.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(traced(case), tmp_path)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = run(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert distance(expected, run(ours, x)) <= tolerance(case, torch.float32)
    assert distance(expected, run(lora_fx.fold(ours), x)) <= tolerance(case, torch.float32)
    assert distance(expected, run(case.model(), x)) > 1e-2


def test_a_whole_attention_module_in_both_readings(tmp_path: Path) -> None:
    """5.0 #1: PEFT applies out_proj's delta twice; its file is read so, with a warning, or at its word."""
    case = BY_NAME["multi_head"]
    model, x = peft_model(case, {"r": 3, "lora_alpha": 5, "target_modules": ["attn"]}), case.arguments()
    with talkative():
        model.save_pretrained(tmp_path)
    expected, bound = run(model, x), tolerance(case, torch.float32)
    with pytest.warns(LoraFxWarning, match=r"out_proj.*twice .*mha_out_proj='once'"):
        ours = lora_fx.load_adapter(traced(case), tmp_path)
    assert distance(expected, run(ours, x)) <= bound
    assert distance(expected, run(lora_fx.fold(ours), x)) <= bound
    once = lora_fx.load_adapter(traced(case), tmp_path, mha_out_proj="once")
    halves = dict(ours.named_parameters())
    name = "attn.out_proj.lora_B.default.weight"
    assert torch.equal(2 * once.get_parameter(name), halves[name])
    lora_fx.save_adapter(ours, tmp_path / "ours")
    with talkative():
        again = peft.PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()
    assert distance(expected, run(again, x)) <= bound


def test_a_parametrised_weight_is_refused(tmp_path: Path) -> None:
    """5.0 #8: PEFT's merge loses the adapter."""
    case = Case("weight_norm", _weight_normed, ("fc2",))
    with talkative():
        peft_model(case, {"r": 3, "target_modules": ["fc1", "fc2"]}).save_pretrained(tmp_path)
    with pytest.raises(LoraFxError, match="fc1"):
        lora_fx.load_adapter(traced(case), tmp_path)


def _weight_normed() -> nn.Module:
    model = _Plain()
    model.fc1 = parametrizations.weight_norm(model.fc1)
    return model


def test_an_adapter_called_like_a_module_keeps_its_neighbours_keys(tmp_path: Path) -> None:
    """5.0 #17: with a second adapter `fc1`, PEFT drops fc1's keys from the first one's file."""
    case, _options = full("mlp", {})
    both = injected(case, injected(case, traced(case)), "fc1")
    randomise(randomise(both), "fc1")
    lora_fx.save_adapter(both, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4
    with talkative():
        model = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    alone = lora_fx.load_adapter(traced(case), tmp_path)
    assert distance(run(model, case.arguments()), run(alone, case.arguments())) <= tolerance(case, torch.float32)


def test_an_embedding_that_is_tied_with_the_head(tmp_path: Path) -> None:
    """PEFT adapts the lookup alone until it merges, and then the head too (5.0 #14); folding here unties them."""
    case = BY_NAME["tied_head"]
    model, x = peft_model(case, {"r": 3, "lora_alpha": 5, "target_modules": ["embed"]}), case.arguments()
    with talkative():
        model.save_pretrained(tmp_path)
    ours = load(case, tmp_path)
    assert distance(run(model, x), run(ours, x)) <= tolerance(case, torch.float32)
    with pytest.warns(LoraFxWarning, match="untied"):
        assert distance(run(model, x), run(lora_fx.fold(ours), x)) <= tolerance(case, torch.float32)


def test_biases_and_saved_modules_in_one_file(tmp_path: Path) -> None:
    """With bias="all", PEFT writes a saved module's bias three times, under three names."""
    case, options = full("mlp", {"target_modules": ["fc1"], "bias": "all", "modules_to_save": ["fc2"]})
    model = peft_model(case, options)
    with talkative():
        model.save_pretrained(tmp_path)
    assert distance(run(model, case.arguments()), run(load(case, tmp_path), case.arguments())) <= tolerance(
        case, torch.float32
    )


def test_a_saved_module_that_peft_would_not_tell_from_another_is_told(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(7, 7) for name in ("a", "head", "aux_head")})
    model.forward = lambda x: model["head"](model["aux_head"](model["a"](x)))
    gm = lora_fx.trace(model.eval(), torch.randn(3, 7))
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(target_modules=["a"], modules_to_save=["head"]))
    with pytest.warns(lora_fx.LoraFxWarning, match=r"'aux_head'.*lora_fx.load_adapter reads it"):
        lora_fx.save_adapter(gm, tmp_path)
