"""Folding from shards to shards: the bits of `fold`, the base's layout, and nothing that the files do not tell."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoint_files import bits, tensors_of, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fuzzing import changed
from test_variants import VARIANTS, moved
from torch import nn
from zoo import BY_NAME, injected, randomise, traced

import lora_fx
from lora_fx import AdapterError, FoldError, LoraFxError, fold_history, fold_work, merging
from lora_fx.adapter_arrays import map_adapter
from lora_fx.checkpoint_plan import plan_fold
from lora_fx.hf_checkpoint import read_checkpoint
from lora_fx.hf_models import load_model

LLAMA = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40}


def assert_is_fold(out: Path, folded: torch.fx.GraphModule, base: Path) -> None:
    """The bits of `fold`, and the base's layout."""
    state, before, after = folded.state_dict(), tensors_of(base), tensors_of(out)
    assert list(after) == list(before)
    assert {name for name in after if bits(after[name]) != bits(state[name])} == set()
    assert any(bits(after[name]) != bits(before[name]) for name in after), "the law would be vacuous"
    for file in base.glob("*.safetensors"):
        with open(file, "rb") as old, open(out / file.name, "rb") as new:
            size = int.from_bytes(old.read(8), "little")
            old.seek(0)
            assert new.read(8 + size) == old.read(8 + size)
        assert file.stat().st_size == (out / file.name).stat().st_size
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()} | {fold_history.RECORD}


def save_peft(model: nn.Module, directory: Path, **config: Any) -> Path:
    """An adapter that PEFT wrote, of random values."""
    torch.manual_seed(3)
    with pytest.warns() if config.pop("warns", False) else _quiet():
        adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 7} | config))
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data.normal_(std=0.2)
        adapted.save_pretrained(directory)
        adapted.unload()
    return directory


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")  # PEFT's, of Conv1D and of tied weights


# The bits of fold ------------------------------------------------------------------------------------

CASES = [
    (name, "plain", torch.bfloat16)
    for name in ("mlp", "root", "addmm", "products", "einsum", "multi_head", "lookups", "kernels", "experts", "unread")
]
CASES += [(name, "dora", dtype) for name in ("addmm", "lookups", "multi_head") for dtype in BY_NAME["mlp"].dtypes[:3:2]]
CASES += [("addmm", "lora_bias", torch.float32), ("multi_head", "lora_bias", torch.bfloat16), ("llama", "plain", None)]
CASES += [("called_twice", "plain", torch.float64), ("mlp", "plain", torch.float16), ("llama", "dora", torch.bfloat16)]


