"""Configurations that say what cannot be meant."""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Any

import peft
import torch
from catalogue.harness import TARGETS, Case, World

import lora_fx

NAN, INF = float("nan"), float("inf")

# {field: values that it cannot have}
VALUES: dict[str, list[Any]] = {
    "r": [0, -4, True, 2.5, 8.0, "8", None, [8], NAN, {"a": 1}],
    "lora_alpha": [0, NAN, INF, -INF, None, "16", True, [16], 1e31],
    "lora_dropout": [1.0, 1.5, -0.1, NAN, INF, None, "0.1", True],
    "target_modules": [3, [3], [None], "(fc", [["fc0"]], {"fc0": 1}, b"fc0", "fc0)", "*"],
    "exclude_modules": [3, "(", [4]],
    "layers_to_transform": ["1", -1, [1.5], True, [None], {"a": 1}],
    "layers_pattern": [5, "(", [3]],
    "rank_pattern": [[1], {"fc0": 0}, {"fc0": 1.5}, {"fc0": True}, {"(": 3}, {3: 4}, {"fc0": None}, "fc0"],
    "alpha_pattern": [{"fc0": NAN}, {"fc0": 0}, {"fc0": "x"}, {"[": 3}, {None: 2}, 7],
    "modules_to_save": ["fc1", 3, [3]],
    "target_parameters": ["fc0.weight", 5, [5]],
    "fan_in_fan_out": ["false", 1, None],
    "use_rslora": ["true", 1, None],
    "use_dora": ["yes", 0, None],
    "lora_bias": ["no", 1],
    "bias": ["al", True, None, 3],
    "init_lora_weights": ["pisa", 3, None, 1.0, "pissa_niter_x"],
    "task_type": ["CAUSAL", 3],
    "inference_mode": ["x", 2],
    "trainable_token_indices": [[], [-1], [1.5], [1, 1], {"words": "x"}, {}, "words", 3],
    "ensure_weight_tying": ["x"],
    "eva_config": [3, {"rho": 0.5}, {"what": 1}],
    "loftq_config": [3, {"loftq_bits": 3}],
    "base_model_name_or_path": [3],
    "auto_mapping": [3, {"x": NAN}],
}
# What PEFT knows and this package does not, or nobody.
OTHERS: list[dict[str, Any]] = [
    {"layer_replication": [[0, 1]]}, {"use_qalora": True}, {"alora_invocation_tokens": [1]},
    {"megatron_config": {"a": 1}}, {"arrow_config": {"x": 1}}, {"lora_alhpa": 32}, {"rank": 8}, {"alpha": 16},
    {"dropout": 0.1}, {"Target_modules": []},
    {"use_superlora": True},
]  # fmt: skip
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True, "lora_bias": True}, "use_dora"),
    ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias"),
    ({"use_dora": True, "target_parameters": ["fc0.weight"]}, "use_dora"),
    ({"lora_dropout": 0.1, "target_parameters": ["fc0.weight"]}, "lora_dropout"),
    ({"layers_to_transform": 1, "target_modules": "fc0"}, "layers_to_transform"),
    ({"layers_pattern": "h"}, "layers_pattern"),
]
# What a configuration may say, and a model cannot do.
IN_A_MODEL: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"target_modules": None}, ("target_modules",)),
    ({"target_modules": []}, ("target_modules",)),
    ({"target_modules": ["fc"]}, ("'fc'",)),
    ({"target_modules": ["fc0", "fc7", "f_c1"]}, ("fc7",)),
    ({"target_modules": ["FC0"]}, ("FC0", "fc0")),
    ({"target_modules": "fc[7-9]"}, ("fc[7-9]",)),
    ({"target_modules": ["fc0.weight"]}, ("fc0.weight",)),
    ({"target_modules": ["nope"]}, ("nope",)),
    ({"exclude_modules": ["zzz"]}, ("zzz",)),
    ({"exclude_modules": TARGETS}, ("exclude_modules",)),
    ({"layers_to_transform": [99]}, ("layers_to_transform",)),
    ({"modules_to_save": ["classifier"]}, ("classifier",)),
    ({"rank_pattern": {"nope": 3}}, ("nope",)),
    ({"alpha_pattern": {"nope": 3}}, ("nope",)),
    ({"rank_pattern": {"fc.": 3, "fc0": 4}}, ("rank_pattern",)),
    ({"target_parameters": ["nope.weight"]}, ("nope.weight",)),
    ({"trainable_token_indices": [99]}, ("99",)),
    ({"trainable_token_indices": {"nope": [1]}}, ("nope",)),
    ({"init_lora_weights": "eva"}, ("calibrate",)),
    ({"init_lora_weights": "lora_ga"}, ("calibrate",)),
    ({"init_lora_weights": "corda"}, ("calibrate",)),
    ({"target_modules": r"(\w+\s?)+fc0$|(a|aa)+x"}, ("target_modules",)),
]


