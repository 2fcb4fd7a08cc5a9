"""swap_adapter: other values for an adapter, in place."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import BY_NAME, STACK, assert_same_bits, bits, distance, fingerprint, frozen, reseal, run, traced

import lora_fx
from lora_fx import AdapterError, GraphError, LoraConfig

GPT2, LLAMA, KERNELS, QWEN = BY_NAME["gpt2"], BY_NAME["llama"], BY_NAME["kernels"], BY_NAME["qwen3"]
# Model and options: one of each kind of thing that an adapter holds.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LLAMA, {"target_modules": ["q_proj", "down_proj"]}),
    "dora": (LLAMA, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "lora_bias": (STACK, {"target_modules": ["q_proj", "down"], "lora_bias": True}),
    "saved": (STACK, {"target_modules": ["q_proj"], "modules_to_save": ["head"], "bias": "all"}),
    "tokens": (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
    "kernels": (KERNELS, {"target_modules": list(KERNELS.targeted), "r": 4}),
    "parts": (GPT2, {"target_modules": ["c_attn[q]", "c_attn[v]"], "rank_pattern": {"c_attn[v]": 2}}),
    "tied": (QWEN, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "pissa": (LLAMA, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "loftq": (LLAMA, {"target_modules": ["q_proj"], "init_lora_weights": "loftq"}),
    "attention": (BY_NAME["multi_head"], {"target_modules": ["attn"]}),
    "target_parameters": (BY_NAME["experts"], {"target_modules": [], "target_parameters": ["gate_up", "down"]}),
}


def adapted(kind: str, seed: int, **options: Any) -> Any:
    case, own = KINDS[kind]
    gm = lora_fx.inject(traced(case), LoraConfig(**{"r": 3, "lora_alpha": 5, **own, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return gm


def held(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


# A start that is computed depends on the scaling: another scaling is another adapter.
FORMS = [(kind, form) for kind in KINDS for form in ("directory", "mapping", "scaled")]
FORMS = [(kind, form) for kind, form in FORMS if form != "scaled" or kind not in ("pissa", "loftq")]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_the_values_are_those_of_the_other_adapter(kind: str, form: str, tmp_path: Path) -> None:
    case, _ = KINDS[kind]
    one, other = adapted(kind, 1), adapted(kind, 2, **({"lora_alpha": 7} if form == "scaled" else {}))
    lora_fx.save_adapter(other, tmp_path)
    arguments, expected = case.arguments(), run(other, case.arguments())
    code, objects = one.code, {name: id(p) for name, p in one.named_parameters()}
    base = run(frozen(traced(case)), arguments)
    assert distance(run(one, arguments), expected) > 1e-3
    source = held(tmp_path) if form == "mapping" else tmp_path
    assert lora_fx.swap_adapter(one, "default", source) is one
    if form == "scaled":
        assert distance(run(one, arguments), expected) < 1e-5
    else:
        assert_same_bits(run(one, arguments), expected)
    assert (one.code, {name: id(p) for name, p in one.named_parameters()}) == (code, objects)
    assert distance(run(one, arguments), base) > 1e-3


def test_pefts_state_dict_and_pefts_directory(tmp_path: Path) -> None:
    case, arguments = LLAMA, LLAMA.arguments()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(case.model(), config).eval()
    expected = run(model, arguments)
    ours = adapted("plain", 1)
    lora_fx.swap_adapter(ours, "default", peft.get_peft_model_state_dict(model))
    assert distance(expected, run(ours, arguments)) < 1e-5
    named = {k: v for k, v in model.state_dict().items() if "lora_" in k}  # with the adapter's name in the keys
    lora_fx.swap_adapter(ours, "default", named)
    assert distance(expected, run(ours, arguments)) < 1e-5
    model.save_pretrained(tmp_path)
    again = adapted("plain", 3)
    lora_fx.swap_adapter(again, "default", str(tmp_path))
    assert_same_bits(run(ours, arguments), run(again, arguments))


def test_values_that_are_known_to_be_finite_are_not_looked_at(tmp_path: Path) -> None:
    """The caller's word counts for a mapping, and not for a file."""
    lora_fx.save_adapter(adapted("plain", 2), tmp_path)
    tensors = held(tmp_path)
    next(iter(tensors.values())).fill_(float("nan"))
    ours = adapted("plain", 1)
    for _ in range(2):
        lora_fx.swap_adapter(ours, "default", tensors, finite=True)
        assert any(bool(p.isnan().any()) for p in ours.parameters())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN or Inf"):
        lora_fx.swap_adapter(ours, "default", tmp_path, finite=True)


