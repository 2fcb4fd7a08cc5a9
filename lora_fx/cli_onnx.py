"""`lora-fx onnx …`: adapters and existing ONNX files, with neither the model's code nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_commands import EXIT_STATUSES, AdapterDir, DryRun, IntegrityOption, Json, OverwriteOnnx, register
from .cli_console import NOTHING_WRITTEN, print_json, progress, show, show_report
from .cli_dry_runs import place_of, report_at
from .cli_paths import check_onnx_destination
from .errors import ExportError

app = typer.Typer(
    no_args_is_help=True,
    help="Adapters and existing ONNX files: fold, make switchable, optimize. Needs neither the model nor torch.",
    rich_markup_mode="markdown",
    epilog=EXIT_STATUSES,
)

OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file, of export, torch.onnx, optimum or genai's builder.")]
OutFile = Annotated[Path, typer.Argument(help="The ONNX file to write.")]
AdapterDirs = Annotated[list[Path], typer.Argument(help="PEFT adapter directories that the file is made for.")]
Partial = Annotated[bool, typer.Option(help="The file is one part of the model, such as its encoder.")]


@register(app, "fold")
def fold(
    base: OnnxFile,
    adapter: AdapterDir,
    out: OutFile,
    strength: Annotated[float, typer.Option(help="Multiplies all that the adapter adds.")] = 1.0,
    partial: Partial = False,
    integrity: IntegrityOption = "checked",
    overwrite: OverwriteOnnx = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into an ONNX file. OUT may be BASE: then it is done in place, and `unfold` takes it back.

    Example: `lora-fx onnx fold BASE.onnx ADAPTER_DIR OUT.onnx`
    """
    in_place = out.exists() and base.exists() and out.samefile(base)
    if not in_place:
        check_onnx_destination(out, [base, adapter], overwrite=overwrite)
    from exporters import fold_into_onnx

    from .adapter_arrays import read_adapter

    with progress("folding"), place_of(out, dry_run) as place:
        arrays = read_adapter(adapter, integrity=integrity)
        report = fold_into_onnx(base, arrays, place, strength=strength, partial=partial)
    untied = [weight.name for weight in report.weights if weight.untied]
    if dry_run and in_place and untied:
        raise ExportError(f"{untied[0]!r} is tied, and cannot be untied in place; fold into another file")
    show_report(report_at(report, out), as_json=as_json, dry_run=dry_run)


@register(app, "unfold")
def unfold(
    file: Annotated[Path, typer.Argument(help="A file that an adapter was folded into in place.")],
    as_json: Json = False,
) -> None:
    """Take back a fold in place: the files are again what they were, byte for byte.

    Example: `lora-fx onnx unfold MODEL.onnx`
    """
    from exporters import unfold_onnx

    unfold_onnx(file)
    if as_json:
        print_json({"path": str(file)})
    else:
        show(f"{file} is again what it was")


@register(app, "inputs")
def inputs(
    base: OnnxFile,
    out: OutFile,
    adapters: AdapterDirs,
    rank: Annotated[int | None, typer.Option(min=1, help="Fix the rank; none: every adapter brings its own.")] = None,
    integrity: IntegrityOption = "checked",
    overwrite: OverwriteOnnx = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Give an ONNX file inputs for adapters, which may be left out, so that they are switched at run time.

    Example: `lora-fx onnx inputs BASE.onnx OUT.onnx ADAPTER_DIR`, then `lora-fx onnx adapter OUT.onnx ADAPTER_DIR
    FRENCH.onnx_adapter`
    """
    check_onnx_destination(out, [base, *adapters], overwrite=overwrite)
    from exporters import add_adapter_inputs

    from .adapter_arrays import read_adapter

    with progress("inserting"), place_of(out, dry_run) as place:
        arrays = [read_adapter(adapter, integrity=integrity) for adapter in adapters]
        report = add_adapter_inputs(base, place, arrays, rank=rank)
    show_report(report_at(report, out), as_json=as_json, dry_run=dry_run)


@register(app, "adapter")
def adapter_file(
    model: Annotated[Path, typer.Argument(help="A file that `inputs` or export_onnx_adapters wrote.")],
    adapter: AdapterDir,
    out: Annotated[Path, typer.Argument(help="The .onnx_adapter file to write.")],
    integrity: IntegrityOption = "checked",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as the .onnx_adapter file that ONNX Runtime loads, made for one model and checked against it.

    Example: `lora-fx onnx adapter MODEL.onnx ADAPTER_DIR FRENCH.onnx_adapter`
    """
    from exporters import write_onnx_adapter

    from .adapter_arrays import read_adapter

    with place_of(out, dry_run) as place:
        write_onnx_adapter(model, read_adapter(adapter, integrity=integrity), place)
    if as_json:
        print_json({"path": str(out), "dry_run": dry_run})
    else:
        show(NOTHING_WRITTEN if dry_run else f"written to {out}")


@register(app, "rows")
def rows(
    base: OnnxFile,
    out: OutFile,
    adapters: AdapterDirs,
    check: Annotated[bool, typer.Option(help="Run the file with made-up inputs, to see that rows stay apart.")] = True,
    integrity: IntegrityOption = "checked",
    overwrite: OverwriteOnnx = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Put several adapters into one ONNX file, which takes adapter_ids: one for each row of the batch, 0 for none.

    They are called by their directories' names, and numbered from 1.

    Example: `lora-fx onnx rows BASE.onnx OUT.onnx FRENCH_DIR GERMAN_DIR`
    """
    named = {path.resolve().name: path for path in adapters}
    if len(named) < len(adapters):
        raise typer.BadParameter("two of the adapter directories have the same name, by which rows choose them")
    check_onnx_destination(out, [base, *adapters], overwrite=overwrite)
    from exporters import add_adapter_stacks

    from .adapter_arrays import read_adapter

    with progress("inserting"), place_of(out, dry_run) as place:
        arrays = {name: read_adapter(directory, integrity=integrity) for name, directory in named.items()}
        report = add_adapter_stacks(base, place, arrays, check=check)
    show_report(report_at(report, out), as_json=as_json, dry_run=dry_run)


@register(app, "optimize")
def optimize(
    base: OnnxFile, out: OutFile, overwrite: OverwriteOnnx = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Try all optimisers, check what each of them gives, and write the best right result.

    Example: `lora-fx onnx optimize FOLDED.onnx OUT.onnx`
    """
    check_onnx_destination(out, [base], overwrite=overwrite)
    from exporters import optimize_onnx

    with progress("optimizing and checking"), place_of(out, dry_run) as place:
        report = optimize_onnx(base, place)
    show_report(report_at(report, out), as_json=as_json, dry_run=dry_run)
