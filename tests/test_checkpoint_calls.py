"""What `fold_checkpoint` refuses, writes and says, and in which order; on files that take no model."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import low_rank, noted, tensors_of, write_adapter, write_base

import lora_fx
from lora_fx import AdapterError, FoldError, checkpoint, checkpoint_folding, fold_work, fold_workers
from lora_fx.adapter_arrays import map_adapter
from lora_fx.checkpoint_folding import Hands, Options, Order
from lora_fx.fold_history import RECORD, history_with, refuse_twice
from lora_fx.fold_work import Beside, InPlace
from lora_fx.hf_checkpoint import read_checkpoint
from lora_fx.shard_writing import write_shard

fold = lora_fx.fold_checkpoint
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ENTRY_KEYS = {"adapter", "r", "lora_alpha", "use_rslora"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two linears, each in a shard, with more files."""
    torch.manual_seed(5)
    tensors = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(4, 5)}
    directory = write_base(tensors, tmp_path / "base", 2, model_type="x")
    (directory / "more" / "deep").mkdir(parents=True)
    for file in ("more/deep/words.txt", "more/words.txt", f"more/{RECORD}", "zero.txt"):
        (directory / file).write_text(file)
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of both linears."""
    return write_adapter(tmp_path / "adapter", low_rank("a", 5, 3) | low_rank("b", 4, 5))


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def order_of(base: Path, adapter: Path, **options: Any) -> Order:
    arrays, let_go = map_adapter(adapter)
    return Order(replace(Options(base, adapter, "default", None), **options), arrays, let_go, Hands(1, 1, None))


# What is asked for -------------------------------------------------------------------------------------

WRONG = [
    ("base", None), ("base", ""), ("base", "a\0b"), ("base", b"x"), ("adapter", None), ("adapter", 3), ("out", None),
    ("in_place", "no"), ("in_place", None), ("overwrite", 1), ("adapter_name", None), ("adapter_name", 3),
    ("workers", 0), ("workers", True), ("workers", 1.5), ("workers", "2"), ("progress", 3),
    ("accumulate", torch.float16), ("accumulate", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_each_argument_of_a_wrong_type_is_told(name: str, value: object, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"base": tmp_path / "b", "adapter": tmp_path / "a", "out": tmp_path / "o"}
    with pytest.raises(FoldError) as caught:
        fold(**arguments | {name: value})
    assert str(caught.value).startswith(f"{name}={value!r} must be ")
    assert list(tmp_path.iterdir()) == []


class BytesPath:
    """A path of bytes, which os.PathLike may be."""

    def __fspath__(self) -> bytes:
        return b"x"


def test_paths_are_text(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FoldError, match="^out=.* must be the path of a directory"):
        fold(base, adapter, BytesPath())  # type: ignore[arg-type]
    assert fold(str(base), str(adapter), str(tmp_path / "out")).shards == 2


@pytest.mark.parametrize(
    ("threads", "workers", "each"), [(1, 1, 1), (3, 1, 3), (9, 1, 4), (3, 2, 1), (8, 2, 4), (3, 8, 1)]
)
def test_threads_are_shared_out_and_torch_has_one(
    threads: int, workers: int, each: int, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Hands, int]] = []
    beside = checkpoint.fold_beside

    def looked_at(order: Order, out: Path) -> Any:
        seen.append((order.hands, torch.get_num_threads()))
        return beside(replace(order, hands=replace(order.hands, workers=1)), out)

    monkeypatch.setattr(checkpoint, "fold_beside", looked_at)
    torch.set_num_threads(threads)
    try:
        fold(base, adapter, tmp_path / "out", workers=workers)
        assert torch.get_num_threads() == threads
        with pytest.raises(FoldError):
            fold(base, adapter, base / "none" / "in" / "base", workers=workers)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert seen == [(Hands(workers, each, None), 1)]


@pytest.mark.parametrize(("number", "fix"), [
    (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "look at the permissions"),
])  # fmt: skip
def test_what_the_file_system_refuses_is_told(
    number: int, fix: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "fold_beside", raising(OSError(number, "why")))
    with pytest.raises(FoldError, match=f"cannot fold into '.*out': why; {fix}") as caught:
        fold(base, adapter, tmp_path / "out")
    assert isinstance(caught.value.__cause__, OSError)


def test_places_that_are_not_free_are_told(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    before = content(tmp_path)
    for out, options, words in (
        (tmp_path / "file", {}, "is a file; give a directory to make"),
        (tmp_path / "file", {"overwrite": True}, "is a file; give a directory to make"),
        (tmp_path / ("x" * 300), {}, "cannot fold into"),
        (base, {}, "is, holds or lies in the base"),
        (base / "out", {}, "is, holds or lies in the base"),
        (tmp_path, {"overwrite": True}, "is, holds or lies in the base"),
        (tmp_path / "full", {}, "is not empty; overwrite=True"),
        (tmp_path / "full", {"overwrite": True}, "so it is no model directory"),
        (tmp_path / "other", {"in_place": True}, "so out=.*other' must be it"),
    ):
        with pytest.raises(FoldError, match=words):
            fold(base, adapter, out, **options)  # type: ignore[arg-type]
    with pytest.raises(FoldError, match="there is no directory '.*none' to fold into"):
        fold(tmp_path / "none", adapter, tmp_path / "none", in_place=True)
    assert content(tmp_path) == before

    (tmp_path / "full" / "config.json").touch()
    with pytest.raises(FoldError, match="is not empty; overwrite=True"):
        fold(base, adapter, tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "full")
        with pytest.raises(FoldError, match="or where you stand"):
            fold(base, adapter, ".", overwrite=True)
    fold(base, adapter, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "x").exists()


# What is written and said ------------------------------------------------------------------------------


def test_the_report_says_what_was_done(base: Path, tmp_path: Path) -> None:
    tensors = low_rank("a", 5, 3) | {"b.weight": torch.ones(4, 5)}
    adapter = write_adapter(tmp_path / "adapter" / "name", tensors, modules_to_save=["b"])
    (base / "old.bin").touch()
    told: list[tuple[int, int]] = []
    report = fold(
        base, tmp_path / "adapter", tmp_path / "out", adapter_name="name", progress=lambda *two: told.append(two)
    )
    size = sum((tmp_path / "out" / name).stat().st_size for name in (ONE, TWO))
    assert [site.weight for site in report.sites] == ["a.weight"]
    assert vars(report) | {"sites": 0, "seconds": 0} == {
        "path": str(tmp_path / "out"), "adapter": str(adapter.parent), "sites": 0, "trained": ("b.weight",),
        "shards": 2, "resumed": 0, "bytes_written": size, "seconds": 0,
        "notes": ("not copied, as they hold the base's weights, or an adapter: old.bin",),
    }  # fmt: skip
    assert 0 < report.seconds < 60
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][0] < size / 2
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    delta = 3 / 2 * tensors["a.lora_B.weight"] @ tensors["a.lora_A.weight"]
    torch.testing.assert_close(after["a.weight"], before["a.weight"] + delta)
    assert torch.equal(after["b.weight"], torch.ones(4, 5))
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) | {"sites": 0} == json.loads(json.dumps(vars(report) | {"sites": 0}))
    assert plain["sites"] == [vars(report.sites[0]) | {"dtype": "torch.float32"}]
    text = str(report)
    assert "replaced, because the adapter trained them in full: b.weight" in text
    assert "2 shards, " in text
    assert "interruption" not in text
    assert "old.bin" in text
    assert "2 shards, 1 of them before an interruption" in str(replace(report, resumed=1))
    assert "trained them in full" not in str(replace(report, trained=()))


def test_a_report_without_remarks_has_none(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert fold(base, adapter, tmp_path / "out").notes == ()
    with pytest.raises(AdapterError, match="has no seal"):
        fold(base, adapter, tmp_path / "sealed", integrity="required")


def test_losses_are_warned_of(tmp_path: Path) -> None:
    base = write_base({"a.weight": torch.ones(5, 3).bfloat16()}, tmp_path / "base", 1)
    small = {name: tensor * 0.02 for name, tensor in low_rank("a", 5, 3).items()}
    with pytest.warns(lora_fx.LoraFxWarning, match="keeps only"):
        fold(base, write_adapter(tmp_path / "adapter", small), tmp_path / "out")


def test_all_other_files_are_copied_and_on_the_disk(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(checkpoint_folding, "write_through", lambda path: synced.append(path.name))
    (base / "config.json").write_text('{"model_type": "\u00e9"}', "utf-8")
    (base / RECORD).write_text(json.dumps({"folds": ["earlier"]}))
    fold(base, adapter, tmp_path / "out")
    before, after = content(base), content(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {ONE, TWO, RECORD}
    assert sorted(synced) == sorted([INDEX, "config.json", "words.txt", "words.txt", RECORD, "zero.txt"])
    text = after[RECORD].decode()
    noted = json.loads(text)["folds"]
    assert noted[0] == "earlier"
    assert noted[1].keys() == ENTRY_KEYS
    assert (noted[1]["r"], noted[1]["lora_alpha"], noted[1]["use_rslora"]) == (2, 3, False)
    assert text.startswith('{\n  "folds": [\n    "earlier"')
    assert text.endswith("}\n")


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, Path]:
    """A decoder whose head is its table, with an adapter of the head and one of a linear."""
    tensors = {"model.embed_tokens.weight": torch.randn(7, 3), "model.a.weight": torch.randn(5, 3)}
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "note": "\u00e9"}
    base = write_base(tensors, tmp_path / "tied", 2, **config)
    return base, write_adapter(tmp_path / "of_head", low_rank("lm_head", 7, 3) | low_rank("model.a", 5, 3))


@pytest.mark.parametrize(("metadata", "wanted"), [
    ({"metadata": {"total_size": 7, "more": 1}}, {"metadata": {"total_size": 7 + 84, "more": 1}}),
    ({"metadata": {"total_size": "7"}}, {"metadata": {"total_size": "7"}}),
    ({"metadata": {}}, {"metadata": {}}), ({"metadata": 3}, {"metadata": 3}), ({}, {}),
])  # fmt: skip
def test_an_untied_head_is_in_index_and_config(
    metadata: dict[str, Any], wanted: dict[str, Any], tied: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = tied
    places = json.loads((base / INDEX).read_text())["weight_map"]
    (base / INDEX).write_text(json.dumps(metadata | {"weight_map": places, "also": 5}))
    with pytest.warns(lora_fx.LoraFxWarning, match="was tied"):
        fold(base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    grown = places | {"lm_head.weight": places["model.embed_tokens.weight"]}
    assert index == wanted | {"weight_map": grown, "also": 5}
    config = (tmp_path / "out" / "config.json").read_text("utf-8")
    assert json.loads(config)["tie_word_embeddings"] is False
    assert "\u00e9" in config
    assert '\n  "note"' in config
    assert "lm_head.weight" in tensors_of(tmp_path / "out")


def test_a_fold_that_was_killed_before_its_end_is_gone_on_with(
    tied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where all is written, and files are that are written anew."""
    base, adapter = tied
    with monkeypatch.context() as patch:
        patch.setattr(Beside, "publish", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fold(base, adapter, tmp_path / "out")
    told: list[tuple[int, int]] = []
    with pytest.warns(lora_fx.LoraFxWarning, match="was tied"):
        report = fold(base, adapter, tmp_path / "out", progress=lambda *two: told.append(two))
    assert (report.resumed, report.shards, len(report.sites)) == (2, 2, 2)
    assert told == []
    assert (
        json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    )


def test_a_directory_that_has_to_stay_is_gone_on_with(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    def killed(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, adapter, ".", progress=killed)
    assert os.listdir() == [fold_work.IN_PLACE]
    told: list[int] = []
    report = fold(base, adapter, ".", progress=lambda done, total: told.append(done))
    assert report.resumed == 1
    assert told[0] > (base / ONE).stat().st_size
    monkeypatch.chdir(tmp_path)
    fold(base, adapter, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_an_earlier_call_left_is_removed(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.lora_fx-fold.gone").mkdir()
    (base / ".lora_fx-fold.gone").mkdir()
    for out, gone, in_place in (
        (tmp_path / "out", tmp_path / ".out.lora_fx-fold.gone", False), (base, base / ".lora_fx-fold.gone", True),
    ):  # fmt: skip
        seen: list[bool] = []
        fold(
            base, adapter, out, in_place=in_place, progress=lambda *_, gone=gone, seen=seen: seen.append(gone.exists())
        )
        assert set(seen) == {False}, "its room is needed"
        assert not gone.exists()
    assert not (tmp_path / ".out.lora_fx-fold").exists()
    assert not (base / ".lora_fx-fold").exists()


def test_a_base_that_changed_since_a_kill_is_folded_anew(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Beside, "publish", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fold(base, adapter, tmp_path / "out")
    os.utime(base / TWO, ns=(0, 7))
    assert fold(base, adapter, tmp_path / "out").resumed == 0


# What keeps two folds apart ----------------------------------------------------------------------------


def test_a_fold_goes_on_only_with_its_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The key of a fold: of the adapter, its configuration, options, headers; beside it, of all files' states."""

    def key(is_in_place: bool, order: Order | None = None) -> str:
        return checkpoint_folding._key(
            read_checkpoint(base, FoldError), order or order_of(base, adapter), is_in_place=is_in_place
        )

    own = order_of(base, adapter)
    before = {is_in_place: key(is_in_place) for is_in_place in (False, True)}
    assert len(set(before.values())) == 2
    assert len(before[True]) == 64
    others = [
        order_of(base, adapter, accumulate=torch.float64),
        replace(own, adapter=replace(own.adapter, sha256="0")),
        replace(own, adapter=replace(own.adapter, config=lora_fx.LoraConfig(r=2, lora_alpha=5))),
    ]
    for is_in_place in (False, True):
        assert {key(is_in_place, other) for other in others}.isdisjoint(before.values())
        assert len({key(is_in_place, other) for other in others}) == 3
    config = own.adapter.config.to_peft()
    turned = SimpleNamespace(to_peft=lambda: dict(reversed(config.items())), **{})
    same = replace(own, adapter=replace(own.adapter, config=turned))  # type: ignore[arg-type]
    assert key(True, same) == before[True]
    odd = SimpleNamespace(to_peft=lambda: {"x": Path("y")})
    assert key(True, replace(own, adapter=replace(own.adapter, config=odd))) != before[True]  # type: ignore[arg-type]

    for file in ("zero.txt", ONE):
        os.utime(base / file, ns=(0, 10**9))
        assert key(True) == before[True]
        assert key(False) != before[False]
        before[False] = key(False)
    (base / "zero.txt").unlink()
    assert key(True) == before[True]
    tensors = tensors_of(base)
    write_base({"a.weight": tensors["a.weight"], "c.weight": tensors["b.weight"]}, tmp_path / "renamed", 2)
    shutil.copy(tmp_path / "renamed" / TWO, base / TWO)
    shutil.copy(tmp_path / "renamed" / INDEX, base / INDEX)
    assert key(True) != before[True]


def test_a_base_that_changes_meanwhile_gives_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_folding._write_companions

    def changing(*arguments: Any) -> None:
        write(*arguments)
        os.utime(base / ONE, ns=(0, 7))

    monkeypatch.setattr(checkpoint_folding, "_write_companions", changing)
    with pytest.raises(FoldError, match="changed while they were folded"):
        fold(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_what_was_folded_before_is_noted_and_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    order = order_of(base, adapter)
    refuse_twice(base, order.entry, adapter)
    for text in ('{"folds": 3}', "{}", '{"folds": [3, {"adapter": "x"}, null]}'):
        (base / RECORD).write_text(text)
        refuse_twice(base, order.entry, adapter)
    assert history_with(base, order.entry) == {"folds": [3, {"adapter": "x"}, None, order.entry]}
    (base / RECORD).write_text(json.dumps({"folds": [order.entry, {"adapter": "x"}]}))
    assert history_with(base, order.entry) == {"folds": [{"adapter": "x"}, order.entry]}
    for out, in_place in ((tmp_path / "out", False), (base, True)):
        with pytest.raises(FoldError, match=r"adapter' is folded into '.*base' already \(lora_fx_fold.json says so\)"):
            fold(base, adapter, out, in_place=in_place)
    assert not (base / fold_work.IN_PLACE).exists()


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for work, sizes, needed in (
        (Beside(tmp_path, ""), [5, 7], 12), (InPlace(tmp_path, ""), [5, 7], 7), (InPlace(tmp_path, ""), [], 0),
    ):  # fmt: skip
        for free, is_enough in ((needed + 2**20, True), (needed + 2**20 - 1, False)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            if is_enough:
                checkpoint_folding._check_room(work, sizes)
                continue
            with pytest.raises(FoldError, match="make room") as caught:
                checkpoint_folding._check_room(work, sizes)
            assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("in_place", [True, False])
def test_without_room_nothing_changes(
    in_place: bool, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(FoldError, match="make room"):
        fold(base, adapter, base if in_place else tmp_path / "out", in_place=in_place)
    assert content(tmp_path) == before
    assert not (base / fold_work.IN_PLACE).exists()


# Who folds ---------------------------------------------------------------------------------------------


def test_processes_fold_where_there_are_shards_for_several(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def here(options: Options, work: Any, names: list[str], sizes: dict[str, int], hands: Hands) -> Iterator[Any]:
        asked.append(names)
        order = order_of(options.base, options.adapter)
        read, plan = checkpoint_folding._planned(order)
        for name in reversed(names):
            job = checkpoint_folding.job_of(read, plan, name, None, order.let_go)
            assert job.size == sizes[name]
            yield name, work.parts / "part", write_shard(job, work.parts / "part")

    monkeypatch.setattr(fold_workers, "fold_in_processes", here)
    told: list[tuple[int, int]] = []
    fold(base, adapter, tmp_path / "two", workers=2, progress=lambda *two: told.append(two))
    assert asked == [[ONE, TWO]]
    sizes = [(tmp_path / "two" / name).stat().st_size for name in (TWO, ONE)]
    assert told == [(sizes[0], sum(sizes)), (sum(sizes), sum(sizes))]
    fold(base, adapter, tmp_path / "one", workers=1)
    only = write_base(tensors_of(base), tmp_path / "only", 1)
    fold(only, adapter, tmp_path / "single", workers=2)
    assert len(asked) == 1
    assert tensors_of(tmp_path / "single").keys() == tensors_of(tmp_path / "one").keys()
    for name, tensor in tensors_of(tmp_path / "one").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "two")[name])
        assert torch.equal(tensor, tensors_of(tmp_path / "single")[name])


def test_each_shard_has_the_threads(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def write(job: Any, part: Path) -> Any:
        seen.append(job.threads)
        return write_shard(job, part)

    monkeypatch.setattr(checkpoint_folding, "write_shard", write)
    order = replace(order_of(base, adapter), hands=Hands(1, 3, None))
    checkpoint_folding.fold_beside(order, tmp_path / "out")
    assert seen == [3, 3]


@pytest.mark.parametrize("failing", [ONE, TWO])
def test_a_shard_that_the_disk_did_not_take_is_told(
    failing: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Beside.finish

    def full(self: Beside, name: str, *arguments: Any) -> None:
        finish(self, name, *arguments)
        if name == failing:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Beside, "finish", full)
    with pytest.raises(FoldError, match="full; make room"):
        fold(base, adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


# In place ----------------------------------------------------------------------------------------------


def test_in_place_only_shards_that_change_are_written(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", low_rank("b", 4, 5))
    before = content(base)
    fold(base, adapter, tmp_path / "out")
    report = fold(base, adapter, base, in_place=True)
    after = content(base)
    assert {name for name in after if after[name] != before.get(name)} == {TWO, RECORD}
    assert after == content(tmp_path / "out")
    assert (report.shards, report.resumed, report.bytes_written) == (1, 0, len(after[TWO]))
    assert [site.weight for site in report.sites] == ["b.weight"]


def killed_after_one(base: Path, adapter: Path) -> None:
    """A fold in place whose first shard is done, and whose second is not."""
    seen: set[str] = set()

    def killed(done: int, total: int) -> None:
        seen.update(os.listdir(base))
        if done > 0.6 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold(base, adapter, base, in_place=True, progress=killed)
    assert not {"config.json", INDEX} & seen


def test_a_fold_in_place_that_was_killed_is_gone_on_with(base: Path, adapter: Path, tmp_path: Path) -> None:
    fold(base, adapter, tmp_path / "out")
    killed_after_one(base, adapter)
    other = write_adapter(tmp_path / "other", low_rank("a", 5, 3, 4), r=4)
    state = content(base)
    for out, in_place in ((base, True), (tmp_path / "x", False)):
        with pytest.raises(FoldError, match="base' is half folded: a fold in place of another adapter, or"):
            fold(base, other, out, in_place=in_place)
    assert content(base).keys() == state.keys()
    assert not (tmp_path / "x").exists()
    report = fold(base, adapter, base, in_place=True)
    assert (report.shards, report.resumed, len(report.sites)) == (2, 1, 2)
    assert content(base) == content(tmp_path / "out")
    assert not (base / fold_work.IN_PLACE).exists()


def test_what_was_noted_of_the_base_is_looked_for_before_the_first_shard_changes(base: Path, tmp_path: Path) -> None:
    tensors = tensors_of(base)
    weights, factors = [tensors["a.weight"], tensors["b.weight"]], low_rank("a", 5, 3) | low_rank("b", 4, 5)
    other = write_adapter(tmp_path / "other", factors, noted([weight + 1 for weight in weights]))
    for out, in_place in ((tmp_path / "out", False), (base, True)):
        with pytest.raises(AdapterError, match="over a base model with other weights"):
            fold(base, other, out, in_place=in_place)
    own = write_adapter(tmp_path / "own", factors, noted(weights))
    killed_after_one(base, own)
    assert fold(base, own, base, in_place=True).resumed == 1


def test_a_fold_that_was_killed_at_its_very_end_is_ended(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold(base, adapter, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folding, "remove", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fold(base, adapter, base, in_place=True)
    assert content(tmp_path / "out").items() <= content(base).items()
    assert fold(base, adapter, base, in_place=True).resumed == 2
    assert content(base) == content(tmp_path / "out")


def test_an_only_shard_is_never_half_folded(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = write_base(tensors_of(base), tmp_path / "own", 1, model_type="x")
    seen: list[bool] = []
    fold(own, adapter, own, in_place=True, progress=lambda *_: seen.append((own / "config.json").exists()))
    assert set(seen) == {True}
    seen.clear()
    of_b = write_adapter(tmp_path / "of_b", low_rank("b", 4, 5))
    fold(base, of_b, base, in_place=True, progress=lambda *_: seen.append((base / "config.json").exists()))
    assert set(seen) == {True}


def test_what_is_done_is_not_looked_at_again(tmp_path: Path) -> None:
    """A delta that float16 has room for once."""
    half = torch.float16
    tensors = {"a.weight": torch.ones(5, 3, dtype=half), "b.weight": torch.ones(4, 5, dtype=half)}
    base = write_base(tensors, tmp_path / "base", 2, model_type="x")
    factors = low_rank("b", 4, 5) | {"a.lora_A.weight": torch.full((2, 3), 2e4), "a.lora_B.weight": torch.ones(5, 2)}
    adapter = write_adapter(tmp_path / "adapter", factors, lora_alpha=2)
    killed_after_one(base, adapter)
    assert fold(base, adapter, base, in_place=True).resumed == 1


def test_a_lock_that_was_left_in_the_base_is_no_half_fold(base: Path, adapter: Path, tmp_path: Path) -> None:
    fold(base, adapter, tmp_path / "out")
    (base / fold_work.IN_PLACE).mkdir()
    (base / fold_work.IN_PLACE / "lock").touch()
    fold(base, adapter, base, in_place=True)
    assert content(base) == content(tmp_path / "out")


def test_a_base_of_one_shard_without_config_or_index_is_folded_in_place(base: Path, tmp_path: Path) -> None:
    own = write_base(tensors_of(base), tmp_path / "own", 1)
    adapter = write_adapter(tmp_path / "adapter", low_rank("b", 4, 5))
    fold(own, adapter, own, in_place=True)
    assert sorted(os.listdir(own)) == [RECORD, "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), FoldError("no luck"), OSError("no number")])
def test_a_base_that_is_left_half_folded_says_so(
    error: Exception, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold(base, adapter, tmp_path / "out")
    finish = InPlace.finish

    def failing(self: InPlace, name: str, *arguments: Any) -> None:
        if name == TWO:
            raise error
        finish(self, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(InPlace, "finish", failing)
        why = str(error).removeprefix(f"[Errno {errno.ENOSPC}] ")
        with pytest.raises(FoldError, match=f"is half folded, and cannot be loaded as it is: {why}. Mend that"):
            fold(base, adapter, base, in_place=True)
    assert not (base / "config.json").exists()
    fold(base, adapter, base, in_place=True)
    assert content(base) == content(tmp_path / "out")


@pytest.mark.parametrize("name", ["write_shard", "_write_json", "history_with"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_is_as_it_was_where_that_can_be(
    name: str, shards: int, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first of several shards changed, and where the only one was kept."""
    own = write_base(tensors_of(base), tmp_path / "own", shards, model_type="x")
    before = content(own)
    monkeypatch.setattr(checkpoint_folding, name, raising(OSError(errno.ENOSPC, "full")))
    with pytest.raises(FoldError, match="full"):
        fold(own, adapter, own, in_place=True)
    is_half = shards == 2 and name != "write_shard"
    assert (own / fold_work.IN_PLACE).exists() == is_half
    assert is_half or content(own) == before


def test_a_base_whose_index_cannot_be_set_aside_is_as_it_was(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = content(base), os.rename

    def failing(source: Path, target: Path) -> None:
        if target == base / fold_work.IN_PLACE / "aside" / INDEX:
            raise OSError(errno.EACCES, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(FoldError, match="look at the permissions"):
        fold(base, adapter, base, in_place=True)
    assert content(base) == before
    assert not (base / fold_work.IN_PLACE).exists()


def test_what_is_not_finite_is_found_before_the_first_shard_changes(base: Path, tmp_path: Path) -> None:
    huge = {name: tensor * 1e30 for name, tensor in low_rank("b", 4, 5).items()}
    adapter = write_adapter(tmp_path / "adapter", low_rank("a", 5, 3) | huge)
    before = content(base)
    told: list[int] = []
    with pytest.raises(FoldError, match=r"folding 'b' \(b.weight\): \|W \+ ΔW\| goes beyond"):
        fold(base, adapter, base, in_place=True, progress=lambda done, total: told.append(done))
    assert told == []
    assert content(base) == before
    assert not (base / fold_work.IN_PLACE).exists()


def test_what_cannot_be_folded_in_place_is_told(tied: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = tied
    with pytest.raises(FoldError, match="'lm_head.weight' cannot be folded in place: it is tied"):
        fold(base, adapter, base, in_place=True)
    table = tensors_of(base)["model.embed_tokens.weight"]
    names = ("model.embed_tokens", "lm_head")
    both = {f"{name}.weight": table + i for i, name in enumerate(names)}
    own = write_base(both | {"model.a.weight": torch.ones(5, 3)}, tmp_path / "own", 1)
    shutil.copy(base / "config.json", own)
    saved = {f"{name}.weight": table - i for i, name in enumerate(names)}
    of_both = write_adapter(
        tmp_path / "of_both", saved | low_rank("model.a", 5, 3), modules_to_save=["embed_tokens", "lm_head"]
    )
    with pytest.raises(FoldError, match="'the table and the head' cannot be folded in place"):
        fold(own, of_both, own, in_place=True)

    shutil.move(own / "model.safetensors", own / "real.safetensors")
    (own / "model.safetensors").symlink_to("real.safetensors")
    of_a = write_adapter(tmp_path / "of_a", low_rank("model.a", 5, 3))
    with pytest.raises(FoldError, match="'model.safetensors' in '.*own' is a link"):
        fold(own, of_a, own, in_place=True)
    assert not (own / fold_work.IN_PLACE).exists()
