"""`lora-fx onnx …`: adapters and existing ONNX files, with neither the model's code nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .adapter_integrity import Integrity
from .cli_console import print_json, progress
from .cli_paths import check_onnx_destination

app = typer.Typer(
    no_args_is_help=True,
    help="Adapters and existing ONNX files: fold, make switchable, optimize. Needs neither the model nor torch.",
    rich_markup_mode="markdown",
)

OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file, of export, torch.onnx, optimum or genai's builder.")]
OutFile = Annotated[Path, typer.Argument(help="The ONNX file to write.")]
AdapterDir = Annotated[Path, typer.Argument(help="PEFT adapter directory (adapter_config.json, safetensors).")]
AdapterDirs = Annotated[list[Path], typer.Argument(help="PEFT adapter directories that the file is made for.")]
Partial = Annotated[bool, typer.Option(help="The file is one part of the model, such as its encoder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a file at OUT that is not an ONNX file, too.")]


RequireIntegrity = Annotated[
    bool, typer.Option("--require-integrity", help="Refuse an adapter whose files have no hashes to verify.")
]


def integrity_of(required: bool) -> Integrity:
    """What `--require-integrity` means."""
    return "required" if required else "checked"


def _show(report: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)


@app.command("fold")
def fold(
    base: OnnxFile,
    adapter: AdapterDir,
    out: OutFile,
    strength: Annotated[float, typer.Option(help="Multiplies all that the adapter adds.")] = 1.0,
    partial: Partial = False,
    require_integrity: RequireIntegrity = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into an ONNX file. OUT may be BASE: then it is done in place, and `unfold` takes it back.

    Example: `lora-fx onnx fold BASE.onnx ADAPTER_DIR OUT.onnx`
    """
    if not (out.exists() and base.exists() and out.samefile(base)):
        check_onnx_destination(out, [base, adapter], overwrite=overwrite)
    from exporters import fold_into_onnx

    from .adapter_arrays import read_adapter

    with progress("folding"):
        arrays = read_adapter(adapter, integrity=integrity_of(require_integrity))
        report = fold_into_onnx(base, arrays, out, strength=strength, partial=partial)
    _show(report, as_json=as_json)


@app.command("unfold")
def unfold(file: Annotated[Path, typer.Argument(help="A file that an adapter was folded into in place.")]) -> None:
    """Take back a fold in place: the files are again what they were, byte for byte.

    Example: `lora-fx onnx unfold MODEL.onnx`
    """
    from exporters import unfold_onnx

    unfold_onnx(file)
    print(f"{file} is again what it was")


@app.command("inputs")
def inputs(
    base: OnnxFile,
    out: OutFile,
    adapters: AdapterDirs,
    rank: Annotated[int | None, typer.Option(min=1, help="Fix the rank; none: every adapter brings its own.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Give an ONNX file inputs for adapters, which may be left out, so that they are switched at run time.

    Example: `lora-fx onnx inputs BASE.onnx OUT.onnx ADAPTER_DIR`, then `lora-fx onnx adapter OUT.onnx ADAPTER_DIR
    FRENCH.onnx_adapter`
    """
    check_onnx_destination(out, [base, *adapters], overwrite=overwrite)
    from exporters import add_adapter_inputs

    with progress("inserting"):
        report = add_adapter_inputs(base, out, adapters, rank=rank)
    _show(report, as_json=as_json)


@app.command("adapter")
def adapter_file(
    model: Annotated[Path, typer.Argument(help="A file that `inputs` or export_onnx_adapters wrote.")],
    adapter: AdapterDir,
    out: Annotated[Path, typer.Argument(help="The .onnx_adapter file to write.")],
) -> None:
    """Write an adapter as the .onnx_adapter file that ONNX Runtime loads, made for one model and checked against it.

    Example: `lora-fx onnx adapter MODEL.onnx ADAPTER_DIR FRENCH.onnx_adapter`
    """
    from exporters import write_onnx_adapter

    print(f"written to {write_onnx_adapter(model, adapter, out)}")


@app.command("rows")
def rows(
    base: OnnxFile,
    out: OutFile,
    adapters: AdapterDirs,
    check: Annotated[bool, typer.Option(help="Run the file with made-up inputs, to see that rows stay apart.")] = True,
    overwrite: Overwrite = False,
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

    with progress("inserting"):
        report = add_adapter_stacks(base, out, named, check=check)
    _show(report, as_json=as_json)


@app.command("optimize")
def optimize(base: OnnxFile, out: OutFile, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Try all optimisers, check what each of them gives, and write the best right result.

    Example: `lora-fx onnx optimize FOLDED.onnx OUT.onnx`
    """
    check_onnx_destination(out, [base], overwrite=overwrite)
    from exporters import optimize_onnx

    with progress("optimizing and checking"):
        report = optimize_onnx(base, out)
    _show(report, as_json=as_json)
