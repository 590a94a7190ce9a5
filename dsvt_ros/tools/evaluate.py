"""``dsvt evaluate``: average precision on labelled data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.tools.arguments import add_model_options, overrides_from
from dsvt_ros.training.evaluation import MIN_IOU, MIN_POINTS, SCORE_THRESHOLD, SimulatedResult, evaluate_simulated
from dsvt_ros.training.simulator import SPLITS, SceneStream

SCHEMA_VERSION = 1
# Edges of the histograms that say how hard the objects are.
RANGE_EDGES_M = (0, 10, 20, 30, 40, 50, 73)
POINT_EDGES = (5, 10, 20, 50, 100, 500, 1_000_000)
OCCLUSION_EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.01)


def main(argv: list[str]) -> int:
    """Evaluate; see ``dsvt evaluate --help``."""
    parser = argparse.ArgumentParser(prog="dsvt evaluate", description="Average precision of a model on labelled data.")
    parser.add_argument(
        "--data",
        required=True,
        help=f"simulated:SPLIT with SPLIT one of {', '.join(SPLITS)} (never trained on but train)",
    )
    add_model_options(parser)
    parser.add_argument("--scenes", type=int, default=200, help="simulated scenes (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    options = parser.parse_args(argv)
    kind, _, split = options.data.partition(":")
    if kind != "simulated" or split not in SPLITS:
        raise DataError(f"--data {options.data}: expected simulated:SPLIT with SPLIT one of {', '.join(SPLITS)}")
    if options.scenes < 1:
        raise DataError(f"--scenes must be at least 1, got {options.scenes}")
    overrides = {"postprocess.score_threshold": SCORE_THRESHOLD} | overrides_from(options)
    detector = Detector.load(options.model, options.weights, options.backend, options.device, overrides)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    scenes = track(range(options.scenes), f"{detector.model.name} on {options.data}", console=console)
    result = evaluate_simulated(detector, SceneStream(split), scenes)
    _print(console, result)
    if options.output:
        content = {"schema_version": SCHEMA_VERSION, "model": detector.model.name, "data": options.data}
        options.output.write_text(json.dumps(content | as_json(result), indent=1) + "\n")
        console.print(f"wrote {options.output}")
    return 0


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
