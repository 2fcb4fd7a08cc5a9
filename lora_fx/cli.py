"""The command line: `lora-fx demo | inspect | fold | export | verify | report | doctor | bench | onnx`.

Exit status: 0 ok, 2 usage, 3 bad input, 4 a check failed, 5 environment (a package, a GPU or disk space is
missing), 1 anything else, which is a bug in lora_fx, and 130 interrupted. Results go to stdout, progress and
messages to stderr; with --json, stdout is one JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import sys
import tempfile
import warnings
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, cli_onnx, cli_report
from .adapter_integrity import Integrity
from .atomic import replace_file
from .cli_commands import (
    EXIT_STATUSES,
    AdapterDir,
    DryRun,
    IntegrityOption,
    Json,
    OverwriteOnnx,
    Quiet,
    Verbose,
    register,
)
from .cli_completion import complete_target
from .cli_console import (
    LOUDNESS,
    NOTHING_WRITTEN,
    complain,
    print_json,
    progress,
    progress_bar,
    set_loudness,
    show,
    show_report,
    show_warning,
    terminal,
)
from .cli_dry_runs import place_of, plan_checkpoint_fold, report_at
from .cli_paths import (
    check_model_destination,
    check_onnx_destination,
    check_page_destination,
    check_report_destination,
    check_writable,
    resolved,
)
from .errors import ExportError, LoraFxError, TargetError, warn

if TYPE_CHECKING:
    from exporters import VerifyReport

    from .config import LoraConfig
    from .delta_statistics import AdapterStatistics
    from .graph_module import LoraGraphModule
    from .hf_models import HfModel
    from .plan import Plan

OK, BUG, USAGE, BAD_INPUT, CHECK_FAILED, ENVIRONMENT, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 4, 5, 130, 141

app = typer.Typer(
    name="lora-fx",
    help="LoRA as a compiler pass: inspect, fold, export and verify, or see it all in `lora-fx demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog=EXIT_STATUSES,
)
app.add_typer(cli_onnx.app, name="onnx")


class Provider(StrEnum):
    """Where ONNX Runtime runs."""

    AUTO = "auto"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    CPU = "cpu"


class Dtype(StrEnum):
    """What weights are loaded as; the names are torch's."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


ModelDir = Annotated[Path, typer.Argument(help="Hugging Face model directory (config.json, safetensors).")]
OptionalAdapter = Annotated[Path | None, typer.Argument(help="PEFT adapter directory; none: the base alone.")]


class Quantize(StrEnum):
    """How many bits the weights of an ONNX file take."""

    INT4 = "int4"
    INT8 = "int8"


OnnxDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="Load the model's weights as this. None: as they are stored, but bfloat16, which ONNX Runtime does not "
        "run on the CPU, as float32. export and verify need the same."
    ),
]


WithCache = Annotated[
    bool, typer.Option("--with-cache", help="A decoder with past_key_values in and present out, to generate with.")
]


class CheckFailedError(LoraFxError):
    """A check said no; what it measured is printed already."""


def main() -> None:
    """The entry point: run a command and turn errors into one line and an exit status."""
    with warnings.catch_warnings(), terminal():
        warnings.showwarning = show_warning
        status = _status()
    sys.exit(status)


def _status() -> int:
    try:
        status = app(prog_name="lora-fx", standalone_mode=False)
        return status if isinstance(status, int) else OK
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # `| head` has read enough
            return CLOSED_PIPE
        raise
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors format themselves
            error.show()  # type: ignore[attr-defined]
            return USAGE
        message, code = _said(error)
        complain(message)
        return code


def _said(error: Exception) -> tuple[str, int]:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, CheckFailedError):
        return text, CHECK_FAILED
    if isinstance(error, LoraFxError):
        return text, ENVIRONMENT if _is_disk_full(error) else BAD_INPUT
    if isinstance(error, ImportError):
        return f"{text}; {_install(error)}", ENVIRONMENT
    if isinstance(error, OSError | MemoryError):
        return text, ENVIRONMENT
    bug = "this is a bug, please report it; lora-fx -v shows the traceback"
    return f"{type(error).__name__}: {text.splitlines()[0]} ({bug})", BUG


def _install(error: ImportError) -> str:
    """The command for the one package that is missing: an extra could bring a second onnxruntime beside the first."""
    missing = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not missing:
        return "lora-fx doctor looks at what is installed"
    return f"pip install {missing}" + (" (or onnxruntime-gpu, never both)" if missing == "onnxruntime" else "")


