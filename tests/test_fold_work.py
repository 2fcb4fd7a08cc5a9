"""The work directory of a fold: what is written in which order, what a kill leaves, who has it, and how it goes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fx import FoldError, fold_work
from lora_fx.fold_results import FoldedSite
from lora_fx.fold_work import Beside, InPlace, clear, is_fixed, locked, remove, work_for

SITES = [
    FoldedSite("fc", "fc.weight", torch.bfloat16, 3.0, 0.5, 0.97),
    FoldedSite("head", "head.weight", torch.float32, 2.0, 0.25, 1.0, untied_from=("table.weight", "x")),
]
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to the disk, in order: paths from the test's directory, `a > b` where something moves."""
    told: list[str] = []

    def tell(owner: Any, name: str, word: str) -> None:
        call = getattr(owner, name)

        def telling(*paths: Any, **options: Any) -> Any:
            places = [str(Path(path).relative_to(tmp_path)) for path in paths if not isinstance(path, bytes)]
            told.append(f"{word} {' > '.join(places)}")
            return call(*paths, **options)

        monkeypatch.setattr(owner, name, telling)

    for name, word in (("write_durably", "write"), ("write_through", "through"), ("sync_directory", "sync")):
        tell(fold_work, name, word)
    for name in ("rename", "replace", "link"):
        tell(os, name, name)
    return told


def begun(work: Beside | InPlace) -> Beside | InPlace:
    work.path.mkdir(exist_ok=True)
    work.begin()
    return work


def part_of(work: Beside | InPlace, name: str, content: bytes = b"new") -> Path:
    (work.parts / name).write_bytes(content)
    return work.parts / name


# Where ------------------------------------------------------------------------------------------------


def test_work_lies_beside_what_is_to_be_made_or_in_what_has_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work_for(tmp_path / "out") == tmp_path / ".out.lora_fx-fold"
    assert work_for(tmp_path / "a" / "b" / "out") == tmp_path / ".out.lora_fx-fold"
    assert work_for(tmp_path / ("x" * 250)).name == f".{'x' * 100}.lora_fx-fold"
    (tmp_path / "out").mkdir()
    assert work_for(tmp_path / "out") == tmp_path / ".out.lora_fx-fold"
    assert is_fixed(tmp_path / "out") is False
    for owner, name, value in ((os.path, "ismount", True), (os, "access", False), (os, "getcwd", tmp_path / "out")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, value=value: value)
            assert is_fixed(tmp_path / "out") is True
            assert is_fixed(tmp_path / "none") is False
            assert work_for(tmp_path / "out") == tmp_path / "out" / fold_work.IN_PLACE


# Who --------------------------------------------------------------------------------------------------


