"""docs/: blocks run and print what is shown, the site builds, links lead somewhere, the architecture is as it says."""

from __future__ import annotations

import ast
import html.parser
import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import browser
import peft
import pytest
import typer
from docs_blocks import PAGES, ROOT, blocks_of, is_right, run

import exporters
import lora_fx
from benchmarks.__main__ import SUBJECTS, _parser
from lora_fx.cli import app
from lora_fx.ops import FAMILIES

WITH_BLOCKS = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

# Blocks -------------------------------------------------------------------------------------------


@pytest.fixture
def families() -> Iterator[None]:
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


@pytest.mark.usefixtures("families")
@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in WITH_BLOCKS])
def test_blocks_run_and_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    for block, printed in run(page, tmp_path):
        shown = block.shows(text)
        assert shown is None or is_right(shown, printed), f"{page.name}:{block.line} prints now\n{printed}"


def test_what_is_shown_is_compared() -> None:
    printed = "2 sites, 1.003 s in /tmp/x\n‖ΔW‖ 13.51  error 3.1e-07\n"
    assert is_right("2 sites, ... s in .../x\n‖ΔW‖ 13.50  error 1.2e-08", printed)
    for wrong in ("3 sites, ...", "2 sites, ... in /tmp/x\n‖ΔW‖ 13.81  error ...", "", printed + "more", printed[:-3]):
        assert not is_right(wrong, printed), wrong


def test_a_fence_runs_unless_it_says_why_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na\n```\n\n<!-- not run: slow -->\n```bash\nb\n```\n\n```bash\nc\n```\n\n```text\nd\n```\n"
    )
    assert [(block.language, block.is_run, block.shown is None) for block in blocks_of(page)] == [
        ("python", True, True), ("bash", False, True), ("bash", True, False)
    ]  # fmt: skip


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in TEXTS])
def test_names_commands_and_options_are_there(page: Path) -> None:
    text = re.sub(r"```text\n.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for package, name in re.findall(r"\b(lora_fx|exporters)\.([A-Za-z]\w+)(?!\w|\.\w|/)", text):
        module = {"lora_fx": lora_fx, "exporters": exporters}[package]
        assert hasattr(module, name) or (ROOT / package / f"{name}.py").exists(), f"{package}.{name}"
    for line in re.findall(r"(?:^|`)lora-fx ([a-z][^`\n#]*)", text, re.MULTILINE):
        assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= _options(_command(line.split())), line
    anywhere = _options(typer.main.get_command(app)) | {
        o for action in _parser()._actions for o in action.option_strings
    }
    assert set(re.findall(r"`(--[a-z][a-z-]*)[^`]*`", text)) <= anywhere


def _command(words: list[str]) -> Any:
    command = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands") or word.startswith("--"):
            break
        assert word in command.commands, words
        command = command.commands[word]
    return command


def _options(command: Any) -> set[str]:
    """Those of a command, and of all below it."""
    own = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    return own.union(*map(_options, getattr(command, "commands", {}).values()))


