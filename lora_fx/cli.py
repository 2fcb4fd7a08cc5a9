"""The command line: `lora-fx demo | inspect | fold | export | verify`.

Exit status: 0 ok, 2 usage, 3 bad input, 4 a check failed, 5 environment (a package, a GPU or disk space is
missing). Results go to stdout, progress and messages to stderr; with --json, stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .errors import AdapterError, ExportError, LoraFxError, LoraFxWarning, warn

if TYPE_CHECKING:
    from torch import nn

    from .graph_module import LoraGraphModule
    from .plan import Plan

OK, USAGE, BAD_INPUT, CHECK_FAILED, ENVIRONMENT = 0, 2, 3, 4, 5

# What goes along with a folded model. Weights in any other format would be the base's, unfolded, so this is a
# list of what is copied and not of what is not.
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".bpe"}

app = typer.Typer(
    name="lora-fx",
    help="LoRA as a compiler pass: inspect, fold, export and verify, or see it all in `lora-fx demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_stderr = Console(stderr=True)

ModelDir = Annotated[Path, typer.Argument(help="Hugging Face model directory (config.json, safetensors).")]
AdapterDir = Annotated[Path, typer.Argument(help="PEFT adapter directory (adapter_config.json, safetensors).")]
OptionalAdapter = Annotated[Path | None, typer.Argument(help="PEFT adapter directory; none: the base alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


class CheckFailedError(LoraFxError):
    """A check said no; what it measured is printed already."""


def main() -> None:
    """The entry point: run a command and turn errors into one line and an exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        status = _status(verbose=bool({"-v", "--verbose"} & set(sys.argv[1:])))
    sys.exit(status)


def _status(verbose: bool) -> int:
    try:
        status = app(prog_name="lora-fx", standalone_mode=False)
    except CheckFailedError as error:
        return _complain(error, CHECK_FAILED, verbose)
    except LoraFxError as error:
        return _complain(error, ENVIRONMENT if _is_disk_full(error) else BAD_INPUT, verbose)
    except ImportError as error:
        hint = f"{error}; install what the command needs: pip install 'lora-fx[demo]'"
        return _complain(ImportError(hint), ENVIRONMENT, verbose)
    except (OSError, MemoryError) as error:
        return _complain(error, ENVIRONMENT, verbose)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(RuntimeError("interrupted"), 130, verbose)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors format themselves
            raise
        error.show()  # type: ignore[attr-defined]
        return USAGE
    return status if isinstance(status, int) else OK


