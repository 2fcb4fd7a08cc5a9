"""`lora-fx onnx …` on files of another exporter: results, exit statuses, one-line errors, JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from exporters import AdapterSession, make_session
from lora_fx import cli

FOREIGN = Path(__file__).parent / "exporters" / "foreign"
BASE, ADAPTER = FOREIGN / "optimum_gpt2" / "model.onnx", FOREIGN / "gpt2" / "adapter"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora-fx", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_fold_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "onnx", "fold", BASE, ADAPTER, tmp_path / "out.onnx", "--json")
    assert status == 0
    assert len(json.loads(out)["weights"]) == 6
    make_session(tmp_path / "out.onnx", provider="cpu")
    mine = Path(shutil.copy(BASE, tmp_path / "mine.onnx"))
    before = mine.read_bytes()
    assert run(capsys, "onnx", "fold", mine, ADAPTER, mine)[0] == 0
    assert mine.read_bytes() != before
    assert run(capsys, "onnx", "unfold", mine)[0] == 0
    assert mine.read_bytes() == before
    status, _, err = run(capsys, "onnx", "unfold", mine)
    assert (status, err.count("\n")) == (3, 1)


def test_switchable_and_by_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "onnx", "inputs", BASE, tmp_path / "switch.onnx", ADAPTER)[0] == 0
    file = tmp_path / "x.onnx_adapter"
    assert run(capsys, "onnx", "adapter", tmp_path / "switch.onnx", ADAPTER, file)[0] == 0
    AdapterSession(tmp_path / "switch.onnx", provider="cpu").load("x", file)
    other = shutil.copytree(ADAPTER, tmp_path / "other")
    status, out, _ = run(capsys, "onnx", "rows", BASE, tmp_path / "rows.onnx", ADAPTER, other, "--json")
    assert (status, len(json.loads(out)["slots"])) == (0, 6)
    assert AdapterSession(tmp_path / "rows.onnx", provider="cpu").adapters == ("adapter", "other")
    assert run(capsys, "onnx", "rows", BASE, tmp_path / "again.onnx", ADAPTER, ADAPTER)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("fold", "none.onnx", ADAPTER, "out.onnx"), 3, "does not exist"),
        (("fold", BASE, "none", "out.onnx"), 3, "no directory"),
        (("fold", BASE, FOREIGN / "bert" / "adapter", "out.onnx"), 3, "no weight for the adapter's"),
        (("fold", BASE, ADAPTER, "out.onnx", "--strength", "nan"), 3, "must be a finite number"),
        (("inputs", BASE, "out.onnx", ADAPTER, "--rank", "0"), 2, "rank"),
        (("adapter", BASE, ADAPTER, "x.onnx_adapter"), 3, "no places for adapters"),
        (("optimize", ADAPTER / "adapter_config.json", "out.onnx"), 3, "cannot open"),
    ],
)
def test_nonsense_gets_one_line_and_a_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, "onnx", *arguments)
    assert (got, out) == (status, "")
    assert said in err
    assert not list(tmp_path.iterdir())


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fold", "unfold", "inputs", "adapter", "rows", "optimize"):
        status, out, _ = run(capsys, "onnx", command, "--help")
        assert status == 0
        assert f"lora-fx onnx {command}" in out


def test_hashes_may_be_demanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's files have none."""
    status, _, err = run(capsys, "onnx", "fold", BASE, ADAPTER, tmp_path / "out.onnx", "--integrity", "required")
    assert (status, err.count("\n")) == (3, 1)
    assert "has no seal" in err
    assert not (tmp_path / "out.onnx").exists()