@pytest.mark.parametrize(("name", "variant", "dtype"), CASES)
def test_the_bits_are_those_of_fold(
    name: str, variant: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(merging, "_BLOCK", 1 << 5)  # so that small weights have several blocks
    case = BY_NAME[name]
    gm = traced(case, case.tracers[0], dtype or torch.bfloat16)
    adapted = moved(injected(case, gm, **VARIANTS.get(variant, {})))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    base = write_base(gm.state_dict(), tmp_path / "base")
    report = lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    folded = lora_fx.fold(adapted)
    assert_is_fold(tmp_path / "out", folded, base)
    told = {site.weight: site for site in lora_fx.fold_report(folded).sites}
    for site in report.sites:
        ours = told[site.weight]
        assert (site.weight_norm, site.delta_norm) == pytest.approx((ours.weight_norm, ours.delta_norm), rel=1e-6)
        assert site.kept == pytest.approx(ours.kept, abs=1e-3)


@pytest.mark.parametrize("accumulate", [None, torch.float32, torch.float64])
def test_large_weights_and_several_threads_give_the_same_bits(accumulate: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(601, 997), nn.Embedding(911, 503)).bfloat16()
    gm = lora_fx.trace(nn.ModuleDict({"a": model[0]})["a"], torch.randn(2, 601, dtype=torch.bfloat16))
    adapted = randomise(lora_fx.inject(gm, {"r": 5, "lora_alpha": 7, "target_modules": ""}), size=0.02)
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    base = write_base(gm.state_dict(), tmp_path / "base", shards=1)
    torch.set_num_threads(3)
    try:
        lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out", accumulate=accumulate)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert_is_fold(tmp_path / "out", lora_fx.fold(adapted, accumulate=accumulate), base)


def test_what_is_trained_as_it_is_takes_the_base_s_place(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(13, 7), nn.Linear(7, 11), nn.Linear(11, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.embed(ids)))

    gm = lora_fx.trace(Words().bfloat16(), torch.tensor([[1, 2, 3]]))
    config = {"r": 2, "target_modules": ["fc"], "modules_to_save": ["head"], "bias": "all"}
    adapted = randomise(lora_fx.inject(gm, config | {"trainable_token_indices": {"embed": [3, 11]}}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    base = write_base(gm.state_dict(), tmp_path / "base")
    report = lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert_is_fold(tmp_path / "out", lora_fx.fold(adapted), base)
    assert sorted(report.trained) == ["fc.bias", "head.bias", "head.weight"]
    assert [site.path for site in report.sites] == ["embed", "fc"]
    assert "replaced, because the adapter trained them in full: " in str(report)
    assert report.to_dict()["shards"] == 2


def test_modules_to_save_are_known_by_their_ends_as_peft_does(tmp_path: Path) -> None:
    model = _gpt2()
    model.save_pretrained(tmp_path / "base")
    before = tensors_of(tmp_path / "base")
    save_peft(model, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["n_2", "f"])
    report = lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    names = [f"transformer.{path}.{last}" for path in ("h.0.ln_2", "ln_f") for last in ("bias", "weight")]
    assert sorted(report.trained) == names
    assert not any(torch.equal(tensors_of(tmp_path / "out")[name], before[name]) for name in names)


def test_parts_of_a_packed_projection_are_folded_as_the_whole_that_the_file_has(tmp_path: Path) -> None:
    """With scalings that are no powers of two of each other, whose B stands in the file once more."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(7, 15)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).split(5, -1)
            return q * k + v

    gm = lora_fx.trace(Packed(), torch.randn(2, 7))
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["qkv[q]", "qkv[v]"], "alpha_pattern": {"qkv[v]": 5}}
    adapted = randomise(lora_fx.inject(gm, config))
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    assert "base_model.model.qkv[v].lora_B.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    base = write_base(gm.state_dict(), tmp_path / "base", 1)
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    got, wanted = tensors_of(tmp_path / "out")["qkv.weight"], lora_fx.fold(adapted).state_dict()["qkv.weight"]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[5:10], gm.state_dict()["qkv.weight"][5:10])


# Files of transformers and PEFT ----------------------------------------------------------------------


def _gpt2(**config: Any) -> nn.Module:
    sizes = {"vocab_size": 97, "n_embd": 22, "n_layer": 1, "n_head": 2, "n_positions": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **config))


def test_conv1d_is_read_from_the_base_and_names_may_lack_the_prefix(tmp_path: Path) -> None:
    """attn.c_proj is square: its siblings' biases tell how it lies, whatever the adapter says."""
    model = _gpt2()
    model.save_pretrained(tmp_path / "with_prefix")
    save_peft(model, tmp_path / "adapter", target_modules=["attn.c_proj"], fan_in_fan_out=True)
    tensors = tensors_of(tmp_path / "with_prefix")
    hub = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}  # as gpt2 is on the hub
    base = write_base(hub, tmp_path / "base", 1, **json.loads((tmp_path / "with_prefix/config.json").read_text()))
    report = lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert report.notes == ("names of the adapter begin with 'transformer.', which the file's have not",)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (saved[f"base_model.model.transformer.h.0.attn.c_proj.lora_{x}.weight"] for x in "AB")
    name = "h.0.attn.c_proj.weight"
    wanted = hub[name] + (b @ a).T * 7 / 3
    torch.testing.assert_close(tensors_of(tmp_path / "out")[name], wanted)

    for change in ({}, {"model_type": "llama"}):
        shutil.rmtree(tmp_path / "out")
        (base / "config.json").write_text(json.dumps(change))
        lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")  # biases weigh more than names
        torch.testing.assert_close(tensors_of(tmp_path / "out")[name], wanted)


def test_a_square_weight_that_is_told_two_ways_is_refused(tmp_path: Path) -> None:
    base = write_base({"fc.weight": torch.randn(6, 6)}, tmp_path / "base", 1, model_type="llama")
    model = nn.ModuleDict({"fc": nn.Linear(6, 6)})
    save_peft(model, tmp_path / "adapter", target_modules=["fc"])
    config = tmp_path / "adapter/adapter_config.json"
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "plain")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(AdapterError, match=r"'fc.weight' is square.*cannot be told.*fan_in_fan_out"):
        lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    (base / "config.json").unlink()
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "turned")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (saved[f"base_model.model.fc.lora_{x}.weight"] for x in "AB")
    weight = load_file(base / "model.safetensors")["fc.weight"]
    for name, delta in (("plain", b @ a), ("turned", (b @ a).T)):
        got = load_file(tmp_path / name / "model.safetensors")["fc.weight"]
        torch.testing.assert_close(got, weight + delta * 7 / 3)


