"""What every command has: examples that parse, -v and -q wherever they are written, dry runs, completion, colours."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer.main
from test_cli import files_of, make_bert, run, save

from lora_fx import LoraFxError, cli, hf_models
from lora_fx.cli_wording import as_options

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted(README.with_name("docs").glob("*.md"))]
FOREIGN = Path(__file__).parent / "exporters" / "foreign"
BASE, ADAPTER = FOREIGN / "optimum_gpt2" / "model.onnx", FOREIGN / "gpt2" / "adapter"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("habits"), make_bert(), target_modules=["query", "dense"])


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
WRITING = [
    words for words in COMMANDS if words[-1] in ("fold", "export", "report", "inputs", "adapter", "rows", "optimize")
]


def parse(line: str) -> tuple[str, ...]:
    """The command of a line, whose arguments it takes.

    Raises:
        Exception: click's, if it does not.
    """
    words = shlex.split(line)
    assert words.pop(0) == "lora-fx"
    path = tuple(words[:2]) if words[0] == "onnx" else (words[0],)
    with COMMANDS[path].make_context(path[-1], words[len(path) :]):
        return path


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_examples_that_parse(words) -> None:
    text = " ".join(COMMANDS[words].help.split())
    lines = re.findall(r"`(lora-fx [^`]*)`", text[text.index("Example") :])
    assert parse(lines[0]) == words
    for line in lines[1:]:
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_pages_parse(page) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    for line in [line for line in lines if line.startswith("lora-fx") and "--help" not in line]:
        parse(line.replace("[ADAPTER_DIR]", "ADAPTER_DIR"))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_the_same_habits(words, monkeypatch, capsys) -> None:
    options = {option for parameter in COMMANDS[words].params for option in parameter.opts}
    assert options >= {"--json", "--verbose", "-v", "--quiet", "-q"}
    assert ("--dry-run" in options) == (words in WRITING)
    monkeypatch.setenv("COLUMNS", "100")
    assert run(monkeypatch, *words, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for status in ("0 ok", "2 usage", "3 bad input", "4 a check failed", "5 environment", "130 interrupted"):
        assert status in printed


# Loud and quiet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("-v", "inspect", "nowhere"), ("inspect", "nowhere", "--verbose")])
def test_verbose_shows_tracebacks_wherever_it_is_written(arguments, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *arguments) == 3
    assert "Traceback" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", "nowhere") == 3  # one command's, not the next one's
    assert "Traceback" not in capsys.readouterr().err


def test_verbose_says_what_takes_the_time(directories, monkeypatch, capsys) -> None:
    before = logging.getLogger("lora_fx").level, list(logging.getLogger("lora_fx").handlers)
    assert run(monkeypatch, "inspect", directories[0], "-v") == 0
    printed = capsys.readouterr()
    for step in ("loading the model", "tracing", "planning"):
        assert re.search(rf"^lora_fx: {step}: \d+\.\d s$", printed.err, re.MULTILINE)
    assert "encoder.layer.0.output.dense" in printed.out
    assert (logging.getLogger("lora_fx").level, logging.getLogger("lora_fx").handlers) == before


@pytest.mark.filterwarnings("always::lora_fx.LoraFxWarning")
def test_quiet_prints_errors_and_json_alone(directories, tmp_path, monkeypatch, capsys) -> None:
    model, adapter = directories
    shutil.copytree(adapter, tmp_path / "adapter")
    config = (adapter / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        config.replace('"task_type": null', '"task_type": "SEQ_CLS"')
    )
    assert run(monkeypatch, "inspect", model, tmp_path / "adapter", "-q") == 3  # a warning of random weights, too
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("error: ")
    assert run(monkeypatch, "-q", "inspect", model) == 0
    assert capsys.readouterr() == ("", "")
    assert run(monkeypatch, "inspect", model, "-q", "--json") == 0
    assert capsys.readouterr().out.startswith("{")
    assert run(monkeypatch, "-q", "inspect", model, "-v") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_librarys_log_is_shown_as_loud_as_asked_for(monkeypatch, capsys) -> None:
    def note(*_: object) -> None:
        logging.getLogger("exporters").warning('took the CPU; pass provider="cpu"')
        raise LoraFxError("no model")

    monkeypatch.setattr(cli, "_loaded", note)
    assert run(monkeypatch, "inspect", "nowhere") == 3
    assert capsys.readouterr().err == "exporters: took the CPU; pass --provider cpu\nerror: no model\n"
    assert run(monkeypatch, "inspect", "nowhere", "-q") == 3
    assert capsys.readouterr().err == "error: no model\n"


def test_versions_are_told(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--version") == 0
    assert re.fullmatch(r"lora-fx \d+\.\d+\.\d+\S* \(Python 3\.\d+\.\d+, torch 2\..*\)\n", capsys.readouterr().out)


# A shell and a terminal -------------------------------------------------------------------------------


def completions(monkeypatch, capsys, line: str) -> list[str]:
    """What bash is given for a line."""
    words = line.split(" ")
    for name, value in (("_LORA_FX_COMPLETE", "complete_bash"), ("COMP_WORDS", line), ("COMP_CWORD", len(words) - 1)):
        monkeypatch.setenv(name, str(value))
    run(monkeypatch)
    return capsys.readouterr().out.split()


def test_a_shell_completes_commands_options_values_and_targets(directories, tmp_path, monkeypatch, capsys) -> None:
    assert completions(monkeypatch, capsys, "lora-fx ex") == ["export"]
    assert completions(monkeypatch, capsys, "lora-fx onnx un") == ["unfold"]
    assert completions(monkeypatch, capsys, "lora-fx export --with") == ["--with-cache"]
    assert completions(monkeypatch, capsys, "lora-fx verify --provider t") == ["tensorrt"]
    assert completions(monkeypatch, capsys, "lora-fx fold --integrity re") == ["required"]
    line = f"lora-fx inspect {directories[0]} --target"
    assert completions(monkeypatch, capsys, f"{line} q") == ["query"]
    assert "LayerNorm" not in completions(monkeypatch, capsys, f"{line} ")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert completions(monkeypatch, capsys, f"lora-fx inspect {tmp_path} --target ") == ["all-linear"]


def test_the_script_for_a_shell_is_shown() -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "lora_fx.cli", "--show-completion", "zsh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "#compdef lora-fx" in done.stdout


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a command prints on a terminal."""
    parent, child = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    try:
        command = [sys.executable, "-m", "lora_fx.cli", *arguments]
        process = subprocess.Popen(
            command, stdout=child, stderr=child, env=clean | {"TERM": "xterm-256color"} | environment
        )
    finally:
        os.close(child)
    printed = b""
    with os.fdopen(parent, "rb", buffering=0) as terminal:
        while True:
            try:
                piece = terminal.read(4096)
            except OSError:  # how Linux says that nobody holds the other end
                break
            if not piece:
                break
            printed += piece
    process.wait()
    return printed.decode()