def is_free(work: Path) -> bool:
    with open(work / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_lock_is_held_once_and_let_go(tmp_path: Path) -> None:
    work, umask = tmp_path / "work", os.umask(0)
    try:
        for _ in range(2):
            with locked(work, "testing"):
                assert (work / "lock").stat().st_mode & 0o777 == 0o666
                assert not is_free(work)
                with pytest.raises(FoldError, match="another process is testing"), locked(work, "testing"):
                    pytest.fail("held twice")
            assert is_free(work)
    finally:
        os.umask(umask)


def test_a_lock_of_a_directory_that_goes_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the lock is opened, and between that and the locking: by removal, or by another's new one."""
    work = tmp_path / "work"

    def first(owner: Any, name: str, before: Callable[[], object]) -> list[int]:
        call, count = getattr(owner, name), [0]

        def then(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == 1:
                before()
            return call(*arguments)

        monkeypatch.setattr(owner, name, then)
        return count

    def exchanged() -> None:
        (work / "lock").unlink()
        (work / "lock").touch()

    for owner, name, before in (
        (os, "open", work.rmdir), (fcntl, "flock", exchanged), (fcntl, "flock", lambda: (work / "lock").unlink()),
    ):  # fmt: skip
        with monkeypatch.context():
            count = first(owner, name, before)
            with locked(work, "testing"):
                assert count[0] == 2
                assert not is_free(work)
        monkeypatch.undo()
        (work / "lock").unlink()
        work.rmdir()


def test_a_lock_that_cannot_be_made_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="full"), locked(tmp_path / "work", "testing"):
        pytest.fail("held")
    assert list(tmp_path.iterdir()) == []


# What it holds ----------------------------------------------------------------------------------------


def test_work_begins_anew_unless_it_is_of_the_same(tmp_path: Path, calls: list[str]) -> None:
    work = Beside(tmp_path / "work", "key")
    assert work.known_key() is None
    for folder in ("work/old", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    (work.path / "lock").touch()
    (work.path / "link").symlink_to(tmp_path / "elsewhere")
    work.begin()
    assert sorted(path.name for path in work.path.iterdir()) == ["aside", "job.json", "lock", "new", "parts"]
    assert (tmp_path / "elsewhere" / "file").exists()
    assert calls == ["write work/job.json.new", "rename work/job.json.new > work/job.json", "sync work"]
    assert work.known_key() == "key"

    (work.new / A).touch()
    part_of(work, B)
    work.begin()
    assert [os.listdir(each) for each in (work.new, work.parts)] == [[A], []]
    Beside(work.path, "other").begin()
    assert os.listdir(work.new) == []
    assert work.known_key() == "other"

    for content in (b"", b"[]", b"{}", b'{"key": "other"}', b"\xff"):
        (work.path / "job.json").write_bytes(content)
        assert work.known_key() is None


def test_a_directory_that_was_exchanged_for_the_one_in_its_place_is_not_gone_on_with(tmp_path: Path) -> None:
    work = begun(Beside(tmp_path / "work", "key"))
    work.new.rename(tmp_path / "out")
    work.new.mkdir()
    assert work.known_key() is None


def test_what_was_done_is_noted_and_a_file_that_changed_since_is_told(tmp_path: Path, calls: list[str]) -> None:
    work = begun(Beside(tmp_path / "work", "key"))
    assert work.done() == []
    calls.clear()
    for name in (B, A):
        work.finish(name, part_of(work, name), SITES)
    assert calls[: len(calls) // 2] == [
        f"through work/parts/{B}",
        f"write work/parts/{B}.json",
        f"rename work/parts/{B}.json > work/swap-{B}",
        f"rename work/parts/{B} > work/new/{B}",
        "sync work/new",
    ]
    assert (work.new / A).read_bytes() == b"new"
    (work.new / "tokenizer.json").touch()  # which no swap- is of
    assert work.done() == [A, B]
    assert work.noted(A) == SITES
    assert json.loads((work.path / f"swap-{A}").read_text())["file"][0] == 3
    for change in (lambda: (work.new / A).write_bytes(b"newer"), lambda: os.utime(work.new / A, ns=(0, 5))):
        change()
        with pytest.raises(FoldError, match=f"{A}' was changed or exchanged since"):
            work.done()


# A directory of its own -------------------------------------------------------------------------------


def test_a_directory_takes_its_place_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (tmp_path / "fresh" / "out", tmp_path / "empty", tmp_path / "full"):
        work = begun(Beside(tmp_path / "work", str(out)))
        (work.new / A).touch()
        if out.name != "out":
            out.mkdir()
        if out.name == "full":
            (out / "old").touch()
            with monkeypatch.context() as patch:
                patch.setattr(fold_work, "replace_directory", lambda *_: False)
                with pytest.raises(FoldError, match="cannot be replaced in one step here"):
                    work.publish(out)
            assert os.listdir(out) == ["old"]
        work.publish(out)
        assert os.listdir(out) == [A]
        assert work.new.exists() == (out.name == "full")  # which is the old one then


def test_a_directory_that_has_to_stay_is_filled_last_with_what_leads_to_the_rest(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    work = begun(Beside(out / fold_work.IN_PLACE, "key"))
    names = ["a.json", A, "z.txt", "config.json", "model.safetensors.index.json"]
    for name in names:
        (work.new / name).touch()
    replace: Callable[..., None] = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError(errno.ENOSPC, "full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="full"):
            work.publish(out)
    assert os.listdir(out) == [fold_work.IN_PLACE]

    for name in names:
        (work.new / name).touch()
    calls.clear()
    work.publish(out)
    new = f"out/{fold_work.IN_PLACE}/new"
    assert calls == [*(f"replace {new}/{name} > out/{name}" for name in names), "sync out"]


# In place ---------------------------------------------------------------------------------------------


def checkpoint(tmp_path: Path, *, keeps_old: bool = False) -> InPlace:
    """Work in a directory of two shards and a config."""
    out = tmp_path / "out"
    out.mkdir()
    for name in (A, B, "config.json"):
        (out / name).write_bytes(b"old")
    work = begun(InPlace(out / "w", "key", keeps_old))
    assert isinstance(work, InPlace)
    return work


def test_a_shard_takes_the_old_one_s_place_when_that_is_noted(tmp_path: Path, calls: list[str]) -> None:
    work = checkpoint(tmp_path)
    (work.directory / A).chmod(0o640)
    calls.clear()
    work.finish(A, part_of(work, A), SITES)
    assert calls == [
        f"through out/w/parts/{A}",
        f"rename out/w/parts/{A} > out/w/ready-{A}",
        "sync out/w",
        f"write out/w/parts/{A}.json",
        f"rename out/w/parts/{A}.json > out/w/swap-{A}",
        "sync out/w",
        f"rename out/w/ready-{A} > out/{A}",
        "sync out",
        "sync out/w",
    ]
    assert (work.directory / A).read_bytes() == b"new"
    assert (work.directory / A).stat().st_mode & 0o777 == 0o640
    assert work.done() == [A]
    assert work.noted(A) == SITES
    (work.directory / A).write_bytes(b"another")
    with pytest.raises(FoldError, match="was changed or exchanged"):
        work.done()


def test_a_shard_that_was_about_to_take_its_place_does_so(tmp_path: Path) -> None:
    work = checkpoint(tmp_path)
    for name in (B, A):
        work.finish(name, part_of(work, name), SITES)
    (work.directory / A).rename(work.path / f"ready-{A}")  # killed before this
    (work.directory / A).write_bytes(b"old")
    assert work.done() == [A, B]
    assert (work.directory / A).read_bytes() == b"new"
    assert not list(work.path.glob("ready-*"))


def test_what_leads_to_the_shards_is_set_aside_and_put_back(tmp_path: Path, calls: list[str]) -> None:
    work = checkpoint(tmp_path)
    calls.clear()
    work.set_aside(["config.json", "model.safetensors.index.json"])
    assert calls == ["rename out/config.json > out/w/aside/config.json", "sync out/w/aside", "sync out"]
    assert os.listdir(work.aside) == ["config.json"]
    calls.clear()
    work.put_back()
    assert calls == ["rename out/w/aside/config.json > out/config.json", "sync out"]
    work.aside.rmdir()
    work.put_back()
    assert sorted(os.listdir(work.directory)) == ["config.json", A, B, "w"]


@pytest.mark.parametrize("keeps_old", [True, False])
def test_an_only_shard_that_was_kept_is_put_back(keeps_old: bool, tmp_path: Path, calls: list[str]) -> None:
    work = checkpoint(tmp_path, keeps_old=keeps_old)
    assert work.take_back()
    work.finish(A, part_of(work, A), SITES)
    assert (f"link out/{A} > out/w/old-{A}" in calls) is keeps_old
    assert work.take_back() is keeps_old
    assert (work.directory / A).read_bytes() == (b"old" if keeps_old else b"new")
    assert work.done() == ([] if keeps_old else [A])


def test_a_shard_that_was_kept_and_not_yet_exchanged_is_put_back(tmp_path: Path) -> None:
    work = checkpoint(tmp_path, keeps_old=True)
    os.link(work.directory / A, work.path / f"old-{A}")  # and what came then failed
    assert work.take_back()
    assert (work.directory / A).read_bytes() == b"old"


# Its end ----------------------------------------------------------------------------------------------


def test_work_is_removed_under_another_name(tmp_path: Path, calls: list[str]) -> None:
    """With what is left of an earlier removal."""
    work, gone = tmp_path / "work", tmp_path / "work.gone"
    for folder in (work, gone):
        (folder / "new").mkdir(parents=True)
    clear(work)
    assert os.listdir(tmp_path) == ["work"]
    gone.mkdir()
    (gone / "file").touch()
    remove(work)
    assert calls == ["rename work > work.gone"]
    assert list(tmp_path.iterdir()) == []
    remove(work)  # which is gone
    clear(work)
