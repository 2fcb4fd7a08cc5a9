"""The command line on small Hugging Face directories: results, exit statuses, one-line errors, JSON."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import onnx
import peft
import pytest
import safetensors.torch
import torch
import transformers
from rich.console import Console

from lora_fx import cli, cli_console, hf_folding, hf_models
from lora_fx.hf_folding import output_error

BERT = {"vocab_size": 97, "hidden_size": 22, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 37}
GPT2 = {"vocab_size": 97, "n_embd": 22, "n_layer": 1, "n_head": 2, "n_positions": 40}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40}
T5 = {"vocab_size": 97, "d_model": 22, "d_kv": 11, "d_ff": 37, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}


def make_bert(kind: str = "Model") -> torch.nn.Module:
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**BERT))


def make_gpt2(**config: object) -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | config))


def make_llama(**config: object) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | config))


def save(root: Path, model: torch.nn.Module, **config: object) -> tuple[Path, Path]:
    """The model's directory, and that of an adapter of it whose B is not zero."""
    model.save_pretrained(root / "model")
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of Conv1D and of tied weights
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **config))
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.data.normal_(std=0.2)
        adapted.save_pretrained(root / "adapter")
    return root / "model", root / "adapter"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def must_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("too far"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small BERT, and an adapter that PEFT wrote for it."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = make_bert()
    model.save_pretrained(root / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "dense"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(root / "adapter")
    return root / "model", root / "adapter"


@pytest.fixture(scope="module")
def exported(directories: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base's ONNX file, and that of the folded model, which replaces another: an ONNX file may be replaced."""
    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "export", directories[0], root / "base.onnx") == 0
        shutil.copy(root / "base.onnx", root / "folded.onnx")
        assert run(patch, "export", *directories, root / "folded.onnx") == 0
    return root / "base.onnx", root / "folded.onnx"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-fx", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_inspect_prints_sites_and_the_plan(directories, monkeypatch, capsys) -> None:
    model, adapter = directories
    assert run(monkeypatch, "inspect", model) == 0
    assert "encoder.layer.0.output.dense" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", model, adapter, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["targets"]) == 5
    assert {target["r"] for target in printed["targets"]} == {3}
    assert printed["all_linear_names"] == ["dense", "key", "query", "value"]


def test_inspect_names_the_nearest_site(directories, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "inspect", directories[0], "--target", "qeury") == 3
    message = capsys.readouterr().err
    assert "Did you mean" in message
    assert "Traceback" not in message


def test_fold_writes_what_peft_merges(directories, tmp_path, monkeypatch, capsys) -> None:
    model, adapter = directories
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-4
    base = transformers.BertModel.from_pretrained(model)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    folded = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 97, (3, 5))
    torch.testing.assert_close(folded(ids).last_hidden_state, merged(ids).last_hidden_state, rtol=1e-5, atol=1e-6)
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out") == 3  # not empty
    assert run(monkeypatch, "fold", model, adapter, model, "--overwrite") == 3  # the source
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out", "--overwrite") == 0


def test_what_is_folded_in_already_is_refused(directories, tmp_path, monkeypatch, capsys) -> None:
    """Both ways of folding note the same, and look at what the other noted."""
    model, adapter = directories
    files = ("--adapter", adapter, "--out")
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "loaded") == 0
    assert run(monkeypatch, "fold", "--base", model, *files, tmp_path / "files") == 0
    noted = json.loads((tmp_path / "loaded" / "lora_fx_fold.json").read_text())
    assert noted == json.loads((tmp_path / "files" / "lora_fx_fold.json").read_text())
    assert [(each["r"], each["lora_alpha"]) for each in noted["folds"]] == [(3, 7)]
    shutil.copytree(adapter, tmp_path / "other")
    values = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    halved = {key: value / 2 for key, value in values.items()}
    safetensors.torch.save_file(halved, tmp_path / "other" / "adapter_model.safetensors")
    for folded in (tmp_path / "loaded", tmp_path / "files"):
        assert run(monkeypatch, "fold", folded, tmp_path / "other", folded.with_suffix(".two")) == 0
        assert len(json.loads((folded.with_suffix(".two") / "lora_fx_fold.json").read_text())["folds"]) == 2
        capsys.readouterr()
        with monkeypatch.context() as patch:
            must_not_load(patch)
            for arguments in (
                ("fold", folded, adapter, tmp_path / "x"), ("fold", "--base", folded, *files, tmp_path / "x"),
                ("export", folded, adapter, tmp_path / "x.onnx"),
            ):  # fmt: skip
                assert run(patch, *arguments) == 3
                assert "already (lora_fx_fold.json says so)" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))


