"""The papers' figures: latency against rate, an ablation as bars, service over time. Needs the `[plot]` extra.

The only file that imports matplotlib, and only when something is drawn. Equal input gives equal SVG files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preble_jax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
# Okabe and Ito's colours: told apart by everybody, on paper too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """errors: half the width of an interval around each y; empty: none. colour_of: label of the curve whose colour and
    marker it has, dashed: the same thing from another source."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    colour_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. bars: label to (height, half the width of its interval), in place of curves."""

    title: str
    x_label: str = ""
    y_label: str = ""
    curves: Sequence[Curve] = ()
    bars: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False


def require_plotting(output: Path) -> None:
    """Raises ConfigError without matplotlib, or for a file that it cannot write."""
    if output.suffix not in FORMATS:
        raise ConfigError(f"--output: expected a file that ends in {', '.join(FORMATS)}, got {output}")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: expected a file in a folder that exists, got {output}; make the folder first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "drawing: expected matplotlib, which is not installed; install it: pip install 'preble-jax[plot]'"
        ) from error


def draw(panels: Sequence[Panel], output: Path, *, title: str = "", columns: int = 4) -> None:
    """Writes the panels, in rows of `columns`, with one legend a panel. Raises ConfigError."""
    require_plotting(output)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = min(columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    size = (3.6 * num_columns, 2.9 * num_rows + (0.3 if title else 0.0))
    # Letters stay text, and names inside the file depend on the content alone.
    with pyplot.rc_context({"svg.hashsalt": "preble-jax", "svg.fonttype": "none", "font.size": 8}):
        figure, grid = pyplot.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
        axes = list(grid.flat)
        for panel, place in zip(panels, axes, strict=False):
            _draw_bars(panel, place) if panel.bars else _draw_curves(panel, place)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        if title:
            figure.suptitle(title)
        _save(figure, output)
        pyplot.close(figure)


def _save(figure: Figure, output: Path) -> None:
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(output.suffix, {})
    try:
        figure.savefig(output, metadata=undated)
    except OSError as error:
        raise ConfigError(f"--output: expected a file that can be written, got {output} ({error.strerror})") from error


def _draw_curves(panel: Panel, axes: Axes) -> None:
    _label(panel, axes)
    order = list(dict.fromkeys(curve.colour_of or curve.label for curve in panel.curves))
    for curve in panel.curves:
        index = order.index(curve.colour_of or curve.label)
        axes.errorbar(
            curve.x,
            curve.y,
            yerr=curve.errors or None,
            label=curve.label,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)] if len(curve.x) <= 30 else None,
            linestyle="--" if curve.colour_of else "-",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
        )
    if panel.log_x:
        axes.set_xscale("log", base=2)
    if panel.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)


def _draw_bars(panel: Panel, axes: Axes) -> None:
    _label(panel, axes)
    labels = list(panel.bars)
    heights = [panel.bars[label][0] for label in labels]
    errors = [panel.bars[label][1] for label in labels]
    colours = [_COLOURS[index % len(_COLOURS)] for index in range(len(labels))]
    axes.bar(range(len(labels)), heights, yerr=errors, color=colours, capsize=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")


def _label(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
