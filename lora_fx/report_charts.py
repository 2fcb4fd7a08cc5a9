"""What the report draws, as plain values: grids of coloured cells, and curves as SVG paths. No markup is made here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# viridis (van der Walt and Smith, BSD): even steps of lightness, so that it reads in grey and to the colour-blind.
_VIRIDIS = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140), (34, 168, 132),
    (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip
LEVELS = 32

# Size of a chart in its own units, and how many points of a curve, and of all curves, are drawn at most.
WIDTH, HEIGHT = 300, 120
_MOST_POINTS, _MOST_POINTS_IN_ALL = 240, 1600


def palette() -> list[tuple[str, str]]:
    """(background, text) of each level: the text black or white, whichever has more contrast."""
    colours = [_colour(level / (LEVELS - 1)) for level in range(LEVELS)]
    return [(colour, "#000" if luminance(colour) > _MIDDLE else "#fff") for colour in colours]


def line_colours(*, on_dark: bool) -> list[str]:
    """Of each level, for lines: of the whole scale, what has a contrast of 3 to the page (WCAG 2.2, 1.4.11)."""
    low, high = (0.4, 1.0) if on_dark else (0.0, 0.55)
    return [_colour(low + (high - low) * level / (LEVELS - 1)) for level in range(LEVELS)]


# The luminance at which black and white text have the same contrast (WCAG 2.2: √(1.05 · 0.05) − 0.05).
_MIDDLE = 0.179


def _colour(share: float) -> str:
    """The colour at a place of the scale, from 0 to 1."""
    position = share * (len(_VIRIDIS) - 1)
    start = min(int(position), len(_VIRIDIS) - 2)
    rgb = [round(a + (b - a) * (position - start)) for a, b in zip(_VIRIDIS[start], _VIRIDIS[start + 1], strict=True)]
    return f"#{rgb[0]:02x}{rgb[1]:02x}{rgb[2]:02x}"


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2.2."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@dataclass(frozen=True)
class Cell:
    """One square of a grid: its colour's level (None: not adapted), what stands in it, and what it says in words."""

    level: int | None
    text: str
    label: str


@dataclass(frozen=True)
class Row:
    """One module of a stack of layers: its name in the layer, and a cell, or None, for each layer."""

    name: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Stack:
    """Layers under one name, and their modules."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Grid:
    """Layers × modules, coloured by one measure.

    Attributes:
        title, note: what is measured, and in what.
        columns: layer indices.
        stacks: the rows.
        low, high: what the first and last colour mean.
        empty: what a square without a colour means.
        left_out: rows that are not drawn, because there are too many.
    """

    title: str
    note: str
    columns: tuple[int, ...]
    stacks: tuple[Stack, ...]
    low: str
    high: str
    empty: str
    left_out: int = 0

    @property
    def has_empty(self) -> bool:
        """Whether there is a square without a colour."""
        cells = (cell for stack in self.stacks for row in stack.rows for cell in row.cells)
        return any(cell is not None and cell.level is None for cell in cells)


@dataclass(frozen=True)
class Place:
    """Where a site stands in a model: the stack of layers, the layer, and the module's name in it."""

    stack: str
    layer: int
    module: str


def place_of(path: str) -> Place | None:
    """The place of a path with a number in it, such as `model.layers.3.self_attn.q_proj`; None for one without."""
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit() and len(part) < _DIGITS), None)
    if index is None:
        return None
    return Place(".".join(parts[:index]), int(parts[index]), ".".join(parts[index + 1 :]))


_DIGITS = 9


