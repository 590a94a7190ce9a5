"""``dsvt evaluate --data simulated:SPLIT``: average precision on simulated scenes."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.tools.arguments import overrides_from
from dsvt_ros.tools.machine import ran_with
from dsvt_ros.training.evaluation import MIN_IOU, MIN_POINTS, SCORE_THRESHOLD, SimulatedResult, evaluate_simulated
from dsvt_ros.training.simulator import SPLITS, SceneStream

DEFAULT_SCENES = 200
# Edges of the histograms that say how hard the objects are.
RANGE_EDGES_M = (0, 10, 20, 30, 40, 50, 73)
POINT_EDGES = (5, 10, 20, 50, 100, 500, 1_000_000)
OCCLUSION_EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)


def evaluate(options: argparse.Namespace, split: str, console: Console) -> dict[str, Any]:
    """Detect on the scenes of a split, print a table and give the content of the JSON."""
    if split not in SPLITS:
        raise DataError(f"--data {options.data}: expected simulated:SPLIT with SPLIT one of {', '.join(SPLITS)}")
    num_scenes = DEFAULT_SCENES if options.scenes is None else options.scenes
    if num_scenes < 1:
        raise DataError(f"--scenes must be at least 1, got {num_scenes}")
    overrides = {"postprocess.score_threshold": SCORE_THRESHOLD} | overrides_from(options)
    detector = Detector.load(options.model, options.weights, options.backend, options.device, overrides)
    scenes = track(range(num_scenes), f"{detector.model.name} on {options.data}", console=console)
    result = evaluate_simulated(detector, SceneStream(split), scenes)
    _print(console, result)
    return ran_with(detector) | as_json(result)


def as_json(result: SimulatedResult) -> dict[str, Any]:
    """The result with histograms of range, points and occlusion of the objects that count."""
    return {
        "num_frames": result.num_scenes,
        "ap": {name: {f"3d@{MIN_IOU[name]}": round(ap, 2)} for name, ap in result.ap.items()},
        "num_objects": {name: int((result.labels == label).sum()) for label, name in enumerate(result.ap)},
        "min_points": MIN_POINTS,
        "histograms": {
            "range_m": _histogram(result, result.range_m, RANGE_EDGES_M),
            "num_points": _histogram(result, result.num_points, POINT_EDGES),
            "occlusion": _histogram(result, result.occlusion, OCCLUSION_EDGES),
        },
    }


def _histogram(result: SimulatedResult, values: NDArray[Any], edges: tuple[float, ...]) -> dict[str, Any]:
    """Objects of each class between consecutive edges."""
    counts = {
        name: np.histogram(values[result.labels == label], edges)[0].tolist() for label, name in enumerate(result.ap)
    }
    return {"edges": list(edges), "counts": counts}


def _print(console: Console, result: SimulatedResult) -> None:
    table = Table(title=f"{result.num_scenes} scenes, objects with at least {MIN_POINTS} points")
    for name in ("class", "objects", "3D IoU", "AP"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for label, (name, ap) in enumerate(result.ap.items()):
        count = int((result.labels == label).sum())
        table.add_row(name, str(count), f"{MIN_IOU[name]}", f"{ap:.1f}")
    console.print(table)
