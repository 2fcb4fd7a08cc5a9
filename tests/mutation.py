"""Mutation testing: change one thing in a function, and see whether a test that calls it notices.

    python tests/mutation.py lora_fx/sites.py lora_fx/folding.py          # all mutants of these files
    python tests/mutation.py lora_fx/plan.py --every 10                   # each tenth

All of a module, with more tests for what is left after the quick ones, and a record that the benchmarks print:

    python tests/mutation.py lora_fx/plan.py --seconds 5 --json quick.json
    python tests/mutation.py lora_fx/plan.py --seconds 40 --again quick.json --record

The tests are collected and run once, to learn which of them call which function, themselves or by what they take from
a fixture or a cache. Then each mutant has a forked process, in which the function's code is exchanged and the tests
run again, so that nothing is imported anew. No result of the unchanged function waits there: fixtures have been torn
down, what lora_fx remembers is forgotten, and so are the caches of tests whose values the function had a part in; the
others, such as traced graphs, stay. Prints the survivors, for a person to kill with a test or to explain in
mutation_equivalents.toml: texts of messages, annotations and `__str__` are not changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENTS, RECORD = (ROOT / "tests" / f"mutation_{name}" for name in ("equivalents.toml", "record.json"))
TESTS = (
    "sites", "plan", "plan_checks", "matching", "merging", "folding", "fold_bases", "fold_tasks", "fold_terms",
    "checks", "tokens_and_ties", "parts", "aliasing", "config", "injection", "quantized", "delta_statistics",
    "unflattening", "checkpoint_calls", "checkpoint_plan", "shard_writing", "fold_work", "checkpoints",
)  # fmt: skip

_SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Add, ast.Pow: ast.Mult,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip


Key = tuple[str, str]  # file, function
Name = tuple[str, str, str]  # file, function, change: lines that are added elsewhere do not change it


@dataclass(frozen=True)
class Mutant:
    """One change of one function."""

    file: str
    function: str
    line: int
    change: str
    code: CodeType

    @property
    def at(self) -> str:
        """file:line."""
        return f"{self.module}:{self.line}"

    @property
    def name(self) -> Name:
        """What it is called in the table of equivalents."""
        return self.module, self.function, self.change

    @property
    def module(self) -> str:
        """The file from the root of the repository."""
        return self.file.removeprefix(f"{ROOT}/")


def mutants(file: Path) -> Iterator[Mutant]:
    """All changes of a file's functions. One that a function has several times is numbered from the second on."""
    tree = ast.parse(file.read_text())
    for function, path in _functions(tree, ()):
        seen: Counter[str] = Counter()
        if path[-1] in ("__str__", "__repr__", "_repr_html_"):
            continue
        for node, apply, what in _changes(function):
            before = ast.unparse(node) if not isinstance(node, ast.stmt) else ast.unparse(node).partition("\n")[0]
            change = f"{what}: {before[:90]}"
            seen[change] += 1
            undo = apply()
            code = code_of(tree, str(file), ".".join(path))
            undo()
            yield Mutant(
                str(file), ".".join(path), node.lineno, change + f" ({seen[change]})" * (seen[change] > 1), code
            )


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


def noting(file: str, note: Callable[[Key], None]) -> Callable[[], None]:
    """Let each function of a file say at each call that it is called; returns what takes that back."""
    module = importlib.import_module(file.removeprefix(f"{ROOT}/").removesuffix(".py").replace("/", "."))
    tree, kept = ast.parse(Path(file).read_text()), []
    for node, path in list(_functions(tree, ())):
        name = ".".join(path)
        node.body.insert(0, ast.parse(f"{_NOTE}({(file, name)!r})").body[0])
        function, code = function_of(module, name), code_of(tree, file, name)
        kept.append((function, function.__code__))
        function.__code__ = code
    setattr(module, _NOTE, note)

    def undo() -> None:
        for function, code in kept:
            function.__code__ = code

    return undo


_NOTE = "_note_of_mutation"


