"""The command line on small Hugging Face directories: results, exit statuses, one-line errors, JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_fx import cli


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small BERT, and an adapter that PEFT wrote for it."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37
    )
    model = transformers.BertModel(config)
    model.save_pretrained(root / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query", "dense"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(root / "adapter")
    return root / "model", root / "adapter"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-fx", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_inspect_prints_sites_and_the_plan(directories, monkeypatch, capsys) -> None:
    model, adapter = directories
    assert run(monkeypatch, "inspect", model) == 0
    assert "encoder.layer.1.output.dense" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", model, adapter, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["targets"]) == 9
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


def test_fold_copies_the_tokenizer_and_no_stale_weights(directories, tmp_path, monkeypatch) -> None:
    model = tmp_path / "models" / "base"
    shutil.copytree(directories[0], model)
    (model / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin"):
        (model / name).write_text("{}")
    assert run(monkeypatch, "fold", model, directories[1], tmp_path / "out") == 0
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}


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
    rename = os.rename

    def broken(source: Path, target: Path) -> None:
        if Path(source).name == "model":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    assert run(monkeypatch, "fold", *directories, tmp_path / "out", "--overwrite") == 5
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fold_that_differs_writes_nothing(directories, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "_fold_bound", lambda model: -1.0)
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
    assert "pip install 'lora-fx[demo]'" in message


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


def test_export_and_verify(directories, tmp_path, monkeypatch, capsys) -> None:
    model, adapter = directories
    base, folded = tmp_path / "base.onnx", tmp_path / "folded.onnx"
    assert run(monkeypatch, "export", model, base) == 0
    assert run(monkeypatch, "export", model, adapter, folded, "--json") == 0
    lines = capsys.readouterr().out
    assert '"opset"' in lines
    assert run(monkeypatch, "verify", folded, model, adapter, "--base", base, "--json") == 0
    assert json.loads(capsys.readouterr().out)
    assert run(monkeypatch, "verify", base, model, adapter) == 4  # the base is not the adapted model
    assert "does not compute" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run(monkeypatch, "verify", folded, model, adapter, "--provider", "cuda") == 5


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
    ],
)
def test_nonsense_gets_one_line_and_a_status(
    directories, tmp_path, monkeypatch, capsys, arguments, status, fragment
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(directories[0]), "ADAPTER": str(directories[1])}
    assert run(monkeypatch, *(places.get(a, a) for a in arguments)) == status
    message = capsys.readouterr().err
    assert fragment in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", "demo", "inspect", "fold", "export", "verify"])
def test_help(command: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *filter(None, [command]), "--help") == 0
    assert "--help" in capsys.readouterr().out


def test_the_command_line_starts_without_torch() -> None:
    code = "import lora_fx.cli, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
