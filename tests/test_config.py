"""LoraConfig: what it takes, what it refuses and in which words, and its way to PEFT's and back."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import BY_NAME, STACK, run, traced

import lora_fx
from lora_fx import ConfigError, LoraConfig
from lora_fx.config import UNSUPPORTED

NAN, INF = float("nan"), float("inf")


def test_defaults_are_pefts() -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for field in dataclasses.fields(ours):
        value = getattr(theirs, field.name)
        assert getattr(ours, field.name) == value, field.name


def test_every_field_of_peft_is_known() -> None:
    """None is ignored: it is supported, or refused by name."""
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in ("peft_type", "peft_version", "runtime_config", "megatron_core", "qalora_group_size"):
            continue
        assert field.name in {f.name for f in dataclasses.fields(LoraConfig)} | set(UNSUPPORTED), field.name


def test_is_frozen_and_keyword_only() -> None:
    config = LoraConfig(r=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    with pytest.raises(ConfigError, match="keyword arguments only, for instance r=3"):
        LoraConfig(3)


def test_does_not_keep_the_callers_containers() -> None:
    names, ranks = ["q"], {"q": 2}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["v"] = 3
    assert config.target_modules == ("q",)
    assert dict(config.rank_pattern) == {"q": 2}


def test_equal_configs_are_equal() -> None:
    assert LoraConfig(target_modules=["q"]) == LoraConfig(target_modules=("q",))
    assert LoraConfig(target_modules={"q", "v"}) == LoraConfig(target_modules={"v", "q"})


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1),
        ({"r": 3, "lora_alpha": 5}, 5 / 3),
        ({"r": 3, "lora_alpha": 5, "use_rslora": True}, 5 / math.sqrt(3)),
        ({"r": 7, "lora_alpha": 2.5}, 2.5 / 7),
        ({"r": 7, "lora_alpha": -2}, -2 / 7),
    ],
)
def test_scaling(options, scaling: float) -> None:
    assert LoraConfig(**options).scaling == scaling


REFUSED = [
    # (options, what the message says)
    ({"r": 0}, ["r=0", "above 0"]),
    ({"r": -4}, ["r=-4", "above 0"]),
    ({"r": True}, ["r=True", "integer"]),
    ({"r": 2.0}, ["r=2.0", "integer"]),
    ({"r": "8"}, ["r='8'", "integer"]),
    ({"r": None}, ["r=None", "integer"]),
    ({"lora_alpha": NAN}, ["lora_alpha=nan", "finite"]),
    ({"lora_alpha": INF}, ["lora_alpha=inf", "finite"]),
    ({"lora_alpha": 0}, ["lora_alpha=0", "other than 0"]),
    ({"lora_alpha": None}, ["lora_alpha=None", "finite number"]),
    ({"lora_alpha": True}, ["lora_alpha=True"]),
    ({"lora_alpha": "16"}, ["lora_alpha='16'"]),
    ({"lora_alpha": 10**400}, ["lora_alpha="]),
    ({"lora_dropout": 1.0}, ["lora_dropout=1.0", "without, 1"]),
    ({"lora_dropout": 1.5}, ["lora_dropout=1.5"]),
    ({"lora_dropout": -0.1}, ["lora_dropout=-0.1"]),
    ({"lora_dropout": NAN}, ["lora_dropout=nan"]),
    ({"lora_dropout": True}, ["lora_dropout=True"]),
    ({"lora_dropout": None}, ["lora_dropout=None"]),
    ({"bias": "lora"}, ["bias='lora'", "'none', 'all', 'lora_only'", "Did you mean 'lora_only'?"]),
    ({"bias": True}, ["bias=True"]),
    ({"bias": None}, ["bias=None"]),
    ({"bias": []}, ["bias=[]"]),
    ({"use_rslora": "false"}, ["use_rslora='false'", "True or False, not str"]),
    ({"use_rslora": 1}, ["use_rslora=1", "True or False"]),
    ({"fan_in_fan_out": None}, ["fan_in_fan_out=None"]),
    ({"init_lora_weights": "gausian"}, ["init_lora_weights='gausian'", "Did you mean 'gaussian'?"]),
    ({"init_lora_weights": "pisa"}, ["init_lora_weights='pisa'", "'gaussian'", "Did you mean 'pissa'"]),
    ({"init_lora_weights": "pissa_niter_x"}, ["pissa_niter_x", "pissa_niter_[number of iterations]"]),
    ({"init_lora_weights": 1}, ["init_lora_weights=1"]),
    ({"init_lora_weights": None}, ["init_lora_weights=None"]),
    ({"target_modules": 3}, ["target_modules=3", "list of names or a string, not int"]),
    ({"target_modules": ["q", 3]}, ["target_modules holds 3", "every entry must be a string"]),
    ({"target_modules": b"q"}, ["target_modules=b'q'"]),
    ({"target_modules": {"q": 1}}, ["target_modules=", "not dict"]),
    ({"target_modules": "(fc"}, ["target_modules='(fc'", "not a regular expression", "position 0", "list of names"]),
    ({"exclude_modules": "*"}, ["exclude_modules='*'", "not a regular expression"]),
    ({"exclude_modules": [None]}, ["exclude_modules holds None"]),
    ({"modules_to_save": "head"}, ["modules_to_save='head'", "modules_to_save=['head']"]),
    ({"modules_to_save": 3}, ["modules_to_save=3"]),
    ({"layers_to_transform": -1, "target_modules": ["q"]}, ["layers_to_transform holds -1", "from 0"]),
    ({"layers_to_transform": [1, "2"], "target_modules": ["q"]}, ["layers_to_transform holds '2'"]),
    ({"layers_to_transform": True, "target_modules": ["q"]}, ["layers_to_transform holds True"]),
    ({"layers_to_transform": 1.0, "target_modules": ["q"]}, ["layers_to_transform holds 1.0"]),
    ({"layers_to_transform": 1, "target_modules": "q"}, ["layers_to_transform=1", "'q' is a string", "as a list"]),
    ({"layers_pattern": "h", "target_modules": ["q"]}, ["layers_pattern=('h',)", "give both or neither"]),
    ({"layers_pattern": "(", "layers_to_transform": 1}, ["layers_pattern", "'('", "not a regular expression"]),
    ({"rank_pattern": {"q": 0}}, ["rank_pattern['q']=0", "above 0"]),
    ({"rank_pattern": {"q": True}}, ["rank_pattern['q']=True"]),
    ({"rank_pattern": {"(": 2}}, ["rank_pattern", "'('", "not a regular expression"]),
    ({"rank_pattern": {1: 2}}, ["rank_pattern has the key 1"]),
    ({"rank_pattern": ["q"]}, ["rank_pattern=['q']", "must map"]),
    ({"alpha_pattern": {"q": NAN}}, ["alpha_pattern['q']=nan", "finite"]),
    ({"alpha_pattern": {"q": "2"}}, ["alpha_pattern['q']='2'"]),
    ({"task_type": "CAUSAL"}, ["task_type='CAUSAL'", "Did you mean 'CAUSAL_LM'?"]),
    ({"task_type": 3}, ["task_type=3"]),
    ({"inference_mode": "yes"}, ["inference_mode='yes'"]),
    ({"lora_alhpa": 32}, ["lora_alhpa", "Did you mean 'lora_alpha'"]),
    ({"targets": ["q"]}, ["targets"]),
    ({"use_superlora": True}, ["use_superlora"]),
    ({"use_dora": True, "lora_bias": True}, ["use_dora and lora_bias", "do not go together"]),
    ({"use_dora": True, "target_parameters": ["w"]}, ["use_dora", "target_parameters", "leave one of the two out"]),
    ({"use_dora": 1}, ["use_dora"]),
    ({"target_parameters": "w"}, ["target_parameters", "list of names"]),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, ["lora_bias", "init_lora_weights=True or False"]),
    ({"layer_replication": [(0, 2)]}, ["layer_replication", "leave it out"]),
    ({"trainable_token_indices": [-1]}, ["trainable_token_indices", "-1", "integers from 0"]),
    ({"trainable_token_indices": [1, 1]}, ["trainable_token_indices", "a row twice"]),
    ({"trainable_token_indices": {"emb": 3}}, ["trainable_token_indices", "list of rows"]),
    ({"trainable_token_indices": {}}, ["trainable_token_indices", "map names of embeddings"]),
    ({"ensure_weight_tying": 1}, ["ensure_weight_tying", "True or False"]),
    ({"rank_pattern": {"(?i)q": 3}}, ["rank_pattern", "(?i)q"]),
    ({"layers_to_transform": 1, "target_modules": ["q"], "layers_pattern": ["(?P<index>h)"]}, ["layers_pattern"]),
    ({"auto_mapping": {"class": b"x"}}, ["auto_mapping", "b'x'", "as JSON"]),
    ({"auto_mapping": [1]}, ["auto_mapping=[1]", "must be a dict"]),
    ({"rank": 4}, ["no option 'rank' (given 4)", "Did you mean 'r'?"]),  # what other tools call it
    ({"alpha": 4}, ["no option 'alpha' (given 4)", "Did you mean 'lora_alpha'?"]),
]


@pytest.mark.parametrize(("options", "fragments"), REFUSED, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_refusals_name_the_field_the_value_and_what_is_right(options, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    with pytest.raises(ConfigError):  # a mapping of the fields is read alike
        LoraConfig.from_peft(options)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_are_taken_at_their_neutral_value(name: str) -> None:
    for neutral in UNSUPPORTED[name]:
        assert LoraConfig(**{name: neutral}) == LoraConfig()


@settings(max_examples=300)
@given(
    name=st.sampled_from([f.name for f in dataclasses.fields(LoraConfig)] + sorted(UNSUPPORTED) + ["peft_type"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_is_taken_or_refused_with_a_config_error(name: str, value) -> None:
    try:
        config = LoraConfig.from_peft({name: value})
    except ConfigError:
        return
    assert math.isfinite(config.scaling)
    json.dumps(config.to_peft(), allow_nan=False)


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        (3, "int is not a LoRA configuration"),
        (None, "NoneType is not a LoRA configuration"),
        (LoraConfig, "is not a LoRA configuration"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"peft_type": "lora"}, "Did you mean 'LORA'?"),
        ({"peft_type": 3}, "peft_type=3"),
        (peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "IA3"),
        (peft.LoraConfig(layer_replication=[(0, 1)]), "layer_replication"),
        ({3: 4}, "3"),
    ],
)
def test_other_configurations_are_refused(config, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_peft(config)
    assert fragment in str(caught.value)


SOME = {
    "r": 3,
    "lora_alpha": 5.5,
    "target_modules": ["q_proj", "up"],
    "exclude_modules": ["layers.0.up"],
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"up": 2},
    "alpha_pattern": {"up": 7},
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
}


def test_pefts_config_round_trips() -> None:
    ours = LoraConfig.from_peft(peft.LoraConfig(**SOME))
    for name, value in SOME.items():
        got = getattr(ours, name)
        expected = sorted(value) if name in ("target_modules", "exclude_modules") else value
        assert (list(got) if isinstance(got, tuple) else got) == expected, name
    theirs = peft.LoraConfig(**{k: v for k, v in ours.to_peft().items() if k != "peft_type"})
    assert LoraConfig.from_peft(theirs) == ours
    assert LoraConfig.from_peft(json.loads(json.dumps(ours.to_peft()))) == ours
    assert LoraConfig.from_peft(ours) is ours


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys, lora_fx; lora_fx.LoraConfig(r=3, target_modules=['q']);"
        "from lora_fx.matching import matches_target; from lora_fx.adapter_files import parse_key;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Every field changes the result ---------------------------------------------------------------------

CHANGES = {
    "r": 5,
    "target_modules": ["up"],
    "exclude_modules": ["up"],
    "lora_alpha": 7,
    "lora_dropout": 0.5,
    "bias": "all",
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1],
    "rank_pattern": {"up": 2},
    "alpha_pattern": {"up": 2},
}
BASE = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up"], "init_lora_weights": False}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_the_result(name: str) -> None:
    """Of two training steps from the same seed: the outputs, or what is trained."""
    assert _after_two_steps(BASE) == _after_two_steps(BASE)
    assert _after_two_steps(BASE) != _after_two_steps(BASE | {name: CHANGES[name]})


def test_layers_pattern_changes_the_result() -> None:
    layers = BASE | {"layers_to_transform": [1]}
    assert _after_two_steps(layers) == _after_two_steps(layers | {"layers_pattern": "layers"})
    with pytest.raises(lora_fx.TargetError, match="layers_to_transform 1"):
        _after_two_steps(layers | {"layers_pattern": "blocks"})


def test_fan_in_fan_out_is_read_from_the_graph() -> None:
    with pytest.warns(lora_fx.LoraFxWarning, match="the graph counts"):
        assert _after_two_steps(BASE | {"fan_in_fan_out": True}) == _after_two_steps(BASE)
    gm = traced(BY_NAME["addmm"])
    for flag in (True, False):  # stored (in, out) either way, so no warning
        assert lora_fx.make_plan(gm, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=flag)).targets


def _after_two_steps(options) -> list[bytes]:
    base = traced(STACK)
    torch.manual_seed(0)
    gm = lora_fx.inject(base, LoraConfig(**options)).train()
    arguments = STACK.arguments()
    optimizer = torch.optim.SGD(lora_fx.lora_parameters(gm), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gm(*arguments[0]).square().mean().backward()
        optimizer.step()
    return [t.numpy().tobytes() for t in run(gm.eval(), arguments)]
