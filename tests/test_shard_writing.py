"""One shard, from file to file: each byte that is not adapted stays, and each weight is W + Δ, whatever is added."""

from __future__ import annotations

import errno
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import bits, low_rank, tensors_of, write_adapter, write_base
from safetensors.torch import load_file

from lora_fx import FoldError, merging, shard_writing
from lora_fx.adapter_arrays import LowRankArrays, map_adapter
from lora_fx.checkpoint_changes import BiasOfB, Change, LowRank, Rows, Term, Whole
from lora_fx.checkpoint_plan import plan_fold
from lora_fx.fold_results import FoldedSite
from lora_fx.hf_checkpoint import Checkpoint, read_checkpoint
from lora_fx.layouts import Experts, Kernel, Layout, Matrix
from lora_fx.shard_writing import ShardJob, check_finite, job_of, write_shard
from lora_fx.stored_tensors import StoredTensor

FLOAT16, FLOAT32, BFLOAT16 = torch.float16, torch.float32, torch.bfloat16


def checkpoint(tensors: dict[str, torch.Tensor], directory: Path) -> Checkpoint:
    return read_checkpoint(write_base(tensors, directory / "base", 1), FoldError)


def array(values: torch.Tensor) -> Any:
    return values.view(torch.uint16).numpy() if values.dtype == BFLOAT16 else values.numpy()


def low(a: torch.Tensor, b: torch.Tensor, layout: Layout, magnitude: torch.Tensor | None = None) -> LowRank:
    """A term of scaling 3 / 2."""
    return LowRank(
        LowRankArrays("w", 0, array(a), array(b), magnitude=None if magnitude is None else array(magnitude)),
        layout,
        1.5,
    )


def change(tensor: StoredTensor, *terms: Term, name: str | None = None) -> Change:
    return Change(tensor, name or tensor.name, tensor.name.removesuffix(".weight"), terms)


