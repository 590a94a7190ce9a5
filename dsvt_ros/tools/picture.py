"""A cloud and its boxes from above, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.class_colors import color_of_class
from dsvt_ros.errors import DataError
from dsvt_ros.structures import Boxes3D

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BACKGROUND = "#10141b"
RINGS = "#2c3542"
TEXT = "#c9d1dc"
TRUTH = "#f2f4f7"

NEAREST_EDGE_M, FARTHEST_EDGE_M = 15.0, 75.0
"""The picture shows the square around the sensor that holds nearly all points, within these."""

RING_STEP_M = 10


def draw_bev(points: NDArray[np.float32], boxes: Boxes3D, truth: Boxes3D | None, path: Path, title: str) -> None:
    """Draw a cloud and boxes seen from above: forward is up, left is left.

    Args:
        points: (N, 3 or more) x, y, z first; rows with NaN are left out.
        boxes: Detected, in the frame of the points.
        truth: Known objects, dashed, or None.
        path: File to write, .png or whatever Matplotlib writes.
        title: Heading.

    Raises:
        DataError: Matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"pictures need Matplotlib ({error}); install it with: pip install matplotlib") from None
    points = points[np.isfinite(points[:, :3]).all(axis=1)]
    edge = _edge(points, [boxes] if truth is None else [boxes, truth])

    figure = Figure(figsize=(10, 10.4), dpi=150, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.055, 0.915, 0.88))
    axes.set_facecolor(BACKGROUND)
    axes.set_aspect("equal")
    axes.set_xlim(edge, -edge)  # y grows to the left
    axes.set_ylim(-edge, edge)
    _draw_rings(axes, edge)
    if len(points):
        low, high = np.percentile(points[:, 2], (2, 98))
        order = np.argsort(points[:, 2], kind="stable")
        axes.scatter(
            points[order, 1],
            points[order, 0],
            c=points[order, 2],
            s=1.5 * (50 / edge) ** 2,
            cmap="viridis",
            vmin=low - 0.35 * (high - low),  # the darkest colours do not show on this background
            vmax=max(high, low + 1e-3),
            alpha=0.65,
            linewidths=0,
            rasterized=True,
        )
    axes.plot(0, 0, marker="^", color=TEXT, markersize=9, markeredgewidth=0)
    if truth is not None:
        _draw_truth(axes, truth)
    _draw_boxes(axes, boxes)
    _draw_legend(axes, boxes, truth)
    axes.set_title(title, color=TEXT, fontsize=13, loc="left", pad=10)
    axes.set_xlabel("y, left (m)", color=TEXT)
    axes.set_ylabel("x, forward (m)", color=TEXT)
    axes.tick_params(colors=TEXT, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    try:
        figure.savefig(path, facecolor=BACKGROUND)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {path}: {error}") from None


def _edge(points: NDArray[np.float32], groups: list[Boxes3D]) -> float:
    """Half of the side of the square to show, m."""
    reach = [np.abs(group.boxes[:, :2]).max() + 4.0 for group in groups if len(group)]
    if len(points):
        reach.append(np.percentile(np.abs(points[:, :2]).max(axis=1), 98))
    return float(np.clip(max(reach, default=NEAREST_EDGE_M), NEAREST_EDGE_M, FARTHEST_EDGE_M))


def _draw_rings(axes: Axes, edge: float) -> None:
    from matplotlib.patches import Circle

    for radius in range(RING_STEP_M, int(edge * 1.42), RING_STEP_M):
        axes.add_patch(Circle((0, 0), radius, fill=False, color=RINGS, linewidth=0.8))
        if radius < edge:
            along = -radius / np.sqrt(2)
            axes.text(along, along, f"{radius} m", color="#8793a5", fontsize=7, ha="center", va="center")


def _outlines(boxes: Boxes3D) -> NDArray[np.float64]:
    """(M, 5, 2) corners of each box seen from above, closed, as (y, x)."""
    corners = np.array([[0.5, 0.5], [0.5, -0.5], [-0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])
    return _to_picture(boxes, corners)


def _headings(boxes: Boxes3D) -> NDArray[np.float64]:
    """(M, 2, 2) a line from each box's centre to beyond its front, as (y, x)."""
    return _to_picture(boxes, np.array([[0.0, 0.0], [0.75, 0.0]]))


def _to_picture(boxes: Boxes3D, local: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = boxes.boxes.astype(np.float64)
    scaled = local * rows[:, None, 3:5]
    cos, sin = np.cos(rows[:, 6:7]), np.sin(rows[:, 6:7])
    x = rows[:, 0:1] + cos * scaled[..., 0] - sin * scaled[..., 1]
    y = rows[:, 1:2] + sin * scaled[..., 0] + cos * scaled[..., 1]
    return np.stack([y, x], axis=-1)


def _draw_truth(axes: Axes, truth: Boxes3D) -> None:
    from matplotlib.collections import LineCollection

    lines = LineCollection(list(_outlines(truth)), colors=TRUTH, linewidths=0.9, linestyles=(0, (3, 2)))
    axes.add_collection(lines)


def _draw_boxes(axes: Axes, boxes: Boxes3D) -> None:
    from matplotlib.collections import LineCollection

    colors = [color_of_class(boxes.class_name(i), int(boxes.labels[i])) for i in range(len(boxes))]
    axes.add_collection(LineCollection(list(_outlines(boxes)), colors=colors, linewidths=1.8))
    axes.add_collection(LineCollection(list(_headings(boxes)), colors=colors, linewidths=1.4))
    left_edge, right_edge = sorted(axes.get_xlim())
    for box, score, color in zip(boxes.boxes, boxes.scores, colors, strict=True):
        half_x = (abs(np.cos(box[6])) * box[3] + abs(np.sin(box[6])) * box[4]) / 2
        half_y = (abs(np.sin(box[6])) * box[3] + abs(np.cos(box[6])) * box[4]) / 2
        x, y = float(box[0] + half_x), float(box[1] - half_y)
        if left_edge < y < right_edge:
            label = f"{score:.2f}"
            axes.annotate(label, (y, x), (2, 1), textcoords="offset points", color=color, fontsize=6.5, clip_on=True)


def _draw_legend(axes: Axes, boxes: Boxes3D, truth: Boxes3D | None) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for label, name in enumerate(boxes.class_names):
        count = int((boxes.labels == label).sum())
        text = f"{name} ({count})"
        if count or len(boxes.class_names) <= 5:
            handles.append(Line2D([], [], color=color_of_class(name, label), linewidth=2.2, label=text))
    if truth is not None:
        text = f"known objects ({len(truth)})"
        handles.append(Line2D([], [], color=TRUTH, linewidth=1, linestyle=(0, (3, 2)), label=text))
    axes.legend(handles=handles, loc="upper right", fontsize=9, facecolor="#1a202a", edgecolor=RINGS, labelcolor=TEXT)
