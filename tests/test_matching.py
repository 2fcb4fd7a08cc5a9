"""Names: PEFT's rules as tables of facts, and side by side with PEFT's own functions on generated names."""

from __future__ import annotations

import contextlib
import itertools
import string
import time
import warnings

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import fx, nn

import lora_fx
from lora_fx import ConfigError
from lora_fx.matching import layer_index, matches_names, matches_target, matching_key, shortest_suffix

# (target_modules, layers_to_transform, layers_pattern, names that are meant, names that are not).
TARGETS = [
    # a list: the whole name, or a dotted suffix
    ([], None, None, [], ["", "fc", "enc.3.q"]),
    (["fc"], None, None, ["fc", "enc.fc", "enc.0.fc"], ["", "xfc", "fc.x", "enc.xfc", "fcx"]),
    (["out"], None, None, ["out"], ["fc"]),
    (["fc", "out"], None, None, ["fc", "out"], ["in"]),
    (["q", "v"], None, [], ["model.h.1.attn.attention.q"], ["model.h.1.attn.attention.drop", "model.h.1.q.inner"]),
    (["attn.q"], None, None, ["attn.q", "h.0.attn.q"], ["q", "xattn.q", "attn.0.q"]),
    (["layers.1.q"], None, None, ["m.layers.1.q"], ["m.layers.11.q", "m.layers.0.q"]),
    (["q*"], None, None, ["q*"], ["qq", "q"]),
    (["all-linear"], None, None, ["all-linear"], ["fc"]),
    # a string: one regular expression on the whole name
    ("fc", None, None, ["fc"], ["enc.fc", "fcx", ""]),
    (".*c", None, None, ["fc", "enc.fc"], ["fcx"]),
    ("f.*", None, None, ["fc", "f"], ["enc.fc"]),
    (".*out.*", None, None, ["stout", "out"], ["fc"]),
    (".*oba.*", None, None, ["foobar"], ["fobra"]),
    (r"m\.h\.[02]\.q", None, None, ["m.h.0.q", "m.h.2.q"], ["m.h.1.q", "xm.h.0.q", "m.h.0.qq"]),
    ("a|b", None, None, ["a", "b"], ["ab", "x.a"]),
    # layers: the number behind the container
    (["q"], [1], ["h"], ["m.h.1.q", "m.h.001.q", "m.h.1.x.2.q", "h.1.q", "h.1.h.2.q"], ["m.h.0.q", "m.h.10.q"]),
    (["q"], [0], ["h"], ["m.h.0.q"], ["m.h.1.q", "m.h.10.q", "m.h.2.x.0.q"]),
    (["q"], [2], ["h"], ["m.h.2.q"], ["m.h.1.q", "m.h.2.bias"]),
    (["q"], [0, 1, 2], ["h"], ["m.h.0.q", "m.h.2.q"], ["m.h.3.q", "m.h.1.v"]),
    (["q", "v"], [1], ["h"], ["m.h.1.q", "m.h.1.v"], ["m.h.0.v"]),
    (["q"], 1, "h", ["m.h.1.q"], ["m.h.0.q"]),
    (["q"], 0, "h", ["m.h.0.q"], ["m.h.1.q"]),
    (["q"], [1], ["m"], [], ["m.h.1.q", "m.x.1.q"]),
    (["q"], [1], ["q"], [], ["m.h.1.q"]),
    (["q"], [1], ["x", "h"], ["m.h.1.q", "m.x.1.q"], ["m.y.1.q"]),
    (["weight"], [1], ["blocks"], ["blocks.1.weight", "mlp.blocks.1.weight"], ["blocks.1.bias", "xblocks.1.weight"]),
    # no layers_pattern: the first number behind a container that is not at the root
    (["q"], [1], None, ["m.any.1.q", "m.a.1.b.2.q"], ["m.any.0.q", "h.1.q", "m.a.2.b.1.q"]),
    (["q"], [1], [], ["m.any.1.q"], ["m.any.0.q"]),
    (["q"], [1], "", ["m.any.1.q"], ["m.any.0.q"]),
    (["q"], [], None, ["m.any.1.q", "q"], ["m.any.1.v"]),
    # a whole name in the list is taken whatever its layer
    (["m.h.0.q"], [1], ["h"], ["m.h.0.q"], ["m.h.1.q", "x.m.h.0.q"]),
]


