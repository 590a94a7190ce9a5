"""``dsvt detect``: boxes in point files and bags, as a table, JSON or picture."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.io.clouds import Scan, open_clouds
from dsvt_ros.model.folder import open_model
from dsvt_ros.poses import axes_matrix, pose_matrix
from dsvt_ros.structures import Boxes3D
from dsvt_ros.sweeps import MergedSweeps
from dsvt_ros.tools.arguments import (
    add_columns_option,
    add_max_frames_option,
    add_model_options,
    check_folders,
    columns_from,
    load_detector,
    max_frames_from,
)
from dsvt_ros.tools.result_file import write_result
from dsvt_ros.tools.sweeps import add_motion_options, merged_clouds

SCHEMA_VERSION = 1


def main(argv: list[str]) -> int:
    """Detect objects in every cloud of every file; see ``dsvt detect --help``."""
    options = _parser().parse_args(argv)
    check_folders(options, "output", "picture")
    max_frames = max_frames_from(options)
    columns = columns_from(options, open_model(options.model).model)
    # Opened before the weights are read, so that a wrong path is answered at once.
    opened = [open_clouds(path, columns, options.topic) for path in options.clouds]
    detector = load_detector(options)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    frames: list[dict[str, Any]] = []
    problem = ""
    for scan, merged in islice(merged_clouds(options, options.clouds, opened, detector), max_frames):
        with detector.timed_stages():
            found = detector.detect(merged.points, _pose(scan, detector))
        frames.append(_frame(scan, merged, found, detector))
        if merged.problem != problem:
            problem = merged.problem
            console.print(f"{scan.source}: {problem or 'older sweeps are in their places again'}")
        _print_frame(console, frames[-1])
        if options.picture:
            from dsvt_ros.tools.picture import draw_bev

            path = _numbered(options.picture, len(frames) - 1)
            draw_bev(merged.points.cpu().numpy(), found, None, path, Path(scan.source).name)
            console.print(f"wrote {path}")
    if not frames:
        raise DataError(f"{', '.join(options.clouds)}: no clouds in there")
    if options.output:
        result = {
            "schema_version": SCHEMA_VERSION,
            "model": detector.model.name,
            "backend": detector.backend,
            "device": str(detector.device),
            "frames": frames,
        }
        write_result(options.output, result, console)
    return 0


def _pose(scan: Scan, detector: Detector) -> NDArray[np.float64] | None:
    """Pose of the sensor in the model's frame; None leaves it to the options.

    Clouds of bags are taken for x forward, as REP 103 has it, those of files for the model's own axes.
    """
    preprocess = detector.config.preprocess
    if scan.message is None or preprocess.cloud_axes != "model" or detector.model.axes == "x_forward":
        return None
    pose: NDArray[np.float64] = axes_matrix(detector.model.axes) @ pose_matrix(preprocess.sensor_pose)
    return pose


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsvt detect", description="Detect objects in point files and bags.")
    parser.add_argument("clouds", nargs="+", metavar="CLOUD", help=".npy, .bin, .pcd, .mcap, .db3 or a bag folder")
    add_model_options(parser)
    add_columns_option(parser)
    parser.add_argument("--topic", help="topic of a bag that has several with clouds")
    add_motion_options(parser)
    add_max_frames_option(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write boxes and stage times as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw a bird's-eye view; later clouds get a number"
    )
    return parser


def _frame(scan: Scan, merged: MergedSweeps, found: Boxes3D, detector: Detector) -> dict[str, Any]:
    """One entry of ``frames`` in the JSON."""
    detections = [
        {
            "class": found.class_name(i),
            "score": round(float(found.scores[i]), 4),
            "center": [round(float(v), 4) for v in box[:3]],
            "size": [round(float(v), 4) for v in box[3:6]],
            "yaw": round(float(box[6]), 5),
            "velocity": [round(float(v), 4) for v in box[7:9]] if len(box) == 9 else None,
        }
        for i, box in enumerate(found.boxes)
    ]
    return {
        "source": scan.source,
        "num_points": len(merged.points),
        "num_sweeps": merged.num_sweeps,
        "num_voxels": detector.num_voxels,
        "timing_ms": {stage: round(ms, 3) for stage, ms in detector.timing_ms.items()},
        "detections": detections,
    }


def _print_frame(console: Console, frame: dict[str, Any]) -> None:
    total = sum(frame["timing_ms"].values())
    sweeps = f" of {frame['num_sweeps']} sweeps" if frame["num_sweeps"] > 1 else ""
    console.print(
        f"{frame['source']}: {frame['num_points']} points{sweeps}, {len(frame['detections'])} objects, {total:.0f} ms"
    )
    if not frame["detections"]:
        return
    table = Table()
    table.add_column("class", no_wrap=True, min_width=max(len(found["class"]) for found in frame["detections"]))
    for name in ("score", "x", "y", "z", "length", "width", "height", "yaw"):
        table.add_column(name, justify="right")
    for found in frame["detections"]:
        numbers = [*found["center"], *found["size"], found["yaw"]]
        table.add_row(found["class"], f"{found['score']:.2f}", *(f"{value:.2f}" for value in numbers))
    console.print(table)


def _numbered(path: Path, index: int) -> Path:
    """`path` for the first picture, ``name_0001.png`` and so on for the next."""
    return path if index == 0 else path.with_name(f"{path.stem}_{index:04d}{path.suffix}")