# What remembers ---------------------------------------------------------------------------------------

_Cache = functools._lru_cache_wrapper  # what functools.cache gives


def caches_under(folder: str) -> list[Any]:
    """Every functools cache of the modules in a folder."""
    found = []
    for module in list(sys.modules.values()):
        if not str(getattr(module, "__file__", None)).startswith(str(ROOT / folder)):
            continue
        for owner in (module, *(each for each in vars(module).values() if isinstance(each, type))):
            found.extend(each for each in list(vars(owner).values()) if isinstance(each, _Cache))
    return found


def forget(caches: Iterable[Any]) -> None:
    """Empty caches."""
    for cache in caches:
        cache.cache_clear()


def forget_memos() -> None:
    """Empty the memos that graph modules carry, wherever they are kept."""
    from lora_fx.graph_module import GraphRecord

    gc.unfreeze()  # what conftest.py froze is not listed otherwise
    for each in gc.get_objects():
        if type(each) is GraphRecord:
            each.compiled.clear()
            each.selections.clear()
    gc.freeze()


# Running tests ----------------------------------------------------------------------------------------


class Session:
    """A pytest plugin: learns which test depends on which functions, then calls `work`, which runs some again."""

    def __init__(self, files: list[str], work: Callable[[Session], None]) -> None:
        undo = [noting(file, self._note) for file in files]
        self._undo = lambda: [each() for each in undo]
        self._work = work
        self._noted: list[set[Key]] = []  # by the test, and the fixtures that are set up
        self._fixtures: dict[object, set[Key]] = {}
        self._failed: list[str] = []
        self._caches: dict[CodeType, Any] = {}
        self._parts: dict[CodeType, set[Key]] = {}  # what a cache of tests is before → which functions it calls
        self._items: dict[str, Any] = {}
        self.tests: dict[Key, dict[str, float]] = {}  # function → the tests that depend on it, with their seconds
        self.at_import: set[Key] = set()
        self.error: BaseException | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        with self._noting(self.at_import):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        try:
            self._items = {item.nodeid: item for item in session.items}
            self._caches = {
                c.__wrapped__.__code__: c for c in caches_under("tests") if isinstance(c.__wrapped__, FunctionType)
            }
            for item, following in _with_next(session.items):
                self._learn(item, following)
            self._undo()
            assert session.items, "no test was found"
            assert not self._failed, f"tests fail without a change: {self._failed}"
            forget(caches_under("lora_fx"))
            forget_memos()
            self._work(self)
        except BaseException as error:  # for main, which has the terminal
            self.error = error
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        with self._noting(self._fixtures.setdefault(fixturedef, set())):
            return (yield)

    def _learn(self, item: Any, following: Any) -> None:
        # What is made by the functions is made by each test that needs it, and so found to be.
        forget(caches_under("lora_fx"))
        forget(self._caches[code] for code in self._parts)
        seen: set[Key] = set()
        started = time.perf_counter()
        with self._noting(seen):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        seconds = time.perf_counter() - started
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            seen.update(*(self._fixtures.get(each, ()) for each in definitions))
        for key in seen:
            self.tests.setdefault(key, {})[item.nodeid] = seconds

    @contextlib.contextmanager
    def _noting(self, seen: set[Key]) -> Iterator[None]:
        """Add the functions that are called meanwhile."""
        self._noted.append(seen)
        try:
            yield
        finally:
            assert self._noted.pop() is seen

    def _note(self, key: Key) -> None:
        for noted in self._noted:
            noted.add(key)
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code in self._caches:
                self._parts.setdefault(frame.f_code, set()).add(key)
            frame = frame.f_back

    def verdict(self, mutant: Mutant | None, key: Key, names: list[str], seconds: float) -> str:
        """What the tests say of a mutant, or of the unchanged function; in a process of its own."""
        child = os.fork()
        if child == 0:
            status = _BROKEN
            try:
                os.setpgid(0, 0)
                signal.alarm(int(seconds) + 1)
                forget(self._caches[code] for code, made_by in self._parts.items() if key in made_by)
                is_possible = mutant is None or _exchange(mutant)
                status = (_SURVIVED if self._pass(names) else _KILLED) if is_possible else _IMPOSSIBLE
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what tests have forked, and a change has let run on
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
        assert os.WEXITSTATUS(status) != _BROKEN, f"the runner failed at {mutant or key}"
        return _VERDICTS[os.WEXITSTATUS(status)]

    def _pass(self, names: list[str]) -> bool:
        """Whether those tests pass; the first that does not is the last that runs."""
        self._failed.clear()
        for item, following in _with_next([self._items[name] for name in names]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                return False
        return True


def _with_next(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items, [*items[1:], None], strict=True)


_SURVIVED, _KILLED, _IMPOSSIBLE, _BROKEN = 0, 1, 3, 70
_VERDICTS = {_SURVIVED: "survived", _KILLED: "killed", _IMPOSSIBLE: "impossible"}


def _exchange(mutant: Mutant) -> bool:
    """Put the mutant's code in place; False where it has other free variables: it could not stand there."""
    module = importlib.import_module(mutant.module.removesuffix(".py").replace("/", "."))
    try:
        function_of(module, mutant.function).__code__ = mutant.code
    except ValueError:
        return False
    return True


def chosen(tests: dict[str, float], module: str, seconds: float) -> list[str]:
    """As many as there is time for: those of files named like the module first, then the quickest of each kind."""
    order, kinds = [], set[str]()
    for name in sorted(tests, key=lambda name: tests[name]):
        kind, file = name.partition("[")[0], name.partition("::")[0].rpartition("test_")[2]
        is_own = file.startswith(module[:4])
        order.append((not is_own, not is_own and kind in kinds, name))
        kinds.add(kind)
    kept: list[str] = []
    for _, _, name in sorted(order, key=lambda each: each[:2]):
        if seconds < 0:
            break
        seconds -= tests[name]
        kept.append(name)
    return kept


# The table of changes that change nothing -------------------------------------------------------------


def equivalents() -> dict[Name, str]:
    """{mutant: why it gives the same result for every input, with the kind of the reason before it}."""
    table = tomllib.loads(EQUIVALENTS.read_text())["equivalent"]
    return {
        (each["file"], each["function"], change): f"{each['kind']}: {each['why']}"
        for each in table
        for change in each["changes"]
    }


def _check_table(known: Iterable[Name], files: list[str]) -> None:
    """No entry stays when the change that it explains is gone."""
    mutated = {file.removeprefix(f"{ROOT}/") for file in files}
    gone = {name for name in known if name[0] in mutated} - {m.name for file in files for m in mutants(Path(file))}
    assert not gone, f"{EQUIVALENTS.name} explains changes that cannot be made any more; take them out: {gone}"


# The command ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A mutant and what became of it."""

    at: str
    function: str
    change: str
    verdict: str
    tests: int

    @property
    def file(self) -> str:
        """Where it is, from the root of the repository."""
        return self.at.rpartition(":")[0]

    @property
    def name(self) -> Name:
        """As of the mutant."""
        return self.file, self.function, self.change

    @property
    def is_dead(self) -> bool:
        """A test notices, or it is no function."""
        return self.verdict in ("killed", "timeout", "impossible")


def counts_of(found: Iterable[Found]) -> Counter[str]:
    """How many mutants there are, how many of each verdict, and how many live unexplained or die explained."""
    counts, known = Counter({"mutants": 0, "killed": 0, "equivalent": 0, "unexplained": 0}), equivalents()
    for each in found:
        counts["mutants"] += 1
        is_explained = each.is_dead != (each.name in known)
        counts[each.verdict if each.is_dead and is_explained else "equivalent" if is_explained else "unexplained"] += 1
    return counts


def digest_of(file: str | Path) -> str:
    """sha256 of a file, by which a record is known to be of it."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def mutate(wanted: list[Mutant], seconds: float, tests: Iterable[str], tell: Callable[[Found], None]) -> None:
    """Run tests on mutants, for each as many as there are seconds for.

    Raises:
        AssertionError: if the tests fail without a change, or if a function is called as they are imported.
    """
    suites = [str(f) for name in tests for f in [ROOT / "tests" / f"test_{name}.py"] if f.is_file()]

    def work(session: Session) -> None:
        survived: dict[Key, bool] = {}
        names: dict[Key, list[str]] = {}
        for mutant in wanted:
            key = (mutant.file, mutant.function)
            known = session.tests.get(key, {})
            names[key] = chosen(known, Path(mutant.file).stem, seconds)
            limit = 3 * sum(known[name] for name in names[key]) + 20
            what = session.verdict(mutant, key, names[key], limit) if known else "not called"
            tell(Found(mutant.at, mutant.function, mutant.change, what, len(names[key])))
            survived[key] = survived.get(key, False) or what == "survived"
        # Where every change was noticed, are the tests content without one?
        for key in (key for key, has in survived.items() if not has and names[key]):
            assert session.verdict(None, key, names[key], 600) == "survived", f"{key}: {names[key]} fail as they are"

    session = Session(sorted({mutant.file for mutant in wanted}), work)
    pytest.main(["-q", "-s", "--tb=no", "-p", "no:cacheprovider", *suites], [session])
    if session.error is not None:
        raise session.error
    imported = session.at_import & {(m.file, m.function) for m in wanted}
    assert not imported, f"called while the tests are imported, which is not done again: {imported}"


@contextlib.contextmanager
def _silent() -> Iterator[Any]:
    """Nothing is printed but what is written to the stream that this gives."""
    with os.fdopen(os.dup(1), "w") as out, Path(os.devnull).open("w") as nothing:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
        try:
            yield out
        finally:
            for number, file in zip((1, 2), kept, strict=True):
                os.dup2(file, number)
                os.close(file)


def main() -> None:
    """Mutate files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="only each n-th mutant")
    parser.add_argument("--seconds", type=float, default=20, help="of tests for a mutant, the quickest first")
    parser.add_argument("--json", type=Path, help="write what became of each mutant to this file")
    parser.add_argument("--part", default="0/1", help="which part of the mutants, for several processes: 0/2, 1/2")
    parser.add_argument("--again", type=Path, help="only the survivors in what --json wrote; the others are taken over")
    parser.add_argument("--record", action="store_true", help=f"note the counts in {RECORD.name}")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="names of test files")
    parser.add_argument("--function", default="", help="only functions whose name contains this")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    part, parts = map(int, options.part.split("/"))
    before = [Found(**each) for each in json.loads(options.again.read_text())] if options.again else []
    dead = {each.name: each for each in before if each.is_dead}
    files = [str((ROOT / file).resolve()) for file in options.files]
    every = [m for f in files for m in mutants(Path(f)) if options.function in m.function]
    every = every[:: options.every][part::parts]
    known = equivalents()
    _check_table(known, files)
    written: list[Found] = [dead[m.name] for m in every if m.name in dead]

    def tell(found: Found) -> None:
        written.append(found)
        if (why := known.get(found.name)) is not None:
            what = "wrongly called equivalent" if found.is_dead else f"equivalent, {why}"
            print(f"{what}: {found.at} {found.function}: {found.change}", file=out, flush=True)
        elif not found.is_dead:
            print(f"{found.verdict}: {found.at} {found.function}: {found.change}", file=out, flush=True)
        if options.json:
            options.json.write_text(json.dumps([vars(each) for each in written], indent=1))

    with _silent() as out:
        mutate([m for m in every if m.name not in dead], options.seconds, options.tests, tell)
    counts = counts_of(written)
    print(f"{len(written)} mutants: {dict(counts)}; {counts['unexplained']} unexplained")
    if options.record:
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        for file in files:
            own = [each for each in written if each.file == file.removeprefix(f"{ROOT}/")]
            record[file.removeprefix(f"{ROOT}/")] = {"sha256": digest_of(file), **counts_of(own)}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