@pytest.mark.parametrize(("targets", "layers", "pattern", "meant", "others"), TARGETS)
def test_the_table_of_targets(targets, layers, pattern, meant, others) -> None:
    assert [name for name in meant if not matches_target(name, targets, layers, pattern)] == []
    assert [name for name in others if matches_target(name, targets, layers, pattern)] == []


@pytest.mark.parametrize(("targets", "layers", "pattern", "meant", "others"), TARGETS)
def test_the_table_of_targets_is_what_peft_says(targets, layers, pattern, meant, others) -> None:
    if isinstance(targets, str) and layers is not None:
        pytest.skip("PEFT refuses the pair")
    for name in (*meant, *others):
        assert _peft_matches(name, targets, layers, pattern) == (name in meant), name


PATTERNS = [
    # (keys, name, the key that counts)
    (["q"], "q", "q"),
    (["q"], "m.q", "q"),
    (["q"], "m.xq", None),
    (["q"], "q.m", None),
    (["^q"], "q", "^q"),
    (["^q"], "m.q", None),
    (["h.1.q"], "m.h.1.q", "h.1.q"),
    (["h.1.q"], "m.h.11.q", None),
    (["h.1.q"], "m.hx1.q", "h.1.q"),  # a dot is any character
    ([r"h\.1\.q"], "m.hx1.q", None),
    (["q|v"], "m.v", "q|v"),
    ([r".*\.q"], "m.q", r".*\.q"),
    (["m.q", "q"], "m.q", "m.q"),  # the first that matches, not the longest
    (["q", "m.q"], "m.q", "q"),
    (["v", "q"], "m.q", "q"),
    ([], "q", None),
]


@pytest.mark.parametrize(("keys", "name", "expected"), PATTERNS)
def test_the_table_of_pattern_keys(keys: list[str], name: str, expected: str | None) -> None:
    assert matching_key([name], dict.fromkeys(keys, 1)) == expected
    assert get_pattern_key(keys, name) == (name if expected is None else expected)


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("m.h.3.q", None, 3),
        ("h.3.q", None, None),
        ("h.3.q", "h", 3),
        ("m.h.3.e.5.q", ["e"], 5),
        ("m.h.3.e.5.q", None, 3),
        ("m.h.3", "h", None),  # the number must not be the last segment
        ("m.h.x.q", "h", None),
        ("m.h.3.q", ["x", "h"], 3),
    ],
)
def test_layer_index(name: str, pattern, index: int | None) -> None:
    assert layer_index(name, pattern) == index


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("m.h.q", [], "q"),
        ("m.h.q", ["m.q"], "h.q"),
        ("m.h.q", ["x.h.q"], "m.h.q"),
        ("q", ["m.q"], "q"),
        ("", [], ""),
    ],
)
def test_shortest_suffix(name: str, others: list[str], expected: str) -> None:
    assert shortest_suffix(name, others) == expected


# Side by side with PEFT -----------------------------------------------------------------------------

SEGMENTS = st.sampled_from(["m", "h", "layers", "q", "v", "xq", "0", "1", "2", "10", "01", "fc_1"])
NAMES = st.lists(SEGMENTS, min_size=0, max_size=6).map(".".join)
PIECES = st.sampled_from([".*", r"\.", "[qv]", "h", "q", "1", r"\d+", "(m|h)", ".", "x?"])
EXPRESSIONS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
LAYERS = st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=3)
CONTAINERS = (
    st.none()
    | st.sampled_from(["", "h", "layers", "m", "h|m"])
    | st.lists(st.sampled_from(["h", "m", "layers"]), max_size=2)
)


def _peft_matches(name, targets, layers, pattern, **options) -> bool:
    config = peft.LoraConfig(
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=pattern if layers is not None else None,
        **options,
    )
    return bool(check_target_module_exists(config, name))


@settings(max_examples=400)
@given(name=NAMES, targets=st.lists(NAMES, max_size=3), layers=LAYERS, pattern=CONTAINERS)
def test_lists_mean_what_they_mean_to_peft(name, targets, layers, pattern) -> None:
    assert matches_target(name, targets, layers, pattern) == _peft_matches(name, targets, layers, pattern)


