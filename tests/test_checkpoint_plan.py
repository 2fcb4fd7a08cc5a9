"""Which tensor an adapter's names mean, how it lies, what is tied: from names, shapes and what the files say."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import noted, write_adapter, write_base

from lora_fx import AdapterError, FoldError, LoraFxError, checkpoint_plan
from lora_fx.adapter_arrays import map_adapter
from lora_fx.base_note import KEY
from lora_fx.checkpoint_changes import BiasOfB, LowRank, Rows, Whole, tensor_of
from lora_fx.checkpoint_plan import CheckpointPlan, check_base_note, is_stored, plan_fold
from lora_fx.checkpoint_ties import _is_same
from lora_fx.hf_checkpoint import read_checkpoint
from lora_fx.layouts import Experts, Kernel, Matrix

ROWS = "token_adapter.trainable_tokens_delta"
OURS = {"writer": "lora_fx"}
GPT2, LLAMA = {"model_type": "gpt2"}, {"model_type": "llama"}
Tensors = Mapping[str, torch.Tensor | tuple[int, ...]]


def values(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, each of its own values."""
    return {name: t if isinstance(t, torch.Tensor) else torch.randn(t) for name, t in tensors.items()}


class Files:
    """Writes bases and adapters, and plans."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = itertools.count()
        self.let_go = 0

    def __call__(
        self, base: Tensors, adapter: Tensors, says: Any = None, metadata: Any = None, **config: Any
    ) -> CheckpointPlan:
        place = self.root / str(next(self.numbers))
        directory = write_base(values(base), place / "base", 1, **says or {})
        saved = write_adapter(place / "adapter", values(adapter), metadata, **config)
        arrays, let_go = map_adapter(saved, integrity="ignored")

        def go() -> None:
            self.let_go += 1
            let_go()

        return plan_fold(read_checkpoint(directory, FoldError), arrays, go)


@pytest.fixture
def plan(tmp_path: Path) -> Files:
    torch.manual_seed(7)
    return Files(tmp_path)


def ab(path: str, a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def linear(path: str, out: int, into: int, r: int = 2) -> dict[str, tuple[int, ...]]:
    return ab(path, (r, into), (out, r))


def lookup(path: str, words: int, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{path}.lora_embedding_A": (2, words), f"{path}.lora_embedding_B": (dim, 2)}


def layouts(found: CheckpointPlan) -> dict[str, Any]:
    return {change.name: term.layout for change in found.changes for term in change.terms if isinstance(term, LowRank)}


# Names -------------------------------------------------------------------------------------------------


def test_names_may_begin_otherwise(plan: Files) -> None:
    for base, adapter, config in (
        ({"a.weight": (5, 3)}, linear("model.a", 5, 3), {}),
        ({"up": (3, 5, 7)}, ab("model.up", (6, 7), (5, 6)), {}),
        ({"a.weight": (5, 3)}, {f"model.a.{ROWS}": (2, 3)}, {"trainable_token_indices": [1, 4]}),
        ({"a.weight": (5, 3)}, {"model.a.weight": (5, 3)}, {"modules_to_save": ["a"]}),
    ):  # fmt: skip
        found = plan(base, adapter, **config)
        assert [change.name for change in found.changes] == list(base)
        assert found.notes == ("names of the adapter begin with 'model.', which the file's have not",)
        turned = {f"model.{name}": shape for name, shape in base.items()}
        own = {name.removeprefix("model."): shape for name, shape in adapter.items()}
        found = plan(turned, own, **config)
        assert [change.name for change in found.changes] == list(turned)
        assert found.notes == ("names in the file begin with 'model.', which the adapter's have not",)
    assert plan({"a.weight": (5, 3)}, linear("a", 5, 3)).notes == ()
    with pytest.raises(AdapterError, match="no tensor for the adapter's 'model.up.weight'"):
        plan({"up": (5, 3)}, linear("model.up", 5, 3))


def test_a_tied_head_has_no_say_in_that_and_one_of_its_own_has(plan: Files) -> None:
    base: dict[str, tuple[int, ...]] = {"a.weight": (5, 3), "embed_tokens.weight": (7, 3)}
    adapter = linear("lm_head", 7, 3) | linear("model.a", 5, 3)
    says = {"architectures": ["XForCausalLM"]}
    found = plan(base, adapter, says)
    assert [(c.name, c.source.name) for c in found.changes] == [
        ("lm_head.weight", "embed_tokens.weight"),
        ("a.weight",) * 2,
    ]
    with pytest.raises(AdapterError, match="no tensor for the adapter's 'model.a.weight'. Did you mean 'a.weight'"):
        plan(base | {"lm_head.weight": (7, 3)}, adapter, says)


def test_what_is_not_there_is_told(plan: Files) -> None:
    for name in ("a.weight_v", "a.weight_g", "a.parametrizations.weight.original0"):
        with pytest.raises(AdapterError, match=f"has '{name}', of which 'a.weight' is computed"):
            plan({name: (5, 3), "b.weight": (2, 2)}, linear("a", 5, 3))
    for adapter, config in (
        (lookup("a", 5, 3), {}),
        ({"a.weight": (5, 3)}, {"modules_to_save": ["a"]}),
        ({"a.bias": (5,)}, {"bias": "all"}),
        ({f"a.{ROWS}": (1, 3)}, {"trainable_token_indices": {"a": [1]}}),
        (linear("a", 5, 3), {"target_parameters": ["a.up"], "target_modules": []}),
    ):  # fmt: skip
        with pytest.raises(
            AdapterError, match=r"has no tensor for the adapter's 'a\.(weight|bias|up)'.*lora-fx fold MODEL"
        ):
            plan({"c.weight": (5, 3)}, adapter, **config)


def test_a_parameter_goes_by_its_own_name_unless_a_module_has_it(plan: Files) -> None:
    assert layouts(plan({"fc": (5, 3)}, linear("fc", 5, 3))) == {"fc": Matrix(5, 3)}
    assert layouts(plan({"fc": (5, 3), "fc.weight": (7, 3)}, linear("fc", 7, 3))) == {"fc.weight": Matrix(7, 3)}
    assert layouts(plan({"fc": (2, 5, 3), "fc.weight": (7, 3)}, ab("fc", (4, 3), (5, 4)))) == {"fc": Experts((2, 5, 3))}


# What is added -----------------------------------------------------------------------------------------


def test_terms_of_one_tensor_are_added_up(plan: Files) -> None:
    adapter = lookup("e", 7, 3) | {f"e.{ROWS}": (2, 3)}
    found = plan({"e.weight": (7, 3)}, adapter, trainable_token_indices={"e": [4, 1]})
    (change,) = found.changes
    assert (change.name, change.source.name, change.path) == ("e.weight", "e.weight", "e")
    one, other = change.terms
    assert isinstance(one, LowRank)
    assert isinstance(other, Rows)
    assert one.layout == Matrix(7, 3, stored_in_out=True)
    assert one.scaling == 1.5
    assert (other.index, other.values.shape) == ((4, 1), (2, 3))
    assert not change.is_whole
    assert not change.is_untied
    assert found.unties is False


def test_a_bias_of_b_is_added_to_the_bias(plan: Files) -> None:
    adapter = linear("a", 5, 3) | {"a.lora_B.bias": (5,)}
    found = plan({"a.weight": (5, 3), "a.bias": (5,)}, adapter, lora_bias=True)
    assert [change.name for change in found.changes] == ["a.weight", "a.bias"]
    (term,) = found.changes[1].terms
    assert isinstance(term, BiasOfB)
    assert (term.scaling, term.values.shape) == (1.5, (5,))
    packed = plan({"a.in_proj_weight": (5, 3), "a.in_proj_bias": (5,), "a.bias": (5,)}, adapter, lora_bias=True)
    assert [change.name for change in packed.changes] == ["a.in_proj_weight", "a.in_proj_bias"]
    for base, there in (({}, "none"), ({"a.bias": (7,)}, r"one of the shape \[7\]")):
        with pytest.raises(AdapterError, match=rf"'a.bias' of the shape \[5\], and the checkpoint has {there}"):
            plan({"a.weight": (5, 3)} | base, adapter, lora_bias=True)


def test_what_is_trained_as_a_whole_stands_alone(plan: Files) -> None:
    found = plan({"a.weight": (5, 3), "a.bias": (5,)}, {"a.weight": (5, 3), "a.bias": (5,)}, modules_to_save=["a"])
    assert [(change.name, change.path, change.is_whole) for change in found.changes] == [
        ("a.bias", "a.bias", True), ("a.weight", "a.weight", True),
    ]  # fmt: skip
    assert all(isinstance(change.terms[0], Whole) for change in found.changes)
    with pytest.raises(AdapterError, match="'a.weight' as a whole, and something to add to it"):
        plan({"a.weight": (5, 3)}, linear("a", 5, 3) | {"a.weight": (5, 3)}, modules_to_save=["a"])


def test_only_floats_can_be_added_to(plan: Files) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert plan({"a.weight": torch.ones(5, 3, dtype=dtype)}, linear("a", 5, 3)).changes
    with pytest.raises(FoldError, match="'a.weight' is I8 in model.safetensors, and only F64, F32, F16, BF16 can"):
        plan({"a.weight": torch.ones(5, 3, dtype=torch.int8)}, linear("a", 5, 3))


def test_full_tensors_are_of_saved_modules_or_trained_biases(plan: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, tuple[int, ...]] = {"m.deep.a.weight": (5, 3), "m.deep.a.bias": (5,)}
    bias, weight = {"m.deep.a.bias": (5,)}, {"m.deep.a.weight": (5, 3)}
    for adapter, config in (
        (bias, {"bias": "all"}), (bias, {"bias": "lora_only"}), (bias, {"modules_to_save": ["a"]}),
        (bias, {"modules_to_save": ["x", "deep"]}), (weight, {"modules_to_save": ["deep.a"]}),
        (weight, {"modules_to_save": ["m"]}), (weight, {"modules_to_save": ["eep"]}),
    ):  # fmt: skip
        assert [change.name for change in plan(base, adapter, **config).changes] == list(adapter)
    for adapter, config in (
        (bias, {}),
        (weight, {"bias": "all"}),
        (weight, {"modules_to_save": ["dee"], "bias": "all"}),
    ):
        with pytest.raises(AdapterError, match="other than the base's, and by adapter_config.json neither"):
            plan(base, adapter, **config)
    for adapter, config in (
        ({"m.deep.a.weight": (7, 3)}, {"modules_to_save": ["a"]}),
        ({"m.deep.a.bias": (7,)}, {"bias": "all"}),
    ):
        with pytest.raises(AdapterError, match=r"has the shape \[7.*\], the checkpoint's \[5.*\]"):
            plan(base, adapter, **config)
    with pytest.raises(AdapterError, match="other than the base's"):
        plan(base, {"m.deep.a.weight": (7, 3)})

    own = values(base)
    with pytest.raises(AdapterError, match="changes nothing in this checkpoint"):
        plan(own, own)
    assert plan.let_go == 2
    found = plan(own, own | values(linear("m.deep.a", 5, 3)))
    assert [change.name for change in found.changes] == ["m.deep.a.weight"]


def test_what_is_stored_is_compared_in_either_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_plan, "_PIECE", 4)
    exact = torch.randn(3, 5)
    half, other = exact.bfloat16(), exact.clone()
    other[2, 4] += 1
    early = exact.clone()
    early[0, 0] += 1
    many = {"whole": exact, "half": half, "other": other, "early": early, "ints": torch.ones(3, 5, dtype=torch.int32)}
    stored = read_checkpoint(write_base(many, tmp_path / "base", 1), FoldError).tensors
    array = exact.numpy()
    assert is_stored(array, stored["whole"])
    assert is_stored(array, stored["half"])
    assert is_stored(half.float().numpy(), stored["half"])
    assert is_stored(half.view(torch.uint16).numpy(), stored["whole"])
    assert not is_stored(array, stored["other"])
    assert is_stored(array, stored["early"]) is False
    assert not is_stored(half.float().numpy() + 1, stored["half"])
    assert is_stored(torch.ones(3, 5).numpy(), stored["ints"]) is False


def test_trained_rows_are_of_a_table(plan: Files) -> None:
    rows = {f"m.e.{ROWS}": (2, 3)}
    base: dict[str, tuple[int, ...]] = {"m.e.weight": (7, 3)}
    for wanted in ([6, 0], {"e": [6, 0]}, {"m.e": [6, 0]}, {"x": [1], "e": [6, 0]}):
        (change,) = plan(base, rows, trainable_token_indices=wanted).changes
        (term,) = change.terms
        assert isinstance(term, Rows)
        assert (change.name, change.path, term.index) == ("m.e.weight", "m.e", (6, 0))
    for wanted, tensors, words in (
        ({"x": [1, 2]}, rows, "files that belong together"),
        (None, rows, "files that belong together"),
        ([1], rows, "files that belong together"),
        ([1, 2], {f"m.e.{ROWS}": (2, 5)}, "files that belong together"),
        ([1, 7], rows, "names row 7 of 'm.e', which has 7"),
    ):
        with pytest.raises(AdapterError, match=words):
            plan(base, tensors, trainable_token_indices=wanted)


# How a weight lies -------------------------------------------------------------------------------------


def test_shapes_tell_how_a_matrix_lies(plan: Files) -> None:
    assert layouts(plan({"a.weight": (5, 3)}, linear("a", 5, 3))) == {"a.weight": Matrix(5, 3)}
    assert layouts(plan({"a.weight": (3, 5)}, linear("a", 5, 3))) == {"a.weight": Matrix(3, 5, stored_in_out=True)}
    assert layouts(plan({"e.weight": (7, 3)}, lookup("e", 7, 3))) == {"e.weight": Matrix(7, 3, stored_in_out=True)}
    assert layouts(plan({"e.weight": (3, 3)}, lookup("e", 3, 3))) == {"e.weight": Matrix(3, 3, stored_in_out=True)}
    for shape, adapter in (
        ((5, 4), linear("a", 5, 3)), ((3, 7), lookup("a", 7, 3)), ((5,), linear("a", 5, 3)),
        ((5, 3, 1, 1), linear("a", 5, 3)),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="of 'a' do not make a delta for 'a.weight', which has the shape"):
            plan({"a.weight": shape}, adapter)
    with pytest.raises(AdapterError, match="A of 'a' has 3 ranks"):
        plan({"a.weight": (5, 3)}, linear("a", 5, 3, 3))


SQUARE: dict[str, tuple[int, ...]] = {"m.c_proj.weight": (6, 6), "m.c_proj.bias": (6,)}
TURNED, PLAIN = {"n.c_proj.weight": (3, 5), "n.c_proj.bias": (5,)}, {"n.c_proj.weight": (3, 5), "n.c_proj.bias": (3,)}


def is_turned(plan: Files, base: Tensors = SQUARE, *args: Any, adapter: Tensors | None = None, **config: Any) -> bool:
    found = layouts(plan(base, adapter or linear("m.c_proj", 6, 6), *args, **config))["m.c_proj.weight"]
    assert found == Matrix(6, 6, stored_in_out=found.stored_in_out)
    return bool(found.stored_in_out)


def test_a_square_matrix_lies_as_we_noted_it(plan: Files) -> None:
    note = OURS | {"lora_fx.turned": '["m.c_proj.weight"]'}
    for says in (None, LLAMA, GPT2):
        assert is_turned(plan, SQUARE | PLAIN, says, note)
        assert not is_turned(plan, SQUARE | TURNED, says, OURS, fan_in_fan_out=True)
        assert not is_turned(plan, SQUARE | TURNED, says, OURS | {"lora_fx.turned": '["x.weight"]'})
    assert not is_turned(plan, SQUARE, None, {"writer": "x", "lora_fx.turned": '["m.c_proj.weight"]'})
    for text in ("{", "3", "[3]", '{"a": 1}', "[" * 100_000):
        with pytest.raises(AdapterError, match=r"the note on weights \(lora_fx.turned\) cannot be read"):
            is_turned(plan, SQUARE, None, OURS | {"lora_fx.turned": text})


def test_a_square_matrix_lies_as_its_siblings(plan: Files) -> None:
    decoys = [
        {"n.c_fc.weight": (3, 5), "n.c_fc.bias": (5,)}, {"n.c_proj.other": (3, 5)},
        {"o.c_proj.weight": (3, 5, 7), "o.c_proj.bias": (5,)}, {"o.c_proj.weight": (3, 5)},
        {"o.c_proj.weight": (3, 5), "o.c_proj.bias": (5, 1)}, {"o.c_proj.weight": (3, 5), "o.c_proj.bias": (7,)},
        {"o.c_proj.weight": (5,), "o.c_proj.bias": (5,)},
    ]  # fmt: skip
    for decoy in ({}, *decoys):
        assert is_turned(plan, SQUARE | decoy | TURNED, LLAMA)
        assert not is_turned(plan, SQUARE | decoy | PLAIN, GPT2)
    also = {"o.c_proj.weight": (3, 5), "o.c_proj.bias": (3,)}
    assert not is_turned(plan, SQUARE | PLAIN | also, GPT2)
    with pytest.raises(AdapterError, match=r"is square, \[6, 6\].*other weights of that name lie either way"):
        is_turned(plan, SQUARE | TURNED | also, GPT2)


def test_a_square_matrix_without_siblings_lies_as_config_or_adapter_say(plan: Files) -> None:
    for said in (False, True):
        assert is_turned(plan, SQUARE, None, fan_in_fan_out=said) is said
        assert is_turned(plan, SQUARE, {"model_type": 3}, fan_in_fan_out=said) is said
        assert is_turned(plan, SQUARE, GPT2, fan_in_fan_out=said)
    assert not is_turned(plan, SQUARE, LLAMA)
    other = layouts(plan({"m.dense.weight": (6, 6)}, linear("m.dense", 6, 6), GPT2))
    assert other == {"m.dense.weight": Matrix(6, 6)}
    for also in (PLAIN, {}):
        with pytest.raises(AdapterError, match="adapter_config.json says fan_in_fan_out, and the base"):
            is_turned(plan, SQUARE | also, LLAMA, fan_in_fan_out=True)


def test_what_lies_turned_elsewhere_explains_what_the_adapter_says(plan: Files) -> None:
    own = linear("m.c_proj", 6, 6)
    assert not is_turned(
        plan, SQUARE | {"t.weight": (3, 5)}, LLAMA, adapter=own | linear("t", 5, 3), fan_in_fan_out=True
    )
    for base, more in (
        ({"t.weight": (5, 3)}, linear("t", 5, 3)), ({"t.weight": (7, 3)}, lookup("t", 7, 3)),
        ({"t.weight": (6, 6)}, linear("t", 6, 6)), ({"t": (3, 5)}, linear("t", 3, 5)),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="says fan_in_fan_out"):
            is_turned(plan, SQUARE | base, LLAMA, adapter=own | more, fan_in_fan_out=True)


def of_groups(out: int, into: int, groups: int, extent: tuple[int, ...], r: int) -> dict[str, torch.Tensor]:
    """A and B of a convolution as PEFT has them, in which no rank mixes groups."""
    layout = Kernel((out, into // groups, *extent), groups)
    a = layout.dense(torch.randn(r, into // groups, *extent))
    return {"c.lora_A.weight": a, "c.lora_B.weight": torch.randn(out, r // groups, *(1 for _ in extent))}


def test_kernels_have_the_groups_that_their_shapes_say(plan: Files) -> None:
    for groups, extent in ((1, (3,)), (2, (3, 1)), (3, (1, 2, 3))):
        shape = (6, 12 // groups, *extent)
        found = layouts(plan({"c.weight": shape}, of_groups(6, 12, groups, extent, 6), r=6))
        assert found == {"c.weight": Kernel(shape, groups)}
        turned = OURS | {"lora_fx.turned": '["c.weight"]'}
        adapter = ab("c", (6, 12 // groups, *extent), (6 * groups, 6 // groups, *(1 for _ in extent)))
        found = layouts(plan({"c.weight": (12, 6, *extent)}, adapter, None, turned, r=6))
        assert found == {"c.weight": Kernel((12, 6, *extent), groups, is_transposed=True)}
    with pytest.raises(AdapterError, match="A of 'c' mixes the 2 groups of inputs"):
        plan({"c.weight": (6, 6, 3)}, ab("c", (6, 12, 3), (6, 3, 1)), r=6)


@pytest.mark.parametrize(("shape", "a", "b", "is_turned"), [
    ((6, 12, 4), (6, 12, 3), (6, 6, 1), False),  # another extent
    ((6, 12, 3), (6, 12, 3), (6, 6, 3), False),  # B is not pointwise
    ((6, 12, 3, 3), (6, 12, 3, 3), (6, 6, 1, 3), False),
    ((5, 12, 3), (6, 12, 3), (6, 6, 1), False),  # other outputs
    ((6, 5, 3), (6, 12, 3), (6, 6, 1), False),  # inputs that are not shared out evenly
    ((6, 24, 3), (6, 12, 3), (6, 6, 1), False),
    ((6, 0, 3), (6, 12, 3), (6, 6, 1), False),
    ((6, 3, 3), (8, 12, 3), (6, 2, 1), False),  # outputs that are not
    ((6, 6, 3), (6, 12, 3), (6, 6, 1), False),  # ranks of one group, in two
    ((12, 4, 3), (6, 12, 3), (6, 6, 1), True),
    ((12, 0, 3), (6, 12, 3), (6, 6, 1), True),
    ((11, 6, 3), (6, 12, 3), (6, 6, 1), True),
    ((12, 3, 3), (6, 12, 3), (6, 6, 1), True),
    ((24, 3, 3), (6, 12, 3), (6, 6, 1), True),
])  # fmt: skip
def test_kernels_that_do_not_fit_are_told(
    shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], is_turned: bool, plan: Files
) -> None:
    metadata = OURS | ({"lora_fx.turned": '["c.weight"]'} if is_turned else {})
    with pytest.raises(AdapterError, match="of 'c' do not make a delta for 'c.weight'"):
        plan({"c.weight": shape}, ab("c", a, b), None, metadata, r=a[0])


def test_stacks_and_parameters(plan: Files) -> None:
    for says in (None, LLAMA):
        assert layouts(plan({"w": (3, 5, 7)}, ab("w", (6, 7), (5, 6)), says)) == {"w": Experts((3, 5, 7))}
        turned = layouts(plan({"w": (3, 7, 5)}, ab("w", (6, 7), (5, 6)), says))
        assert turned == {"w": Experts((3, 7, 5), stored_in_out=True)}
    square = {"w": (3, 5, 5)}
    adapter = ab("w", (6, 5), (5, 6))
    for says, metadata, is_turned in (
        (LLAMA, None, False), ({"model_type": "llama4"}, None, True), ({"model_type": "gpt_oss"}, None, True),
        (None, OURS, False), (None, OURS | {"lora_fx.turned": '["w"]'}, True),
        ({"model_type": "llama4"}, OURS, False),
    ):  # fmt: skip
        assert layouts(plan(square, adapter, says, metadata)) == {"w": Experts((3, 5, 5), stored_in_out=is_turned)}
    with pytest.raises(AdapterError, match=r"'w' holds square matrices, \[3, 5, 5\].*without the base's config.json"):
        plan(square, adapter)
    for shape, a, b in (
        ((3, 5, 7), (4, 7), (5, 4)), ((3, 5, 7), (6, 7), (5, 3)), ((3, 5, 8), (6, 7), (5, 6)),
        ((2, 7, 6), (4, 7), (5, 4)),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="do not make a delta for 'w'"):
            plan({"w": shape}, ab("w", a, b))

    named = {"target_parameters": ["p.w"], "target_modules": []}
    assert layouts(plan({"p.w": (5, 3)}, linear("p", 5, 3), **named)) == {"p.w": Matrix(5, 3)}
    assert layouts(plan({"p.w": (5, 5)}, linear("p", 5, 5), GPT2, fan_in_fan_out=True, **named)) == {
        "p.w": Matrix(5, 5)
    }
    assert layouts(plan({"p.w": (3, 5, 7)}, ab("p", (6, 7), (5, 6)), **named)) == {"p.w": Experts((3, 5, 7))}
    for shape, tensors in (((3, 5), linear("p", 5, 3)), ((5, 3), linear("p", 5, 3, 4)), ((5,), linear("p", 5, 3))):
        with pytest.raises(AdapterError, match=r"do not make a delta for 'p.w'|no tensor for the adapter's 'p.weight'"):
            plan({"p.w": shape}, tensors, **named)
    stacked = ab("w", (6, 7), (5, 6))
    for more, config in (
        ({"w.lora_B.bias": (5,)}, {"lora_bias": True}),
        ({"w.lora_magnitude_vector": (5,)}, {"use_dora": True}),
    ):
        with pytest.raises(AdapterError, match="'w' is a parameter of its own"):
            plan({"w": (3, 5, 7)}, stacked | more, **config)


def test_a_magnitude_has_a_value_for_each_output(plan: Files) -> None:
    for base, adapter in (
        ({"a.weight": (5, 3)}, linear("a", 5, 3) | {"a.lora_magnitude_vector": (5,)}),
        ({"a.in_proj_weight": (5, 3)}, linear("a", 5, 3) | {"a.lora_magnitude_vector": (5,)}),
    ):
        assert len(layouts(plan(base, adapter, use_dora=True))) == 1
    with pytest.raises(AdapterError, match="lora_magnitude_vector of 'a' has 3 values, and its weight 5 outputs"):
        plan({"a.weight": (5, 3)}, linear("a", 5, 3) | {"a.lora_magnitude_vector": (3,)}, use_dora=True)
    adapter = ab("c", (6, 12, 3), (6, 6, 1)) | {"c.lora_magnitude_vector": (6,)}
    with pytest.raises(AdapterError, match="'c': DoRA is defined for matrices and convolutions"):
        plan({"c.weight": (12, 6, 3)}, adapter, None, OURS | {"lora_fx.turned": '["c.weight"]'}, r=6, use_dora=True)


# Ties --------------------------------------------------------------------------------------------------

TABLE: dict[str, tuple[int, ...]] = {"m.embed_tokens.weight": (7, 3), "m.a.weight": (5, 3)}
HEAD = {"lm_head.weight": (7, 3)}
DECODER = {"architectures": ["XForCausalLM"]}


def outcome(plan: Files, *args: Any, **config: Any) -> Any:
    """{result: source} and whether nothing may be tied any more; or the beginning of why not."""
    try:
        found = plan(*args, **config)
    except LoraFxError as error:
        return str(error)
    return {change.name: change.source.name for change in found.changes}, found.unties


def test_a_head_of_which_there_is_nothing_is_untied_from_its_table(plan: Files) -> None:
    untied = {"lm_head.weight": "m.embed_tokens.weight"}, True
    head = linear("lm_head", 7, 3)
    for says in (DECODER, DECODER | {"tie_word_embeddings": True}, DECODER | {"text": {"tie_word_embeddings": True}}):
        assert outcome(plan, TABLE, head, says) == untied
        assert outcome(plan, TABLE, HEAD, says, modules_to_save=["lm_head"]) == untied
    for name in ("wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "word_embedding"):
        found = outcome(
            plan, {f"{name}.weight": (7, 3)}, linear("embed_out", 7, 3), {"architectures": ["XLMHeadModel"]}
        )
        assert found == ({"embed_out.weight": f"{name}.weight"}, True)
    for base, adapter, says in (
        (TABLE, head, None), (TABLE, head, DECODER | {"tie_word_embeddings": False}),
        (TABLE, head, DECODER | {"text": {"tie_word_embeddings": False}}), (TABLE, linear("m.head", 7, 3), DECODER),
        (TABLE | {"wte.weight": (7, 3)}, head, DECODER), (TABLE, linear("lm_head", 8, 3), DECODER),
        ({"m.tables.weight": (7, 3)}, head, DECODER), (TABLE, lookup("lm_head", 3, 7), DECODER),
        (TABLE, {"lm_head.lora_A.weight": (2, 3, 1), "lm_head.lora_B.weight": (7, 2, 1)}, DECODER),
    ):  # fmt: skip
        assert "no tensor for the adapter's" in outcome(plan, base, adapter, says)
    wide = TABLE | {"wte.weight": (8, 3)}
    assert outcome(plan, wide, head, DECODER)[0] == untied[0]
    assert "no tensor for" in outcome(plan, TABLE, {"lm_head.bias": (7,)}, DECODER, bias="all")


def test_only_decoders_are_untied(plan: Files) -> None:
    for says in (
        {"architectures": ["XForMaskedLM"]}, {"model_type": "x"}, {"architectures": []}, {"architectures": [3]},
        {"architectures": "XForCausalLM"}, {"architectures": ["XForMaskedLM", "XForCausalLM"]},
    ):  # fmt: skip
        assert "folding unties 'lm_head.weight', and what that does" in outcome(
            plan, TABLE, linear("lm_head", 7, 3), says
        )


def test_a_table_whose_head_has_no_name_stays(plan: Files) -> None:
    table, rows = lookup("m.embed_tokens", 7, 3), {f"m.embed_tokens.{ROWS}": (1, 3)}
    tied = "'m.embed_tokens.weight' is tied to the head"
    for says in (DECODER, {"model_type": "x"}, {"architectures": ["A", "XForMaskedLM"]}, {"architectures": [3]}):
        assert tied in outcome(plan, TABLE, table, says)
        assert tied in outcome(plan, TABLE, {"m.embed_tokens.weight": (7, 3)}, says, modules_to_save=["embed_tokens"])
    own = {"m.embed_tokens.weight": "m.embed_tokens.weight"}
    for base, adapter, says in (
        (TABLE, table, None), (TABLE, table, {"architectures": ["XModel"]}),
        (TABLE, table, DECODER | {"tie_word_embeddings": False}), (TABLE | HEAD, table, DECODER),
        (TABLE, rows, DECODER),
    ):  # fmt: skip
        assert outcome(plan, base, adapter, says, trainable_token_indices=[3]) == (own, False)
    assert tied in outcome(plan, TABLE | {"lm_head.bias": (7,)}, table, DECODER)
    assert tied in outcome(plan, TABLE, table | rows, DECODER, trainable_token_indices=[3])
    assert outcome(plan, {"wpe.weight": (7, 3)}, lookup("wpe", 7, 3), DECODER) == ({"wpe.weight": "wpe.weight"}, False)


def test_a_table_and_a_head_that_get_the_same_stay_tied(plan: Files) -> None:
    both = {"m.embed_tokens.weight": "m.embed_tokens.weight", "lm_head.weight": "m.embed_tokens.weight"}
    a, b, c = torch.randn(2, 3), torch.randn(7, 2), torch.randn(7, 3)
    table = {"m.embed_tokens.lora_embedding_A": b.T, "m.embed_tokens.lora_embedding_B": a.T}
    head = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    only = {"m.embed_tokens.weight": "m.embed_tokens.weight"}, False
    assert outcome(plan, TABLE, table | head, DECODER) == only
    for other in (a * 2, a + 1):
        assert outcome(plan, TABLE, table | head | {"lm_head.lora_A.weight": other}, DECODER) == (both, True)
    assert outcome(plan, TABLE, table | head, DECODER, alpha_pattern={"lm_head": 5}) == (both, True)
    longer = {"lm_head.lora_A.weight": torch.randn(4, 3), "lm_head.lora_B.weight": torch.randn(7, 4)}
    assert outcome(plan, TABLE, table | longer, DECODER, rank_pattern={"lm_head": 4}, alpha_pattern={"lm_head": 6}) == (
        both,
        True,
    )
    rows = {f"m.embed_tokens.{ROWS}": (1, 3)}
    assert outcome(plan, TABLE, table | head | rows, DECODER, trainable_token_indices={"embed_tokens": [3]}) == (
        both,
        True,
    )

    wholes = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert outcome(plan, TABLE, {"m.embed_tokens.weight": c, "lm_head.weight": c.clone()}, DECODER, **wholes) == only
    assert outcome(plan, TABLE, {"m.embed_tokens.weight": c, "lm_head.weight": c + 1}, DECODER, **wholes) == (
        both,
        True,
    )
    assert outcome(plan, TABLE, {"m.embed_tokens.weight": c} | head, DECODER, modules_to_save=["embed_tokens"]) == (
        both,
        True,
    )
    assert outcome(plan, TABLE, {"lm_head.weight": c} | table, DECODER, modules_to_save=["lm_head"]) == (both, True)

    magnitude = {"m.embed_tokens.lora_magnitude_vector": torch.ones(3), "lm_head.lora_magnitude_vector": torch.ones(7)}
    assert outcome(plan, TABLE, table | head | magnitude, DECODER, use_dora=True) == (both, True)


def test_two_changes_are_the_same_or_not(plan: Files) -> None:
    (one,) = plan({"a.weight": (5, 3)}, linear("a", 5, 3)).changes
    rows = replace(one, terms=(Rows((1,), np.zeros((1, 3))),))
    dora = replace(one, terms=(replace(one.terms[0], low=replace(one.terms[0].low, magnitude=np.ones(5))),))
    twice = replace(one, terms=one.terms * 2)
    assert _is_same(one, one) is True
    for other in (rows, dora, twice):
        assert _is_same(other, other) is _is_same(other, one) is False
    assert _is_same(one, rows) is _is_same(one, twice) is False


def test_the_memory_of_an_adapter_is_aligned(tmp_path: Path) -> None:
    odd = np.frombuffer(b"x" + np.arange(3, dtype=np.float32).tobytes(), np.float32, offset=1)
    found = tensor_of(odd)
    assert found.tolist() == [0, 1, 2]
    assert found.data_ptr() % 4 == 0


def test_what_was_saved_twice_and_parts_is_no_longer_tied(plan: Files) -> None:
    base, tied = TABLE | HEAD, DECODER | {"tie_word_embeddings": True}
    head, table = linear("lm_head", 7, 3), lookup("m.embed_tokens", 7, 3)
    rows = {f"m.embed_tokens.{ROWS}": (1, 3)}
    for adapter, config in ((head, {}), (table, {}), (head | table, {}), (HEAD, {"modules_to_save": ["lm_head"]})):
        assert outcome(plan, base, adapter, tied, **config)[1] is True
        assert outcome(plan, base, adapter, DECODER, **config)[1] is False
        assert outcome(plan, base, adapter, DECODER | {"tie_word_embeddings": 1}, **config)[1] is False
    assert outcome(plan, base, rows, tied, trainable_token_indices=[3])[1] is False
    assert outcome(plan, base, linear("m.a", 5, 3), tied)[1] is False
    for none in (TABLE, TABLE | {"lm_head.bias": (7,)}):
        found = outcome(plan, none, table, {"architectures": ["XModel"], "tie_word_embeddings": True})
        assert found == ({"m.embed_tokens.weight": "m.embed_tokens.weight"}, False)
    bias = {"m.embed_tokens.weight": (7, 3), "m.a.weight": (5, 3), "lm_head.bias": (7,)}
    assert outcome(plan, bias, linear("m.a", 5, 3), tied)[1] is False
    assert "folding unties 'lm_head.weight', and what that does to XForMaskedLM" in outcome(
        plan, base, head, tied | {"architectures": ["XForMaskedLM"]}
    )


# The base's note ---------------------------------------------------------------------------------------


def check(
    tmp_path: Path,
    base: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None,
    adapter: Tensors,
    **config: Any,
) -> None:
    number = len(list(tmp_path.iterdir()))
    saved = write_adapter(tmp_path / f"{number}" / "adapter", values(adapter), metadata, **config)
    directory = write_base(base, tmp_path / f"{number}" / "base", 1)
    arrays, let_go = map_adapter(saved)
    check_base_note(plan_fold(read_checkpoint(directory, FoldError), arrays, let_go), arrays)


def test_each_adapted_weight_is_looked_for_in_the_note(tmp_path: Path) -> None:
    a, b = torch.randn(5, 3), torch.randn(4, 7)
    base, adapter = {"a.weight": a, "b.weight": b}, linear("a", 5, 3) | linear("b", 4, 7)
    check(tmp_path, base, None, adapter)
    check(tmp_path, base, noted([a, b]), adapter)
    check(
        tmp_path,
        {"a.weight": a.bfloat16(), "b.weight": b.bfloat16()},
        noted([a.bfloat16(), b.bfloat16()], "bfloat16"),
        adapter,
    )
    check(tmp_path, base, noted([a, b], "float8"), adapter)  # which tells nothing
    for weights in ([a, b + 1], [a]):
        with pytest.raises(AdapterError, match=r"over a base model with other weights \('b.weight' is another"):
            check(tmp_path, base, noted(weights), adapter)
    with pytest.raises(AdapterError, match="cannot be read"):
        check(tmp_path, base, {KEY: "{"}, adapter)


def test_what_is_not_adapted_by_a_and_b_or_has_too_few_values_is_not_looked_for(tmp_path: Path) -> None:
    a, tiny, exact = torch.randn(5, 3), torch.randn(3, 1), torch.randn(2, 2)
    adapter = linear("a", 5, 3) | linear("b", 3, 1) | {"full.weight": (4, 4)}
    base = {"a.weight": a, "b.weight": tiny, "full.weight": torch.randn(4, 4)}
    check(tmp_path, base, noted([a]), adapter, modules_to_save=["full"])
    with pytest.raises(AdapterError, match="'c.weight' is another"):
        check(
            tmp_path,
            base | {"c.weight": exact},
            noted([a]),
            adapter | linear("c", 2, 2),
            modules_to_save=["full"],
        )
