"""Adapter files: what is written, what is read, and every way in which files can be wrong."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import fx, nn
from zoo import BY_NAME, STACK, assert_same_bits, fingerprint, injected, lora_tensors, randomise, reseal, run, traced

import lora_fx
from lora_fx import AdapterError, ConfigError, LoraConfig, LoraFxError, LoraFxWarning
from lora_fx.adapter_files import parse_key

MLP = BY_NAME["mlp"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter of the MLP."""
    lora_fx.save_adapter(randomise(injected(MLP, traced(MLP))), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, **changes: Any) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(fields | changes))
    reseal(directory)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


# What is written ------------------------------------------------------------------------------------


def test_the_files_are_pefts(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["target_modules"] == ["fc1", "fc2"]
    assert list(config) == sorted(config)
    with safe_open(str(saved / WEIGHTS), framework="pt") as file:
        assert file.metadata() == {"format": "pt"} or "format" in file.metadata()
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118
    assert shapes == {
        "base_model.model.fc1.lora_A.weight": (3, 7),
        "base_model.model.fc1.lora_B.weight": (11, 3),
        "base_model.model.fc2.lora_A.weight": (3, 11),
        "base_model.model.fc2.lora_B.weight": (5, 3),
    }


def test_biases_and_saved_modules_stand_under_pefts_keys(tmp_path: Path) -> None:
    gm = injected(STACK, traced(STACK), targets=["q_proj"], bias="all", modules_to_save=["head"])
    lora_fx.save_adapter(gm, tmp_path)
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / WEIGHTS)}
    assert {"head.weight", "head.bias"} <= keys
    assert "body.layers.0.q_proj.base_layer.bias" in keys
    assert "body.layers.0.norm.bias" in keys
    assert "body.layers.0.norm.weight" not in keys