def _is_disk_full(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    show(f"lora-fx {__version__} ({', '.join(found)})")
    raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_versions, is_eager=True, help="Print versions, and leave.")
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Options of every command."""
    set_loudness(verbose, quiet)


@register(app)
def demo(
    out: Annotated[Path | None, typer.Option(help="Where to keep the files; none: a temporary directory.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Tune all-MiniLM-L6-v2 on Python's own documentation, fold, export, and check every claim on the way.

    Example: `lora-fx demo --out lora_fx_demo`
    """
    if out is not None:
        check_writable(out)
    from .demo import run_demo

    with tempfile.TemporaryDirectory() as temporary:
        result = run_demo(
            out or Path(temporary), steps=steps, seed=seed, quiet=as_json or LOUDNESS.quiet, is_temporary=out is None
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    if result.problems:
        raise CheckFailedError("; ".join(result.problems))


@register(app)
def inspect(
    model: ModelDir,
    adapter: OptionalAdapter = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan these modules: ends of names (repeat the option), or all-linear, or one regular expression.",
            autocompletion=complete_target,
        ),
    ] = None,
    r: Annotated[int | None, typer.Option(min=1, help="Rank for --target; none: 8.")] = None,
    as_json: Json = False,
) -> None:
    """Show the sites of a model, and what an adapter, or a choice of targets, would adapt.

    Of an adapter, also how large its deltas are, what folding keeps of them, and how many of its ranks carry them.

    Examples: `lora-fx inspect MODEL_DIR`, `lora-fx inspect MODEL_DIR ADAPTER_DIR`,
    `lora-fx inspect MODEL_DIR --target query --target value --r 16`
    """
    if adapter is not None and (target or r is not None):
        raise typer.BadParameter("an adapter says itself what it adapts; give either ADAPTER_DIR or --target and --r")
    if r is not None and not target:
        raise typer.BadParameter("--r is the rank for --target; name at least one target")
    import lora_fx

    config = None
    if target:
        config = lora_fx.LoraConfig(r=8 if r is None else r, target_modules=_targets(target))
    gm = _traced(_loaded(model, adapter))
    with progress("planning"):
        sites = lora_fx.find_sites(gm)
        linear_names = lora_fx.find_all_linear_names(gm)
        plan, statistics = _plan(gm, adapter, config)
    parameters = lora_fx.trainable_parameters(gm)[1]
    if as_json:
        print_json(
            {
                "parameters": parameters,
                "adapter_parameters": None if plan is None else plan.parameters,
                "sites": [_row(site) for site in sites],
                "all_linear_names": linear_names,
                "targets": None if plan is None else _plan_rows(plan),
                "not_adapted": None if plan is None else [dataclasses.asdict(skip) for skip in plan.skipped],
                "statistics": None if statistics is None else cli_report.statistics_rows(statistics),
            }
        )
        return
    show(sites if plan is None else plan)
    if statistics is not None:
        show(f"\n{statistics}")
    share = (
        "" if plan is None else f", and {plan.parameters:,} more in the adapter ({plan.parameters / parameters:.2%})"
    )
    show(f"\n{parameters:,} parameters in the model{share}")
    show(f"target_modules for every linear but the head: {linear_names}")


def _targets(words: list[str]) -> str | list[str]:
    """What `--target` means: ends of names, or `all-linear` or a regular expression, which stand alone."""
    alone = [word for word in words if word.lower() == "all-linear" or set(word) & set("*+?|^$\\")]
    if alone and len(words) > 1:
        raise typer.BadParameter(f"--target {alone[0]!r} means several modules by itself; give no other --target")
    return alone[0] if alone else words


def _plan(
    gm: LoraGraphModule, adapter: Path | None, config: LoraConfig | None
) -> tuple[Plan | None, AdapterStatistics | None]:
    import lora_fx

    from .graph_module import record_of

    if adapter is not None:
        injected = lora_fx.load_adapter(gm, adapter)
        return record_of(injected).adapters["default"].plan, lora_fx.adapter_statistics(injected)
    if config is None:
        return None, None
    try:
        return lora_fx.make_plan(gm, config), None
    except TargetError as error:
        raise TargetError(str(error).replace("target_modules", "--target")) from error