def make_grid(
    title: str,
    note: str,
    values: Mapping[str, float | None],
    others: Mapping[str, str],
    *,
    order: Iterable[str] = (),
    low: float = 0.0,
    high: float | None = None,
    text: Callable[[float], str],
    empty: str,
    most_cells: int,
) -> Grid | None:
    """The grid of a measure; None if no site lies in a layer.

    Args:
        values: {path: value}; None where there is none.
        others: {path: why it has no value}, for sites that are drawn empty.
        order: paths as they follow one another in the model; others come behind.
        low, high: the range of colours; `high` None is the largest value.
        text: a value in words.
        empty: what a square without a value means.
        most_cells: how many squares are drawn; at least one module is.
    """
    known = {*values, *others}
    paths = dict.fromkeys((*(path for path in order if path in known), *values, *others))
    places = {path: place for path in paths if (place := place_of(path)) is not None}
    if not any(path in places for path in values):
        return None
    top = largest_of(values) if high is None else high
    columns = sorted({place.layer for place in places.values()})
    rows: dict[tuple[str, str], dict[int, Cell]] = {}
    for path, place in places.items():
        cell = make_cell(path, values.get(path), others.get(path), low, top, text)
        rows.setdefault((place.stack, place.module), {})[place.layer] = cell
    shown = list(rows)[: max(1, most_cells // len(columns))]
    stacks = {
        stack: tuple(
            Row(module, tuple(rows[stack, module].get(layer) for layer in columns))
            for name, module in shown
            if name == stack
        )
        for stack, _ in shown
    }
    return Grid(
        title,
        note,
        tuple(columns),
        tuple(Stack(name, found) for name, found in stacks.items()),
        text(low),
        text(top),
        empty,
        len(rows) - len(shown),
    )


def largest_of(values: Mapping[str, float | None]) -> float:
    """The largest finite value; 0 if there is none."""
    return max((value for value in values.values() if value is not None and math.isfinite(value)), default=0.0)


def make_cell(
    path: str, value: float | None, why: str | None, low: float, high: float, text: Callable[[float], str]
) -> Cell:
    """A square for a site's value, or for the reason why it has none."""
    if value is None or not math.isfinite(value):
        return Cell(None, "", f"{path}: {why or 'no value'}")
    return Cell(level_of(value, low, high), text(value), f"{path}: {text(value)}")


def level_of(value: float, low: float, high: float) -> int:
    """The colour of a value."""
    share = (value - low) / (high - low) if high > low else 1.0
    return round(max(0.0, min(1.0, share)) * (LEVELS - 1))


@dataclass(frozen=True)
class Line:
    """One curve: an SVG path, its colour's level, and its name."""

    path: str
    level: int
    name: str


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, WIDTH × HEIGHT.

    Attributes:
        title: what is drawn.
        lines: the curves.
        left, right: the ends of the axis across.
        low, high: the ends of the axis up.
    """

    title: str
    lines: tuple[Line, ...]
    left: str
    right: str
    low: str
    high: str


def make_chart(
    title: str, curves: Iterable[tuple[str, Sequence[tuple[float, float]]]], *, from_zero: bool = False
) -> Chart | None:
    """A chart of named curves of (x, y); None if there is no point to draw.

    Args:
        title: what it shows.
        curves: finite points by x.
        from_zero: the axis up begins at 0.
    """
    named = [(name, points) for name, points in curves if points]
    if not named:
        return None
    xs = [x for _, points in named for x, _ in points]
    ys = [y for _, points in named for _, y in points]
    left, right, low, high = min(xs), max(xs), 0.0 if from_zero else min(ys), max(ys)
    most = min(_MOST_POINTS, max(_MOST_POINTS_IN_ALL // len(named), 16))
    lines = [
        Line(
            _path(
                [(_scaled(x, left, right) * WIDTH, HEIGHT - _scaled(y, low, high) * HEIGHT) for x, y in _thin(p, most)]
            ),
            round(index / max(1, len(named) - 1) * (LEVELS - 1)),
            name,
        )
        for index, (name, p) in enumerate(named)
    ]
    return Chart(title, tuple(lines), short(left), short(right), short(low), short(high))


def bars(values: Sequence[float], width: int, height: int, most: int = 32) -> str:
    """The SVG path of small bars, in relation to the largest; of many values, some are left out."""
    shown = values[:: -(-len(values) // most) or 1]
    largest = max(values, default=0.0)
    if not largest:
        return ""
    step = width / len(shown)
    return "".join(
        f"M{i * step:.1f} {height}h{step * 0.8:.1f}v-{value / largest * height:.1f}h-{step * 0.8:.1f}z"
        for i, value in enumerate(shown)
    )


def short(value: float) -> str:
    """A number in four digits at most."""
    return f"{value:.4g}"


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Of many points, the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    found: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        found += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return found


def _scaled(value: float, low: float, high: float) -> float:
    """Where a value lies between two, which may be far apart or equal."""
    return 0.5 if not high > low else (value / 2 - low / 2) / (high / 2 - low / 2)


def _path(points: Sequence[tuple[float, float]]) -> str:
    head, *rest = [f"{x:.1f} {y:.1f}" for x, y in points]
    return f"M{head}L{'L'.join(rest or [head])}"
