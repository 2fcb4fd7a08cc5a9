"""What cannot go wrong unnoticed, counted: bad inputs, flipped bits, kills, programs, threads, ulps, changed lines."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import exporters
import lora_fx

from .checks import require
from .report import Table

TESTS = Path(__file__).resolve().parents[1] / "tests"


def measure(*, quick: bool = False, rounds: int | None = None) -> Iterator[Table]:
    """All counts, one table after the other.

    `rounds` is the number of programs, of which fuzzing makes 1,000 runs each: 10,000 for a release.
    """
    sys.path.insert(0, str(TESTS))
    try:
        yield _catalogue(quick)
        yield _numbers(quick)
        yield _models(quick)
        yield _threads(2_000 if quick else 100_000)
        yield _programs(20 if quick else rounds or 300)
        yield _fuzzing(10_000 if quick else 1000 * (rounds or 300))
        yield _files(quick)
        yield _mutants(quick)
    finally:
        sys.path.remove(str(TESTS))


def _catalogue(quick: bool) -> Table:
    """Every case in a process of its own."""
    from catalogue.all_cases import CASES
    from catalogue.harness import make_world, run_case

    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        world = make_world(_made(Path(name) / "world"))
        for number, case in enumerate(CASES[:: 12 if quick else 1]):
            outcome = run_case(case, world, Path(name) / str(number))
            named = outcome.kind == "refused" and all(word in outcome.message for word in case.words)
            group = counts.setdefault(case.name.partition("/")[0], Counter())
            group["cases"] += 1
            group["refused, named" if named else outcome.kind] += 1
    kinds = ("cases", "refused, named", "right", "refused", "silent", "foreign", "hang", "killed", "damaged")
    rows = [(group, *(found[kind] for kind in kinds)) for group, found in sorted(counts.items())]
    total = tuple(sum(found[kind] for found in counts.values()) for kind in kinds)
    return Table(
        "The catalogue of bad inputs and faults",
        ("group", *kinds),
        (*rows, ("all", *total)),
        (
            "named: the message has the field, file or tensor; graphs, parameters and files are compared before and "
            "after",
        ),
    )


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _files(quick: bool) -> Table:
    """Flipped bits, kills at every call to the file system, kills at random moments."""
    counts = dict.fromkeys(_WRITES, 50 if quick else 1000)
    rows = [_flips(quick), *_crash_points(), *(_random_kills(kind, count) for kind, count in counts.items())]
    return Table(
        "Files",
        ("what", "tried", "noticed or whole", "silent, torn, mixed or lost"),
        tuple(rows),
        ("SIGKILL; afterwards there is the old state or the new, after unfold_onnx where a fold was under way",),
    )


def _model() -> tuple[nn.Module, torch.fx.GraphModule]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5)).eval()
    return model, lora_fx.trace(model, (torch.randn(3, 7),))


def _adapted(gm: torch.fx.GraphModule, rank: int) -> torch.fx.GraphModule:
    injected = lora_fx.inject(gm, {"r": rank, "target_modules": ["0", "2"]}).eval()
    with torch.no_grad():
        for parameter in lora_fx.lora_parameters(injected):
            parameter.add_(torch.randn_like(parameter) / 3)
    return injected


def _flips(quick: bool) -> tuple[str, int, int, int]:
    gm = lora_fx.trace(nn.Sequential(nn.Linear(3, 2, bias=False)).eval(), (torch.randn(2, 3),))
    tried = noticed = 0
    with tempfile.TemporaryDirectory() as name:
        lora_fx.save_adapter(lora_fx.inject(gm, {"r": 1, "target_modules": ["0"]}), name)
        for file in sorted(Path(name).iterdir()):
            good = file.read_bytes()
            for bit in range(0, 8 * len(good), 29 if quick else 1):
                damaged = bytearray(good)
                damaged[bit // 8] ^= 1 << bit % 8
                file.write_bytes(damaged)
                tried += 1
                try:
                    lora_fx.read_adapter(name)
                except lora_fx.LoraFxError:
                    noticed += 1
            file.write_bytes(good)
    return "single bits of an adapter's two files", tried, noticed, tried - noticed


def _crash_points() -> list[tuple[str, int, int, int]]:
    """The test of every call to the file system as the last one, which raises if it finds anything."""
    import test_filesystem_faults as faults
    from filesystem_faults import DONE, run_with_fault

    rows = []
    with tempfile.TemporaryDirectory() as name:
        files = faults.files.__wrapped__(_Factory(Path(name))) if hasattr(faults.files, "__wrapped__") else None
        if files is None:
            return rows
        for what, work in faults.WORK.items():
            base = _made(Path(name) / what.replace(",", ""))
            before, after = faults.states(work, files, base)
            tried = good = 0
            for n in range(1, faults.MOST_CALLS):
                here = _made(base / str(n))
                work.prepare(files, here)
                status = run_with_fault(lambda w=work, h=here: w.write(files, h), n, None, lora_fx.LoraFxError)
                if status == DONE:
                    break
                tried += 1
                good += work.state(here) in (before, after)
            rows.append((f"killed at each call: {what}", tried, good, tried - good))
    return rows


class _Factory:
    """What pytest's tmp_path_factory is to the fixture."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mktemp(self, name: str) -> Path:
        return _made(self._root / name)