def test_a_tied_head_is_untied(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    save_peft(model, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens", "q_proj"])
    with pytest.warns(lora_fx.LoraFxWarning, match="was tied with model.embed_tokens.weight"):
        lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base, out = load_model(tmp_path / "base"), load_model(tmp_path / "out")
    assert out.missing == ()
    gm = lora_fx.trace(base.model, kwargs=base.inputs)
    with _quiet():
        folded = lora_fx.fold(lora_fx.load_adapter(gm, tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(out.model(**base.inputs).logits, folded(**base.inputs).logits)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = [tensor.numel() * 4 for tensor in tensors_of(tmp_path / "out").values()]
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out")) > set(tensors_of(tmp_path / "base"))
    assert index["metadata"]["total_size"] == sum(sizes)
    with pytest.raises(FoldError, match="'lm_head.weight' cannot be folded in place: it is tied"):
        lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "base", in_place=True)
    assert not list((tmp_path / "base").glob(".*"))


def test_what_is_tied_is_not_untied_unless_the_files_say_how(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    for name, config in {
        "table": {"target_modules": ["embed_tokens"]},
        "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        "both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "as_one": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    }.items():
        save_peft(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / name, **config)
    fold = lambda name: lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-out")
    with pytest.raises(FoldError, match=r"'model.embed_tokens.weight' is tied to the head.*lora-fx fold MODEL"):
        fold("table")
    for name in ("rows", "as_one"):
        fold(name)
        assert list(tensors_of(tmp_path / f"{name}-out")) == list(tensors_of(tmp_path / "base"))
        assert filecmp.cmp(tmp_path / f"{name}-out/config.json", tmp_path / "base/config.json", shallow=False)
    fold("both")
    assert json.loads((tmp_path / "both-out/config.json").read_text())["tie_word_embeddings"] is False
    found = tensors_of(tmp_path / "both-out")
    saved = load_file(tmp_path / "both/adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(found[f"{name}.weight"], saved[f"base_model.model.{name}.weight"])


def test_peft_s_parameters_and_experts_by_the_same_names(tmp_path: Path) -> None:
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 7, 5)), nn.Parameter(torch.randn(3, 5, 11))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.ModuleDict({"experts": Moe()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_peft(model, tmp_path / "adapter", target_modules=[], target_parameters=["experts.up", "experts.down"])
    base = write_base(before, tmp_path / "base")
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, merged[name])


def test_the_hub_s_links_are_followed_and_other_files_come_along(tmp_path: Path) -> None:
    """models--x/snapshots/y holds links to models--x/blobs."""
    root, blobs = tmp_path / "models--x/snapshots/y", tmp_path / "models--x/blobs"
    adapter = _mlp_adapter(tmp_path)
    write_base(traced(BY_NAME["mlp"]).state_dict(), root, 2, model_type="x")
    blobs.mkdir()
    (root / "tokenizer").mkdir()
    (root / "tokenizer/vocab.txt").write_text("a")
    (root / "pytorch_model.bin").write_bytes(b"x")
    (root / ".cache").mkdir()
    for file in list(root.glob("*.*on")) + list(root.glob("*.safetensors")):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    report = lora_fx.fold_checkpoint(root, adapter, tmp_path / "out")
    assert report.notes == ("not copied, as they hold the base's weights, or an adapter: pytorch_model.bin",)
    assert (tmp_path / "out/tokenizer/vocab.txt").read_text() == "a"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not (tmp_path / "out/.cache").exists()
    with pytest.raises(FoldError, match="is a link, to a file that others may read too"):
        lora_fx.fold_checkpoint(root, adapter, root, in_place=True)


def _mlp_adapter(root: Path, r: int = 2) -> Path:
    lora_fx.save_adapter(randomise(injected(BY_NAME["mlp"], traced(BY_NAME["mlp"]), r=r)), root / f"adapter{r}")
    return root / f"adapter{r}"


# In place, in processes, one after the other, at the same time ---------------------------------------


def test_in_place_and_in_processes_the_files_are_the_same(tmp_path: Path) -> None:
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base", 2, model_type="x")
    told: list[tuple[int, int]] = []
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", progress=lambda *bytes_: told.append(bytes_))
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "other", workers=2)
    lora_fx.fold_checkpoint(base, adapter, base, in_place=True)
    for directory in (tmp_path / "other", base):
        same = filecmp.cmpfiles(tmp_path / "out", directory, os.listdir(tmp_path / "out"), shallow=False)
        assert len(same[0]) == len(os.listdir(directory)) == 5
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    with pytest.raises(FoldError, match=r"is folded into .* already \(lora_fx_fold.json says so\)"):
        lora_fx.fold_checkpoint(base, adapter, base, in_place=True)
    second = _mlp_adapter(tmp_path, 3)
    with pytest.raises(AdapterError, match="was saved over a base model with other weights"):
        lora_fx.fold_checkpoint(tmp_path / "out", second, tmp_path / "twice")
    lora_fx.fold_checkpoint(tmp_path / "out", second, tmp_path / "twice", integrity="ignored")
    assert len(json.loads((tmp_path / "twice" / fold_history.RECORD).read_text())["folds"]) == 2


def test_two_at_once_are_one_too_many(tmp_path: Path) -> None:
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base")
    for out, in_place in ((tmp_path / "out", False), (base, True)):
        work = base / fold_work.IN_PLACE if in_place else fold_work.work_for(out)
        with (
            fold_work.locked(work, "testing"),
            pytest.raises(FoldError, match="another process is folding into .*; let it end, or end it"),
        ):
            lora_fx.fold_checkpoint(base, adapter, out, in_place=in_place)
        lora_fx.fold_checkpoint(base, adapter, out, in_place=in_place)  # a lock that nobody holds is no lock
        assert not work.exists()


def test_an_empty_directory_that_has_to_stay_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user stands, or a mount: its name cannot go to another directory."""
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base", 2, model_type="x")
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    inode = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(fold_work.Beside, "publish", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            lora_fx.fold_checkpoint(base, adapter, ".")
    report = lora_fx.fold_checkpoint(base, adapter, ".")
    assert report.resumed == 2
    assert (tmp_path / "out").stat().st_ino == inode
    names = os.listdir(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    assert filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", names, shallow=False)[0] == names
    with pytest.raises(FoldError, match="or where you stand"):
        lora_fx.fold_checkpoint(base, adapter, ".", overwrite=True)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_result_that_is_not_finite_leaves_everything_as_it_was(tmp_path: Path) -> None:
    gm = traced(BY_NAME["mlp"], dtype=torch.float16)
    adapted = randomise(injected(BY_NAME["mlp"], gm))
    with torch.no_grad():
        adapted.get_parameter("fc2.lora_B.default.weight").fill_(6e4)
        adapted.get_parameter("fc2.lora_A.default.weight").fill_(1)
    lora_fx.save_adapter(adapted, tmp_path / "adapter")
    base = write_base(gm.state_dict(), tmp_path / "base")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    for out, in_place in ((tmp_path / "out", False), (base, True)):
        with pytest.raises(FoldError, match=r"folding 'fc2' \(fc2.weight\): \|W \+ ΔW\| goes beyond torch.float16"):
            lora_fx.fold_checkpoint(base, tmp_path / "adapter", out, in_place=in_place)
        assert {file.name: file.read_bytes() for file in base.iterdir()} == before
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_a_header_of_its_own_and_tensors_in_any_order_stay(tmp_path: Path) -> None:
    """Copied with the tensors: metadata, spaces, empty tensors, types that torch has no names for."""
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base", 1)
    tensors = load_file(base / "model.safetensors") | {"empty": torch.empty(0, 3), "n": torch.arange(5)}
    save_file(tensors, base / "model.safetensors", metadata={"more": "x y"})
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"more": "x y"}
        assert file.keys() == sorted(tensors) or set(file.keys()) == set(tensors)
        assert torch.equal(file.get_tensor("n"), torch.arange(5))


def test_what_was_changed_at_random_is_refused_or_taken(tmp_path: Path) -> None:
    """Shards, index, config.json and the adapter: an error of our tree, or a plan, and nothing else."""
    adapter = _mlp_adapter(tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base", 2, **config)
    kinds: Counter[str] = Counter()
    for file in (*sorted(base.iterdir()), adapter / "adapter_model.safetensors"):
        good = file.read_bytes()
        for data in changed(good, 80, seed=len(file.name)):
            file.write_bytes(data)
            try:
                arrays, let_go = map_adapter(adapter, integrity="ignored")
                plan_fold(read_checkpoint(base, FoldError), arrays, let_go)
                kinds["taken"] += 1
            except LoraFxError:
                kinds["refused"] += 1
        file.write_bytes(good)
    assert min(kinds["taken"], kinds["refused"]) > 5


def test_a_base_that_was_brought_back_is_not_taken_for_a_folded_one(tmp_path: Path) -> None:
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base")
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole")
    shutil.copytree(base, tmp_path / "original")
    calls = iter(range(100))

    def progress(done: int, total: int) -> None:
        if done > total * 0.7 and next(calls) == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora_fx.fold_checkpoint(base, adapter, base, in_place=True, progress=progress)
    shutil.copytree(tmp_path / "original", base, dirs_exist_ok=True)
    with pytest.raises(FoldError, match=r"was changed or exchanged since an interrupted fold.*remove '.*lora_fx-fold'"):
        lora_fx.fold_checkpoint(base, adapter, base, in_place=True)
    shutil.rmtree(base / fold_work.IN_PLACE)
    lora_fx.fold_checkpoint(base, adapter, base, in_place=True)
    for name in os.listdir(base):
        assert filecmp.cmp(base / name, tmp_path / "whole" / name, shallow=False), name


def test_a_base_that_changes_meanwhile_gives_no_mixture(tmp_path: Path) -> None:
    adapter = _mlp_adapter(tmp_path)
    base = write_base(traced(BY_NAME["mlp"]).state_dict(), tmp_path / "base")
    shards = sorted(base.glob("*.safetensors"))

    def progress(done: int, total: int) -> None:
        content = bytearray(shards[0].read_bytes())
        content[-1] ^= 1
        shards[0].write_bytes(content)

    with pytest.raises(FoldError, match="changed while they were folded"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()