class Kind(enum.Enum):
    ONE = "one"


def _config(fields: dict[str, Any]) -> object:
    lora_fx.LoraConfig(**({"target_modules": TARGETS} | fields))
    return False


def _inject(world: World, fields: dict[str, Any]) -> object:
    lora_fx.inject(world.gm, lora_fx.LoraConfig(**({"target_modules": TARGETS} | fields)))
    return False


def _peft(world: World) -> object:
    """A PEFT configuration that is right, given as it is."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS)
    return lora_fx.trainable_parameters(lora_fx.inject(world.gm, config))[0] == 2 * (7 + 11) + 2 * (11 + 5)


CASES = [
    *(
        Case(f"config/{name}={value!r}"[:60], lambda w, n=name, v=value: _config({n: v}), (name,))
        for name, values in VALUES.items()
        for value in values
    ),
    *(
        Case(f"config/unknown {next(iter(fields))}", lambda w, f=fields: _config(f), (next(iter(fields)),))
        for fields in OTHERS
    ),
    *(Case(f"config/together {fields}"[:70], lambda w, f=fields: _config(f), (word,)) for fields, word in TOGETHER),
    *(
        Case(f"config/in a model {fields}"[:80], lambda w, f=fields: _inject(w, f), words)
        for fields, words in IN_A_MODEL
    ),
    Case("config/not a config", lambda w: lora_fx.inject(w.gm, 5), ("int", "LoraConfig")),
    Case("config/a string", lambda w: lora_fx.inject(w.gm, "r=8"), ("str", "LoraConfig")),
    Case("config/a class", lambda w: lora_fx.inject(w.gm, peft.LoraConfig), ("LoraConfig",)),
    Case("config/another tuner", lambda w: lora_fx.inject(w.gm, peft.IA3Config()), ("IA3",)),
    Case("config/positional", lambda w: lora_fx.LoraConfig(8), ("LoraConfig",)),
    Case("config/an enum of no meaning", lambda w: _config({"task_type": Kind.ONE}), ("task_type",)),
    Case("config/peft's own", _peft),
    Case("config/a plan of another graph", lambda w: _other_plan(w), ("plan",)),
    Case("config/a slow expression", lambda w: _slow(w), ("((a|aa)+)x", "100 ms")),
    Case("config/a slow pattern", lambda w: _slow(w, rank_pattern={"((a|aa)+)x": 3}), ("((a|aa)+)x", "100 ms")),
    Case("config/a number in a mapping's key", lambda w: lora_fx.inject(w.gm, {3: 4}), ("3",)),
]


def _slow(world: World, **options: Any) -> object:
    """Of a model with a long name."""
    model = torch.nn.Sequential(OrderedDict({"a" * 60: torch.nn.Linear(3, 4)}))
    fields = {"target_modules": ["a" * 60]} | options if options else {"target_modules": "((a|aa)+)x"}
    lora_fx.inject(torch.fx.symbolic_trace(model), fields)
    return False


def _other_plan(world: World) -> object:
    other = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(3, 4)), (torch.randn(2, 3),))
    lora_fx.inject(world.gm, lora_fx.make_plan(other, {"target_modules": ["0"]}))
    return False
