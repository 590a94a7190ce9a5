"""``dsvt evaluate --data kitti:DIR``: average precision on the KITTI object data set."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError, ModelError
from dsvt_ros.io.clouds import Scan, select_columns
from dsvt_ros.io.kitti import (
    COLUMNS,
    SENSOR_HEIGHT_M,
    KittiFolder,
    KittiObjects,
    in_field_of_view,
    is_seen,
    objects_from_boxes,
    open_kitti,
    read_objects,
    write_objects,
)
from dsvt_ros.kitti_ap import CLASSES, DIFFICULTIES, DONT_CARE, NUM_POSITIONS, KittiFrame, KittiResult, evaluate_kitti
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools.arguments import load_detector, overrides_from
from dsvt_ros.tools.machine import ran_with
from dsvt_ros.training.evaluation import SCORE_THRESHOLD

THRESHOLD_KEY = "postprocess.score_threshold"

TYPES = {
    "car": "Car",
    "vehicle": "Car",
    "van": "Van",
    "truck": "Truck",
    "pedestrian": "Pedestrian",
    "cyclist": "Cyclist",
}
"""Class names of models and what KITTI calls them; detections of other classes are left out."""


def evaluate(options: argparse.Namespace, place: str, console: Console) -> dict[str, Any]:
    """Detect, or read detections, print a table and give the content of the JSON."""
    kind = options.ap or "r40"
    if options.detections is not None:
        if options.save_detections is not None:
            raise DataError("--save-detections needs a model to run: leave out --detections")
        folder = _chosen(open_kitti(place, clouds=False), options.frames)
        about: dict[str, Any] = {"model": str(options.detections)}
        classes = list(CLASSES)
        frames = _read_frames(folder, options, console)
    else:
        folder = _chosen(open_kitti(place), options.frames)
        detector = load_detector(options)
        about = ran_with(detector)
        classes = _classes_of(detector)
        frames = _detected_frames(folder, detector, options, console)
    result = evaluate_kitti(frames, kind, classes)
    _print(console, result, about["model"], kind)
    return about | {"ap_kind": kind} | as_json(result)


def as_json(result: KittiResult) -> dict[str, Any]:
    """The result; null stands for the AP of a class without objects."""
    ap = {
        name: {
            measure: {level: None if math.isnan(value) else round(value, 4) for level, value in values.items()}
            for measure, values in measures.items()
        }
        for name, measures in result.ap.items()
    }
    return {
        "num_frames": result.num_frames,
        "ap": ap,
        # Every object that counts at one difficulty counts at the harder ones.
        "num_objects": {name: found[DIFFICULTIES[-1]][1] for name, found in result.found.items()},
        "found": {name: {level: list(pair) for level, pair in found.items()} for name, found in result.found.items()},
    }


# -------------------------------------------------------------------------------------------------- detections


def detect_frame(folder: KittiFolder, frame: str, detector: Detector) -> Boxes3D:
    """Detect on what the camera sees of a cloud: only that is labelled.

    Returns:
        Boxes in the lidar frame.
    """
    calibration = folder.calibration(frame)
    points = folder.points(frame)
    points = points[in_field_of_view(points, calibration, folder.image_size(frame, calibration))]
    fill = {feature.name: feature.fill for feature in detector.model.features[3:]}
    cloud = select_columns(Scan(frame, points, COLUMNS), detector.model.feature_names, fill)
    T_model_sensor = np.eye(4)
    T_model_sensor[2, 3] = detector.model.ground_z + SENSOR_HEIGHT_M
    return detector.detect(cloud, T_model_sensor)


def objects_of_frame(folder: KittiFolder, frame: str, boxes: Boxes3D) -> KittiObjects:
    """Boxes of the lidar frame as KITTI's detections; those of other classes or outside the image are left out."""
    calibration = folder.calibration(frame)
    types = [TYPES.get(name.lower()) for name in boxes.class_names]
    known = np.array([types[label] is not None for label in boxes.labels], bool)
    objects = objects_from_boxes(
        boxes.boxes[known],
        boxes.scores[known],
        [types[label] or "" for label in boxes.labels[known]],
        calibration,
        folder.image_size(frame, calibration),
    )
    return objects.select(is_seen(objects.image_boxes))


