"""The best right form of an ONNX file: every optimiser is tried, its result checked, and the smallest right one kept.

Which optimiser works depends on the architecture, the opset and the versions of all that is involved; some crash, and
some write models that are invalid or compute something else. So nothing is assumed: what one of them gives is opened,
run, and compared with the file that it was given.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from lora_fx import ExportError

from .made_up_inputs import made_up
from .onnx_files import check_apart, check_derived, checked_target, has_external_data, open_model, written
from .onnx_weights import MANIFEST_KEY, Array, read_manifest, read_shared_modules, write_manifest
from .quiet import quiet, stderr_caught
from .sessions import check_provider, checked_file, open_session
from .text import Shown, Table, reason, table

Feed = Mapping[str, Array]

# One op for what was several.
_FUSED = (
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "EmbedLayerNormalization", "RMSNormalization",
    "BiasGelu", "FastGelu", "QuickGelu", "RotaryEmbedding", "FusedMatMul", "FusedConv",
)  # fmt: skip
# In eps of max |y|: fused sums run in another order.
_TOLERANCE = {"float32": 2048.0, "float16": 32.0, "float64": 2048.0}


@dataclass(frozen=True)
class Candidate:
    """What one optimiser made of the file.

    Attributes:
        name: the optimiser, and the opset of the file that it was given.
        nodes: number of nodes; None if there is no valid result.
        error: against the file it was given, relative to max |output|.
        fusions: {op type: how many} of ops that stand for several.
        problem: why it cannot be used; empty if it can.
    """

    name: str
    nodes: int | None
    error: float | None
    fusions: Mapping[str, int]
    problem: str = ""


@dataclass(frozen=True)
class OptimizeReport(Shown):
    """What was tried, and what was kept. Prints as a table.

    Attributes:
        path: the file that was written.
        kept: name of the candidate that it is.
        candidates: all of them; the first is the file as it was.
        seconds: what it took.
    """

    path: str
    kept: str
    candidates: tuple[Candidate, ...]
    seconds: float

    @property
    def best(self) -> Candidate:
        """The candidate that was kept."""
        return next(each for each in self.candidates if each.name == self.kept)

    @property
    def lost(self) -> dict[str, int]:
        """{op type: how many} of fusions that another right candidate has more of."""
        most: Counter[str] = Counter()
        for each in self.candidates:
            most |= Counter(each.fusions) if not each.problem else Counter()
        return dict(most - Counter(self.best.fusions))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"lost": self.lost}

    def blocks(self) -> list[str | Table]:
        """A row for each optimiser."""
        rows = [
            (
                "→" if each.name == self.kept else "",
                each.name,
                each.nodes or "",
                "" if each.error is None else f"{each.error:.1e}",
                each.problem or ", ".join(f"{op} {count}" for op, count in each.fusions.items()),
            )
            for each in self.candidates
        ]
        lost = ", ".join(f"{op} {count}" for op, count in self.lost.items())
        return [
            f"{self.path}: {self.best.nodes} nodes, by {self.kept}, {self.seconds:.1f} s",
            table(("", "tried", "nodes", "error", "fusions, or why not"), rows),
            *([f"fusions that only others found: {lost}"] if lost else []),
        ]


def optimize_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    inputs: Sequence[Feed] | None = None,
    provider: str = "cpu",
) -> OptimizeReport:
    """Write the best right form of a file that ONNX Runtime's optimisers can find.

    Tried are onnxscript's fusions for ONNX Runtime, onnxruntime.transformers with its model types, and ONNX Runtime's
    own (extended level). A result is right if it opens on the provider, and computes what the file computes, at all
    inputs. The one with the fewest nodes is kept; the file itself, if none is better.

    Args:
        path: any ONNX file; fold before, since LoRA in the graph breaks fusions.
        out: the file to write.
        inputs: a list of {input: array}; None makes some up at two shapes.
        provider: where the file is to run, as for `make_session`.

    Raises:
        ExportError: if the file cannot be read, or run with the inputs.
    """
    started = time.perf_counter()
    check_provider(provider)
    file, target = checked_file(path), checked_target(out)
    with tempfile.TemporaryDirectory(prefix="lora_fx.") as directory:
        best, candidates = _probe(file, Path(directory), inputs, provider, "")
        _write(best, file, target)
    kept = _best(candidates)
    return OptimizeReport(os.fspath(out), kept.name, tuple(candidates), time.perf_counter() - started)


def export_optimized(
    gm: Any,
    path: str | os.PathLike[str],
    *,
    opsets: Sequence[int | None] = (None, 23, 24),
    provider: str = "cpu",
    **options: Any,
) -> OptimizeReport:
    """`export_onnx` at several opsets, `optimize_onnx` on each, and the best right result.

    Args:
        gm: a folded (or untouched) graph.
        opsets: those to try; None is the exporter's choice.
        provider: where the file is to run.
        options: of `export_onnx`.

    Raises:
        ExportError: if the graph can be exported at none of the opsets.
    """
    from .onnx_export import export_onnx

    started = time.perf_counter()
    target = checked_target(path)
    candidates: list[Candidate] = []
    found: list[tuple[Path, Path, Candidate]] = []
    with tempfile.TemporaryDirectory(prefix="lora_fx.") as name:
        for opset in opsets:
            directory = Path(name) / str(opset)
            directory.mkdir()
            try:
                report = export_onnx(gm, directory / "model.onnx", opset=opset, **options)
            except ExportError as error:
                candidates.append(Candidate(f"opset {opset}", None, None, {}, reason(error, 160)))
                continue
            best, tried = _probe(directory / "model.onnx", directory, None, provider, f"opset {report.opset}, ")
            candidates += tried
            found.append((best, directory / "model.onnx", _best(tried)))
        if not found:
            raise ExportError(
                f"the graph can be exported at none of the opsets {list(opsets)}: {candidates[0].problem}"
            )
        best, file, _ = min(found, key=lambda each: each[2].nodes or 0)
        _write(best, file, target)
    kept = _best(candidates)
    return OptimizeReport(os.fspath(path), kept.name, tuple(candidates), time.perf_counter() - started)


def _best(candidates: Sequence[Candidate]) -> Candidate:
    return min((each for each in candidates if not each.problem), key=lambda each: each.nodes or 0)


def _probe(
    file: Path, directory: Path, inputs: Sequence[Feed] | None, provider: str, prefix: str
) -> tuple[Path, list[Candidate]]:
    """The best file, and all candidates; the first is the file itself."""
    plain = open_session(file, provider)
    feeds = list(inputs) if inputs is not None else [made_up(plain, 2, 6), made_up(plain, 3, 9)]
    try:
        wanted = [plain.run(None, dict(feed)) for feed in feeds]
    except Exception as error:
        raise ExportError(
            f"{file} cannot be run with these inputs: {reason(error)}; pass inputs=[{{name: array}}]"
        ) from error
    candidates = [_described(f"{prefix}as it was", file, 0.0)]
    best, fewest = file, candidates[0].nodes or 0
    for number, (name, optimise) in enumerate(_OPTIMISERS.items()):
        result = directory / f"{number}.onnx"
        candidate = _tried(f"{prefix}{name}", optimise, file, result, feeds, wanted, provider)
        candidates.append(candidate)
        if not candidate.problem and (candidate.nodes or 0) < fewest:
            best, fewest = result, candidate.nodes or 0
    return best, candidates


def _tried(
    name: str,
    optimise: Callable[[Path, Path], None],
    file: Path,
    result: Path,
    feeds: Sequence[Feed],
    wanted: Sequence[Sequence[Array]],
    provider: str,
) -> Candidate:
    try:
        with quiet(), stderr_caught():
            optimise(file, result)
            session = open_session(result, provider)
            got = [session.run(None, dict(feed)) for feed in feeds]
    except Exception as error:  # whatever an optimiser, or what it wrote, may raise
        return Candidate(name, None, None, {}, reason(error, 160))
    distances = [
        _distance(a, b) for given, asked in zip(got, wanted, strict=True) for a, b in zip(given, asked, strict=True)
    ]
    wrong = [distance for distance in distances if not distance.ok]
    worst = max(distances, key=lambda distance: distance.relative)
    problem = f"computes something else, by {max(w.relative for w in wrong):.1e} of max |y|" if wrong else ""
    return _described(name, result, worst.relative, problem)


def _described(name: str, file: Path, error: float, problem: str = "") -> Candidate:
    ops = Counter(node.op_type for node in ir.load(file).graph.all_nodes())
    return Candidate(name, ops.total(), error, {op: ops[op] for op in _FUSED if ops[op]}, problem)


@dataclass(frozen=True)
class _Distance:
    relative: float
    ok: bool


def _distance(a: Any, b: Any) -> _Distance:
    """The largest error of one output, relative to its largest value; of a sequence, of any of its members."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = [_distance(x, y) for x, y in zip(a, b, strict=True)]
        return max(found, key=lambda each: (not each.ok, each.relative), default=_Distance(0.0, ok=True))
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return _Distance(0.0, ok=True) if type(a) is type(b) and a == b else _Distance(float("inf"), ok=False)
    if a.shape != b.shape or a.dtype != b.dtype:
        return _Distance(float("inf"), ok=False)
    if a.dtype.kind != "f":
        return _Distance(0.0, ok=True) if np.array_equal(a, b) else _Distance(float("inf"), ok=False)
    usual = np.isfinite(b)
    if not np.array_equal(usual, np.isfinite(a)):
        return _Distance(float("inf"), ok=False)
    error = float(np.abs(a[usual].astype(np.float64) - b[usual]).max(initial=0))
    scale = float(np.abs(b[usual]).max(initial=0))
    relative = error / scale if scale else error
    return _Distance(relative, ok=relative <= _TOLERANCE[a.dtype.name] * float(np.finfo(a.dtype).eps))