def _save(gm: torch.fx.GraphModule, here: Path, rank: int) -> None:
    lora_fx.save_adapter(_ADAPTED[rank], here / "adapter")


def _fold(gm: torch.fx.GraphModule, here: Path, rank: int) -> None:
    exporters.fold_into_onnx(here / "base" / "model.onnx", here / f"r{rank}", here / "model.onnx")


def _export(gm: torch.fx.GraphModule, here: Path, rank: int) -> None:
    exporters.export_onnx(_FOLDED[rank], here / "model.onnx", external_data=True, check=False)


def _patch(gm: torch.fx.GraphModule, here: Path, rank: int) -> None:
    file = here / "model.onnx"
    if Path(f"{file}.undo").is_dir():
        exporters.unfold_onnx(file)
    exporters.fold_into_onnx(file, here / f"r{rank}", file)


_WRITES: dict[str, Callable[[torch.fx.GraphModule, Path, int], None]] = {
    "save_adapter": _save, "fold_into_onnx": _fold, "export_onnx": _export, "fold in place": _patch,
}  # fmt: skip
_ADAPTED: dict[int, torch.fx.GraphModule] = {}
_FOLDED: dict[int, torch.fx.GraphModule] = {}


def _random_kills(kind: str, count: int) -> tuple[str, int, int, int]:
    """A process that writes one state after the other, killed at a random moment, again and again."""
    write = _WRITES[kind]
    _, gm = _model()
    generator = np.random.default_rng(0)
    good = 0
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        for rank in (2, 3):
            _ADAPTED[rank] = _adapted(gm, rank)
            _FOLDED[rank] = lora_fx.fold(_ADAPTED[rank])
            lora_fx.save_adapter(_ADAPTED[rank], here / f"r{rank}")
        for directory in (here / "base", here):
            directory.mkdir(exist_ok=True)
            exporters.export_onnx(gm, directory / "model.onnx", external_data=True, check=False)
        states = {_state(here, kind)} if kind == "fold in place" else set()
        took = 0.0
        for rank in (2, 3):
            started = time.perf_counter()
            write(gm, here, rank)
            took = time.perf_counter() - started
            states.add(_state(here, kind))
        for number in range(count):
            child = os.fork()
            if child == 0:
                try:
                    for turn in range(10**6):
                        write(gm, here, 2 + turn % 2)
                finally:
                    os._exit(0)
            time.sleep(float(generator.uniform(0, 3 * took)))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            good += _state(here, kind) in states
            del number
    return f"killed at random: {kind}", count, good, count - good


def _state(here: Path, kind: str) -> bytes:
    """What a reader gets."""
    try:
        if kind == "save_adapter":
            adapter = lora_fx.read_adapter(here / "adapter", integrity="required")
            return adapter.sha256.encode()
        file = here / "model.onnx"
        if not file.exists():
            exporters.unfold_onnx(file)
        session = exporters.make_session(file, provider="cpu")
        return session.run(None, {session.get_inputs()[0].name: np.ones((2, 7), np.float32)})[0].tobytes()
    except lora_fx.LoraFxError as error:
        return f"lost: {error}".encode()


