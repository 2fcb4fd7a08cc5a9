"""What every command has: --verbose and --quiet wherever they are written, and the exit statuses under its help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .adapter_integrity import Integrity
from .cli_console import set_loudness

EXIT_STATUSES = (
    "Exit status: 0 ok, 1 a bug in lora_fx, 2 usage, 3 bad input, 4 a check failed, 5 environment (a package, a GPU or "
    "disk space is missing), 130 interrupted."
)

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        show_default=False,
        help="Say what is done, and show tracebacks of errors; -vv: more of it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone, and what --json asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Do the work and all checks, say what comes of it, and leave nothing written.")
]
AdapterDir = Annotated[Path, typer.Argument(help="PEFT adapter directory (adapter_config.json, safetensors).")]
OverwriteOnnx = Annotated[bool, typer.Option(help="Replace a file at OUT that is not an ONNX file, too.")]
IntegrityOption = Annotated[
    Integrity,
    typer.Option("--integrity", help="An adapter's hashes and base: checked if it notes them, required, or ignored."),
]


def register(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`app.command`, with the options that every command has."""

    def registered(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, verbose: int = 0, quiet: bool = False, **kwargs: Any) -> None:
            set_loudness(verbose, quiet)
            function(*args, **kwargs)

        hints = get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters.values()
        parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
        for option, default, annotation in (("verbose", 0, Verbose), ("quiet", False, Quiet)):
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(option, kind, default=default, annotation=annotation))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, epilog=EXIT_STATUSES)(run)
        return function

    return registered
