"""Whatever call to the file system is a process's last, or fails: no file is half written, and none is lost."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
import zoo
from checkpoint_files import write_base
from filesystem_faults import DONE, REFUSED, hidden, run_with_fault, visible
from safetensors import SafetensorError
from torch import nn

import exporters
import lora_fx
from exporters.onnx_adapters import read_onnx_adapter
from exporters.onnx_files import open_model
from lora_fx import LoraFxError
from lora_fx.atomic import replace_file
from lora_fx.fold_work import IN_PLACE
from lora_fx.hf_folding import HfFold, fold_into
from lora_fx.hf_models import HfModel, load_model
from lora_fx.hf_saving import save_folded

MOST_CALLS = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with and without weights beside it, and two adapters."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("files")
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))
    gm = lora_fx.trace(model.eval(), (torch.randn(3, 7),))
    for rank in (2, 3):
        injected = zoo.randomise(lora_fx.inject(gm, {"r": rank, "target_modules": ["0", "2"]}))
        lora_fx.save_adapter(injected, root / f"r{rank}")
    for external in (False, True):
        directory = root / ("external" if external else "embedded")
        directory.mkdir()
        exporters.export_onnx(gm, directory / "model.onnx", external_data=external, check=False)
    exporters.add_adapter_inputs(root / "embedded" / "model.onnx", root / "switch.onnx", root / "r2")
    exporters.add_adapter_stacks(root / "embedded" / "model.onnx", root / "rows.onnx", {"r2": root / "r2"})
    for shards in (1, 2):
        write_base(gm.state_dict(), root / f"shards{shards}", shards, model_type="x")
    return root


def injected_graph(rank: int) -> torch.fx.GraphModule:
    torch.manual_seed(rank)
    gm = lora_fx.trace(nn.Sequential(nn.Linear(7, 11)).eval(), (torch.randn(3, 7),))
    return zoo.randomise(lora_fx.inject(gm, {"r": rank, "target_modules": ["0"]}))


INJECTED = {rank: injected_graph(rank) for rank in (2, 4)}
FOLDED = lora_fx.fold(INJECTED[2])


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that the disk has not got yet, and waiting for that takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclass(frozen=True)
class Work:
    """Something that writes.

    Attributes:
        prepare: (files, directory): puts what is there before into the directory.
        write: the same, writes.
        state: of the directory, what has to be as before, or as afterwards.
    """

    prepare: Callable[[Path, Path], object]
    write: Callable[[Path, Path], object]
    state: Callable[[Path], object] = visible


def weights(directory: Path) -> object:
    """What a graph and its weights hold; the weights may be on their way to the name that they will have."""
    file = directory / "model.onnx"
    if not file.exists() and (directory / "model.onnx.undo").is_dir():
        exporters.unfold_onnx(file)  # what the message of make_session says
    found: dict[str, object] = {}
    for name, value in open_model(file).graph.initializers.items():
        assert value.const_value is not None
        found[name] = value.const_value.numpy().tobytes()
    session = exporters.make_session(file, provider="cpu")
    return found | {"y": session.run(None, {session.get_inputs()[0].name: np.ones((2, 7), np.float32)})[0].tobytes()}


def weights_if_any(directory: Path) -> object:
    """Without a graph, there is nothing yet."""
    return weights(directory) if (directory / "model.onnx").exists() else {}


def parameters(directory: Path) -> object:
    """What an .onnx_adapter file holds; onnxruntime writes it in another order every time."""
    file = directory / "x.onnx_adapter"
    return {n: a.tobytes() for n, a in read_onnx_adapter(file)[0].items()} if file.exists() else {}


def copied(name: str) -> Callable[[Path, Path], object]:
    return lambda files, here: shutil.copytree(files / name, here, dirs_exist_ok=True)


def save(rank: int, name: str = "adapter") -> Callable[[Path, Path], object]:
    return lambda files, here: lora_fx.save_adapter(INJECTED[rank], here / name)


def fold(rank: int, base: str, out: str = "model.onnx") -> Callable[[Path, Path], object]:
    return lambda files, here: exporters.fold_into_onnx(
        files / base / "model.onnx" if base else here / "model.onnx", files / f"r{rank}", here / out
    )


def with_directory(files: Path, here: Path) -> None:
    save(2)(files, here)
    (here / "adapter" / "more").mkdir()


def nothing(files: Path, here: Path) -> None:
    pass


@functools.cache
def loaded_model(files: Path) -> tuple[HfModel, HfFold]:
    """A transformers model, and an adapter folded into it."""
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(files / "llama")
    (files / "llama" / "tokenizer.json").write_text("{}")
    loaded = load_model(files / "llama")
    gm = lora_fx.trace(loaded.model, kwargs=loaded.inputs)
    injected = zoo.randomise(lora_fx.inject(gm, {"r": 2, "target_modules": ["q_proj", "down_proj"]}))
    return loaded, fold_into(loaded, injected)


def load_hf(files: Path, here: Path) -> None:
    loaded_model(files)


def unfolded_hf(files: Path, here: Path) -> None:
    loaded_model(files)
    shutil.copytree(files / "llama", here / "model")


def save_hf(files: Path, here: Path) -> None:
    try:
        save_folded(*loaded_model(files), here / "model", dtype=None)
    except (OSError, SafetensorError) as error:  # which the command line reports
        raise lora_fx.FoldError(str(error)) from error


def export(files: Path, here: Path) -> None:
    exporters.export_onnx(FOLDED, here / "model.onnx", external_data=True, check=False)


def fold_shards(rank: int, **options: bool) -> Callable[[Path, Path], object]:
    return lambda files, here: lora_fx.fold_checkpoint(files / "shards2", files / f"r{rank}", here / "out", **options)


def fold_in_place(files: Path, here: Path) -> None:
    lora_fx.fold_checkpoint(here, files / "r2", here, in_place=True)


def page(size: int) -> Callable[[Path, Path], object]:
    """What `lora-fx report` writes."""

    def write(files: Path, here: Path) -> None:
        try:
            replace_file(here / "report.html", b"page" * size)
        except OSError as error:  # which the command line reports
            raise lora_fx.AdapterError(str(error)) from error

    return write


WORK = {
    "save": Work(nothing, save(2)),
    "save over another": Work(save(4), save(2)),
    "fold": Work(nothing, fold(2, "embedded")),
    "fold over another": Work(fold(3, "embedded"), fold(2, "embedded")),
    "fold with weights beside": Work(nothing, fold(2, "external"), weights_if_any),
    "fold over another with weights beside": Work(fold(3, "external"), fold(2, "external"), weights),
    "fold in place": Work(copied("embedded"), fold(2, ""), weights),
    "fold in place with weights beside": Work(copied("external"), fold(2, ""), weights),
    "adapter file": Work(
        nothing, lambda f, h: exporters.write_onnx_adapter(f / "switch.onnx", f / "r2", h / "x.onnx_adapter"),
        parameters,
    ),
    "append": Work(
        lambda f, h: shutil.copy(f / "rows.onnx", h / "rows.onnx"),
        lambda f, h: exporters.append_adapter(h / "rows.onnx", "r3", f / "r3", check=False),
    ),
    "inputs": Work(
        nothing, lambda f, h: exporters.add_adapter_inputs(f / "embedded/model.onnx", h / "model.onnx", f / "r2"),
        weights_if_any,
    ),
    "export over another": Work(copied("external"), export, weights),
    "shards": Work(nothing, fold_shards(2)),
    "page": Work(nothing, page(200)),
    "page over another": Work(page(300), page(200)),
    "transformers model": Work(load_hf, save_hf),
    "transformers model over another": Work(unfolded_hf, save_hf),
}  # fmt: skip


def unfold(files: Path, here: Path) -> None:
    exporters.unfold_onnx(here / "model.onnx")


for _kind in ("embedded", "external"):

    def _folded(files: Path, here: Path, kind: str = _kind) -> None:
        copied(kind)(files, here)
        fold(2, "")(files, here)

    WORK[f"unfold, {_kind}"] = Work(_folded, unfold, weights)


# The exchange, beside the renaming; a call that fails is one and the same to both.
OVER_ANOTHER = {"shards over another": Work(fold_shards(3), fold_shards(2, overwrite=True))}


@pytest.mark.parametrize("name", WORK | OVER_ANOTHER)
def test_a_kill_at_any_call_leaves_the_old_or_the_new(name: str, files: Path, tmp_path: Path) -> None:
    work = (WORK | OVER_ANOTHER)[name]
    before, after = states(work, files, tmp_path)
    seen = set()
    for n in range(1, MOST_CALLS):
        here = tmp_path / str(n)
        here.mkdir()
        work.prepare(files, here)
        status = run_with_fault(lambda: work.write(files, here), n, None, LoraFxError)  # noqa: B023
        state = work.state(here)
        assert state in (before, after), f"killed at call {n}"
        seen.add(state == after)
        if status == DONE:
            break
        assert status == -9
        if "in place" not in name and "unfold" not in name:  # where a kill is to be taken back first
            with contextlib.suppress(*[LoraFxError] * (state == after)):  # appended already
                work.write(files, here)
            assert work.state(here) == after
            if state == before:
                assert not hidden(here), f"killed at call {n}"
        shutil.rmtree(here)
    assert n > 3, "the law would be vacuous"
    assert n < MOST_CALLS - 1
    assert seen == {True, False}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=os.strerror)
@pytest.mark.parametrize("name", WORK)
def test_a_call_that_fails_leaves_everything_as_it_was(name: str, number: int, files: Path, tmp_path: Path) -> None:
    work = WORK[name]
    _, after = states(work, files, tmp_path)
    refused = 0
    for n in range(1, MOST_CALLS):
        here = tmp_path / str(n)
        here.mkdir()
        work.prepare(files, here)
        everything = visible(here)
        fault = OSError(number, os.strerror(number))
        status = run_with_fault(lambda: work.write(files, here), n, fault, LoraFxError)  # noqa: B023
        assert status in (DONE, REFUSED), f"call {n} fails"
        if status == REFUSED:
            refused += 1
            assert visible(here) == everything, f"call {n} fails"
        else:
            assert work.state(here) == after, f"call {n} fails"
            if n > 3 and not hidden(here) and untouched(work, files, tmp_path / "last", n):
                break
        shutil.rmtree(here)
    assert refused > 1, "the law would be vacuous"
    assert n < MOST_CALLS - 1


def untouched(work: Work, files: Path, here: Path, n: int) -> bool:
    """Whether there is no n-th call at all."""
    here.mkdir(exist_ok=True)
    work.prepare(files, here)
    status = run_with_fault(lambda: work.write(files, here), n, None, LoraFxError)
    shutil.rmtree(here)
    return status == DONE


def states(work: Work, files: Path, tmp_path: Path) -> tuple[object, object]:
    """(before, after), of a run without a fault."""
    here = tmp_path / "plain"
    here.mkdir()
    work.prepare(files, here)
    before = work.state(here)
    work.write(files, here)
    after = work.state(here)
    assert before != after
    assert not hidden(here)
    shutil.rmtree(here)
    return before, after


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_in_place_is_gone_on_with_after_a_kill_at_any_call(
    shards: int, files: Path, tmp_path: Path
) -> None:
    base = files / f"shards{shards}"
    shutil.copytree(base, tmp_path / "whole")
    before = visible(base)
    fold_in_place(files, tmp_path / "whole")
    after, seen = visible(tmp_path / "whole"), set[str]()
    for n in range(1, MOST_CALLS):
        here = tmp_path / str(n)
        shutil.copytree(base, here)
        status = run_with_fault(lambda: fold_in_place(files, here), n, None, LoraFxError)  # noqa: B023
        now = visible(here)
        is_mixed = len({now[name] == before[name] for name in before if name.endswith(".safetensors")}) == 2
        if is_mixed and shards > 1 and "config.json" in now:
            assert now.keys() >= after.keys(), f"killed at call {n}: half folded, and it could be loaded"
        seen.add("whole" if now == after else "before" if now == before else "between")
        if status != DONE and now != after and (here / IN_PLACE / "job.json").exists():
            with pytest.raises(LoraFxError, match="is half folded"):
                lora_fx.fold_checkpoint(here, files / "r3", here, in_place=True)
            with pytest.raises(LoraFxError, match="is half folded"):
                lora_fx.fold_checkpoint(here, files / "r2", tmp_path / "other")
        with contextlib.suppress(*[LoraFxError] * (now == after)):  # folded already
            fold_in_place(files, here)
        assert visible(here) == after, f"killed at call {n}"
        assert not hidden(here), f"killed at call {n}"
        shutil.rmtree(here)
        if status == DONE:
            break
        assert status == -9
    assert seen == {"before", "between", "whole"}


def test_a_checkpoint_in_place_is_as_it_was_or_to_be_gone_on_with_when_a_call_fails(
    files: Path, tmp_path: Path
) -> None:
    results: dict[int, set[str]] = {1: set(), 2: set()}
    for shards in (1, 2):
        before = visible(files / f"shards{shards}")
        shutil.copytree(files / f"shards{shards}", tmp_path / f"whole{shards}")
        fold_in_place(files, tmp_path / f"whole{shards}")
        after = visible(tmp_path / f"whole{shards}")
        for n in range(1, MOST_CALLS):
            here = tmp_path / f"{shards}.{n}"
            shutil.copytree(files / f"shards{shards}", here)
            fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            status = run_with_fault(lambda: fold_in_place(files, here), n, fault, LoraFxError)  # noqa: B023
            assert status in (DONE, REFUSED), f"call {n} fails"
            is_begun = (here / IN_PLACE).exists()
            if status == REFUSED:
                results[shards].add("begun" if is_begun else "as it was")
                if is_begun:
                    fold_in_place(files, here)
                    assert visible(here) == after, f"call {n} fails"
                else:
                    assert visible(here) == before, f"call {n} fails"
            elif not is_begun and untouched(
                Work(copied(f"shards{shards}"), fold_in_place), files, tmp_path / "last", n
            ):
                break
            shutil.rmtree(here)
    assert results == {1: {"as it was"}, 2: {"as it was", "begun"}}


@pytest.mark.parametrize("name", ["save over another", "fold over another", "fold over another with weights beside"])
def test_a_file_that_may_not_grow_leaves_everything_as_it_was(name: str, files: Path, tmp_path: Path) -> None:
    """EFBIG, wherever the bytes are written: in Python, in protobuf, in Rust."""
    work = WORK[name]
    work.prepare(files, tmp_path)
    before, refused = visible(tmp_path), 0
    for limit in (0, 1, 17, 100, 300, 500):

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work.write(files, tmp_path)

        assert run_with_fault(limited, -1, None, LoraFxError) == REFUSED, limit
        assert visible(tmp_path) == before
        refused += 1
    assert refused


def test_the_graph_is_of_the_ir(files: Path) -> None:
    """`weights` would say little if the weights beside the graph were not read."""
    model = open_model(files / "external" / "model.onnx")
    assert any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())