def _programs(count: int) -> Table:
    """Programs of calls against the float64 oracle."""
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis.stateful import run_state_machine_as_test
    from programs import Programs

    found = "none"
    try:
        run_state_machine_as_test(
            Programs,
            settings=settings(
                max_examples=count, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck),
                database=None, phases=(Phase.generate,), derandomize=False,
            ),
        )  # fmt: skip
    except AssertionError as error:
        found = str(error)[:200]
    return Table("Programs of calls against W + ΔW in float64", ("programs", "counter-examples"), ((count, found),))


def _fuzzing(runs: int) -> Table:
    """Whatever reads files, fuzzed by atheris, guided by coverage."""
    import fuzz_targets

    rows = []
    for name in fuzz_targets.NAMES:
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "fuzz.py", name, f"-runs={runs}", f"-artifact_prefix={directory}/"]
            done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, errors="replace", check=False)
            count = re.search(r"Done (\d+) runs", done.stderr)
            rows.append((name, int(count[1]) if count else 0, len(list(Path(directory).iterdir())), done.returncode))
    return Table("Fuzzing of readers", ("reader of", "runs", "findings", "exit status"), tuple(rows))


def _threads(calls: int) -> Table:
    import hammer

    with tempfile.TemporaryDirectory() as name:
        found = {"one graph": hammer.graph(calls), "one session": hammer.session(calls, Path(name))}
    rows = [
        (what, *(counts[kind] for kind in ("right", "wrong")), _errors(counts), counts["changes"])
        for what, counts in found.items()
    ]
    return Table("Eight threads", ("on", "right", "wrong", "errors", "changes meanwhile"), tuple(rows))


def _errors(counts: Counter[str]) -> int:
    return sum(count for kind, count in counts.items() if kind not in ("right", "wrong", "changes"))


def _numbers(quick: bool) -> Table:
    """Fold against W + ΔW in float64, in units of the last place of the stored type; and folding in place and back."""
    rows = []
    size = 96 if quick else 384
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(6)
        model = nn.Sequential(nn.Linear(size, size)).to(dtype).eval()
        gm = lora_fx.inject(
            lora_fx.trace(model, (torch.randn(2, size).to(dtype),)), {"r": 8, "lora_alpha": 12, "target_modules": ["0"]}
        )
        with torch.no_grad():
            for parameter in lora_fx.lora_parameters(gm):
                parameter.normal_(0, 0.05)
        a, b = (gm.get_parameter(f"0.lora_{half}.default.weight").detach().double() for half in "AB")
        weight = model[0].weight.detach().clone()
        exact = weight.double() + 1.5 * b @ a
        for accumulate in (None, torch.float64):
            folded = lora_fx.fold(gm, accumulate=accumulate).get_parameter("0.weight").detach()
            ulp = _ulp(exact, dtype)
            error = (folded.double() - exact).abs() / ulp
            rows.append(
                (
                    str(dtype)[6:],
                    "default" if accumulate is None else "float64",
                    float(error.max()),
                    f"{float((error <= 0.5).double().mean()):.4%}",
                )
            )
        cycles = 100 if quick else 10_000
        for _ in range(cycles):
            lora_fx.unfold(lora_fx.fold(gm, inplace=True))
        rows.append((str(dtype)[6:], f"{cycles} × fold, unfold", int(not torch.equal(weight, model[0].weight)), "bits"))
    return Table(
        "Fold, in units of the last place",
        ("stored", "summed in", "largest error", "within half a unit"),
        tuple(rows),
        ("the last rows: whether any bit of the base's weight changed",),
    )