def test_new_files_get_the_usual_permissions(saved: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for name in (CONFIG, WEIGHTS):
        assert stat.S_IMODE((saved / name).stat().st_mode) == 0o666 & ~umask


def test_saving_again_replaces_both_files_and_leaves_no_litter(saved: Path) -> None:
    gm = randomise(injected(MLP, traced(MLP), targets=["fc1"], r=2))
    lora_fx.save_adapter(gm, saved)
    assert sorted(os.listdir(saved)) == [CONFIG, WEIGHTS]
    assert_same_bits(run(gm, MLP.arguments()), run(lora_fx.load_adapter(traced(MLP), saved), MLP.arguments()))


def test_paths_may_be_strings_and_new(tmp_path: Path) -> None:
    lora_fx.save_adapter(injected(MLP, traced(MLP)), str(tmp_path / "a" / "b"))
    assert lora_fx.load_adapter(traced(MLP), str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_file_is_the_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.bfloat16 if dtype.itemsize == 2 else dtype
    gm = traced(MLP, "trace", base)
    adapted = randomise(lora_fx.inject(gm, LoraConfig(target_modules=["fc1"]), adapter_dtype=dtype))
    lora_fx.save_adapter(adapted, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    loaded = lora_fx.load_adapter(gm, tmp_path)
    assert {p.dtype for p in lora_tensors(loaded).values()} == {dtype}
    assert_same_bits(run(adapted, MLP.arguments(base)), run(loaded, MLP.arguments(base)))
    wide = lora_fx.load_adapter(gm, tmp_path, adapter_dtype=torch.float64)
    assert {p.dtype for p in lora_tensors(wide).values()} == {torch.float64}


def test_all_linear_is_saved_as_what_it_meant(tmp_path: Path) -> None:
    """PEFT would take the head of a custom model too."""
    gm = randomise(lora_fx.inject(traced(STACK), LoraConfig(target_modules="all-linear")))
    lora_fx.save_adapter(gm, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] != "all-linear"
    assert_same_bits(run(gm, STACK.arguments()), run(lora_fx.load_adapter(traced(STACK), tmp_path), STACK.arguments()))


def test_the_order_of_patterns_survives(tmp_path: Path) -> None:
    """The first key that matches counts; PEFT sorts them when it saves, and changes the adapter."""
    options = {"alpha_pattern": {"up": 2, "layers.0.up": 11, "layers.1.up": 13}}
    with pytest.raises(lora_fx.TargetError, match=r"keys are tried in order, and the first match counts"):
        injected(STACK, traced(STACK), **options)
    options = {"alpha_pattern": {"layers.1.up": 2, "up": 11, "^head": 13}, "rank_pattern": {"layers.1.up": 7, "up": 2}}
    gm = randomise(injected(STACK, traced(STACK), **options))
    lora_fx.save_adapter(gm, tmp_path)
    loaded = lora_fx.load_adapter(traced(STACK), tmp_path)
    assert_same_bits(run(gm, STACK.arguments()), run(loaded, STACK.arguments()))


def test_several_adapters_of_one_graph(tmp_path: Path) -> None:
    both = randomise(randomise(injected(MLP, injected(MLP, traced(MLP)), "second", r=2)), "second")
    for name in lora_fx.adapter_names(both):
        lora_fx.save_adapter(both, tmp_path / name, adapter_name=name)
    loaded = lora_fx.load_adapter(traced(MLP), tmp_path / "default")
    loaded = lora_fx.load_adapter(loaded, tmp_path / "second", adapter_name="second")
    assert not lora_fx.compare_graphs(both, loaded)
    found = lora_fx.load_adapter(traced(MLP), tmp_path, adapter_name="second")  # PEFT's sub-directory
    assert lora_fx.adapter_names(found) == ("second",)


def test_a_loaded_adapter_trains(saved: Path) -> None:
    gm = lora_fx.load_adapter(traced(MLP), saved).train()
    assert {id(p) for p in gm.parameters() if p.requires_grad} == {id(p) for p in lora_fx.lora_parameters(gm)}
    zoo.loss_of(gm, MLP.arguments()).backward()
    assert all(p.grad is not None for p in lora_fx.lora_parameters(gm))


@pytest.mark.parametrize("saves", [False, True])
def test_statistics_that_training_moved_are_saved_or_told(saves: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), torch.randn(11, 7)
    base = lora_fx.trace(copy.deepcopy(model), (x,))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"] if saves else None, init_lora_weights=False)
    gm = lora_fx.inject(lora_fx.trace(model, (x,)), config)
    lora_fx.save_adapter(gm, tmp_path)  # nothing has moved yet
    gm.train()(3 * x + 1)
    if saves:
        lora_fx.save_adapter(gm, tmp_path)
        assert torch.equal(lora_fx.load_adapter(base, tmp_path).eval()(x), gm.eval()(x))
    else:
        with pytest.warns(LoraFxWarning, match="statistics of 1, which .* modules_to_save"):
            lora_fx.save_adapter(gm, tmp_path)


def test_trained_names_of_a_tied_pair_are_saved_and_loaded(tmp_path: Path) -> None:
    case = BY_NAME["tied_head"]
    gm = injected(case, traced(case), targets=["fc"], modules_to_save=["lm_head", "embed"])
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(gm):
            parameter.add_(0.1)
    lora_fx.save_adapter(gm, tmp_path)
    assert_same_bits(run(gm, case.arguments()), run(lora_fx.load_adapter(traced(case), tmp_path), case.arguments()))


@pytest.mark.parametrize(
    ("key", "path", "half"),
    [
        ("base_model.model.a.b.lora_A.weight", "a.b", "A"),
        ("base_model.model.a.b.lora_B.default.weight", "a.b", "B"),
        ("a.b.lora_A.weight", "a.b", "A"),
        ("base_model.model.lora_A.weight", "", "A"),
        ("base_model.model.lora_A.lora_B.weight", "lora_A", "B"),
        ("base_model.model.lora_B.fc.lora_A.weight", "lora_B.fc", "A"),
        ("base_model.model.head.weight", "head.weight", None),
        ("base_model.model.a.base_layer.bias", "a.bias", None),
    ],
)
def test_keys(key: str, path: str, half: str | None) -> None:
    found = parse_key(key, "file")
    assert (found.path, found.end) == (path, half and f"lora_{half}.weight")


@pytest.mark.parametrize("key", ["a.lora_A.bias", "a.lora_diag"])
def test_keys_of_other_kinds_of_adapter_are_refused(key: str) -> None:
    with pytest.raises(AdapterError, match="does not support"):
        parse_key(f"base_model.model.{key}", "file")


# Broken files ---------------------------------------------------------------------------------------


def _drop(name: str) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: t.pop(f"base_model.model.{name}"))


def _put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: t.__setitem__(f"base_model.model.{name}", tensor))


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(data) and None


def _cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(keep((d / name).read_bytes())) and None


def _directory_for_weights(d: Path) -> None:
    (d / WEIGHTS).unlink()
    (d / WEIGHTS).mkdir()


def _pickle(d: Path) -> None:
    (d / WEIGHTS).unlink()
    torch.save({"x": torch.ones(1)}, d / "adapter_model.bin")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda d: (d / name).unlink()


B1 = "fc1.lora_B.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing tensor": (_drop(B1), ["lacks 1 of 4 tensors", "'fc1.lora_B.weight'", "of this model?"]),
    "unexpected tensor": (
        _put("fc3.lora_A.weight", torch.ones(3, 7)),
        ["1 tensors", "'fc3.lora_A.weight'", "make_plan"],
    ),
    "base weights": (_put("fc1.bias", torch.ones(11)), ["no place", "'fc1.bias'"]),
    "rank": (_put(B1, torch.ones(11, 2)), ["'fc1.lora_B.weight'", "(11, 2)", "(11, 3)", "rank_pattern"]),
    "zero size": (_put(B1, torch.ones(11, 0)), ["(11, 0)"]),
    "transposed": (_put(B1, torch.ones(3, 11)), ["(3, 11)"]),
    "scalar": (_put(B1, torch.ones(())), ["()", "(11, 3)"]),
    "NaN": (_put(B1, torch.full((11, 3), float("nan"))), [B1, "NaN or Inf", WEIGHTS]),
    "Inf": (_put(B1, torch.full((11, 3), float("inf"))), [B1, "NaN or Inf"]),
    "integers": (_put(B1, torch.ones(11, 3, dtype=torch.int32)), [B1, "torch.int32"]),
    "booleans": (_put(B1, torch.ones(11, 3, dtype=torch.bool)), [B1, "torch.bool"]),
    "float8": (_put(B1, torch.ones(11, 3).to(torch.float8_e4m3fn)), [B1, "float8"]),
    "dora": (_put("fc1.lora_magnitude_vector", torch.ones(11)), ["no place", "lora_magnitude_vector"]),
    "empty weights": (_write(WEIGHTS, b""), [WEIGHTS, "no readable safetensors"]),
    "four bytes": (_write(WEIGHTS, b"\x01\x02\x03\x04"), [WEIGHTS, "no readable safetensors"]),
    "text": (_write(WEIGHTS, b"hello, this is text, not tensors"), [WEIGHTS, "no readable safetensors"]),
    "cut": (_cut(WEIGHTS, lambda b: b[:-1]), [WEIGHTS, "no readable safetensors"]),
    "cut in header": (_cut(WEIGHTS, lambda b: b[:40]), [WEIGHTS, "no readable safetensors"]),
    "more": (_cut(WEIGHTS, lambda b: b + b"\0"), [WEIGHTS, "no readable safetensors"]),
    "no tensors": (lambda d: save_file({}, d / WEIGHTS), [WEIGHTS, "holds no tensor"]),
    "no weights": (_remove(WEIGHTS), [f"no {WEIGHTS}", "incomplete"]),
    "weights are a directory": (_directory_for_weights, [WEIGHTS]),
    "pickle": (_pickle, ["adapter_model.bin", "pickle", "save_pretrained"]),
    "no config": (_remove(CONFIG), [f"holds no {CONFIG}", "save_adapter"]),
    "empty config": (_write(CONFIG, b""), [CONFIG, "not a JSON configuration"]),
    "cut config": (_cut(CONFIG, lambda b: b[:100]), [CONFIG, "not a JSON configuration"]),
    "config is a list": (_write(CONFIG, b"[1]"), [CONFIG, "a JSON list"]),
    "config is no text": (_write(CONFIG, b"\xff\xfe\x00"), [CONFIG]),
    "key twice": (_write(CONFIG, b'{"peft_type": "LORA", "r": 3, "r": 4}'), ["'r' stands twice"]),
    "NaN in config": (_write(CONFIG, b'{"peft_type": "LORA", "r": 3, "lora_alpha": NaN}'), ["NaN is no JSON number"]),
    "deep config": (_write(CONFIG, b"[" * 100_000), [CONFIG]),
    "no r": (_write(CONFIG, b'{"peft_type": "LORA", "target_modules": ["fc1"]}'), ["no 'r'"]),
    "no type": (_write(CONFIG, b'{"r": 3, "target_modules": ["fc1"]}'), ["no 'peft_type'"]),
    "other type": (lambda d: edit_config(d, peft_type="IA3"), [CONFIG, "'IA3'"]),
    "lower case": (lambda d: edit_config(d, peft_type="lora"), ["Did you mean 'LORA'?"]),
    "other r": (lambda d: edit_config(d, r=4), ["(3, 7)", "(4, 7)", "see r and rank_pattern"]),
    "fewer targets": (lambda d: edit_config(d, target_modules=["fc1"]), ["2 tensors", "fc2"]),
    "more targets": (lambda d: (_drop(B1)(d), _drop("fc1.lora_A.weight")(d)), ["lacks 2 of 4", "fc1"]),
    "no targets": (lambda d: edit_config(d, target_modules=None), ["target_modules"]),
    "unknown option": (lambda d: edit_config(d, use_superlora=True), [CONFIG, "use_superlora"]),
    "dora in config": (lambda d: edit_config(d, use_dora=True), ["lacks 2 of 6", "lora_magnitude_vector"]),
    "dropout of one": (lambda d: edit_config(d, lora_dropout=1.0), [CONFIG, "lora_dropout=1.0"]),
    "rslora is text": (lambda d: edit_config(d, use_rslora="false"), [CONFIG, "use_rslora='false'"]),
    "bad expression": (lambda d: edit_config(d, target_modules="(fc"), [CONFIG, "not a regular expression"]),
    "alpha is null": (lambda d: edit_config(d, lora_alpha=None), [CONFIG, "lora_alpha=None"]),
    "saved module missing": (lambda d: edit_config(d, modules_to_save=["fc2"]), ["fc2"]),
    "residual base": (lambda d: edit_config(d, init_lora_weights="corda"), [CONFIG, "corda"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_adapter_is_refused_and_nothing_is_changed(fault: str, saved: Path) -> None:
    damage, fragments = BROKEN[fault]
    damage(saved)
    gm = traced(MLP)
    before = fingerprint(gm)
    with pytest.raises(LoraFxError) as caught:
        lora_fx.load_adapter(gm, saved)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert fingerprint(gm) == before


@pytest.mark.parametrize("harmless", [{"target_modules": ["fc1", "fc2", "fc9"]}, {"modules_to_save": ["classifier"]}])
def test_a_file_may_name_what_this_model_has_not(harmless: dict[str, Any], saved: Path) -> None:
    """One configuration serves several models; the tensors say what is adapted, and they are all there."""
    expected = lora_fx.load_adapter(traced(MLP), saved)
    edit_config(saved, **harmless)
    assert not lora_fx.compare_graphs(expected, lora_fx.load_adapter(traced(MLP), saved))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no directory"):
        lora_fx.load_adapter(traced(MLP), tmp_path / "nope")
    with pytest.raises(AdapterError):
        lora_fx.load_adapter(traced(MLP), "org/model-on-the-hub")


def test_another_models_adapter_is_refused(saved: Path) -> None:
    for name in ("stack", "functional", "root"):
        with pytest.raises(LoraFxError):
            lora_fx.load_adapter(traced(BY_NAME[name]), saved)


def test_a_taken_name_is_refused(saved: Path) -> None:
    gm = injected(MLP, traced(MLP))
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        lora_fx.load_adapter(gm, saved)
    with pytest.raises(AdapterError, match="letters, digits"):
        lora_fx.load_adapter(gm, saved, adapter_name="../x")


def test_saving_a_broken_adapter_leaves_the_good_files(saved: Path) -> None:
    before = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    gm = injected(MLP, traced(MLP))
    with torch.no_grad():
        gm.get_parameter("fc1.lora_A.default.weight")[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"fc1\.lora_A\.weight.*NaN or Inf and is not saved"):
        lora_fx.save_adapter(gm, saved)
    with pytest.raises(AdapterError, match="cannot be written"):
        lora_fx.save_adapter(injected(MLP, traced(MLP)), saved / CONFIG)
    with pytest.raises(AdapterError, match="meta"):
        lora_fx.save_adapter(injected(MLP, lora_fx.trace(MLP.model(), *MLP.arguments())).to("meta"), saved)
    assert {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before
    assert sorted(os.listdir(saved)) == sorted(before)


@pytest.mark.parametrize("failing", [CONFIG, WEIGHTS])
def test_a_write_that_fails_half_way_leaves_the_old_files(failing: str, saved: Path, monkeypatch) -> None:
    """The disk is full when one of the files is put in place: the pair must stay a pair."""
    (saved / "directory").mkdir()  # so that the whole cannot be exchanged
    before = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    replace = os.replace

    def full(source, target, **options):
        if Path(target).name == failing:
            raise OSError(28, "No space left on device")
        return replace(source, target, **options)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AdapterError, match="No space left"):
        lora_fx.save_adapter(randomise(injected(MLP, traced(MLP), r=2)), saved)
    monkeypatch.undo()
    assert {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before
    assert sorted(os.listdir(saved)) == sorted([*before, "directory"])
    assert not list(saved.parent.glob(".*"))


def test_save_refuses_what_has_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter 'default'; it has none. inject adds one"):
        lora_fx.save_adapter(traced(MLP), tmp_path / "x")
    gm = randomise(injected(MLP, lora_fx.trace(MLP.model(), *MLP.arguments())))
    lora_fx.fold(gm, inplace=True)
    with pytest.raises(AdapterError, match=r"lora_fx\.unfold\(gm\) brings them back"):
        lora_fx.save_adapter(gm, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@settings(max_examples=150)
@given(data=st.binary(max_size=400) | st.integers(0, 300).map(lambda n: n), value=st.integers(0, 255))
def test_damaged_weights_are_read_whole_or_refused(data, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes, and one byte of a good file changed."""
    directory = tmp_path_factory.mktemp("damaged")
    gm = traced(MLP)
    lora_fx.save_adapter(_good(gm), directory)
    content = bytearray((directory / WEIGHTS).read_bytes())
    if isinstance(data, int):
        content[data % len(content)] = value
    else:
        content = bytearray(data)
    (directory / WEIGHTS).write_bytes(content)
    try:
        loaded = lora_fx.load_adapter(gm, directory)
    except LoraFxError:
        return
    assert all(bool(p.isfinite().all()) for p in lora_fx.lora_parameters(loaded))


def _good(gm: fx.GraphModule) -> fx.GraphModule:
    torch.manual_seed(0)
    return randomise(injected(MLP, gm, r=2))


@settings(max_examples=150)
@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "target_modules", "rank_pattern", "bias", "use_rslora", "modules_to_save", "x"]
        ),
        st.none()
        | st.booleans()
        | st.integers(-2, 9)
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.text(max_size=3)),
        max_size=3,
    )
)
def test_damaged_configs_are_read_or_refused(fields, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    gm = traced(MLP)
    lora_fx.save_adapter(_good(gm), directory)
    edit_config(directory, **fields)
    try:
        lora_fx.load_adapter(gm, directory)
    except LoraFxError:
        return


def test_a_config_error_of_a_file_names_the_file(saved: Path) -> None:
    edit_config(saved, r=0)
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*r=0 must be an integer above 0"):
        lora_fx.load_adapter(traced(MLP), saved)


def test_a_plain_file_of_two_keys_is_enough(tmp_path: Path) -> None:
    """What others write: the config PEFT needs, and tensors with or without the prefix and the adapter's name."""
    gm = _good(traced(MLP))
    tensors = {name: p.detach() for name, p in lora_tensors(gm).items()}
    (tmp_path / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["fc1", "fc2"], "r": 2, "lora_alpha": 5})
    )
    for spelled in (
        tensors,
        {f"base_model.model.{name}": t for name, t in tensors.items()},
        {name.replace(".default.", "."): t for name, t in tensors.items()},
    ):
        (tmp_path / WEIGHTS).write_bytes(save(spelled))
        loaded = lora_fx.load_adapter(traced(MLP), tmp_path)
        assert_same_bits(run(gm, MLP.arguments()), run(loaded, MLP.arguments()))


def test_two_keys_that_mean_one_tensor_are_refused(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    extra = {f"base_model.model.{B1}".replace(".weight", ".default.weight"): torch.ones(11, 3)}
    save_file(tensors | extra, saved / WEIGHTS)
    with pytest.raises(AdapterError):
        lora_fx.load_adapter(traced(MLP), saved)


def test_tied_embeddings_with_different_adapters_in_a_file_keep_their_own(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(11, 7), nn.Embedding(11, 7)
            self.b.weight = self.a.weight

        def forward(self, ids):
            return self.a(ids) * 2 + self.b(ids.flip(1)).tanh()

    ids, model = torch.randint(0, 11, (2, 5)), Tied().eval()
    gm = lora_fx.inject(lora_fx.trace(model, ids), LoraConfig(r=2, target_modules=["a", "b"]))
    lora_fx.save_adapter(randomise(gm), tmp_path)
    alike = lora_fx.load_adapter(lora_fx.trace(model, ids), tmp_path)
    assert torch.equal(alike(ids), gm(ids))
    edit_tensors(tmp_path, lambda t: t["base_model.model.b.lora_embedding_A"].mul_(3))
    with pytest.warns(LoraFxWarning, match="different adapters for sites that share one tied weight"):
        loaded = lora_fx.load_adapter(lora_fx.trace(model, ids), tmp_path)
    assert not torch.equal(loaded(ids), gm(ids))
    assert lora_fx.lora_parameters(loaded)[0] is not lora_fx.lora_parameters(loaded)[2]