class Count:
    """What is told, and how often pages are let go."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.let_go = 0

    def go(self) -> None:
        self.let_go += 1


def job_for(base: Checkpoint, *changes: Change, accumulate: Any = None, threads: int = 1) -> tuple[ShardJob, Count]:
    count = Count()
    return ShardJob(base.shards[0], changes, accumulate, count.go, count.told.append, threads), count


def written(tmp_path: Path, base: Checkpoint, *changes: Change, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """(the tensors of the result, the sites)."""
    job, count = job_for(base, *changes, **options)
    sites = write_shard(job, tmp_path / "out.safetensors")
    assert sum(count.told) == job.size == (tmp_path / "out.safetensors").stat().st_size
    assert count.let_go == len(changes)
    return load_file(tmp_path / "out.safetensors"), sites


def one(tmp_path: Path, weight: torch.Tensor, *terms: Term, **options: Any) -> tuple[torch.Tensor, FoldedSite]:
    """(the result for a single weight, what was done to it)."""
    base = checkpoint({"w.weight": weight}, tmp_path)
    found, sites = written(tmp_path, base, change(base.tensors["w.weight"], *terms), **options)
    return found["w.weight"], sites[0]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BLOCK", 1 << 3)
    monkeypatch.setattr(shard_writing, "_PIECE", 5)
    monkeypatch.setattr(shard_writing, "_COPIED", 9)
    monkeypatch.setattr(shard_writing, "_BUFFER", 4)


# Bytes -------------------------------------------------------------------------------------------------


def several(tmp_path: Path) -> tuple[Checkpoint, list[Change], dict[str, torch.Tensor]]:
    """Weights that change among tensors that do not, and the result."""
    base = checkpoint(
        {
            "first": torch.arange(7), "a.weight": torch.randn(5, 3), "between": torch.randn(3).half(),
            "b.weight": torch.randn(4, 5).bfloat16(), "c.weight": torch.randn(3, 7), "d.weight": torch.randn(3),
            "empty": torch.empty(0, 3), "last": torch.arange(11, dtype=torch.uint8),
        },
        tmp_path,
    )  # fmt: skip
    before = tensors_of(base.directory)
    a, b, whole = torch.randn(2, 3), torch.randn(5, 2), torch.randn(3, 7)
    changes = [
        change(base.tensors["a.weight"], low(a, b, Matrix(5, 3))),
        change(base.tensors["c.weight"], Whole(whole.numpy())),
        change(base.tensors["b.weight"], Whole(torch.ones(4, 5).numpy())),
    ]
    wanted = before | {
        "a.weight": before["a.weight"] + 1.5 * b @ a,
        "c.weight": whole,
        "b.weight": torch.ones(4, 5).bfloat16(),
    }
    return base, changes, wanted


def assert_written(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, msg=name)


def without(name: str) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda patch: patch.delattr(os, name)


def refusing(number: int) -> Callable[[pytest.MonkeyPatch], Any]:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def refuse(*_: Any) -> int:
            calls.append(number)
            assert len(calls) == 1, "asked again"
            raise OSError(number, "no")

        patch.setattr(os, "copy_file_range", refuse)

    return prepare


def in_pieces(patch: pytest.MonkeyPatch) -> None:
    write, copy = os.pwrite, os.copy_file_range
    patch.setattr(os, "pwrite", lambda descriptor, data, at: write(descriptor, data[:3], at))
    patch.setattr(os, "copy_file_range", lambda source, into, count, *at: copy(source, into, min(count, 2), *at))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "system",
    [lambda patch: None, in_pieces, without("copy_file_range"), without("posix_fadvise")]
    + [refusing(n) for n in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)],
)
def test_what_does_not_change_is_copied_whatever_the_system_can(
    system: Callable[[pytest.MonkeyPatch], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, changes, wanted = several(tmp_path)
    for most in (1, 9, 1 << 26):
        with monkeypatch.context() as patch:
            patch.setattr(shard_writing, "_COPIED", most)
            if most == 9:
                system(patch)
            found, sites = written(tmp_path, base, *changes)
        assert_written(found, wanted)
        assert [site.weight for site in sites] == ["a.weight"]
        source, result = (file.read_bytes() for file in (base.shards[0].path, tmp_path / "out.safetensors"))
        assert source[: base.shards[0].data_start] == result[: base.shards[0].data_start]
        (tmp_path / "out.safetensors").unlink()


def test_the_system_is_told_that_a_shard_is_read_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *what: advice.append(what))
    base, changes, _ = several(tmp_path)
    written(tmp_path, base, *changes)
    assert advice == [(0, 0, os.POSIX_FADV_SEQUENTIAL)]


def test_what_the_system_refuses_otherwise_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, changes, _ = several(tmp_path)
    refusing(errno.EIO)(monkeypatch)
    with pytest.raises(OSError, match="no"):
        written(tmp_path, base, *changes)


@pytest.mark.parametrize("system", [lambda patch: None, without("copy_file_range")])
def test_a_shard_that_got_shorter_is_told(
    system: Callable[[pytest.MonkeyPatch], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, changes, _ = several(tmp_path)
    os.truncate(base.shards[0].path, base.shards[0].size - 1)
    system(monkeypatch)
    with pytest.raises(FoldError, match="changed while it was read"):
        written(tmp_path, base, *changes)


def test_tensors_that_are_untied_stand_behind_all_others(tmp_path: Path) -> None:
    base, changes, wanted = several(tmp_path)
    a, c = base.tensors["a.weight"], base.tensors["c.weight"]
    own = low(torch.ones(2, 3), torch.ones(5, 2), Matrix(5, 3))
    extra = [change(a, own, name="head.weight"), change(c, Whole(torch.ones(3, 7).numpy()), name="other.weight")]
    before = tensors_of(base.directory)
    found, sites = written(tmp_path, base, *changes, *extra)
    assert_written(found, wanted | {"head.weight": before["a.weight"] + 3, "other.weight": torch.ones(3, 7)})
    assert [(site.weight, site.untied_from) for site in sites] == [("a.weight", ()), ("head.weight", ("a.weight",))]
    plain, grown = job_for(base, *changes)[0], job_for(base, *changes, *extra)[0]
    assert plain.header == base.shards[0].header
    assert plain.size == base.shards[0].size
    assert grown.size == plain.size + len(grown.header) - len(plain.header) + a.nbytes + c.nbytes


def test_a_job_is_of_one_shard(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(5, 3), "b.weight": torch.ones(4, 5)}
    base = read_checkpoint(write_base(tensors, tmp_path / "base", 2), FoldError)
    arrays, let_go = map_adapter(write_adapter(tmp_path / "adapter", low_rank("a", 5, 3) | low_rank("b", 4, 5)))
    plan = plan_fold(base, arrays, let_go)
    for shard, name in zip(base.shards, ("a.weight", "b.weight"), strict=True):
        job = job_of(base, plan, shard.path.name, torch.float64, let_go)
        assert job.source is shard
        assert [each.name for each in job.changes] == [name]
        assert (job.accumulate, job.let_go) == (torch.float64, let_go)


# Values ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float64])
def test_low_rank_terms_of_every_layout(dtype: torch.dtype, threads: int, tmp_path: Path) -> None:
    for number, (layout, a_shape, b_shape) in enumerate((
        (Matrix(7, 5), (3, 5), (7, 3)),
        (Matrix(7, 5, stored_in_out=True), (3, 7), (5, 3)),
        (Experts((3, 7, 5)), (6, 5), (7, 6)),
        (Kernel((7, 5, 3), 1), (4, 5, 3), (7, 4, 1)),
        (Kernel((4, 5, 2), 2), (6, 5, 2), (4, 3, 1)),
        (Kernel((6, 5, 2), 3, is_transposed=True), (6, 2, 2), (15, 2, 1)),
    )):  # fmt: skip
        a, b = torch.randn(a_shape), torch.randn(b_shape)
        given = layout.dense(a) if isinstance(layout, Kernel) and not layout.is_transposed else a
        weight = torch.randn(layout.shape if not isinstance(layout, Matrix) else (7, 5)).to(dtype)
        got, site = one(tmp_path / str(number), weight, low(given, b, layout), threads=threads)
        delta = 1.5 * layout.delta(a.double(), b.double())
        assert got.shape == weight.shape
        torch.testing.assert_close(got, (weight.double() + delta).to(dtype), rtol=1e-5, atol=1e-5)
        assert site.weight_norm == pytest.approx(float(weight.double().norm()), rel=1e-4)
        assert site.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
        error = float((got.double() - weight.double() - delta).norm() / delta.norm())
        assert site.kept == pytest.approx(1 - error, abs=1e-3)
        assert (site.path, site.weight, site.dtype, site.untied_from) == ("w", "w.weight", dtype, ())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_magnitude_scales_each_output(dtype: torch.dtype, tmp_path: Path) -> None:
    for number, layout in enumerate((Matrix(7, 5), Matrix(5, 7, stored_in_out=True), Kernel((4, 5, 2), 2))):
        shape = layout.shape if isinstance(layout, Kernel) else (7, 5) if not layout.stored_in_out else (5, 7)
        a = torch.randn(4, 5, 2) if isinstance(layout, Kernel) else torch.randn(3, 5)
        b = torch.randn(4, 2, 1) if isinstance(layout, Kernel) else torch.randn(7, 3)
        given = layout.dense(a) if isinstance(layout, Kernel) else a
        weight, magnitude = torch.randn(shape).to(dtype), torch.rand(len(b)) + 1
        got, site = one(tmp_path / str(number), weight, low(given, b, layout, magnitude))
        whole = weight.double() + 1.5 * layout.delta(a.double(), b.double())
        outputs = whole.movedim(1 if layout.stored_in_out else 0, 0)
        norms = outputs.flatten(1).norm(dim=1)
        wanted = (outputs * (magnitude / norms).reshape(-1, *(1,) * (outputs.ndim - 1))).movedim(
            0, 1 if layout.stored_in_out else 0
        )
        torch.testing.assert_close(got, wanted.to(dtype), rtol=2e-5 if dtype == FLOAT32 else 8e-3, atol=2e-5)
        assert site.delta_norm == pytest.approx(float((wanted - weight.double()).norm()), rel=1e-2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_rows_and_biases(dtype: torch.dtype, tmp_path: Path) -> None:
    table, values = torch.randn(7, 3).to(dtype), torch.randn(2, 3)
    got, site = one(tmp_path / "rows", table, Rows((5, 2), values.numpy()))
    wanted = table.clone()
    wanted[[5, 2]] = values.to(dtype)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert site.delta_norm == pytest.approx(float((values - table[[5, 2]].float()).norm()), rel=1e-4)

    bias, added = torch.randn(11).to(dtype), torch.randn(11)
    got, site = one(tmp_path / "bias", bias, BiasOfB(added.numpy(), 2.5))
    torch.testing.assert_close(got, (bias.double() + 2.5 * added.double()).to(dtype), rtol=1e-6, atol=1e-6)
    assert site.delta_norm == pytest.approx(2.5 * float(added.norm()), rel=1e-5)

    a, b = torch.randn(2, 3), torch.randn(7, 2)  # rows of a table that is adapted, too
    both = (low(a, b, Matrix(7, 3)), Rows((5, 2), values.numpy()))
    got, _ = one(tmp_path / "both", table, *both)
    wanted = table.double() + 1.5 * b.double() @ a.double()
    wanted[[5, 2]] += values.double() - table[[5, 2]].double()
    torch.testing.assert_close(got, wanted.to(dtype), rtol=1e-5, atol=1e-5)


def test_nothing_is_added_where_a_delta_is_zero(tmp_path: Path) -> None:
    weight = torch.tensor([[-0.0, 1.0, 2.0]])
    got, site = one(tmp_path, weight, low(torch.ones(2, 3), torch.zeros(1, 2), Matrix(1, 3)))
    assert bits(got) == bits(weight)
    assert (site.delta_norm, site.kept) == (0.0, 1.0)


@pytest.mark.parametrize(("accumulate", "wanted"), [(torch.float64, 1 + 2**-7), (None, 1.0)])
def test_only_float64_is_rounded_once_exactly(accumulate: Any, wanted: float, tmp_path: Path) -> None:
    """1 + 2⁻⁸ + 2⁻⁴⁰ lies above the middle of two bfloat16, and float32 has only the middle."""
    a, b = torch.tensor([[2**-8], [2**-40]]) / 1.5, torch.ones(1, 2)
    term = replace(low(a * 1.5, b, Matrix(1, 1)), scaling=1.0)
    got, _ = one(tmp_path, torch.ones(1, 1).bfloat16(), term, accumulate=accumulate)
    assert float(got) == wanted


# What is not finite ------------------------------------------------------------------------------------


def assert_refused(tmp_path: Path, weight: torch.Tensor, words: str, *terms: Term) -> None:
    """Both where it is written and where it is only looked at."""
    base = checkpoint({"w.weight": weight}, tmp_path)
    job, count = job_for(base, change(base.tensors["w.weight"], *terms))
    for call in (lambda: check_finite(job), lambda: write_shard(job, tmp_path / "out")):
        count.told.clear()
        with pytest.raises(FoldError, match=words):
            call()
    assert count.told, "the law would be vacuous"


@pytest.mark.usefixtures("small_blocks")
def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    a, b = torch.ones(2, 3), torch.ones(7, 2)
    matrix = Matrix(7, 3)
    broken = torch.ones(7, 3)
    broken[6, 1] = math.nan
    in_base = "base weight of 'w' .w.weight. holds NaN or Inf before folding"
    beyond = "folding 'w' .w.weight.: .* goes beyond torch.float16's largest number 6.55e.04"
    assert_refused(tmp_path / "1", broken, in_base, low(a, b, matrix))
    assert_refused(tmp_path / "2", torch.ones(7, 3).half(), beyond, low(a * 1e3, b * 1e3, matrix))
    assert_refused(tmp_path / "3", broken, in_base, low(a, b, matrix), low(a, b, matrix))
    assert_refused(tmp_path / "4", torch.ones(7, 3).half(), beyond, low(a, b, matrix), low(a * 1e3, b * 1e3, matrix))
    assert_refused(tmp_path / "5", torch.ones(7, 3).half(), beyond, low(a, b, matrix, torch.full((7,), 5e5)))
    assert_refused(tmp_path / "6", torch.ones(7).half(), beyond, BiasOfB(torch.full((7,), 5e4).numpy(), 2.0))
    late = torch.ones(7, 3)
    late[6, 2] = 1e5
    whole = "the adapter's 'w' has values beyond torch.float16's largest number 6.55e.04"
    assert_refused(tmp_path / "7", torch.ones(7, 3).half(), whole, Whole(late.numpy()))


def test_what_is_looked_at_is_not_written_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, changes, _ = several(tmp_path)
    job, count = job_for(base, *changes)
    with monkeypatch.context() as patch:
        patch.setattr(shard_writing, "_merge", lambda *_: pytest.fail("norms tell already"))
        check_finite(job)
    assert (count.let_go, count.told) == (3, [])
    merged: list[Any] = []
    monkeypatch.setattr(shard_writing, "_merge", lambda *arguments: merged.append(arguments))
    bias = change(base.tensors["d.weight"], BiasOfB(np.ones(3, np.float32), 1.0))
    check_finite(job_for(base, bias)[0])
    assert len(merged) == 1
    assert shard_writing._is_surely_finite(bias, -1) is False


@pytest.mark.parametrize(("of_weight", "of_delta", "is_sure"), [
    (0, 0.45, True), (0.45, 0, True), (0, 0.5, False), (0, 0.6, False), (0.4, 0.2, False), (0.2, 0.2, True),
])  # fmt: skip
def test_norms_alone_tell_below_half_of_the_largest_number(
    of_weight: float, of_delta: float, is_sure: bool, tmp_path: Path
) -> None:
    largest = torch.finfo(FLOAT16).max
    base = checkpoint({"w.weight": torch.tensor([[0.0, of_weight * largest]]).half()}, tmp_path)
    term = replace(low(torch.tensor([[0, of_delta * largest]]), torch.ones(1, 1), Matrix(1, 2)), scaling=1.0)
    with open(base.shards[0].path, "rb") as file:
        assert shard_writing._is_surely_finite(change(base.tensors["w.weight"], term), file.fileno()) is is_sure


# Lanes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_items_are_worked_on_side_by_side_and_given_in_order(count: int) -> None:
    meeting = threading.Barrier(count, timeout=20)
    threads: set[threading.Thread] = set()

    def lane() -> Callable[[int], int]:
        threads.add(threading.current_thread())
        meeting.wait()
        return lambda item: item * item

    assert shard_writing._in_lanes(range(1, 50), lane, count) == [item * item for item in range(1, 50)]
    assert len(threads) == count
    assert (threading.current_thread() in threads) is (count == 1)


def test_what_fails_in_one_lane_ends_them_all() -> None:
    done = itertools.count()

    def work(item: int) -> None:
        if item == 3:
            raise FoldError("three")
        time.sleep(1e-3)
        next(done)

    with pytest.raises(FoldError, match="three"):
        shard_writing._in_lanes(range(1000), lambda: work, 2)
    assert next(done) < 500
