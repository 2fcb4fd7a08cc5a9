"""The benchmarks' exact counters against closed forms, and that their checks can fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from benchmarks import __main__ as command
from benchmarks import (
    adapters,
    curves,
    deployment,
    export,
    folding,
    goals,
    gpu,
    injection,
    latency,
    optimizer,
    plots,
    reliability,
    scale,
    training,
    workloads,
)
from benchmarks.checks import CheckFailed, assert_effect, assert_same, copy_adapter, require
from benchmarks.counters import OpCounter, memory_of, node_visits, python_calls, saved_bytes
from benchmarks.report import Table, as_json, machine
from benchmarks.timing import Variant, exponent, interleave

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and torch.export's


# Checks that can fail ------------------------------------------------------------------------------


def test_assert_same_holds_within_rounding_and_fails_beyond() -> None:
    x = torch.randn(5, 7)
    assert assert_same("x", x * (1 + 1e-7), x) < 1e-6
    with pytest.raises(CheckFailed, match="x: relative error"):
        assert_same("x", x + 1e-2, x)
    with pytest.raises(CheckFailed, match="shapes differ"):
        assert_same("x", x, x[:3])
    with pytest.raises(CheckFailed):
        assert_same("x", x * float("nan"), x)


def test_assert_effect_refuses_an_adapter_that_does_nothing() -> None:
    x = torch.randn(5, 7)
    assert_effect("x", x + 1, x)
    with pytest.raises(CheckFailed, match="nothing is compared"):
        assert_effect("x", x, x)
    with pytest.raises(CheckFailed, match="no"):
        require(False, "no")


def test_copy_adapter_refuses_other_sites() -> None:
    workload = workloads.linear_stack(3, 5)
    other = workloads.linear_stack(2, 5)
    with pytest.raises(CheckFailed, match="different sites"):
        copy_adapter(workloads.with_peft(workload), workloads.with_peft(other))


def test_injection_check_sees_a_wrong_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workloads.linear_stack(3, 5)
    gm = workloads.traced(workload)
    assert "bit for bit" in injection.check(workload, gm)
    real = workloads.with_lora_fx
    monkeypatch.setattr(workloads, "with_lora_fx", lambda w, g: real(w, g, lora_alpha=21))
    with pytest.raises(CheckFailed, match="against PEFT"):
        injection.check(workload, gm)


def test_folding_check_sees_a_wrong_weight() -> None:
    subject = folding.make_subject(workloads.linear_stack(3, 5))
    assert "traced graph" in folding.check(subject)
    spoiled = {name: value * (1 + 1e-5) for name, value in subject.exact.items()}
    with pytest.raises(CheckFailed, match="error bounds"):
        folding.check(dataclasses.replace(subject, exact=spoiled))


def test_training_check_sees_another_adapter() -> None:
    workload = workloads.llama(1, 64, 8)
    peft_model, _, injected = workloads.adapted_alike(workload)
    assert "14 gradients" in training.check(peft_model, injected, workload)
    with torch.no_grad():
        lora_fx.lora_parameters(injected)[3].mul_(1.01)
    with pytest.raises(CheckFailed):
        training.check(peft_model, injected, workload)


# Counters ------------------------------------------------------------------------------------------


def _step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().sum().backward()


def _lora_flops(sites: int, width: int, rows: int, r: int) -> int:
    """One step of a stack whose input needs no gradient, base included."""
    base = 2 * rows * width * width * (2 * sites - 1)  # forward of all, dx of all but the first
    return base + 6 * rows * r * 2 * width * sites - 2 * rows * r * width


def test_flops_of_a_lora_step_are_the_closed_form_for_both() -> None:
    sites, width, rows = 5, 7, 3
    workload = workloads.linear_stack(sites, width, rows)
    peft_model, _, injected = workloads.adapted_alike(workload)
    for model in (peft_model, injected):
        with OpCounter() as counter:
            _step(model, workload.inputs[0][0])
        assert counter.flops == _lora_flops(sites, width, rows, workload.r)


def test_flops_count_addmm_inplace_bmm_and_attention() -> None:
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    q = torch.randn(1, 2, 11, 13)
    with OpCounter() as counter:
        c.addmm_(a, b)
        torch.bmm(torch.randn(2, 3, 5), torch.randn(2, 5, 7))
        with torch.no_grad():
            nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * 3 * 5 * 7 + 2 * 2 * 3 * 5 * 7 + 2 * (2 * 2 * 11 * 11 * 13)


def test_a_product_without_a_formula_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="convolution"), OpCounter():
        nn.functional.conv1d(torch.randn(1, 2, 5), torch.randn(3, 2, 2))


def test_kernels_leave_views_out() -> None:
    x = torch.randn(4, 6)
    with OpCounter() as counter:
        (x.t().view(24) if x.t().is_contiguous() else x.view(24)) + 1
    assert counter.kernels == 1
    assert counter.ops == {"aten.add.Tensor": 1}


def test_saved_bytes_counts_a_storage_once_and_no_parameters() -> None:
    model = nn.Linear(5, 7, bias=False)
    x = torch.randn(3, 5)
    with saved_bytes(model) as counted:
        (model(x) * model(x)).sum()
    # x for both linears once, and both results for the product
    assert counted.total == 4 * (3 * 5 + 2 * 3 * 7)


def test_a_fold_of_float32_takes_no_memory_that_grows_with_the_weights() -> None:
    peaks = [goals._fold_peak(workloads.llama(1, hidden, 4)) for hidden in (64, 256)]
    assert peaks[0] == peaks[1] <= 3 * 16 * 16 * 8  # products of r × r numbers


def test_memory_of_sees_peak_kept_and_what_prepare_made() -> None:
    def run(given: torch.Tensor) -> Any:
        temporary = given.clone()
        kept = given.clone()
        del temporary
        return kept

    memory = memory_of(run, lambda: torch.zeros(1000))
    assert (memory.peak, memory.kept) == (8000, 4000)

    def replace(module: nn.Linear) -> nn.Linear:
        module.weight.data = module.weight.data.clone()
        return module

    memory = memory_of(replace, lambda: nn.Linear(10, 100, bias=False))
    assert (memory.peak, memory.kept) == (4000, 0)


def test_inject_visits_grow_linearly() -> None:
    visits, calls = zip(
        *(injection.inject_visits(w, workloads.traced(w)) for w in map(workloads.linear_stack, (10, 20, 40))),
        strict=True,
    )
    assert visits[2] - visits[1] == 2 * (visits[1] - visits[0])  # affine in the sites
    assert exponent((10, 20, 40), visits) <= 1.0
    assert exponent((10, 20, 40), calls) <= 1.02


def test_node_visits_restores_what_it_patches() -> None:
    gm = workloads.traced(workloads.linear_stack(2, 5))
    with node_visits() as counted:
        nodes = list(gm.graph.nodes)
        assert list(reversed(gm.graph.nodes)) == nodes[::-1]
    assert counted.visits == 2 * len(nodes)
    assert list(gm.graph.nodes)
    assert counted.visits == 2 * len(nodes)


def test_python_calls_are_the_same_each_time() -> None:
    assert python_calls(lambda: [abs(-1), max(2, 3)]) == python_calls(lambda: [abs(-1), max(2, 3)]) > 2


def test_lora_adds_the_closed_form_to_the_floor() -> None:
    workload = workloads.llama(1, 64, 8)
    tables = training._count_table(workload, lora_dropout=0.0)  # raises where the form does not hold
    assert [row[0] for row in tables.rows] == ["PEFT", "lora_fx", "optimize()", "optimize(recompute=False)", "floor"]
    assert tables.rows[1][2] == 1.0  # FLOPs / PEFT


def test_rounding_of_an_exact_fold_is_rounding_once() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    model = nn.Linear(5, 7, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(weight)
    found = folding.rounding(model, {"weight": weight})
    assert found.rms == 1.0
    assert found.worst_ulp <= 0.5


# Timing and printing -------------------------------------------------------------------------------


def test_interleave_runs_each_variant_in_each_round() -> None:
    seen: list[str] = []
    times = interleave({"a": Variant(lambda _: seen.append("a")), "b": Variant(lambda _: seen.append("b"))}, 3)
    assert sorted(seen) == ["a"] * 4 + ["b"] * 4
    assert [len(values) for values in times.seconds.values()] == [3, 3]


def test_exponent_of_powers() -> None:
    assert exponent((1, 2, 4), (3, 6, 12)) == pytest.approx(1)
    assert exponent((1, 2, 4), (3, 12, 48)) == pytest.approx(2)


def test_tables_print_and_go_to_json() -> None:
    table = Table("title", ("what", "n", "ratio"), (("a", 1234, 0.5), ("b", None, 1234.5)), ("a note",))
    assert "| a    | 1,234 |  0.50 |" in str(table)
    assert "–" in str(table)
    stored = json.loads(as_json(machine(), {"subject": (table,)}))
    assert stored["subjects"]["subject"][0]["rows"][0] == ["a", 1234, 0.5]
    assert stored["machine"]["packages"]["torch"]


def test_command_runs_a_subject_and_reports_failed_checks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(command, "_settle", lambda: None)
    monkeypatch.setattr(injection, "measure", lambda **_: (Table("t", ("a",), ((1,),)),))
    assert command.main(["injection", "--json", str(tmp_path / "out.json")]) == 0
    assert "### t" in capsys.readouterr().out
    assert "t" in (tmp_path / "out.json").read_text("utf-8")

    def fail(**_: Any) -> tuple[Table, ...]:
        raise CheckFailed("wrong")

    monkeypatch.setattr(latency, "measure", fail)
    assert command.main(["latency"]) == 4
    assert "check failed, nothing was timed: wrong" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        command.main(["speed"])
    assert stopped.value.code == 2


def test_curves_are_drawn(tmp_path: Path) -> None:
    tables = tuple(
        Table(f"over {axis}", (axis, "model", "kept / PEFT", "kernels / PEFT", "moved / PEFT", "time / PEFT"), tuple(
            (value, name, 0.5, 0.5, 0.5, 0.9) for value in (2, 8) for name in ("PEFT", "inject", "optimize", "floor")
        ))
        for axis in ("r", "tokens")
    )  # fmt: skip
    (path,) = plots.draw({"curves": tables}, tmp_path / "pictures")
    text = path.read_text()
    assert all(word in text for word in ("optimize", "floor", "tokens", "kept bytes / PEFT"))
    before = path.read_bytes()
    assert plots.draw({"curves": tables}, tmp_path / "pictures")[0].read_bytes() == before
    assert plots.draw({"gpu": ()}, tmp_path / "none") == []


def test_bars_are_drawn(tmp_path: Path) -> None:
    swap = Table("swap", ("way", "ms", "/ PEFT"), (("PEFT", 1.0, 1.0), ("lora_fx, finite=True", 0.1, 0.125)))
    batch = Table("batch", ("way", "ms", "/ PEFT"), (("lora_fx, adapter_ids", 0.1, 0.4375),))
    (path,) = plots.draw({"adapters": (swap, batch)}, tmp_path)
    text = path.read_text()
    assert all(word in text for word in ("swap / set_peft_model_state_dict", "mixed batch", "0.12", "0.44"))


def test_subjects_are_the_files() -> None:
    modules = (
        injection,
        folding,
        training,
        adapters,
        export,
        latency,
        deployment,
        reliability,
        scale,
        gpu,
        goals,
        optimizer,
        curves,
    )
    assert tuple(module.__name__.rpartition(".")[2] for module in modules) == command.SUBJECTS
    assert all(callable(module.measure) for module in modules)


def test_the_tables_of_adapters_hold_what_they_promise() -> None:
    swap = adapters.swap_table(workloads.llama(2, 64, 8), rounds=1)
    assert [row[0] for row in swap.rows] == [
        "PEFT, set_peft_model_state_dict",
        "lora_fx, swap_adapter",
        "lora_fx, finite=True",
        "floor: copies, nothing checked",
    ]
    batch = adapters.batch_table(workloads.llama(2, 64, 2), rounds=1)
    peft_row, ours, base = batch.rows
    assert ours[4] < 0.25 * peft_row[4]  # kernels: exact
    assert base[4] < ours[4]


def test_the_table_of_training_many() -> None:
    many = adapters.many_table(dataclasses.replace(workloads.llama(1, 32, 8), r=2), (1, 3), rounds=1)
    own, one, three = many.rows
    assert (own[0], one[0], three[0]) == ("one, in a graph of its own", "1 at once", "3 at once")
    assert own[2] == own[3] == 1
    assert three[2] < 0.8  # kernels of each


def test_the_check_of_a_mixed_batch_sees_a_wrong_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapters._batched_alike

    def wrong(workload: workloads.Workload, names: list[str]) -> tuple[Any, Any]:
        model, batched = real(workload, names)
        return model, lambda adapter_ids, **kwargs: batched(adapter_ids=adapter_ids.roll(1), **kwargs)

    monkeypatch.setattr(adapters, "_batched_alike", wrong)
    with pytest.raises(CheckFailed, match="the mixed batch"):
        adapters.batch_table(workloads.llama(2, 64, 2), rounds=1)


SMALL = scale.Size(layers=1, hidden=64, inner=96, vocabulary=37, heads=4, key_heads=2, shard=50_000)


def test_the_check_of_a_folded_checkpoint_sees_a_wrong_weight(tmp_path: Any) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    scale.write_checkpoint(base, SMALL)
    scale.write_adapter(adapter, SMALL)
    lora_fx.fold_checkpoint(base, adapter, out)
    scale.check_folded(base, adapter, out)
    assert len(list(base.glob("*.safetensors"))) > 1
    for file, message in ((1, "is another"), (2, "is another")):
        shard = sorted(out.glob("*.safetensors"))[file - 1]
        data = bytearray(shard.read_bytes())
        size = 8 + int.from_bytes(data[:8], "little")
        data[size:] = b"\x01\x3c" * ((len(data) - size) // 2)
        shard.write_bytes(data)
        with pytest.raises(CheckFailed, match=message):
            scale.check_folded(base, adapter, out)


def test_folding_a_large_tensor_takes_little_memory(tmp_path: Any) -> None:
    """In a process of its own: 256 MiB of weights in two tensors, and 100 MiB above import at most."""
    size = scale.Size(layers=0, hidden=4096, inner=1, vocabulary=1, heads=4, key_heads=4)
    shapes = {"model.embed_tokens.weight": (16384, 4096), "fc_proj.weight": (16384, 4096)}
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale.Size, "shapes", shapes)
        scale.write_checkpoint(base, size)
        scale.write_adapter(adapter, size)
        run = scale.fold_apart(base, adapter, tmp_path / "out")
        scale.check_folded(base, adapter, tmp_path / "out")
    assert 0 < run.anonymous <= 100 * scale.MEBI
