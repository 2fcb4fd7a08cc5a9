"""Mutation testing: change one thing in a function, and see whether a test that calls it notices.

    python tests/mutation.py lora_fx/sites.py lora_fx/folding.py          # all mutants of these files
    python tests/mutation.py lora_fx/plan.py --every 10 --json out.json   # each tenth

The tests run once, to learn which of them call which function. Then each mutant has a forked process, in which the
function's code is exchanged, so that nothing is imported or traced again. Prints the survivors, for a person to kill
with a test or to explain: texts of messages, annotations and `__str__` are not changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "sites", "plan", "plan_checks", "matching", "merging", "folding", "checks", "tokens_and_ties", "parts", "aliasing",
    "config", "injection",
)  # fmt: skip

_SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Add, ast.Pow: ast.Mult,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one function."""

    file: str
    function: str
    line: int
    change: str
    tree: ast.Module

    @property
    def at(self) -> str:
        """file:line."""
        return f"{self.file.removeprefix(f'{ROOT}/')}:{self.line}"


def mutants(file: Path) -> Iterator[Mutant]:
    """All changes of a file's functions."""
    tree = ast.parse(file.read_text())
    for function, path in _functions(tree, ()):
        if path[-1] in ("__str__", "__repr__", "_repr_html_"):
            continue
        for node, apply, what in _changes(function):
            before = ast.unparse(node) if not isinstance(node, ast.stmt) else ast.unparse(node).partition("\n")[0]
            undo = apply()
            yield Mutant(str(file), ".".join(path), node.lineno, f"{what}: {before[:90]}", copy.deepcopy(tree))
            undo()


def _functions(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[ast.FunctionDef, tuple[str, ...]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, (*path, child.name)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, (*path, child.name))


def _changes(function: ast.FunctionDef) -> Iterator[tuple[Any, Callable[[], Callable[[], None]], str]]:
    """(the node, what changes it and returns what changes it back, a word for it)."""
    for parent in list(_inside(function)):
        for field, value in ast.iter_fields(parent):
            items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for at, node in items:
                if isinstance(node, ast.AST) and not _is_text(parent, node):
                    for new, what in _new_nodes(parent, field, node):
                        located = node if hasattr(node, "lineno") else parent
                        yield located, _setter(parent, field, at, node, new), what


def _inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a body, without annotations, docstrings, and what is raised."""
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop(0)
        yield node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(node, ast.Call):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                    waiting.append(child)


def _is_text(parent: ast.AST, node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _new_nodes(parent: ast.AST, field: str, node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    if type(node) in _SWAPS:
        yield _SWAPS[type(node)](), f"{type(node).__name__} → {_SWAPS[type(node)].__name__}"
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value), "flipped"
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1), "+ 1"
        elif isinstance(node.value, float):
            yield ast.Constant(node.value * 2 + 1), "other number"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand, "without not"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand, "without minus"
    elif isinstance(node, ast.Raise):
        yield ast.Pass(), "no raise"
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Yield | ast.YieldFrom):
        yield ast.Pass(), "left out"
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield ast.Return(ast.Constant(None)), "returns None"
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass(), "left out"
    if field == "test" or (field == "ifs" and isinstance(parent, ast.comprehension)):
        for constant in (True, False):
            yield ast.Constant(constant), f"always {constant}"
    if field == "keywords" and isinstance(parent, ast.Call) and isinstance(node, ast.keyword) and node.arg:
        kept = [keyword for keyword in parent.keywords if keyword is not node]
        yield _Call(kept), f"without {node.arg}="


class _Call(ast.AST):
    """Stands for an argument that goes."""

    def __init__(self, kept: list[ast.keyword]) -> None:
        super().__init__()
        self.kept = kept


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _setter(
    parent: ast.AST, field: str, at: int | None, old: ast.AST, new: ast.AST
) -> Callable[[], Callable[[], None]]:
    def put(node: ast.AST) -> None:
        if isinstance(new, _Call):
            assert isinstance(parent, ast.Call)
            parent.keywords = new.kept if node is new else whole
        elif at is None:
            setattr(parent, field, node)
        else:
            getattr(parent, field)[at] = node

    whole = list(parent.keywords) if isinstance(parent, ast.Call) else []

    def apply() -> Callable[[], None]:
        put(new)
        return lambda: put(old)

    return apply


# Exchanging a function's code -------------------------------------------------------------------------


def code_of(tree: ast.Module, file: str, path: str) -> CodeType:
    """The code of a function of a module, compiled and not run."""
    code = compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True, flags=_FUTURE)
    for name in path.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code


_FUTURE = 0x1000000  # from __future__ import annotations


def function_of(module: Any, path: str) -> FunctionType:
    """The function itself: under properties, caches and other decorators."""
    found: Any = module
    for name in path.split("."):
        found = found.__dict__[name] if isinstance(found, type) else getattr(found, name)
    for attribute in ("fget", "func", "__func__"):
        found = getattr(found, attribute, None) or found
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    assert isinstance(found, FunctionType), f"{path} is a {type(found)}"
    return found


# Running tests ----------------------------------------------------------------------------------------


class Calls:
    """A pytest plugin: which test calls which functions, and how long it takes."""

    def __init__(self, files: list[str]) -> None:
        self._files = set(files)
        self.tests: dict[tuple[str, str], dict[str, float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        seen: set[tuple[str, str]] = set()

        def note(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename in self._files:
                name = frame.f_code.co_qualname.partition(".<locals>")[0]
                seen.add((frame.f_code.co_filename, name))

        started = time.perf_counter()
        sys.setprofile(note)
        try:
            result = yield
        finally:
            sys.setprofile(None)
        for key in seen:
            self.tests.setdefault(key, {})[item.nodeid] = time.perf_counter() - started
        return result


def run_tests(arguments: list[str], *plugins: object) -> int:
    """pytest in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *arguments], list(plugins)))