def test_known_keys_are_checked_like_new_ones() -> None:
    """From the second time on, a mapping of the same keys is not read again."""
    case, arguments = LLAMA, LLAMA.arguments()
    ours = adapted("plain", 1)
    for seed in (2, 3, 4):
        other = adapted("plain", seed)
        tensors = {n: p.detach().clone() for n, p in other.named_parameters() if "lora_" in n}
        lora_fx.swap_adapter(ours, "default", tensors)
        assert_same_bits(run(other, arguments), run(ours, arguments))
    before = fingerprint(ours)
    first = next(iter(tensors))
    for wrong, message in (
        (torch.full_like(tensors[first], float("nan")), "NaN or Inf"),
        (tensors[first][:1], "only values of the same rank"),
        (tensors[first].to(torch.int64), "int64"),
        ("text", "must map keys to tensors"),
    ):
        with pytest.raises(AdapterError, match=message):
            lora_fx.swap_adapter(ours, "default", tensors | {first: wrong})
        assert fingerprint(ours) == before
    ours.get_submodule(first.rpartition(".")[0]).weight = nn.Parameter(torch.zeros_like(tensors[first]))
    lora_fx.swap_adapter(ours, "default", tensors)  # into the parameter that is there now
    assert_same_bits(run(other, arguments), run(ours, arguments))
    two = lora_fx.inject(traced(case), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    lora_fx.swap_adapter(two, "default", tensors)
    assert lora_fx.inject(two, LoraConfig(r=1, target_modules=["up_proj"]), adapter_name="more") is not two


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    counts = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(1)
        return graph.forward

    one = adapted("plain", 1)
    arguments = LLAMA.arguments()
    torch._dynamo.reset()
    compiled = torch.compile(one, backend=counting)
    run(compiled, arguments)
    for seed in (2, 3, 4):
        other = adapted("plain", seed)
        lora_fx.save_adapter(other, tmp_path / str(seed))
        lora_fx.swap_adapter(one, "default", tmp_path / str(seed))
        assert distance(run(other, arguments), run(compiled, arguments)) < 1e-5
    assert len(counts) == 1


def test_an_adapter_that_does_not_count_and_one_of_several(tmp_path: Path) -> None:
    arguments = LLAMA.arguments()
    both = lora_fx.inject(adapted("plain", 1), LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="other")
    lora_fx.set_adapters(both, "other")
    before = run(both, arguments)
    lora_fx.save_adapter(adapted("plain", 2), tmp_path)
    lora_fx.swap_adapter(both, "default", tmp_path)
    assert_same_bits(before, run(both, arguments))
    lora_fx.set_adapters(both, "default")
    assert_same_bits(run(adapted("plain", 2), arguments), run(both, arguments))


def test_values_of_another_type_are_cast() -> None:
    ours, source = adapted("plain", 1), adapted("plain", 2)
    tensors = {n: p.detach().bfloat16() for n, p in source.named_parameters() if "lora_" in n}
    lora_fx.swap_adapter(ours, "default", tensors)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, source.get_parameter(name).bfloat16().float())


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop(next(iter(t))), "lacks"),
    "unexpected": (lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(3, 3)}), "holds, beside"),
    "shape": (lambda t: t.update({next(iter(t)): torch.ones(2, 22)}), "only values of the same rank"),
    "nan": (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN or Inf"),
    "inf": (lambda t: list(t.values())[-1][0].fill_(float("inf")), "NaN or Inf"),
    "type": (lambda t: t.update({next(iter(t)): next(iter(t.values())).to(torch.int8)}), "int8"),
    "no tensor": (lambda t: t.update({"a": 3}), "must map keys to tensors"),
    "empty": (lambda t: t.clear(), "lacks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing(fault: str, tmp_path: Path) -> None:
    lora_fx.save_adapter(adapted("plain", 2), tmp_path)
    tensors = held(tmp_path)
    damage, message = FAULTS[fault]
    damage(tensors)
    ours = adapted("plain", 1)
    before = fingerprint(ours)
    with pytest.raises(AdapterError, match=message):
        lora_fx.swap_adapter(ours, "default", tensors)
    assert fingerprint(ours) == before
    if all(isinstance(t, torch.Tensor) for t in tensors.values()) and tensors:
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            lora_fx.swap_adapter(ours, "default", tmp_path)
        assert fingerprint(ours) == before


def test_what_a_directory_says_beside_its_tensors(tmp_path: Path) -> None:
    ours = adapted("plain", 1)
    before = fingerprint(ours)
    lora_fx.save_adapter(adapted("plain", 2), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"init_lora_weights": "pissa"}, "took something out of the base"),
        ({"trainable_token_indices": [1]}, "trains the rows"),
        ({"use_dora": 3}, "use_dora"),
    ):
        path.write_text(json.dumps(config | change))
        reseal(tmp_path)
        with pytest.raises(lora_fx.LoraFxError, match=message):
            lora_fx.swap_adapter(ours, "default", tmp_path)
        assert fingerprint(ours) == before