def test_calls_of_peft_are_there() -> None:
    sources = "".join(path.read_text("utf-8") for path in Path(peft.__file__).parent.rglob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| (`.*) \|$", (ROOT / "docs" / "from-peft.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 15
    for theirs, ours in rows:
        for name in re.findall(r"`(?:model\.|PeftModel\.)?(\w+)", theirs):
            assert name == "model" or re.search(rf"\bdef {name}\(", sources), name
        for name in re.findall(r"(\w+)\(", ours):
            assert hasattr(lora_fx, name) or name == "batched", name


def test_every_subject_of_the_benchmarks_is_on_the_page() -> None:
    text = (ROOT / "docs" / "numbers.md").read_text("utf-8")
    assert set(re.findall(r"^\| `python -m benchmarks (\w+)`", text, re.MULTILINE)) == set(SUBJECTS)


# The site -----------------------------------------------------------------------------------------


class Scan(html.parser.HTMLParser):
    """What a page links to, what it loads, and where it can be jumped to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.loaded.add(given["href"])
        if "src" in given:
            self.loaded.add(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as it can be."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    return out


@pytest.fixture(scope="module")
def scans(site: Path) -> dict[Path, Scan]:
    return {page: Scan(page.read_text("utf-8")) for page in site.rglob("*.html") if page.name != "404.html"}


def test_links_lead_somewhere_and_nothing_is_fetched(scans: dict[Path, Scan]) -> None:
    assert len(scans) == len(PAGES)
    for page, scan in scans.items():
        for link in scan.links | scan.loaded:
            url = urllib.parse.urlsplit(link)
            if url.scheme:
                assert url.scheme in ("https", "data"), link
                assert link not in scan.loaded or url.scheme == "data", f"{page.name} fetches {link}"
                continue
            target = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if url.fragment and target in scans:
                assert urllib.parse.unquote(url.fragment) in scans[target].anchors, f"{page.name}: {link}"


def test_every_public_name_is_in_the_reference(scans: dict[Path, Scan]) -> None:
    anchors = [anchor for page, scan in scans.items() if page.parent.name == "reference" for anchor in scan.anchors]
    public = {f"{package.__name__}.{name}" for package in (lora_fx, exporters) for name in package.__all__}
    public -= {"lora_fx.__version__"}
    assert {name: anchors.count(name) for name in public} == dict.fromkeys(public, 1)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium to look with: apt-get install chromium")
def test_chromium_shows_pages_in_both_schemes_and_finds_words(site: Path) -> None:
    with browser.open_browser() as page:
        for name in ("index", "passes", "architecture", "reference/graphs"):
            for dark, width in ((False, 1280), (True, 390)):
                page.open(site / f"{name}.html", dark=dark, width=width)
                scheme = page.value("document.body.getAttribute('data-md-color-scheme')")
                assert scheme == ("slate" if dark else "default"), name
                assert page.value("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than {width}"
        typed = "const box = document.querySelector('.md-search__input'); box.focus(); box.value = 'unfold';"
        page.value(f"(() => {{ {typed} box.dispatchEvent(new Event('keyup')) }})()")
        found = "document.querySelectorAll('.md-search-result__item').length"
        waits = f"new Promise(done => {{ const look = () => {found} ? done({found}) : setTimeout(look, 50); look() }})"
        answer = page.call("Runtime.evaluate", expression=waits, awaitPromise=True, returnByValue=True)
        assert answer["result"]["value"] > 0
        assert not page.complaints()
        assert all(url.startswith(("file:", "data:")) for url in page.requests())


# The architecture ---------------------------------------------------------------------------------

ARCHITECTURE = ROOT / "docs" / "architecture.md"


@cache
def _modules() -> dict[str, Path]:
    """{dotted name: file} of both packages, but their lists of public names."""
    files = [path for package in ("lora_fx", "exporters") for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {name: path for name, path in names.items() if "." in name}


@cache
def _imports(module: str) -> dict[str, bool]:
    """{what the module imports: whether that is at its top}, but for types alone."""
    path = _modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: dict[str, bool] = {}

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        for name in _imported(node, package):
            found[name] = found.get(name, False) or at_top
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text("utf-8")), True)
    return found


def _imported(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parents = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)] if node.level else []
    base = ".".join([*parents, *([node.module] if node.module else [])])
    inner = {f"{base}.{alias.name}" for alias in node.names} & set(_modules())
    return [*inner, *([base] if len(inner) < len(node.names) else [])]


def _named(text: str) -> list[str]:
    """The modules that a piece of the page names as files, or as folders."""
    found: list[str] = []
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        dotted = name.removesuffix(".py").rstrip("/").replace("/", ".")
        dotted = dotted if dotted.startswith("exporters.") else f"lora_fx.{dotted}"
        meant = [m for m in _modules() if m == dotted or (name.endswith("/") and m.startswith(f"{dotted}."))]
        assert meant, f"docs/architecture.md names {name}, which is not there"
        found += meant
    return found


@cache
def _layers() -> list[tuple[str, list[str]]]:
    """(title, modules) of each layer of the page, from the lowest on."""
    text = ARCHITECTURE.read_text("utf-8").partition("## The layers")[2].partition("\n## ")[0]
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    rows = [(section, re.findall(r"^\| (.*?) \|", section, re.MULTILINE)) for section in sections]
    return [(section.partition("\n")[0], [m for cell in cells for m in _named(cell)]) for section, cells in rows]


def test_every_module_is_in_one_layer() -> None:
    listed = [module for _, modules in _layers() for module in modules]
    missing = sorted(set(_modules()) - set(listed))
    assert not missing, f"docs/architecture.md names these in no layer: {missing}"
    twice = sorted({module for module in listed if listed.count(module) > 1})
    assert not twice, f"docs/architecture.md names these in several layers: {twice}"


def test_arrows_point_one_way() -> None:
    height = {module: number for number, (_, modules) in enumerate(_layers()) for module in modules}
    up = [(m, name) for m in height for name in _imports(m) if height.get(name, -1) > height[m]]
    assert not up, f"on docs/architecture.md these import from a layer below theirs, change code or page: {up}"


def test_loops_are_those_of_the_page() -> None:
    reached = {module: _reach(module, lambda at_top: True) for module in _modules()}
    loops = {
        frozenset(o for o in reached if o in reached[m] and m in reached[o]) for m in _modules() if m in reached[m]
    }
    text = ARCHITECTURE.read_text("utf-8").partition("## Loops")[2]
    assert loops == {frozenset(_named(line.partition(": ")[0])) for line in text.splitlines() if line.startswith("- ")}


def test_layers_without_torch_import_none() -> None:
    free = [module for title, modules in _layers() for module in modules if title.endswith("no torch")]
    assert len(free) > 25
    for module in free:
        found = {name.partition(".")[0] for name in _reach(module, lambda at_top: at_top)}
        assert "torch" not in found, module


def _reach(module: str, counts: Callable[[bool], bool]) -> set[str]:
    """All that a module imports, and what it imports imports."""
    reached: set[str] = set()
    todo = [module]
    while todo:
        new = {name for name, at_top in _imports(todo.pop()).items() if counts(at_top)} - reached
        reached |= new
        todo += new & set(_modules())
    return reached


def test_packages_take_from_each_other_what_the_page_says() -> None:
    rule = ARCHITECTURE.read_text("utf-8").partition("- `exporters` takes")[2].partition("`lora_fx` takes")[0]
    inside = {f"lora_fx.{name}" for name in re.findall(r"`(\w+)`", rule.partition("of its modules")[2])}
    taken = {name for m in _modules() if m.startswith("exporters.") for name in _imports(m) if name in _modules()}
    assert {name for name in taken if name.startswith("lora_fx.")} == inside
    for title, modules in _layers():
        for module in modules if title != "Command line" else ():
            if module.startswith("lora_fx."):
                assert not [name for name in _imports(module) if name.partition(".")[0] == "exporters"], module