def _models(quick: bool) -> Table:
    """Every model of the tests: the folded graph against the adapted one, ONNX Runtime against the folded graph."""
    import zoo

    rows = []
    for case in [case for case in zoo.BY_NAME.values() if "trace" in case.tracers][:: 6 if quick else 1]:
        adapted = zoo.randomise(zoo.injected(case, zoo.traced(case))).eval()
        folded = zoo.folded(case, adapted)
        wanted, found = (zoo.run(gm, case.arguments()) for gm in (adapted, folded))
        eps = torch.finfo(wanted[0].dtype).eps
        with tempfile.TemporaryDirectory() as name:
            rows.append(
                (
                    case.name,
                    zoo.distance(wanted, found) / eps,
                    zoo.tolerance(case, torch.float32) / eps,
                    _exported(folded, Path(name) / "model.onnx", eps),
                    "same" if _same_bits(case, adapted, folded) else "other",
                )
            )
    return Table(
        "The models of the tests, in eps of float32 of the largest output",
        ("model", "folded − adapted", "bound", "ONNX Runtime − torch", "bits of another fold"),
        tuple(rows),
        (
            "another fold: again, in place, in place without a copy, and with another number of threads; ONNX Runtime "
            "− torch may be 1024",
        ),
    )


def _exported(gm: torch.fx.GraphModule, file: Path, eps: float) -> float | str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_fx.LoraFxWarning)
        try:
            error = exporters.export_onnx(gm, file).max_error
        except lora_fx.ExportError as refused:
            return f"refused: {str(refused)[:60]}"
    return "" if error is None else error / eps


def _same_bits(case: Any, adapted: torch.fx.GraphModule, folded: torch.fx.GraphModule) -> bool:
    import zoo

    wanted = {name: zoo.bits(tensor) for name, tensor in folded.state_dict().items()}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = zoo.folded(case, adapted)
            if {name: zoo.bits(tensor) for name, tensor in again.state_dict().items()} != wanted:
                return False
    finally:
        torch.set_num_threads(threads)
    if case.unties:  # which cannot be done in place
        return True
    values = {site.weight: wanted[site.weight] for site in lora_fx.fold_report(folded).sites}
    in_place = lora_fx.fold(adapted, inplace=True)
    is_same = all(zoo.bits(in_place.get_parameter(name)) == value for name, value in values.items())
    lora_fx.unfold(in_place)
    lora_fx.fold(copied := copy.deepcopy(adapted), inplace=True, reversible=False)
    return is_same and all(zoo.bits(copied.get_parameter(name)) == value for name, value in values.items())


def _ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of a type there."""
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(dtype).tiny)))
    return torch.exp2(exponent) * torch.finfo(dtype).eps


# The modules in whose functions one thing at a time is changed.
_MUTATED = tuple(
    f"lora_fx/{name}.py" for name in ("sites", "plan", "folding", "fold_bases", "fold_sums", "fold_tasks", "fold_terms")
)


def _mutants(quick: bool) -> Table:
    """Some of the changes of one operator, condition, number or call; and what was recorded of all of them."""
    import mutation

    every, files = (40, _MUTATED[-2:]) if quick else (10, _MUTATED)
    suites = ["fold_tasks", "fold_terms", *([] if quick else ["sites", "plan", "plan_checks", "folding", "quantized"])]
    with tempfile.TemporaryDirectory() as name:
        found = Path(name) / "found.json"
        command = [sys.executable, "mutation.py", *files, f"--every={every}", "--seconds=60", f"--json={found}"]
        ran = subprocess.run([*command, "--tests", *suites], cwd=TESTS, capture_output=True, check=False, text=True)
        require(ran.returncode == 0, f"mutation.py: {ran.stderr[-1000:]}")
        counts = mutation.counts_of(mutation.Found(**each) for each in json.loads(found.read_text()))
    rows = [_mutant_row(f"each {every}th, with the tests of {', '.join(suites)}", counts)]
    record = json.loads(mutation.RECORD.read_text())
    for file in record:
        is_new = record[file]["sha256"] != mutation.digest_of(mutation.ROOT / file)
        rows.append(_mutant_row(f"all of {file}, recorded{' before it was edited' * is_new}", Counter(record[file])))
    return Table(
        "Changes of one operator, condition, number or call",
        ("which", "tried", "a test fails", "nothing changes", "unexplained"),
        tuple(rows),
        (
            "nothing changes: the same result for every input, each for a reason in tests/mutation_equivalents.toml",
            "a test that does not end fails",
        ),
    )


def _mutant_row(what: str, counts: Counter[str]) -> tuple[str, int, int, int, int]:
    noticed = counts["killed"] + counts["timeout"] + counts["impossible"]
    return what, counts["mutants"], noticed, counts["equivalent"], counts["unexplained"]
