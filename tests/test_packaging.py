"""What pyproject.toml promises, and the time an import takes. `.ci/package.py` builds and installs, in minutes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lora_fx

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
PLATFORMS = (
    {"sys_platform": "linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_machine": "AMD64"},
)


def packages_of(extra: str, platform: dict[str, str]) -> Iterator[str]:
    """Names of what an extra installs there, through the extras that it names."""
    for line in EXTRAS[extra]:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate(default_environment() | platform):
            continue
        if wanted.name == "lora-fx":
            for other in wanted.extras:
                yield from packages_of(other, platform)
        else:
            yield wanted.name


RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda each: "-".join(each.values()))
def test_no_extra_installs_two_runtimes_that_write_one_directory(platform) -> None:
    found = {extra: RUNTIMES & set(packages_of(extra, platform)) for extra in EXTRAS}
    assert all(len(runtimes) <= 1 for runtimes in found.values()), found
    assert all(found[extra] for extra in ("ort", "ort-gpu", "demo", "bench", "test"))
    excluded = {frozenset(each["extra"] for each in pair) for pair in SETTINGS["tool"]["uv"]["conflicts"]}
    fighting = {frozenset(pair) for pair in combinations(EXTRAS, 2) if found[pair[0]] | found[pair[1]] == RUNTIMES}
    assert fighting <= excluded


def test_the_supported_versions_are_those_that_install() -> None:
    said = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    required = SpecifierSet(PROJECT["requires-python"])
    assert said[0] == str(required).removeprefix(">=")
    assert all(version in required for version in said)
    assert f"py{said[0].replace('.', '')}" == SETTINGS["tool"]["ruff"]["target-version"]
    assert SETTINGS["tool"]["mypy"]["python_version"] == said[0]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in said


def test_the_changelog_has_the_version() -> None:
    sections = re.findall(
        r"^## (\S+) – (unreleased|\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert sections[0][0] == lora_fx.__version__
    assert all(date != "unreleased" for _, date in sections[1:])


def test_both_packages_are_typed_and_the_scripts_are_there() -> None:
    assert "Typing :: Typed" in PROJECT["classifiers"]
    for package in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "py.typed").is_file()
    for script in re.findall(r"\.ci/[\w.]+", (ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        assert (ROOT / script).is_file(), script


def test_an_import_takes_less_than_a_second_over_torch() -> None:
    """Of CPU time; what torch itself imports lazily and tracing needs counts as ours."""
    code = """
import sys, time
import torch
started = time.process_time()
import lora_fx, exporters
bare = time.process_time() - started
for name in lora_fx.__all__: getattr(lora_fx, name)
print(bare, time.process_time() - started)
heavy = {'onnx', 'onnxruntime', 'transformers', 'peft', 'torchao', 'bitsandbytes', 'rich', 'typer'} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bare, everything = map(float, done.stdout.split())
    assert bare < 0.1
    assert everything < 1