def test_fold_goes_from_files_to_files(directories, tmp_path, monkeypatch, capsys) -> None:
    """No model, and a bar on a terminal."""
    model, adapter = directories
    monkeypatch.setattr(hf_models, "load_model", None)
    terminal = io.StringIO()
    monkeypatch.setattr(cli_console, "_stderr", Console(file=terminal, force_terminal=True, width=90))
    files = ("--base", model, "--adapter", adapter)
    assert run(monkeypatch, "fold", *files, "--out", tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["sites"]) == 5
    assert printed["shards"] == 1
    assert "folding" in terminal.getvalue()
    before, after = (safetensors.torch.load_file(where / "model.safetensors") for where in (model, tmp_path / "out"))
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 5
    assert run(monkeypatch, "fold", *files, "--out", tmp_path / "out") == 3  # not empty
    assert run(monkeypatch, "fold", *files, "--out", tmp_path / "out", "--overwrite") == 0
    assert "1 shard" in capsys.readouterr().out
    shutil.copytree(model, tmp_path / "own")
    assert run(monkeypatch, "fold", "--base", tmp_path / "own", "--adapter", adapter, "--in-place") == 0
    assert safetensors.torch.load_file(tmp_path / "own" / "model.safetensors").keys() == after.keys()
    for wrong in (
        (*files,), (model, *files, "--in-place"), (model, adapter, tmp_path / "x", "--workers", 2), (model, adapter),
        (*files, "--out", tmp_path / "x", "--dtype", "float16"), (*files, "--in-place", "--out", tmp_path / "x"), (),
        (*files, "--out", tmp_path / "x", "--workers", 0),
    ):  # fmt: skip
        assert run(monkeypatch, "fold", *wrong) == 2
    assert not (tmp_path / "x").exists()