def _plan_rows(plan: Plan) -> list[dict[str, Any]]:
    return [{"path": t.site.path, "r": t.r, "scaling": t.scaling, "parameters": t.parameters} for t in plan.targets]


def _row(site: Any) -> dict[str, Any]:
    return dataclasses.asdict(site) | {"dtype": str(site.dtype)}


@register(app)
def fold(
    model: Annotated[Path | None, typer.Argument(help="Hugging Face model directory, to be loaded.")] = None,
    adapter: Annotated[Path | None, typer.Argument(help="PEFT adapter directory.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Model directory to write: a new one, or an empty one.")] = None,
    base: Annotated[Path | None, typer.Option(help="Checkpoint to fold file by file, without its model.")] = None,
    adapter_option: Annotated[Path | None, typer.Option("--adapter", help="With --base: the adapter.")] = None,
    out_option: Annotated[Path | None, typer.Option("--out", help="With --base: the directory to write.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="With --base: change its own shards.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --base: processes, each with a shard.")] = 1,
    dtype: Annotated[Dtype | None, typer.Option(help="Load, fold and save as this; none: as it is stored.")] = None,
    integrity: IntegrityOption = "checked",
    overwrite: Annotated[bool, typer.Option(help="Replace the model directory at OUT.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into a model and save it in Hugging Face's layout.

    MODEL ADAPTER OUT loads the model: nothing is written unless the folded model computes what the adapted one does. A
    head that is tied to the embeddings and adapted is untied, in the files and in config.json.

    --base DIR --adapter DIR --out DIR goes from shards to shards, with no model code and little memory, whatever the
    size; the same call again goes on after an interruption. --dry-run reads headers alone then.

    Examples: `lora-fx fold MODEL_DIR ADAPTER_DIR OUT_DIR`, `lora-fx fold --base DIR --adapter DIR --out DIR`
    """
    if base is not None:
        _fold_files(
            base,
            adapter_option,
            out_option,
            [model, adapter, out],
            in_place=in_place,
            workers=workers,
            dtype=dtype,
            integrity=integrity,
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    if adapter_option is not None or out_option is not None or in_place or workers != 1:
        raise typer.BadParameter("--adapter, --out, --in-place and --workers go with --base; add it, or leave them out")
    if model is None or adapter is None or out is None:
        raise typer.BadParameter("give MODEL ADAPTER OUT, or --base DIR --adapter DIR --out DIR")
    check_model_destination(out, (model, adapter), overwrite=overwrite)
    _fold_model(model, adapter, out, dtype, integrity, dry_run=dry_run, as_json=as_json)


def _fold_files(
    base: Path,
    adapter: Path | None,
    out: Path | None,
    positional: list[Path | None],
    *,
    in_place: bool,
    workers: int,
    dtype: Dtype | None,
    integrity: Integrity,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if any(each is not None for each in positional) or dtype is not None:
        raise typer.BadParameter("--base goes with --adapter and --out, and with neither MODEL ADAPTER OUT nor --dtype")
    if adapter is None or (out is None and not in_place):
        raise typer.BadParameter("--base needs --adapter, and --out or --in-place")
    if in_place and out is not None and resolved(out) != resolved(base):
        raise typer.BadParameter("--in-place changes --base; leave --out out")
    if dry_run:
        if not in_place:
            check_model_destination(out or base, (base, adapter), overwrite=overwrite)
        planned = plan_checkpoint_fold(base, adapter, None if in_place else out, integrity)
        show_report(planned, as_json=as_json, dry_run=True)
        return
    import lora_fx

    with progress_bar("folding") as told:
        report = lora_fx.fold_checkpoint(
            base,
            adapter,
            base if out is None else out,
            in_place=in_place,
            overwrite=overwrite,
            integrity=integrity,
            workers=workers,
            progress=told,
        )
    show_report(report, as_json=as_json)


def _fold_model(
    model: Path,
    adapter: Path,
    out: Path,
    dtype: Dtype | None,
    integrity: Integrity,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    history = _history_with(model, adapter)
    loaded = _loaded(model, adapter, dtype)
    gm = _traced(loaded)
    from safetensors import SafetensorError

    import lora_fx

    from .hf_folding import fold_into
    from .hf_saving import save_folded

    with progress("folding and checking"):
        injected = lora_fx.load_adapter(gm, adapter, integrity=integrity)
        outcome = fold_into(loaded, injected)
    if not outcome.ok:
        raise CheckFailedError(outcome.problem)
    try:
        if not dry_run:
            with progress("saving"):
                save_folded(loaded, outcome, out, dtype=dtype, history=history)
    except SafetensorError as error:  # how a full disk reads there
        raise OSError(f"{str(out)!r} cannot be written: {error}") from error
    if as_json:
        sites = [_row(site) for site in outcome.report.sites]
        said = {"out": str(out), "error": outcome.error, "sites": sites, "dry_run": dry_run}
        print_json(said | {"trained_in_full": outcome.trained, "untied": outcome.untied})
        return
    show(outcome.report)
    if outcome.trained:
        show(f"\nreplaced, because the adapter trained them in full: {', '.join(outcome.trained)}")
    done = NOTHING_WRITTEN if dry_run else f"written to {out}"
    show(f"\n{done}; folded and adapted outputs differ by {outcome.error:.2g} of the largest value")


def _history_with(model: Path, adapter: Path) -> dict[str, Any]:
    """What is to be noted of the folded model. An adapter that it holds already is refused."""
    from .adapter_arrays import data_sha256_of
    from .adapter_files import open_adapter
    from .fold_history import entry_of, history_with, refuse_twice

    files = open_adapter(adapter, "default", "ignored", mapped=True)  # load_adapter looks at the seal
    entry, directory = entry_of(data_sha256_of(files), files.config), resolved(model)
    refuse_twice(directory, entry, adapter)
    return history_with(directory, entry)


@register(app)
def export(
    model: ModelDir,
    paths: Annotated[list[Path], typer.Argument(metavar="[ADAPTER_DIR] OUT.onnx", help="Adapter, and file to write.")],
    opset: Annotated[int | None, typer.Option(min=1, help="ONNX operator set; none: the exporter's choice.")] = None,
    dtype: OnnxDtype = None,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Quantize the weights, after the float file's check.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(help="See that the adapter has an effect, and run the folded graph and the file, on the CPU."),
    ] = True,
    with_cache: WithCache = False,
    integrity: IntegrityOption = "checked",
    overwrite: OverwriteOnnx = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Export a model, with an adapter folded in, to a checked ONNX file that is op for op the base model's.

    An ONNX file at OUT is replaced; anything else that is there stays, unless --overwrite says otherwise.

    Examples: `lora-fx export MODEL_DIR ADAPTER_DIR OUT.onnx`, `lora-fx export MODEL_DIR BASE.onnx --quantize int4`
    """
    if len(paths) > 2:
        raise typer.BadParameter("give an adapter directory and one file to write, or the file alone")
    adapter, out = (paths[0], paths[1]) if len(paths) == 2 else (None, paths[0])
    if adapter is None and (out.is_dir() or out.suffix.lower() != ".onnx"):
        what = "a directory" if out.is_dir() else "no .onnx file"
        raise typer.BadParameter(f"{str(out)!r} is {what}, so OUT.onnx, the file to write, is missing")
    check_onnx_destination(out, [model, *paths[:-1]], overwrite=overwrite)
    _check_opset(opset)
    gm = _folded(model, adapter, dtype, with_cache=with_cache, check=check, integrity=integrity)
    from exporters import export_onnx

    with progress("exporting and checking"), place_of(out, dry_run) as place:
        report = export_onnx(gm, place, opset=opset, quantize=quantize, check=check)
    show_report(report_at(report, out), as_json=as_json, dry_run=dry_run)


def _check_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise typer.BadParameter(f"--opset {opset}: onnx {onnx.__version__} knows the operator sets 1 to {newest}")


@register(app)
def verify(
    onnx: Annotated[Path, typer.Argument(help="The ONNX file to check.")],
    model: ModelDir,
    adapter: OptionalAdapter = None,
    base: Annotated[Path | None, typer.Option(help="The base model's ONNX, to compare op for op.")] = None,
    provider: Annotated[Provider, typer.Option(help="Where ONNX Runtime runs.")] = Provider.AUTO,
    dtype: OnnxDtype = None,
    with_cache: WithCache = False,
    integrity: IntegrityOption = "checked",
    write: Annotated[
        Path | None, typer.Option("--report", help="Write the report there: a page (.html), or JSON (.json).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run an ONNX file and the torch model on the same inputs and compare; exit status 4 if they differ.

    Examples: `lora-fx verify OUT.onnx MODEL_DIR ADAPTER_DIR --base BASE.onnx`, `lora-fx verify DECODER.onnx MODEL_DIR
    --with-cache --report REPORT.html`
    """
    if write is not None:
        check_report_destination(write, [onnx, model, *([adapter] if adapter else []), *([base] if base else [])])
    from exporters import verify_onnx
    from exporters.onnx_files import open_model
    from exporters.sessions import checked_file

    _check_runs_on(onnx, provider)
    if base is not None:
        open_model(checked_file(base))
    gm = _folded(model, adapter, dtype, with_cache=with_cache, integrity=integrity)
    with progress("verifying"):
        report = verify_onnx(onnx, gm, base=base, provider=provider)
    if write is not None:
        report.write(write)
    show_report(report, as_json=as_json)
    if write is not None and not as_json:
        show(f"written to {write}")
    if not report.ok:
        raise CheckFailedError(_disagreement(report, base))


@register(app)
def report(
    model: ModelDir,
    adapter: AdapterDir,
    out: Annotated[Path, typer.Option(help="The page to write: one .html file that fetches nothing.")],
    other: Annotated[Path | None, typer.Option(help="Adapter directory to compare with.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="Trainer's trainer_state.json; none: ADAPTER's own, if it is there.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="Show the graph around this site (repeat the option).")] = None,
    graphs: Annotated[int, typer.Option(min=0, max=200, help="How many sites' graphs, where none is named.")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify", help="Export the folded model, compare it with torch, and time both.")
    ] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Load the model as this; none: as it is stored.")] = None,
    integrity: IntegrityOption = "checked",
    overwrite: Annotated[bool, typer.Option(help="Replace a file at OUT.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a page about an adapter: its deltas as a picture of the model, singular values, graphs, training curves.

    With --verify, exit status 4 if the exported file disagrees; the page is written all the same.

    Examples: `lora-fx report MODEL_DIR ADAPTER_DIR --out report.html`, `lora-fx report MODEL_DIR ADAPTER_DIR --other
    ADAPTER_DIR2 --log checkpoint-500/trainer_state.json --verify --out report.html`
    """
    sources = [model, adapter, *([other] if other else []), *([log] if log else [])]
    check_page_destination(out, sources, overwrite=overwrite)
    wanted = cli_report.Wanted(adapter, other, log, tuple(site or ()), graphs, verify, integrity)
    cli_report.check_wanted(wanted)
    made, verification = cli_report.make_report(_loaded(model, adapter, dtype), _traced, wanted)
    from .report_page import report_page

    page = report_page(made).encode()
    if not dry_run:
        replace_file(out, page)
    if as_json:
        print_json({"out": str(out), "dry_run": dry_run} | cli_report.report_values(made, verification))
    else:
        done = NOTHING_WRITTEN if dry_run else f"written to {out}"
        show("\n\n".join(map(str, [*cli_report.paragraphs(made, verification), done])))
    if verification is not None and not verification.ok:
        raise CheckFailedError(_disagreement(verification, Path("the base's file")))


@register(app)
def doctor(as_json: Json = False) -> None:
    """Say what is wrong with this machine's ONNX Runtime, and what mends it; exit status 5 if something is broken.

    Packages and versions, providers that are listed against those that work, CUDA's libraries, GPU and driver.

    Example: `lora-fx doctor`
    """
    from exporters import diagnose

    with progress("examining the installation"):
        diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        show(diagnosis)
    if not diagnosis.ok:
        raise OSError(f"broken: {', '.join(dict.fromkeys(finding.subject for finding in diagnosis.errors))}")


@register(app)
def bench(
    subjects: Annotated[
        list[str] | None, typer.Argument(help="What to measure, of what python -m benchmarks --help lists; none: all.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small models, few rounds.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each timing; none: by subject.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every table to this file as well.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw what has a picture into this folder, as SVG.")] = None,
) -> None:
    """Measure lora_fx against PEFT and the floor. It takes a checkout, where `python -m benchmarks` is the same.

    Examples: `lora-fx bench --quick`, `lora-fx bench training folding --json tables.json --plots pictures`
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise OSError(
            "the benchmarks are no part of the installed package; run pip install -e '.[bench]' in a checkout of the "
            "repository, and this again"
        )
    for name in ("peft", "transformers"):
        if find_spec(name) is None:
            raise OSError(f"the benchmarks need {name}; run pip install -c constraints.txt -e '.[bench]' in {checkout}")
    sys.path.insert(0, str(checkout))
    from benchmarks.__main__ import SUBJECTS
    from benchmarks.__main__ import main as run_benchmarks

    unknown = [name for name in subjects or () if name not in SUBJECTS]
    if unknown:
        raise typer.BadParameter(f"unknown subject {unknown[0]!r}; choose from {', '.join(SUBJECTS)}")
    if plots is not None:
        check_writable(plots)
    arguments = [*(subjects or ()), *(["--quick"] if quick else []), *(["--rounds", str(rounds)] if rounds else [])]
    for option, path in (("--json", json_file), ("--plots", plots)):
        arguments += [] if path is None else [option, str(path)]
    if run_benchmarks(arguments):
        raise CheckFailedError("a subject's results are wrong, so it was not timed")


def _check_runs_on(onnx: Path, provider: Provider) -> None:
    """A file that does not open is bad input; one that opens on the CPU and not where it was asked for is not."""
    from exporters import make_session

    with progress("opening the file"):
        make_session(onnx, provider="cpu")
        if provider in (Provider.AUTO, Provider.CPU):
            return
        try:
            make_session(onnx, provider=provider)
        except ExportError as error:
            raise OSError(str(error)) from error


def _disagreement(report: VerifyReport, base: Path | None) -> str:
    """What disagrees: the model, or the base's graph, or both."""
    reasons = []
    try:
        dataclasses.replace(report, base=None).raise_if_failed()
    except ExportError as error:
        reasons.append(str(error).splitlines()[0])
    if report.base is not None and not report.base.same_graph:
        agrees = "" if reasons else f"{report.path} computes what the model computes, but "
        reasons.append(f"{agrees}it is not op for op {base}")
    return "; ".join(reasons)


def _loaded(model: Path, adapter: Path | None, dtype: Dtype | None = None) -> HfModel:
    """The model of a directory; the adapter's task decides the head."""
    from .adapter_files import open_adapter

    config = None if adapter is None else open_adapter(adapter, "default", "ignored", mapped=True).config
    task = None if config is None else config.task_type
    with progress("loading the model"):
        import torch

        from .hf_models import load_model

        loaded = load_model(model, task, None if dtype is None else getattr(torch, dtype))
    trained = () if config is None else tuple(config.modules_to_save or ())
    random = [name for name in loaded.missing if not set(name.split(".")) & set(trained)]
    if random:
        warn(
            f"{str(model)!r} lacks {len(random)} weights of {type(loaded.model).__name__}, which are random now and "
            f"in every later run: {', '.join(map(repr, random[:4]))}. Outputs that need them mean nothing"
        )
    return loaded


def _traced(loaded: HfModel, *, with_cache: bool = False) -> LoraGraphModule:
    import lora_fx

    with progress("tracing"):
        if not with_cache:
            return lora_fx.trace(loaded.model, (), loaded.inputs)
        from exporters import decoder_example, flat_cache_model

        flat = flat_cache_model(loaded.model)
        inputs, shapes = decoder_example(flat)
        return lora_fx.trace(flat, (), inputs, dynamic_shapes=shapes)


def _folded(
    model: Path,
    adapter: Path | None,
    dtype: Dtype | None,
    *,
    with_cache: bool = False,
    check: bool = False,
    integrity: Integrity = "checked",
) -> LoraGraphModule:
    """The graph that an ONNX file is made of, or compared with."""
    import lora_fx

    if adapter is not None:
        _history_with(model, adapter)
    loaded = _loaded(model, adapter, dtype)
    if dtype is None and loaded.is_bfloat16:
        loaded.model.float()
        warn(
            f"{str(model)!r} is bfloat16, which ONNX Runtime does not run on the CPU, so it is taken as float32; "
            "--dtype float16 halves that, --dtype bfloat16 (with --no-check) keeps it"
        )
    if loaded.takes_one_text:
        warn(
            f"{str(model)!r} has no pad_token_id in its config.json, without which {type(loaded.model).__name__} "
            "takes one text at a time, and so does its ONNX file; set it for batches"
        )
    gm = _traced(loaded, with_cache=with_cache)
    if adapter is None:
        return gm
    with progress("folding and checking" if check else "folding"):
        injected = lora_fx.load_adapter(gm, adapter, integrity=integrity)
        if check:
            lora_fx.check_effect(injected)
        return lora_fx.fold(injected, check=check)


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
