"""``dsvt evaluate`` on Argoverse 2, and on single sweeps of nuScenes: recall, precision and AP by range."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.io.argoverse2 import labelled_sweeps, open_argoverse2
from dsvt_ros.io.labelled_sweeps import LabelledSweep
from dsvt_ros.io.nuscenes import read_sweep
from dsvt_ros.range_ap import DEFAULT_EDGES_M, MAX_DISTANCE_M, RangeFigures, RangeFrame, ScoredCenters, evaluate_ranges
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools.arguments import load_detector, overrides_from
from dsvt_ros.tools.label_classes import ARGOVERSE2, NUSCENES, LabelClasses
from dsvt_ros.tools.machine import ran_with
from dsvt_ros.tools.sweep_detection import T_model_sensor, detect, low_scores, num_sweeps, suit_intensity

MEASURE = f"center@{MAX_DISTANCE_M:g}"
MIN_POINTS = 1
"""Returns on an object that counts, as both data sets ask."""


def evaluate_argoverse2(options: argparse.Namespace, place: str, console: Console) -> dict[str, Any]:
    """Detect on the labelled sweeps of a log or a folder of logs, print a table and give the content of the JSON."""
    logs = open_argoverse2(place)
    total = sum(len(log.labelled_ns) for log in logs)
    if not total:
        raise DataError(f"{place}: no sweep has the time stamp of an annotation")
    detector = _load(options)
    sweeps = labelled_sweeps(logs, num_sweeps(detector))
    return _evaluate(detector, sweeps, f"{detector.model.name} on {options.data}", total, ARGOVERSE2, console)


def evaluate_sweep(options: argparse.Namespace, place: str, console: Console) -> dict[str, Any]:
    """Detect on one sweep of nuScenes, print a table and give the content of the JSON."""
    sweep = read_sweep(Path(place))
    detector = _load(options)
    return _evaluate(detector, [sweep], f"{detector.model.name} on one sweep", 1, NUSCENES, console)


def as_json(figures: Mapping[str, Sequence[RangeFigures]]) -> dict[str, Any]:
    """The figures of each class; null stands for those that need an object or a box where there is none."""
    return {
        "measure": MEASURE,
        "ranges": {
            name: [
                {
                    "near_m": one.near_m,
                    "far_m": one.far_m,
                    "num_objects": one.num_objects,
                    "num_found": one.num_found,
                    "num_false": one.num_false,
                    "recall": _rounded(one.recall),
                    "precision": _rounded(one.precision),
                    "ap": _rounded(one.ap),
                }
                for one in ranges
            ]
            for name, ranges in figures.items()
        },
    }


def range_frame(
    sweep: LabelledSweep,
    label: str,
    ignored: frozenset[str],
    classes: LabelClasses,
    detections: Boxes3D,
    shown: Boxes3D,
) -> RangeFrame:
    """Objects and detections of one class.

    Args:
        sweep: Its boxes are the objects.
        label: The class, as the data set names it.
        ignored: Labels whose objects need not be found.
        classes: Tell which detections are of the class.
        detections: In the frame of the sweep.
        shown: The same.
    """
    names = np.array(sweep.class_names, dtype=object)
    own = names == label
    relevant = own | np.isin(names, list(ignored))
    return RangeFrame(
        objects=sweep.boxes[relevant, :2],
        counts=(own & (sweep.num_points >= MIN_POINTS))[relevant],
        detections=_centers(detections, label, classes),
        shown=_centers(shown, label, classes),
    )


def _load(options: argparse.Namespace) -> Detector:
    detector = load_detector(options)
    suit_intensity(detector, list(overrides_from(options)))
    return detector


def _evaluate(
    detector: Detector,
    sweeps: Iterable[LabelledSweep],
    title: str,
    total: int,
    classes: LabelClasses,
    console: Console,
) -> dict[str, Any]:
    evaluated = classes.evaluated(detector.model)
    frames: dict[str, list[RangeFrame]] = {label: [] for label in evaluated}
    for sweep in track(sweeps, title, total=total, console=console):
        shown, detections = _detections(detector, sweep)
        for label in evaluated:
            ignored = classes.ignored(label, evaluated)
            frames[label].append(range_frame(sweep, label, ignored, classes, detections, shown))
    figures = {label: evaluate_ranges(frames[label], DEFAULT_EDGES_M) for label in evaluated}
    _print(console, figures, detector.model.name, total)
    return ran_with(detector) | {"num_frames": total} | as_json(figures)


def _detections(detector: Detector, sweep: LabelledSweep) -> tuple[Boxes3D, Boxes3D]:
    """Boxes at the model's own score threshold, and all down to low scores.

    Detected twice: the threshold applies before scores are rectified, so the final ones do not tell what passes it.
    """
    pose = T_model_sensor(detector.model, sweep.axes, sweep.T_level_sensor)
    shown = detect(detector, sweep.scans, pose)
    with low_scores(detector):
        return shown, detect(detector, sweep.scans, pose)


def _centers(boxes: Boxes3D, label: str, classes: LabelClasses) -> ScoredCenters:
    own = np.array([classes.label_of(name) == label for name in boxes.class_names], bool)[boxes.labels]
    return ScoredCenters(boxes.boxes[own, :2].astype(np.float64), boxes.scores[own])


def _print(console: Console, figures: Mapping[str, Sequence[RangeFigures]], model: str, num_frames: int) -> None:
    table = Table(title=f"{model}: {num_frames} sweeps, centres less than {MAX_DISTANCE_M:g} m apart")
    for column in ("class", "range", "found", "false", "recall", "precision", "AP"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, ranges in figures.items():
        for i, one in enumerate(ranges):
            table.add_row(
                "" if i else name,
                f"{one.near_m:g}-{one.far_m:g} m",
                f"{one.num_found} of {one.num_objects}",
                str(one.num_false),
                *(f"{100 * share:.0f} %" if not math.isnan(share) else "-" for share in (one.recall, one.precision)),
                f"{one.ap:.1f}" if not math.isnan(one.ap) else "-",
                end_section=i == len(ranges) - 1,
            )
    console.print(table)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
