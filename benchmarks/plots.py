"""Pictures of tables: curves over r, tokens and layers, and bars for what is done once. Written as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Table

# Seen by those who mix up red and green, too (Okabe and Ito), on white and on black.
_COLOURS = {"PEFT": "#999999", "inject": "#56B4E9", "optimize": "#D55E00", "floor": "#009E73"}
_GREY = "#808080"

# (subject, number of its table, the row that is shown, what it is a share of, its column)
_BARS = (
    ("folding", 0, "lora_fx.fold inplace, irreversible", "fold / merge_and_unload", "/ merge_and_unload"),
    ("adapters", 0, "lora_fx, finite=True", "swap / set_peft_model_state_dict", "/ PEFT"),
    ("adapters", 1, "lora_fx, adapter_ids", "mixed batch / adapter_names", "/ PEFT"),
    ("optimizer", 0, "flat_parameters, AdamW(fused=True)", "AdamW, flat and fused / default", "/ PEFT, AdamW"),
    ("export", 0, "export_onnx: folded", "export, folded / base", "/ base, same exporter"),
    ("export", 0, "torch.onnx.export: PEFT unmerged", "export, PEFT unmerged / base", "/ base, same exporter"),
)


def draw(results: Mapping[str, Sequence[Table]], folder: Path) -> list[Path]:
    """A picture for each subject that has one.

    Args:
        results: {subject: its tables}.
        folder: is made.
    """
    import matplotlib as mpl

    mpl.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if "curves" in results:
        written.append(_curves(results["curves"], folder / "training.svg"))
    bars = dict(_cell(results[name], *row) for name, *row in _BARS if name in results)
    if bars:
        written.append(_bars(bars, folder / "once.svg"))
    return written


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "lora_fx", "font.size": 9, "text.color": _GREY,
        "axes.labelcolor": _GREY, "axes.edgecolor": _GREY, "xtick.color": _GREY, "ytick.color": _GREY,
    })  # fmt: skip
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row", layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def _curves(tables: tuple[Table, ...], path: Path) -> Path:
    shown = ("kept / PEFT", "time / PEFT")
    figure, axes = _figure(len(shown), len(tables), (9, 5))
    for column, table in enumerate(tables):
        for row, what in enumerate(shown):
            place, panel = table.header.index(what), axes[row][column]
            for name, colour in _COLOURS.items():
                points = [(each[0], each[place]) for each in table.rows if each[1] == name]
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
            panel.set_xscale("log", base=2)
            panel.set_xticks([each[0] for each in table.rows], [str(each[0]) for each in table.rows])
            panel.set_ylim(0, max(1.1, panel.get_ylim()[1]))
            panel.grid(axis="y", alpha=0.25)
            if row == len(shown) - 1:
                panel.set_xlabel(table.header[0])
            if column == 0:
                panel.set_ylabel({"kept / PEFT": "kept bytes / PEFT", "time / PEFT": "step time / PEFT"}[what])
    axes[0][0].legend(frameon=False, labelcolor=_GREY)
    return _save(figure, path)


def _cell(tables: tuple[Table, ...], number: int, row: str, label: str, column: str) -> tuple[str, float]:
    table = tables[number]
    value = next(each for each in table.rows if each[0] == row)[table.header.index(column)]
    assert isinstance(value, float)
    return label, value


def _bars(values: dict[str, float], path: Path) -> Path:
    figure, axes = _figure(1, 1, (9, 0.6 + 0.45 * len(values)))
    panel = axes[0][0]
    colours = [_COLOURS["PEFT" if "PEFT unmerged" in name else "optimize"] for name in values]
    drawn = panel.barh(list(values), list(values.values()), color=colours, height=0.6)
    panel.bar_label(drawn, fmt="%.2f", padding=3, color=_GREY)
    panel.axvline(1, color=_COLOURS["PEFT"])
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set_xlabel("time, as a share of what is named behind the stroke")
    return _save(figure, path)
