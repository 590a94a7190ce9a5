"""The color of each class, the same in RViz and in every picture."""

from __future__ import annotations

CLASS_COLORS = {
    "car": (0.20, 0.60, 1.00),
    "vehicle": (0.20, 0.60, 1.00),
    "truck": (0.55, 0.40, 0.95),
    "bus": (0.95, 0.75, 0.15),
    "pedestrian": (1.00, 0.35, 0.30),
    "cyclist": (0.25, 0.80, 0.35),
    "bicycle": (0.25, 0.80, 0.35),
    "motorcycle": (0.10, 0.75, 0.70),
}
"""Red, green, blue of the class names that models share, lower case."""

OTHER_COLORS = ((0.90, 0.45, 0.80), (0.65, 0.65, 0.65), (0.75, 0.60, 0.35), (0.85, 0.85, 0.35))
"""Of all other classes, by label."""


def color_of_class(class_name: str, label: int) -> tuple[float, float, float]:
    """Red, green, blue in [0, 1]."""
    return CLASS_COLORS.get(class_name.lower(), OTHER_COLORS[label % len(OTHER_COLORS)])