def test_fold_without_room_is_the_machine_s_fault(directories, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    arguments = ("--base", directories[0], "--adapter", directories[1], "--out", tmp_path / "out")
    assert run(monkeypatch, "fold", *arguments) == 5
    assert "make room on that disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_fold_copies_the_tokenizer_and_no_stale_weights(directories, tmp_path, monkeypatch) -> None:
    model = tmp_path / "models" / "base"
    shutil.copytree(directories[0], model)
    (model / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin"):
        (model / name).write_text("{}")
    assert run(monkeypatch, "fold", model, directories[1], tmp_path / "out") == 0
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    names = {"config.json", "lora_fx_fold.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    assert written == names


def test_fold_never_replaces_a_directory_that_holds_what_it_reads(directories, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(directories[0], tmp_path / "models" / "base")
    arguments = (tmp_path / "models" / "base", directories[1], tmp_path / "models", "--overwrite")
    assert run(monkeypatch, "fold", *arguments) == 3
    assert "holds" in capsys.readouterr().err
    assert (tmp_path / "models" / "base" / "model.safetensors").is_file()


def test_a_fold_that_cannot_move_into_place_puts_the_old_directory_back(
    directories, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if Path(source).name == "model.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    monkeypatch.chdir(tmp_path / "out")  # so that the directory itself stays, and its entries are moved one by one
    assert run(monkeypatch, "fold", *directories, tmp_path / "out", "--overwrite") == 5
    assert "No space left" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == {"mine.txt": b"old", "config.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fold_that_differs_writes_nothing(directories, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(hf_folding, "fold_bound", lambda model: -1.0)
    assert run(monkeypatch, "fold", *directories, tmp_path / "out") == 4
    assert "differs from the adapted one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_weights_that_the_files_lack_are_said_to_be_random(directories, tmp_path, monkeypatch, capsys) -> None:
    model, adapter = directories
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    run(monkeypatch, "inspect", model, tmp_path / "adapter")
    assert "classifier.weight" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", model, adapter) == 0
    assert capsys.readouterr().err == ""


def test_a_missing_package_is_named_with_the_command_that_installs_it(directories, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(monkeypatch, "inspect", directories[0]) == 5
    message = capsys.readouterr().err
    assert "transformers" in message
    assert message.endswith("; pip install transformers\n")
    assert "[demo]" not in message, "an extra with onnxruntime-gpu breaks an installation that has onnxruntime"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "pip install onnxruntime (or"),
        (ModuleNotFoundError("No module named 'onnx.reference'", name="onnx.reference"), "pip install onnx"),
        (ImportError("libcudart.so.13: cannot open shared object file"), "lora-fx doctor"),
    ],
)
def test_what_cannot_be_imported_is_told_with_the_next_command(error, said, monkeypatch, capsys) -> None:
    def fails(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    assert run(monkeypatch, "inspect", "any") == 5
    assert f"; {said}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "whisper", "vit"])
def test_inspect_finds_the_class_and_inputs_of_other_models(kind, tmp_path, monkeypatch, capsys) -> None:
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 37}
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=97, num_key_value_heads=1, **small)
        model, site = transformers.LlamaForCausalLM(config), "model.layers.0.self_attn.q_proj"
    elif kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **small))
        site = "classifier"
    else:
        heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
        layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        sizes = {"d_model": 22, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "num_mel_bins": 8}
        config = transformers.WhisperConfig(
            vocab_size=97, max_source_positions=10, **heads, **layers, **tokens, **sizes
        )
        model, site = transformers.WhisperForConditionalGeneration(config), "proj_out"
    model.save_pretrained(tmp_path)
    assert run(monkeypatch, "inspect", tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert site in [row["path"] for row in printed["sites"]]
    assert printed["parameters"] == sum(p.numel() for p in model.parameters())


def test_export_and_verify(directories, exported, monkeypatch, capsys) -> None:
    model, adapter = directories
    base, folded = exported
    assert run(monkeypatch, "verify", folded, model, adapter, "--base", base, "--json") == 0
    assert json.loads(capsys.readouterr().out)
    names = [value.name for value in onnx.load(folded, load_external_data=False).graph.input]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]  # what BERT's tokenizer gives
    assert run(monkeypatch, "verify", base, model, adapter, "--provider", "cpu") == 4  # not the adapted model
    assert "does not compute" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(monkeypatch, "verify", folded, model, adapter, "--provider", "cuda") == 5
    page = folded.with_suffix(".html")
    assert run(monkeypatch, "verify", folded, model, adapter, "--report", page) == 0
    assert page.read_text().startswith("<!doctype html>")
    capsys.readouterr()
    small = page.with_name("small.onnx")
    assert run(monkeypatch, "export", model, adapter, small, "--quantize", "int8", "--json") == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["bits"] == 8


def test_verify_tells_a_file_that_computes_something_else_from_one_of_another_graph(
    directories, exported, tmp_path, monkeypatch, capsys
) -> None:
    model, adapter = directories
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["x"], ["y"])], "other", [value], [result])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    arguments = ("--base", tmp_path / "other.onnx", "--provider", "cpu")
    assert run(monkeypatch, "verify", exported[1], model, adapter, *arguments) == 4
    last = capsys.readouterr().err
    assert "computes what the model computes, but it is not op for op" in last
    assert run(monkeypatch, "verify", exported[1], model, *arguments) == 4
    last = capsys.readouterr().err
    assert "does not compute" in last
    assert "; it is not op for op" in last


