"""``dsvt evaluate --data nuscenes:DIR``: the official figures of the nuScenes detection task."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsvt_ros.config import DetectorConfig, with_overrides
from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.export.cache import cache_folder
from dsvt_ros.io.nuscenes import AXES, NuScenesFolder, NuScenesSample, open_nuscenes
from dsvt_ros.io.nuscenes_results import read_results, records_from_boxes, write_results
from dsvt_ros.tools.arguments import check_folders, load_detector, overrides_from
from dsvt_ros.tools.evaluate_ranges import evaluate_sweep
from dsvt_ros.tools.label_classes import NUSCENES
from dsvt_ros.tools.machine import ran_with
from dsvt_ros.tools.nuscenes_devkit import open_devkit
from dsvt_ros.tools.progress import terminal_progress
from dsvt_ros.tools.sweep_detection import T_model_sensor, detect, low_scores, num_sweeps, suit_intensity

DEFAULT_SPLITS = {"v1.0-mini": "mini_val", "v1.0-trainval": "val"}

ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}
"""Mean errors of the boxes that fit an object: the kit's names, and how its authors abbreviate them."""

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Detections of every sample, as the results file has them."""


def evaluate(options: argparse.Namespace, place: str, console: Console) -> dict[str, Any]:
    """Detect, or read detections, let the kit score them, print a table and give the content of the JSON."""
    if place.endswith(".json"):
        for name in ("version", "split", "devkit_python", "detections", "save_detections"):
            if getattr(options, name) is not None:
                raise DataError(f"--{name.replace('_', '-')} is for --data nuscenes:DIR, got --data {options.data}")
        return evaluate_sweep(options, place, console)
    if options.detections is not None and options.save_detections is not None:
        raise DataError("--save-detections needs a model to run: leave out --detections")
    check_folders(options, "save_detections")
    folder = open_nuscenes(place, options.version)
    split = options.split or _default_split(folder)
    # First of all, since hours of detection would be in vain without it.
    cache = cache_folder(with_overrides(DetectorConfig(), overrides_from(options)).engine)
    with terminal_progress() as progress:
        devkit = open_devkit(options.devkit_python, cache, progress)
        scenes = devkit.scenes(split)
    samples = folder.samples([name for name in scenes if name in folder.scenes])
    if not samples:
        raise DataError(f"{folder.path}: {folder.version} has no scene of the split {split}; choose another --split")
    if options.detections is not None:
        about: dict[str, Any] = {"model": str(options.detections)}
        path = Path(options.detections)
        _check_some(read_results(path), path)
        summary = devkit.evaluate(folder.path, folder.version, split, path)
    else:
        detector = load_detector(options)
        NUSCENES.evaluated(detector.model)
        suit_intensity(detector, list(overrides_from(options)))
        about = ran_with(detector)
        records = detected_records(folder, samples, detector, options.data, console)
        with tempfile.TemporaryDirectory(prefix="dsvt_nuscenes_") as temporary:
            path = options.save_detections or Path(temporary) / "results.json"
            write_results(path, records)
            _check_some(records, detector.model.name)
            summary = devkit.evaluate(folder.path, folder.version, split, path)
    _print(console, summary, f"{about['model']}: {folder.version}, {split}, {len(samples)} samples")
    return about | {"version": folder.version, "split": split, "num_frames": len(samples)} | as_json(summary)


def detected_records(
    folder: NuScenesFolder, samples: Sequence[NuScenesSample], detector: Detector, title: str, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Boxes of every sample with scores down to low ones, as the results file lists them."""
    records = {}
    with low_scores(detector):
        for sample in track(samples, f"{detector.model.name} on {title}", console=console):
            scans = folder.scans(sample, num_sweeps(detector))
            pose = T_model_sensor(detector.model, AXES, folder.sweeps(sample)[0].T_level_sensor)
            boxes = detect(detector, scans, pose)
            records[sample.token] = records_from_boxes(sample.token, boxes, scans[0].T_fixed_sensor)
    return records


def as_json(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The kit's summary: AP and NDS in percent, errors as the kit has them; null stands for what is not defined."""
    return {
        "map": _percent(summary["mean_ap"]),
        "nds": _percent(summary["nd_score"]),
        "tp_errors": {name: _rounded(summary["tp_errors"][name]) for name in ERRORS},
        "ap": {
            name: {"mean": _percent(summary["mean_dist_aps"][name])}
            | {f"center@{float(distance):g}": _percent(ap) for distance, ap in by_distance.items()}
            for name, by_distance in summary["label_aps"].items()
        },
        "tp_errors_of_class": {
            name: {error: _rounded(errors[error]) for error in ERRORS}
            for name, errors in summary["label_tp_errors"].items()
        },
    }


def _check_some(records: Records, source: str | Path) -> None:
    if not any(records.values()):
        raise DataError(f"{source}: no box in any sample; nuscenes-devkit cannot score that, every figure would be 0")


def _default_split(folder: NuScenesFolder) -> str:
    if folder.version not in DEFAULT_SPLITS:
        raise DataError(
            f"{folder.path}: name the split of {folder.version} with --split; "
            f"only {' and '.join(DEFAULT_SPLITS)} have a usual one (and v1.0-test has no labels)"
        )
    return DEFAULT_SPLITS[folder.version]


def _print(console: Console, summary: Mapping[str, Any], title: str) -> None:
    table = Table(title=title)
    table.add_column("class")
    for column in ("AP", *ERRORS.values()):
        table.add_column(column, justify="right")
    for name, ap in summary["mean_dist_aps"].items():
        errors = summary["label_tp_errors"][name]
        table.add_row(name, f"{100 * ap:.1f}", *(_cell(errors[error]) for error in ERRORS))
    table.add_section()
    means = [_cell(summary["tp_errors"][error]) for error in ERRORS]
    table.add_row("mean", f"{100 * summary['mean_ap']:.1f}", *means)
    console.print(table)
    console.print(f"mAP {100 * summary['mean_ap']:.2f}, NDS {100 * summary['nd_score']:.2f}")


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> float | None:
    return _rounded(100 * value)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