def test_names_and_states_that_are_refused(tmp_path: Path) -> None:
    ours = adapted("plain", 1)
    lora_fx.save_adapter(ours, tmp_path)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        lora_fx.swap_adapter(ours, "other", tmp_path)
    with pytest.raises(AdapterError, match="there is no directory"):
        lora_fx.swap_adapter(ours, "default", tmp_path / "nope")
    with pytest.raises(AdapterError, match="mha_out_proj='thrice'"):
        lora_fx.swap_adapter(ours, "default", tmp_path, mha_out_proj="thrice")
    gm = frozen(traced(LLAMA))
    folded = lora_fx.inject(gm, LoraConfig(r=2, target_modules=["q_proj"]))
    lora_fx.fold(folded, inplace=True)
    with pytest.raises((GraphError, AdapterError), match="folded in place|no adapter"):
        lora_fx.swap_adapter(folded, "default", tmp_path)


def test_tied_sites_whose_file_differs_are_refused(tmp_path: Path) -> None:
    ours = adapted("tied", 1)
    lora_fx.save_adapter(adapted("tied", 2), tmp_path)
    tensors = held(tmp_path)
    key = next(key for key in tensors if re.search(r"lm_head.*lora_A", key))
    tensors[key] = tensors[key] + 1
    before = fingerprint(ours)
    with pytest.raises(AdapterError, match="holds different adapters for 'lm_head' and 'model.embed_tokens'"):
        lora_fx.swap_adapter(ours, "default", tensors)
    assert fingerprint(ours) == before


def test_a_kernel_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 10, 3, groups=2)

        def forward(self, x):
            return self.conv(x)

    model = Convolved().eval()
    gm = lora_fx.trace(model, torch.randn(2, 6, 7))
    ours = lora_fx.inject(gm, LoraConfig(r=4, target_modules=["conv"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False))
    before = {name: bits(p) for name, p in ours.named_parameters()}
    with pytest.raises(AdapterError, match="mixes the 2 groups"):
        lora_fx.swap_adapter(ours, "default", peft.get_peft_model_state_dict(peer))
    assert {name: bits(p) for name, p in ours.named_parameters()} == before