@pytest.mark.parametrize(
    ("arguments", "status", "fragment"),
    [
        (["inspect", "nowhere"], 3, "config.json"),
        (["inspect"], 2, "model"),
        (["frobnicate"], 2, "frobnicate"),
        (["inspect", "MODEL", "nowhere"], 3, "adapter_config.json"),
        (["fold", "MODEL", "MODEL", "out"], 3, "adapter_config.json"),
        (["export", "MODEL", "ADAPTER", "out.onnx", "--opset", "5"], 3, "opset"),
        (["verify", "nowhere.onnx", "MODEL"], 3, "nowhere.onnx"),
        (["demo", "--steps", "0"], 2, "steps"),
        (["inspect", "MODEL", "ADAPTER", "--target", "query"], 2, "--target"),
        (["inspect", "MODEL", "--r", "4"], 2, "--target"),
        (["export", "MODEL", "ADAPTER"], 2, "is missing"),
        (["export", "MODEL", "typo"], 2, "is missing"),
        (["export", "MODEL", "ADAPTER", "MODEL/model.safetensors"], 2, ".onnx"),
        (["export", "MODEL", "ADAPTER", "MODEL/new.onnx"], 3, "lies in"),
        (["export", "MODEL", "ADAPTER", "ADAPTER/new.onnx"], 3, "lies in"),
        (["export", "MODEL", "ADAPTER", "nowhere/new.onnx"], 3, "mkdir"),
        (["export", "MODEL", "ADAPTER", "MODEL/config.json/new.onnx"], 3, "lies in"),
        (["export", "MODEL", "out.onnx", "--opset", "99"], 2, "opset"),
        (["export", "MODEL", "out.onnx", "--opset", "-1"], 2, "opset"),
        (["export", "MODEL", "out.onnx", "--dtype", "int8"], 2, "bfloat16"),
        (["verify", "nowhere.onnx", "MODEL", "--provider", "gpu"], 2, "tensorrt"),
        (["verify", "MODEL/config.json", "MODEL", "--provider", "cuda"], 3, "cannot open"),
        (["fold", "MODEL", "ADAPTER", "MODEL/out"], 3, "lies in"),
        (["fold", "MODEL", "ADAPTER", "ADAPTER/out", "--overwrite"], 3, "lies in"),
        (["fold", "MODEL", "ADAPTER", "/proc/out"], 3, "cannot write"),
        (["demo", "--out", "/proc/out"], 3, "cannot write"),
    ],
)
def test_nonsense_gets_one_line_and_a_status(
    directories, tmp_path, monkeypatch, capsys, arguments, status, fragment
) -> None:
    monkeypatch.chdir(tmp_path)
    model, adapter = map(str, directories)
    before = files_of(directories[0].parent)
    if arguments[-1] != "5":
        must_not_load(monkeypatch)
    assert run(monkeypatch, *(a.replace("MODEL", model).replace("ADAPTER", adapter) for a in arguments)) == status
    message = capsys.readouterr().err
    assert fragment in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())
    assert files_of(directories[0].parent) == before


@pytest.mark.parametrize("command", ["fold", "export", "demo"])
def test_a_place_inside_a_file_is_refused_before_anything_is_loaded(
    command, directories, tmp_path, monkeypatch, capsys
) -> None:
    must_not_load(monkeypatch)
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out.onnx"
    arguments = ["--out", out] if command == "demo" else [*directories, out]
    assert run(monkeypatch, command, *arguments) == 3
    assert "is a file" in capsys.readouterr().err
    assert files_of(tmp_path) == {"file": b"mine"}


def test_export_with_cache_writes_a_decoder(tmp_path, monkeypatch, capsys) -> None:
    model, adapter = save(tmp_path, make_llama(), target_modules="all-linear")
    assert run(monkeypatch, "export", model, adapter, tmp_path / "out.onnx", "--with-cache", "--no-check") == 0
    graph = onnx.load(tmp_path / "out.onnx").graph
    past = [f"past_key_values.0.{part}" for part in ("key", "value")]
    assert {value.name for value in graph.input} == {"input_ids", "attention_mask", "position_ids", *past}
    assert {value.name for value in graph.output} == {"logits", "present.0.key", "present.0.value"}


def test_export_replaces_what_is_no_onnx_file_only_when_told(directories, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "out.onnx").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        must_not_load(patch)
        assert run(patch, "export", *directories, tmp_path / "out.onnx") == 3
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.onnx").read_bytes() == b"mine"
    capsys.readouterr()
    assert run(monkeypatch, "export", *directories, tmp_path / "out.onnx", "--overwrite", "--json") == 0
    assert (tmp_path / "out.onnx").stat().st_size > 1000
    assert json.loads(capsys.readouterr().out)["opset"] > 0


def test_overwrite_deletes_model_directories_alone(directories, tmp_path, monkeypatch, capsys) -> None:
    must_not_load(monkeypatch)
    (tmp_path / "thesis.tex").write_text("mine")
    assert run(monkeypatch, "fold", *directories, tmp_path, "--overwrite") == 3
    assert "no config.json" in capsys.readouterr().err
    assert files_of(tmp_path) == {"thesis.tex": b"mine"}