def _complain(error: BaseException, status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    _stderr.print(f"[bold red]error:[/] {_escaped(str(error) or type(error).__name__)}", soft_wrap=True)
    return status


def _is_disk_full(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; what other libraries note to themselves helps nobody here."""
    if issubclass(category, LoraFxWarning):
        _stderr.print(f"[bold yellow]warning:[/] {_escaped(str(message))}", soft_wrap=True)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command."""


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Where to keep the files; none: a temporary directory.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Tune all-MiniLM-L6-v2 on Python's own documentation, fold, export, and check every claim on the way.

    Example: `lora-fx demo --out lora_fx_demo`
    """
    from .demo import run_demo

    with tempfile.TemporaryDirectory() as temporary:
        result = run_demo(out or Path(temporary), steps=steps, seed=seed, quiet=as_json, is_temporary=out is None)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    if result.problems:
        raise CheckFailedError("; ".join(result.problems))


@app.command()
def inspect(
    model: ModelDir,
    adapter: OptionalAdapter = None,
    target: Annotated[list[str] | None, typer.Option(help="Plan these target_modules (repeat the option).")] = None,
    r: Annotated[int | None, typer.Option(help="Rank for --target; none: 8.")] = None,
    as_json: Json = False,
) -> None:
    """Show the sites of a model, and what an adapter, or a choice of targets, would adapt.

    Examples: `lora-fx inspect MODEL_DIR`, `lora-fx inspect MODEL_DIR ADAPTER_DIR`,
    `lora-fx inspect MODEL_DIR --target query --target value --r 16`
    """
    import lora_fx

    if adapter is not None and (target or r is not None):
        raise typer.BadParameter("an adapter says itself what it adapts; give either ADAPTER_DIR or --target and --r")
    if r is not None and not target:
        raise typer.BadParameter("--r is the rank for --target; name at least one target")
    gm = _trace(model, adapter)[1]
    sites = lora_fx.find_sites(gm)
    plan = None
    if adapter is not None:
        plan = _adapter_plan(gm, adapter)
    elif target:
        names: Any = target[0] if target == ["all-linear"] else target
        plan = lora_fx.make_plan(gm, lora_fx.LoraConfig(r=8 if r is None else r, target_modules=names))
    linear_names = lora_fx.find_all_linear_names(gm)
    parameters = lora_fx.trainable_parameters(gm)[1]
    if as_json:
        rows = [dataclasses.asdict(site) | {"dtype": str(site.dtype)} for site in sites]
        print(
            json.dumps(
                {
                    "parameters": parameters,
                    "adapter_parameters": None if plan is None else plan.parameters,
                    "sites": rows,
                    "all_linear_names": linear_names,
                    "targets": None if plan is None else _plan_rows(plan),
                    "not_adapted": None if plan is None else [dataclasses.asdict(skip) for skip in plan.skipped],
                }
            )
        )
        return
    print(sites if plan is None else plan)
    share = (
        "" if plan is None else f", and {plan.parameters:,} more in the adapter ({plan.parameters / parameters:.2%})"
    )
    print(f"\n{parameters:,} parameters in the model{share}")
    print(f"target_modules for every linear but the head: {linear_names}")


def _adapter_plan(gm: LoraGraphModule, adapter: Path) -> Plan:
    import lora_fx

    from .graph_module import record_of

    with _progress("reading the adapter"):
        injected = lora_fx.load_adapter(gm, adapter)
    return record_of(injected).adapters["default"].plan


def _plan_rows(plan: Plan) -> list[dict[str, Any]]:
    return [{"path": t.site.path, "r": t.r, "scaling": t.scaling, "parameters": t.parameters} for t in plan.targets]


@app.command()
def fold(
    model: ModelDir,
    adapter: AdapterDir,
    out: Annotated[Path, typer.Argument(help="New model directory to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace what is at OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into a model and save it in Hugging Face's layout.

    Nothing is written unless the folded model computes what the adapted one does.

    Example: `lora-fx fold MODEL_DIR ADAPTER_DIR OUT_DIR`
    """
    import lora_fx

    _check_destination(out, (model, adapter), overwrite)
    base, gm = _trace(model, adapter)
    injected = lora_fx.load_adapter(gm, adapter)
    record = lora_fx.trace_record(gm)
    assert record is not None
    import torch

    with torch.no_grad(), _progress("folding"):
        expected = injected(*record.args, **record.kwargs)
        folded = lora_fx.fold(injected, inplace=True)
        error = _largest_error(expected, base(*record.args, **record.kwargs))
    if error > (bound := _fold_bound(base)):
        raise CheckFailedError(f"the folded model differs from the adapted one by {error:.3g}, allowed {bound:.3g}")
    with _progress("saving"):
        _save_model(base, model, out)
    report = lora_fx.fold_report(folded)
    if as_json:
        rows = [dataclasses.asdict(site) | {"dtype": str(site.dtype)} for site in report.sites]
        print(json.dumps({"out": str(out), "error": error, "sites": rows}))
        return
    print(report)
    print(f"\nwritten to {out}; folded and adapted outputs differ by {error:.2g} of the largest value")


@app.command()
def export(
    model: ModelDir,
    paths: Annotated[list[Path], typer.Argument(metavar="[ADAPTER_DIR] OUT.onnx", help="Adapter, and file to write.")],
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; none: the exporter's choice.")] = None,
    as_json: Json = False,
) -> None:
    """Export a model, with an adapter folded in, to a checked ONNX file that is op for op the base model's.

    Examples: `lora-fx export MODEL_DIR ADAPTER_DIR OUT.onnx`, `lora-fx export MODEL_DIR BASE.onnx`
    """
    from exporters import export_onnx

    if len(paths) > 2:
        raise typer.BadParameter("give an adapter directory and one file to write, or the file alone")
    adapter, out = (paths[0], paths[1]) if len(paths) == 2 else (None, paths[0])
    gm = _folded(model, adapter)
    with _progress("exporting and checking"):
        report = export_onnx(gm, out, opset=opset)
    print(json.dumps(report.to_dict(), default=str) if as_json else report)


@app.command()
def verify(
    onnx: Annotated[Path, typer.Argument(help="The ONNX file to check.")],
    model: ModelDir,
    adapter: OptionalAdapter = None,
    base: Annotated[Path | None, typer.Option(help="The base model's ONNX, to compare op for op.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cuda, tensorrt or cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Run an ONNX file and the torch model on the same inputs and compare; exit status 4 if they differ.

    Example: `lora-fx verify OUT.onnx MODEL_DIR ADAPTER_DIR --base BASE.onnx`
    """
    from exporters import make_session, verify_onnx

    if provider != "auto":
        try:
            make_session(onnx, provider=provider)
        except ExportError as error:
            if provider in ("cuda", "tensorrt") and onnx.is_file():
                raise OSError(str(error)) from error
            raise
    gm = _folded(model, adapter)
    with _progress("verifying"):
        report = verify_onnx(onnx, gm, base=base, provider=provider)
    print(json.dumps(report.to_dict(), default=str) if as_json else report)
    if not report.ok:
        raise CheckFailedError(f"{onnx} does not compute what the model computes")


def _trace(model: Path, adapter: Path | None) -> tuple[nn.Module, LoraGraphModule]:
    """The model of a directory and its graph; the adapter's task decides the head."""
    from .adapter_files import find_adapter_directory, read_config
    from .hf_models import load_model

    config = None if adapter is None else read_config(find_adapter_directory(adapter, "default"))
    task = None if config is None else config.task_type
    with _progress("loading the model"):
        loaded, inputs, missing = load_model(model, task)
    trained = () if config is None else tuple(config.modules_to_save or ())
    random = [name for name in missing if not set(name.split(".")) & set(trained)]
    if random:
        warn(
            f"{str(model)!r} lacks {len(random)} weights of {type(loaded).__name__}, which are random now and in "
            f"every later run: {', '.join(map(repr, random[:4]))}. Outputs that need them mean nothing"
        )
    import lora_fx

    with _progress("tracing"):
        return loaded, lora_fx.trace(loaded, (), inputs)


def _folded(model: Path, adapter: Path | None) -> LoraGraphModule:
    import lora_fx

    gm = _trace(model, adapter)[1]
    if adapter is None:
        return gm
    with _progress("folding"):
        return lora_fx.fold(lora_fx.load_adapter(gm, adapter))


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on stderr what is going on, with a spinner on a terminal."""
    if not _stderr.is_terminal:
        yield
        return
    with _stderr.status(what):
        yield


def _check_destination(out: Path, sources: tuple[Path, ...], overwrite: bool) -> None:
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise AdapterError(f"OUT {str(out)!r} is, or holds, {str(source)!r}, which is read; give another directory")
    if out.exists() and not out.is_dir():
        raise AdapterError(f"{str(out)!r} is a file; OUT must be a directory")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise AdapterError(f"{str(out)!r} is not empty; --overwrite replaces it")


def _largest_error(expected: Any, actual: Any) -> float:
    import torch
    from torch.utils import _pytree as pytree

    from .equivalence import relative_error

    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    errors = [relative_error(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return max(errors, default=0.0)


def _fold_bound(model: nn.Module) -> float:
    """What a right fold may differ by: rounding of each weight, carried through a deep model."""
    import torch

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return (32 if dtype in (torch.float16, torch.bfloat16) else 1024) * torch.finfo(dtype).eps


def _save_model(model: Any, source: Path, out: Path) -> None:
    """Write a model directory beside OUT and put it in place when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        _copy_companions(source, folder)
        old = Path(temporary) / "old"
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(folder, out)
        except BaseException:
            if old.exists():
                os.rename(old, out)
            raise


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, preprocessor and pooling files, also one directory down; the new model's own files stay."""
    for file in [*source.glob("*"), *source.glob("[!.]*/*")]:
        target = folder / file.relative_to(source)
        is_wanted = file.suffix in _COPIED_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and is_wanted and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(file, target)


__all__ = ["app", "main"]
