"""How long the stages of each backend take, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvt_ros.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

STAGE_COLORS = {
    "preprocess": "#5f6f85",
    "voxelize": "#8fb8de",
    "encode": "#2fa39a",
    "partition": "#c99a00",
    "sparse": "#e8743b",
    "scatter": "#a8b0bb",
    "dense": "#3b6fd4",
    "decode": "#b58ad6",
    "nms": "#c8385a",
}
"""The same in every picture; the two networks stand out."""
OTHER_COLOR = "#7a7a7a"
TEXT = "#1f2733"
FAINT_TEXT = "#66707d"
GRID = "#e2e6eb"

NARROWEST_LABEL = 0.035
"""Share of the axis that a stage must fill for its time to be written into it."""


def check_picture(path: Path) -> None:
    """Whether `draw_stages` can draw into a file of this name, before there is anything to draw.

    Raises:
        DataError: Matplotlib is not installed, or writes no such files.
    """
    written = _canvas_type().get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in written:
        raise DataError(f"cannot write the picture {path}: expected a name that ends in .{', .'.join(sorted(written))}")


def draw_stages(content: dict[str, Any], path: Path) -> None:
    """Draw the result of ``dsvt benchmark``: a bar of stages for each backend, and the total beside it.

    Args:
        content: What the command writes as JSON.
        path: File to write, .png or whatever Matplotlib writes.

    Raises:
        DataError: Matplotlib is not installed, or the file cannot be written.
    """
    canvas = _canvas_type()
    from matplotlib.figure import Figure

    results = content["results"]
    figure = Figure(figsize=(11, 1.9 + 0.72 * len(results)), dpi=150, facecolor="white")
    canvas(figure)
    axes = figure.add_subplot()
    longest = max(max(sum(result["stage_ms"].values()), result["total_ms"]["p50"]) for result in results)
    for row, result in enumerate(results):
        _draw_bar(axes, row, result, longest)
    axes.set_xlim(0, 1.17 * longest)  # totals stand to the right of the bars
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.set_yticks(range(len(results)), [_label(result) for result in results], color=TEXT, fontsize=11)
    axes.set_xlabel("milliseconds, medians", color=FAINT_TEXT)
    axes.set_title(_title(content), color=TEXT, fontsize=13, loc="left", pad=28)
    axes.tick_params(length=0, labelcolor=TEXT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _draw_legend(axes, results)
    try:
        figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {path}: {error}") from None


def _canvas_type() -> type[FigureCanvasAgg]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise DataError(
            f"pictures need Matplotlib ({error}); install it with: pip install matplotlib (extra plot of dsvt_ros)"
        ) from None
    return FigureCanvasAgg


def _draw_bar(axes: Axes, row: int, result: dict[str, Any], longest: float) -> None:
    left = 0.0
    for stage, ms in result["stage_ms"].items():
        axes.barh(row, ms, 0.62, left, color=STAGE_COLORS.get(stage, OTHER_COLOR), edgecolor="white", linewidth=0.6)
        if ms > NARROWEST_LABEL * longest:
            axes.text(left + ms / 2, row, f"{ms:.1f}", color="white", fontsize=8.5, ha="center", va="center")
        left += ms
    total = result["total_ms"]["p50"]
    for edge in (row - 0.42, row + 0.32):
        axes.plot([total, total], [edge, edge + 0.1], color=TEXT, linewidth=2, solid_capstyle="butt")
    beside = (max(left, total), row)
    placed: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
    axes.annotate(f"{total:.1f} ms", beside, (8, 6), color=TEXT, fontsize=12, weight="bold", **placed)
    memory = f"{result['peak_memory_mib']:,} MiB"
    axes.annotate(memory, beside, (8, -9), color=FAINT_TEXT, fontsize=8.5, **placed)


def _draw_legend(axes: Axes, results: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    stages = dict.fromkeys(stage for result in results for stage in result["stage_ms"])
    handles: list[Patch | Line2D] = [Patch(color=STAGE_COLORS.get(stage, OTHER_COLOR), label=stage) for stage in stages]
    handles.append(Line2D([], [], color=TEXT, linewidth=2, label="whole frame, p50"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncol=len(handles), frameon=False, fontsize=8.5,
        labelcolor=TEXT, handlelength=1.0, columnspacing=1.2, handletextpad=0.5, borderaxespad=0.2,
    )  # fmt: skip


def name_of(result: dict[str, Any]) -> str:
    """The backend that a result is of, and whether `auto` chose it."""
    name = str(result["backend"])
    return f"auto: {name}" if result.get("asked_for") == "auto" else name


def _label(result: dict[str, Any]) -> str:
    name, precision = name_of(result), str(result["precision"])
    return name if precision in name else f"{name}, {precision}"


def _title(content: dict[str, Any]) -> str:
    counts, hardware = content["cloud"]["num_points"], content["hardware"]
    points = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    device = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    clouds = "a cloud" if len(counts) == 1 else f"{len(counts)} clouds"
    return f"{content['model']}: {clouds} of {points} points, {device}"