def verdict(mutant: Mutant, tests: list[str], seconds: float) -> str:
    """killed, survived, or timeout; in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(int(seconds))
            module = importlib.import_module(mutant.file.removeprefix(f"{ROOT}/").removesuffix(".py").replace("/", "."))
            function = function_of(module, mutant.function)
            try:
                function.__code__ = code_of(mutant.tree, mutant.file, mutant.function)
            except ValueError:  # other free variables: it is no function that could stand there
                os._exit(3)
            status = run_tests(tests)
        finally:
            os._exit(0 if status == 0 else 1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "timeout"
    return {0: "survived", 3: "impossible"}.get(os.WEXITSTATUS(status), "killed")


def chosen(tests: dict[str, float], module: str, seconds: float) -> list[str]:
    """As many as there is time for: those of a file named like the module first, then the quickest of each kind."""
    order, kinds = [], set[str]()
    for name in sorted(tests, key=lambda name: tests[name]):
        kind, file = name.partition("[")[0], name.partition("::")[0].rpartition("test_")[2]
        is_own = file[:4] == module[:4]
        order.append((not is_own, kind in kinds, name))
        kinds.add(kind)
    kept: list[str] = []
    for _, _, name in sorted(order, key=lambda each: each[:2]):
        if seconds < 0:
            break
        seconds -= tests[name]
        kept.append(name)
    return kept


def main() -> None:
    """Mutate files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="only each n-th mutant")
    parser.add_argument("--seconds", type=float, default=20, help="of tests for a mutant, the quickest first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="0/1", help="which part of the mutants, for several processes: 0/2, 1/2")
    parser.add_argument("--again", type=Path, help="only the survivors in what --json wrote")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="names of test files")
    parser.add_argument("--function", default="", help="only functions whose name contains this")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    files = [str((ROOT / file).resolve()) for file in options.files]
    suites = [str(f) for name in options.tests for f in [ROOT / "tests" / f"test_{name}.py"] if f.is_file()]
    calls = Calls(files)
    assert run_tests(suites, calls) == 0, "the tests fail without a mutant"
    part, parts = map(int, options.part.split("/"))
    every = [m for file in files for m in mutants(Path(file)) if options.function in m.function][:: options.every]
    if options.again:
        survivors = {
            tuple(each.values())[:3] for each in json.loads(options.again.read_text()) if not _dead(each["verdict"])
        }
        every = [m for m in every if (m.at, m.function, m.change) in survivors]
    found: list[dict[str, Any]] = []
    for mutant in every[part::parts]:
        tests = chosen(calls.tests.get((mutant.file, mutant.function), {}), Path(mutant.file).stem, options.seconds)
        what = verdict(mutant, tests, 5 * options.seconds + 30) if tests else "not called"
        found.append(
            {
                "at": mutant.at,
                "function": mutant.function,
                "change": mutant.change,
                "verdict": what,
                "tests": len(tests),
            }
        )
        if not _dead(what):
            print(f"{what}: {mutant.at} {mutant.function}: {mutant.change}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} mutants: {dict(Counter(each['verdict'] for each in found))}")


def _dead(verdict: str) -> bool:
    return verdict in ("killed", "timeout")


if __name__ == "__main__":
    main()