@settings(max_examples=400)
@given(name=NAMES, cut=st.integers(0, 5), layers=LAYERS, pattern=CONTAINERS)
def test_suffixes_mean_what_they_mean_to_peft(name, cut, layers, pattern) -> None:
    """As above, on targets that do match something, so that the layer filter decides."""
    target = ".".join(name.split(".")[cut:])
    assert matches_target(name, [target], layers, pattern) == _peft_matches(name, [target], layers, pattern)


@settings(max_examples=400)
@given(name=NAMES, expression=EXPRESSIONS)
def test_expressions_mean_what_they_mean_to_peft(name: str, expression: str) -> None:
    assert matches_target(name, expression) == _peft_matches(name, expression, None, None)


@settings(max_examples=400)
@given(name=NAMES, keys=st.lists(NAMES.filter(bool) | EXPRESSIONS, unique=True, max_size=4))
def test_pattern_keys_mean_what_they_mean_to_peft(name: str, keys: list[str]) -> None:
    expected = get_pattern_key(keys, name)
    ours = matching_key([name], dict.fromkeys(keys, 1))
    assert (name if ours is None else ours) == expected


class Tree(nn.Module):
    """Linears at arbitrary dotted names, called one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            *owners, last = name.split(".")
            owner: nn.Module = self
            for part in owners:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(last, nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x).tanh()
        return x


LEAVES = [
    ".".join(parts) for parts in itertools.product(["m", "x"], ["h", "layers"], ["0", "1", "10"], ["q", "v", "xq"])
]
SUFFIXES = st.sampled_from(["q", "v", "0.q", "h.1.q", "layers.10.xq", "m.h.0.q", "x.layers.1.v", "xq", "h.0.v"])


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(LEAVES), min_size=2, max_size=8, unique=True),
    targets=st.lists(SUFFIXES, min_size=1, max_size=3, unique=True)
    | st.sampled_from([r".*\.q", r"m\..*[qv]", r".*[01]\.[qv]"]),
    excluded=st.none() | st.lists(SUFFIXES, max_size=1) | st.just(r"x\..*"),
    layers=st.none() | st.lists(st.sampled_from([0, 1, 10]), min_size=1, max_size=2, unique=True),
    pattern=st.none() | st.sampled_from(["h", "layers", ["h", "layers"]]),
    ranks=st.dictionaries(SUFFIXES | st.just("^m.*q"), st.integers(1, 9), max_size=2),
)
def test_plans_mean_the_modules_and_ranks_that_peft_adapts(names, targets, excluded, layers, pattern, ranks) -> None:
    """Whole configurations on whole models: the same modules with the same ranks, or a TargetError."""
    layers = None if isinstance(targets, str) else layers
    options = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers else None,
        "rank_pattern": ranks,
        "r": 11,
    }
    gm = fx.symbolic_trace(Tree(names))
    try:
        plan = lora_fx.make_plan(gm, lora_fx.LoraConfig(**options))
    except lora_fx.TargetError:
        return  # some pattern means nothing here; PEFT goes on in silence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Tree(names), peft.LoraConfig(**options)).base_model.model
    theirs = {n: m.r["default"] for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {target.site.path: target.r for target in plan.targets} == theirs


@settings(max_examples=200)
@given(words=st.lists(st.text(string.ascii_lowercase + ".*[", min_size=1, max_size=8), min_size=1, max_size=3))
def test_list_entries_are_never_expressions(words: list[str]) -> None:
    for word in words:
        assert matches_target(word, words)
        assert matches_target(f"x.{word}", words)
    assume(all("zz" not in word for word in words))
    assert not matches_target("zz", words)


@pytest.mark.parametrize("expression", ["(a|aa)+$x", r"((a+)+b?)+$y", "(?:a?){40}a{40}$z"])
def test_an_expression_has_a_budget(expression: str) -> None:
    """However it is used, and by however many names."""
    names = ["a" * 41] * 50
    started = time.process_time()
    for use in (
        lambda: [matches_names(name, expression) for name in names],
        lambda: matching_key(names, {expression: 1}),
        lambda: [layer_index(f"{name}.3.x", expression) for name in names],
    ):
        with contextlib.suppress(ConfigError):
            use()
    assert time.process_time() - started < 3 * 0.3


def test_the_budget_is_per_expression_and_said() -> None:
    with pytest.raises(ConfigError, match=r"takes more than 100 ms.*without repetitions inside"):
        matches_names("a" * 60, "(a|aa)+$x")
    assert matches_names("a" * 60, "(a|aa)+")