def _detected_frames(
    folder: KittiFolder, detector: Detector, options: argparse.Namespace, console: Console
) -> Iterator[KittiFrame]:
    own_threshold = detector.config.postprocess.score_threshold
    if options.save_detections is not None:
        _make_folder(options.save_detections)
    for frame in track(folder.frames, f"{detector.model.name} on {options.data}", console=console):
        labels = folder.labels(frame)
        # Twice: the threshold applies before scores are rectified, so the final ones do not tell what passes it.
        shown = objects_of_frame(folder, frame, detect_frame(folder, frame, detector))
        detector.configure({THRESHOLD_KEY: min(SCORE_THRESHOLD, own_threshold)})
        detections = objects_of_frame(folder, frame, detect_frame(folder, frame, detector))
        detector.configure({THRESHOLD_KEY: own_threshold})
        if options.save_detections is not None:
            path = options.save_detections / f"{frame}.txt"
            write_objects(path, detections)
            detections = read_objects(path)  # so that scoring the files gives the same figures
        yield KittiFrame(labels, detections, shown)


def _read_frames(folder: KittiFolder, options: argparse.Namespace, console: Console) -> Iterator[KittiFrame]:
    overrides = overrides_from(options)
    threshold = overrides.get(THRESHOLD_KEY, open_model(options.model).defaults.postprocess.score_threshold)
    for frame in track(folder.frames, f"{options.detections} on {options.data}", console=console):
        detections = read_objects(options.detections / f"{frame}.txt")
        detections = detections.select(~detections.of_types(DONT_CARE))
        # Labels as detections have no score (NaN): they are certain.
        yield KittiFrame(folder.labels(frame), detections, detections.select(~(detections.scores < threshold)))


def _chosen(folder: KittiFolder, split: Path | None) -> KittiFolder:
    """The folder with the frames that a split file names."""
    if split is None:
        return folder
    try:
        names = split.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--frames {split} cannot be read: {error}") from None
    missing = sorted(set(names) - set(folder.frames))
    if missing or not names:
        raise DataError(f"--frames {split}: {folder.path} has no frame {missing[0] if missing else 'of that list'}")
    return KittiFolder(folder.path, tuple(names))


def _classes_of(detector: Detector) -> list[str]:
    """The evaluated classes that a model knows."""
    types = {TYPES.get(name.lower()) for name in detector.model.class_names}
    classes = [name for name, described in CLASSES.items() if described.type in types]
    if not classes:
        raise ModelError(
            f"model {detector.model.name} has the classes {', '.join(detector.model.class_names)}; "
            f"expected one of {', '.join(TYPES)}"
        )
    return classes


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--save-detections {path}: {error.strerror or error}") from error


def _print(console: Console, result: KittiResult, name: str, kind: str) -> None:
    table = Table(title=f"{name}: AP ({kind}) on {result.num_frames} frames")
    for column in ("class", "measure", *DIFFICULTIES):
        table.add_column(column, justify="left" if column in ("class", "measure") else "right")
    for class_name, measures in result.ap.items():
        for i, (measure, values) in enumerate(measures.items()):
            cells = ("-" if math.isnan(value) else f"{value:.2f}" for value in values.values())
            table.add_row("" if i else class_name, measure, *cells)
        loosest = min(CLASSES[class_name].min_ious)
        counts = (f"{k} of {n}" for k, n in result.found[class_name].values())
        table.add_row("", f"found (3d@{loosest:g})", *counts, end_section=True)
    console.print(table)
    fewest = min((n for found in result.found.values() for _, n in found.values() if n), default=0)
    if kind != "exact" and 0 < fewest < NUM_POSITIONS:
        console.print(f"{kind} reads low where fewer than {NUM_POSITIONS} objects count; --ap exact does not")