def test_colours_are_for_terminals_that_want_them() -> None:
    red = re.compile(r"\x1b\[[0-9;]*31m")
    assert red.search(on_a_terminal("inspect", "nowhere"))
    plain = on_a_terminal("inspect", "nowhere", NO_COLOR="1")
    assert "error:" in plain
    assert not red.search(plain)
    command = [sys.executable, "-m", "lora_fx.cli", "inspect", "nowhere"]
    piped = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert piped.startswith("error: there is no directory 'nowhere'")
    assert "\x1b" not in piped


def test_other_libraries_notes_stay_out_of_it(directories) -> None:
    """transformers imports torchao where it is installed, which logs what it cannot load of itself."""
    assert find_spec("torchao") is not None, "the extra `test` has it"
    command = [sys.executable, "-m", "lora_fx.cli", "inspect", str(directories[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Dry runs ---------------------------------------------------------------------------------------------


def test_dry_runs_of_models_leave_nothing(directories, tmp_path, monkeypatch, capsys) -> None:
    before = files_of(directories[0].parent)
    for arguments, said in (
        (("fold", *directories, tmp_path / "out"), "folded and adapted outputs differ by"),
        (("export", *directories, tmp_path / "out.onnx"), f"{tmp_path / 'out.onnx'}"),
        (("report", *directories, "--out", tmp_path / "out.html"), "ranks for 99 %"),
    ):
        assert run(monkeypatch, *arguments, "--dry-run") == 0
        printed = capsys.readouterr().out
        assert "dry run: nothing was written" in printed
        assert said in printed
        assert list(tmp_path.iterdir()) == []
    assert files_of(directories[0].parent) == before


def test_a_dry_run_of_a_fold_of_files_reads_headers_and_plans(directories, tmp_path, monkeypatch, capsys) -> None:
    model, adapter = directories
    files = ("fold", "--base", model, "--adapter", adapter, "--dry-run")
    assert run(monkeypatch, *files, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "5 tensors would change, 1 shard be written" in printed
    assert "encoder.layer.0.attention.self.query.weight" in printed
    assert run(monkeypatch, *files, "--in-place", "--json") == 0
    assert '"dry_run": true' in capsys.readouterr().out
    assert run(monkeypatch, *files, "--out", model) == 3
    other = dict(safetensors.torch.load_file(adapter / "adapter_model.safetensors"))
    (tmp_path / "other").mkdir()
    shutil.copy(adapter / "adapter_config.json", tmp_path / "other")
    renamed = {name.replace("query", "quarry"): tensor for name, tensor in other.items()}
    safetensors.torch.save_file(renamed, tmp_path / "other" / "adapter_model.safetensors")
    assert run(monkeypatch, *files[:4], tmp_path / "other", "--dry-run", "--out", tmp_path / "out") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_dry_runs_on_onnx_files_leave_nothing(tmp_path, monkeypatch, capsys) -> None:
    mine = Path(shutil.copy(BASE, tmp_path / "mine.onnx"))
    before = mine.read_bytes()
    out = tmp_path / "out.onnx"
    for arguments in (
        ("fold", mine, ADAPTER, mine),
        ("fold", mine, ADAPTER, out),
        ("inputs", mine, out, ADAPTER),
        ("rows", mine, out, ADAPTER),
    ):
        assert run(monkeypatch, "onnx", *arguments, "--dry-run") == 0
        printed = capsys.readouterr().out
        assert "dry run: nothing was written" in printed
        assert str(arguments[-1] if arguments[0] == "fold" else out) in printed
        assert files_of(tmp_path) == {"mine.onnx": before}
    assert run(monkeypatch, "onnx", "inputs", mine, out, ADAPTER) == 0
    assert run(monkeypatch, "onnx", "adapter", out, ADAPTER, tmp_path / "x.onnx_adapter", "--dry-run", "--json") == 0
    assert not (tmp_path / "x.onnx_adapter").exists()


# What is wrong is said at once, in the words of the command line ------------------------------------------


@pytest.mark.parametrize(("arguments", "status", "fragment"), [
    (("verify", "ONNX", "MODEL", "--base", "nowhere.onnx"), 3, "nowhere.onnx"),
    (("verify", "ONNX", "MODEL", "--base", "MODEL/config.json"), 3, "config.json"),
    (("verify", "ONNX", "MODEL", "--report", "x.py"), 2, ".html or .json"),
    (("verify", "ONNX", "MODEL", "--report", "no/x.html"), 3, "mkdir"),
    (("verify", "ONNX", "MODEL", "--report", "MODEL/x.json"), 3, "lies in"),
    (("inspect", "MODEL", "--target", "q", "--r", "0"), 2, "--r"),
    (("inspect", "MODEL", "--target", "q", "--target", "all-linear"), 2, "give no other --target"),
    (("report", "MODEL", "ADAPTER", "--out", "x.html", "--other", "MODEL"), 3, "adapter_config.json"),
    (("report", "MODEL", "ADAPTER", "--out", "x.html", "--other", "nowhere"), 3, "no directory 'nowhere'"),
    (("report", "MODEL", "ADAPTER", "--out", "x.html", "--log", "nowhere.json"), 3, "nowhere.json"),
    (("report", "MODEL", "ADAPTER", "--out", "x.html", "--log", "MODEL/config.json"), 3, "log_history"),
])  # fmt: skip
def test_files_are_looked_at_before_a_model_is_loaded(
    arguments, status, fragment, directories, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(cli, "_loaded", lambda *_: pytest.fail("too far"))
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(directories[0]), "ADAPTER": str(directories[1]), "ONNX": str(BASE)}
    words = [re.sub("MODEL|ADAPTER|ONNX", lambda found: places[found[0]], word) for word in arguments]
    assert run(monkeypatch, *words) == status
    assert fragment in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["lacks", "cuts off"])
def test_an_adapter_is_looked_at_before_a_model_is_loaded(damage, directories, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(hf_models, "load_model", lambda *_: pytest.fail("too far"))
    shutil.copytree(directories[1], tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink() if damage == "lacks" else weights.write_bytes(content[:300])
    for command in (("inspect",), ("fold", "OUT"), ("export", "OUT.onnx"), ("report", "--out", "OUT.html")):
        out = [word.replace("OUT", str(tmp_path / "out")) for word in command[1:]]
        assert run(monkeypatch, command[0], directories[0], tmp_path / "adapter", *out) == 3
        assert "adapter_model.safetensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("said", "wanted"), [
    ("export_onnx(..., check=False) writes it all the same", "--no-check writes it all the same"),
    ("export with check=False and verify it", "export with --no-check and verify it"),
    ("pass opset=18, or leave opset=None, which", "pass --opset 18, or leave --opset out, which"),
    ('Run with provider="cpu", or', "Run with --provider cpu, or"),
    ("integrity='ignored' reads them", "--integrity ignored reads them"),
    ("read_adapter(directory, integrity='ignored') reads", "--integrity ignored reads"),
    ("again with rank= that, or with rank=None", "again with --rank that, or without --rank"),
    ("find_sites(gm) lists all", "lora-fx inspect MODEL_DIR lists all"),
    ("away; unfold_onnx('m.onnx') puts", "away; lora-fx onnx unfold m.onnx puts"),
    ("export_onnx(gm, 'm.onnx') writes one", "lora-fx export MODEL_DIR [ADAPTER_DIR] m.onnx writes one"),
    ("overwrite=True (--overwrite) replaces", "--overwrite replaces"),
    ("or unfold_onnx this one", "or lora-fx onnx unfold this one"),
    ("add_adapter_inputs makes one, fold_into_onnx none", "lora-fx onnx inputs makes one, lora-fx onnx fold none"),
    ("mapping={initializer: module} tells", "in Python, mapping={initializer: module} tells"),
    ("a quantize=5 stays", "a quantize=5 stays"),
])  # fmt: skip
def test_messages_name_options(said, wanted) -> None:
    assert as_options(said) == wanted


def test_a_target_that_is_not_there_is_told_in_options(directories, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "inspect", directories[0], "--target", "qeury") == 3
    message = capsys.readouterr().err
    assert "--target 'qeury' matched none" in message
    assert "Did you mean 'query'" in message
    assert "lora-fx inspect MODEL_DIR lists all" in message
    assert "find_sites" not in message
    assert run(monkeypatch, "inspect", directories[0], "--target", ".*self\\.(key|value)", "--json") == 0
    paths = [target["path"] for target in json.loads(capsys.readouterr().out)["targets"]]
    assert paths == [f"encoder.layer.0.attention.self.{name}" for name in ("key", "value")]
    assert run(monkeypatch, "export", *directories, "x.onnx", "--opset", "5") == 3
    assert "pass --opset 18, or leave --opset out" in capsys.readouterr().err


def test_hashes_that_do_not_fit_are_ignored_where_that_is_asked_for(directories, tmp_path, monkeypatch, capsys) -> None:
    import lora_fx

    torch.manual_seed(1)
    model = make_bert()
    gm = lora_fx.trace(model.eval(), (torch.ones(2, 5, dtype=torch.long),))
    gm = lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    lora_fx.save_adapter(gm, tmp_path / "adapter")  # over a base of other weights
    fold = ("fold", directories[0], tmp_path / "adapter", tmp_path / "out")
    assert run(monkeypatch, *fold) == 3
    assert "--integrity ignored" in capsys.readouterr().err
    assert run(monkeypatch, *fold, "--integrity", "ignored") == 0


# The rest -----------------------------------------------------------------------------------------------


def test_verify_takes_a_decoder_with_its_cache(tmp_path, monkeypatch) -> None:
    from test_cli import make_llama

    model, adapter = save(tmp_path, make_llama(), target_modules="all-linear")
    assert run(monkeypatch, "export", model, adapter, tmp_path / "out.onnx", "--with-cache", "--no-check") == 0
    assert run(monkeypatch, "verify", tmp_path / "out.onnx", model, adapter, "--with-cache", "--provider", "cpu") == 0
    assert run(monkeypatch, "verify", tmp_path / "out.onnx", model, adapter, "--provider", "cpu") == 3


def test_report_shows_the_comparison_in_the_terminal(directories, tmp_path, monkeypatch, capsys) -> None:
    other = shutil.copytree(directories[1], tmp_path / "other")
    arguments = ("report", *directories, "--other", other, "--verify", "--out", tmp_path / "x.html")
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    for fragment in ("ranks for 99 %", "adapter and other", "weights:", "folded, torch", "written to"):
        assert fragment in printed


def test_a_file_where_a_directory_is_meant_and_weights_that_are_cut_off_are_named(
    directories, tmp_path, monkeypatch, capsys
) -> None:
    base, adapter = directories

    def refused(*arguments: object) -> str:
        assert run(monkeypatch, *arguments) == 3
        return capsys.readouterr().err.strip()

    for file in (base / "config.json", adapter / "adapter_model.safetensors"):
        wanted = f"error: {str(file)!r} is a file; give the directory that it is in: {str(file.parent)!r}"
        assert refused("inspect", file) == wanted
    told = refused("fold", base, adapter / "adapter_config.json", tmp_path / "out")
    assert f"is a file; give the directory that it is in: {str(adapter)!r}" in told
    wanted = f"error: {str(base)!r} is a directory, where an ONNX file is meant; give the path of the file"
    assert refused("verify", base, base) == wanted
    cut = Path(shutil.copytree(base, tmp_path / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    told = refused("inspect", cut.parent)
    assert re.match(
        rf"error: {re.escape(repr(str(cut)))} is cut off or damaged \(.+\); copy or download it again", told
    )


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "--help"]], ids=" ".join)
def test_a_reader_that_has_enough_is_no_bug(arguments) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-c", "from lora_fx.cli import main; main()", *arguments]
        ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, text=True)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")