def test_fold_fills_the_empty_directory_that_the_user_stands_in(directories, tmp_path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    inode = (tmp_path / "out").stat().st_ino
    monkeypatch.chdir(tmp_path / "out")
    for options in ([], ["--overwrite"]):
        assert run(monkeypatch, "fold", *directories, ".", *options) == 0
        names = {"config.json", "lora_fx_fold.json", "model.safetensors"}
        assert {path.name for path in tmp_path.glob("out/*")} == names
        assert (tmp_path / "out").stat().st_ino == inode
    assert len(list(tmp_path.iterdir())) == 1


def test_a_new_fold_that_cannot_move_into_place_leaves_no_directories(
    directories, tmp_path, monkeypatch, capsys
) -> None:
    def broken(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", broken)
    assert run(monkeypatch, "fold", *directories, tmp_path / "a" / "b" / "out") == 5
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_weights_are_written_is_the_environment(
    directories, tmp_path, monkeypatch, capsys
) -> None:
    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.BertModel, "save_pretrained", full)
    assert run(monkeypatch, "fold", *directories, tmp_path / "out") == 5
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_fold_leaves_config_json_as_it_is(make, tmp_path, monkeypatch) -> None:
    model, adapter = save(tmp_path, make(), target_modules=["c_attn", "q_proj"])
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as older releases write it
    (model / "config.json").write_text(json.dumps(config))
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out") == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "half", "--dtype", "float16") == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == config | {"torch_dtype": "float16"}
    weights = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
@pytest.mark.parametrize(("make", "targets"), [(make_gpt2, ["c_attn", "lm_head"]), (make_llama, ["q_proj", "lm_head"])])
def test_fold_unties_an_adapted_head(make, targets, tmp_path, monkeypatch, capsys) -> None:
    torch.manual_seed(0)
    model, adapter = save(tmp_path, make(tie_word_embeddings=True), target_modules=targets)
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    assert "lm_head.weight" in json.loads(printed.out)["untied"]
    assert "was tied with" in printed.err
    source = json.loads((model / "config.json").read_text())
    assert source["tie_word_embeddings"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == source | {"tie_word_embeddings": False}
    auto = transformers.AutoModelForCausalLM
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(model), adapter).eval()
    folded = auto.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 97, (3, 5))
    torch.testing.assert_close(folded(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    base = auto.from_pretrained(model).eval()
    torch.testing.assert_close(folded.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.allclose(folded(ids).logits, base(ids).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_fold_refuses_a_class_that_computes_something_else_untied(tmp_path, monkeypatch, capsys) -> None:
    """T5 scales its outputs by whether config.json says tied, unless it says so itself."""
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model, adapter = save(tmp_path / "in", t5, target_modules=["q", "lm_head"], task_type="SEQ_2_SEQ_LM")
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out") == 0
    config = json.loads((model / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (model / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "refused") == 3
    assert "cannot be saved with" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_fold_names_what_was_trained_in_full(tmp_path, monkeypatch, capsys) -> None:
    bert = make_bert("ForSequenceClassification")
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    model, adapter = save(tmp_path, bert, **options)
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out") == 0
    assert "trained them in full: classifier.weight, classifier.bias" in capsys.readouterr().out
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["trained_in_full"] == ["classifier.weight", "classifier.bias"]


def test_a_fold_of_which_nothing_can_be_compared_fails(directories, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(directories[0], tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["embeddings.LayerNorm.bias"].fill_(torch.nan)
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert run(monkeypatch, "fold", tmp_path / "model", directories[1], tmp_path / "out") == 4
    assert "nothing but NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([1.0, torch.nan], [1.0, torch.nan], 0.0),
        ([2.0, torch.inf], [1.0, torch.inf], 0.5),  # what is finite counts
        ([1.0, torch.nan], [torch.nan, 1.0], torch.inf),
        ([1.0, torch.nan], [1.0, torch.inf], torch.inf),
        ([1.0, torch.inf], [1.0, -torch.inf], torch.inf),
        ([1.0, 2.0], [1.0, torch.nan], torch.inf),
        ([1.0, torch.finfo().min], [3.0, torch.finfo().min], 2.0),  # a mask is no measure
        ([torch.nan], [torch.nan], torch.nan),
        ([], [], torch.nan),
    ],
)
def test_output_error(expected, actual, error) -> None:
    found = output_error(
        {"y": torch.tensor(expected), "ids": torch.ones(2, dtype=torch.long)},
        {"y": torch.tensor(actual), "ids": torch.ones(2, dtype=torch.long)},
    )
    assert found == pytest.approx(error, nan_ok=True)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        ("truncated", "metadata"),
        ("hidden_size", "Field 'hidden_size' expected int"),
        ("architectures", "'architectures' is 5"),
        ("other shapes", "'encoder.layer.0.intermediate.dense.bias' has the shape (37,) in the weights and (41,) by"),
        ("activation", "nonsense"),
    ],
)
def test_a_damaged_model_directory_is_bad_input(damage, fragment, directories, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(directories[0], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    changes = {
        "hidden_size": {"hidden_size": "abc"},
        "architectures": {"architectures": 5},
        "other shapes": {"intermediate_size": 41},
        "activation": {"hidden_act": "nonsense"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes.get(damage, {})))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    assert run(monkeypatch, "inspect", tmp_path / "model") == 3
    message = capsys.readouterr().err
    assert fragment in message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["first\nsecond", "\n", ""])
def test_an_error_that_nobody_foresaw_is_one_line_and_a_status_of_its_own(
    text, directories, monkeypatch, capsys
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError(text)

    monkeypatch.setattr(hf_models, "load_model", broken)
    assert run(monkeypatch, "inspect", directories[0]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ZeroDivisionError")
    assert "report" in message
    assert len(message.splitlines()) == 1
    assert run(monkeypatch, "-v", "inspect", directories[0]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_a_bfloat16_model_is_exported_in_float32_or_as_told(tmp_path, monkeypatch, capsys) -> None:
    model, adapter = save(tmp_path, make_bert().bfloat16(), target_modules=["query"])
    assert run(monkeypatch, "export", model, adapter, tmp_path / "out.onnx") == 0
    assert "bfloat16" in capsys.readouterr().err
    assert run(monkeypatch, "verify", tmp_path / "out.onnx", model, adapter, "--provider", "cpu") == 0
    assert run(monkeypatch, "export", model, adapter, tmp_path / "half.onnx", "--dtype", "float16") == 0
    capsys.readouterr()
    half = ("verify", tmp_path / "half.onnx", model, adapter, "--provider", "cpu")
    assert run(monkeypatch, *half, "--dtype", "float16") == 0
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, *half) == 4
    assert "dtype torch.float16 instead of torch.float32" in capsys.readouterr().err
    stored = ("export", model, tmp_path / "stored.onnx", "--dtype", "bfloat16")
    assert run(monkeypatch, *stored, "--no-check") == 0
    weights = onnx.load(tmp_path / "stored.onnx").graph.initializer
    assert onnx.TensorProto.BFLOAT16 in {tensor.data_type for tensor in weights}


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_a_decoder_that_classifies_without_a_pad_token_takes_one_text(tmp_path, monkeypatch, capsys) -> None:
    gpt2 = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**GPT2))
    model, adapter = save(tmp_path, gpt2, target_modules=["c_attn"], task_type="SEQ_CLS")
    assert run(monkeypatch, "fold", model, adapter, tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert "takes batches of one only" in capsys.readouterr().err
    assert run(monkeypatch, "export", model, adapter, tmp_path / "out.onnx", "--json") == 0
    printed = capsys.readouterr()
    assert "pad_token_id" in printed.err
    assert json.loads(printed.out)["inputs"]["input_ids"][0] == 1
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    assert run(monkeypatch, "export", model, adapter, tmp_path / "out.onnx", "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert isinstance(json.loads(printed.out)["inputs"]["input_ids"][0], str)


def test_json_has_no_nan_and_no_infinity(capsys) -> None:
    cli_console.print_json({"a": (torch.nan, [-torch.inf, 1.5]), "b": {"c": torch.inf}, "d": torch.float16})
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "torch.float16"}


def test_a_terminal_sees_what_is_going_on(directories, tmp_path, monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli_console, "_stderr", Console(file=screen, force_terminal=True))
    assert run(monkeypatch, "inspect", directories[0]) == 0
    assert run(monkeypatch, "fold", *directories, tmp_path / "out") == 0
    for step in ("loading the model", "tracing", "planning", "folding", "saving"):
        assert step in screen.getvalue()


@pytest.mark.parametrize("command", ["", "demo", "inspect", "fold", "export", "verify", "report", "doctor", "bench"])
def test_help(command: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *filter(None, [command]), "--help") == 0
    assert "--help" in capsys.readouterr().out


def test_bench_runs_subjects_and_refuses_what_is_none(tmp_path, monkeypatch, capsys) -> None:
    files = ("--json", tmp_path / "tables.json", "--plots", tmp_path / "pictures")
    assert run(monkeypatch, "bench", "optimizer", "--quick", "--rounds", 1, *files) == 0
    assert "flat_parameters" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "tables.json").read_text())["subjects"]) == ["optimizer"]
    assert (tmp_path / "pictures" / "once.svg").read_text().startswith("<?xml")
    assert run(monkeypatch, "bench", "speed") == 2
    assert "choose from injection" in capsys.readouterr().err
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "lora_fx" / "cli.py"))
    assert run(monkeypatch, "bench") == 5
    assert "in a checkout" in capsys.readouterr().err


def test_the_command_line_starts_without_torch() -> None:
    code = "import lora_fx.cli, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