def _write(best: Path, file: Path, target: Path) -> None:
    """The best result with the weights' names that are still true, and weights beside it if the file's are."""
    original, model = open_model(file), ir.load(best)
    check_apart(file, original, target, may_replace=True)
    if MANIFEST_KEY in original.metadata_props:
        recorded = read_manifest(original.metadata_props)
        kept = [weight for name, weight in recorded.items() if name in model.graph.initializers]
        write_manifest(model, tuple(kept), read_shared_modules(original.metadata_props))
    with written(model, target, external=has_external_data(original)) as files:
        if best is file:
            check_derived(files.model, file)


def _by_onnxscript(file: Path, out: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(file)
    result = optimize_for_ort(model)
    ir.save(result[0] if isinstance(result, tuple) else result, out)


def _by_transformers(model_type: str) -> Callable[[Path, Path], None]:
    def optimise(file: Path, out: Path) -> None:
        from onnxruntime.transformers import optimizer

        # Its own runs of ONNX Runtime (opt_level) are another candidate.
        fused = optimizer.optimize_model(os.fspath(file), model_type=model_type, opt_level=0, use_gpu=False)
        onnx.save(fused.model, out)

    return optimise


def _by_onnxruntime(file: Path, out: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = os.fspath(out)
    ort.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


_OPTIMISERS: dict[str, Callable[[Path, Path], None]] = {
    "onnxscript ort_fusions": _by_onnxscript,
    "onnxruntime.transformers bert": _by_transformers("bert"),
    "onnxruntime.transformers gpt2": _by_transformers("gpt2"),
    "onnxruntime.transformers vit": _by_transformers("vit"),
    "onnxruntime extended": _by_onnxruntime,
}
