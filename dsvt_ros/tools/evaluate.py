"""``dsvt evaluate``: average precision on labelled data. Each kind of data has a module of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dsvt_ros.errors import DataError
from dsvt_ros.kitti_ap import AP_KINDS
from dsvt_ros.tools import evaluate_kitti, evaluate_nuscenes, evaluate_ranges, evaluate_simulated
from dsvt_ros.tools.arguments import add_model_options, check_folders
from dsvt_ros.tools.result_file import write_result
from dsvt_ros.training.simulator import SPLITS

SCHEMA_VERSION = 1

# Kind of data to its module's `evaluate(options, place, console)`, which prints a table and gives the JSON's content.
KINDS = {
    "kitti": evaluate_kitti.evaluate,
    "nuscenes": evaluate_nuscenes.evaluate,
    "av2": evaluate_ranges.evaluate_argoverse2,
    "simulated": evaluate_simulated.evaluate,
}
# Options that only some kinds of data take.
OWN_OPTIONS = {
    "ap": ("kitti",),
    "frames": ("kitti",),
    "detections": ("kitti", "nuscenes"),
    "save_detections": ("kitti", "nuscenes"),
    "version": ("nuscenes",),
    "split": ("nuscenes",),
    "devkit_python": ("nuscenes",),
    "scenes": ("simulated",),
}


def main(argv: list[str]) -> int:
    """Evaluate; see ``dsvt evaluate --help``."""
    options = _parser().parse_args(argv)
    kind, _, place = options.data.partition(":")
    if kind not in KINDS or not place:
        raise DataError(
            f"--data {options.data}: expected simulated:SPLIT with SPLIT one of {', '.join(SPLITS)}, kitti:DIR, "
            "nuscenes:DIR, nuscenes:FILE.json or av2:DIR"
        )
    for name, kinds in OWN_OPTIONS.items():
        if kind not in kinds and getattr(options, name) is not None:
            raise DataError(
                f"--{name.replace('_', '-')} is for --data {' and '.join(f'{other}:...' for other in kinds)}, "
                f"got --data {options.data}"
            )
    check_folders(options, "output")
    console = Console(soft_wrap=True, markup=False, highlight=False)
    content = {"schema_version": SCHEMA_VERSION, "data": options.data} | KINDS[kind](options, place, console)
    if options.output:
        write_result(options.output, content, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsvt evaluate", description="Average precision of a model on labelled data.")
    parser.add_argument(
        "--data",
        required=True,
        help="kitti:DIR, a folder with velodyne, label_2 and calib (or training/...); nuscenes:DIR, a folder with "
        "samples, sweeps and v1.0-...; nuscenes:FILE.json, one sweep; av2:DIR, an Argoverse 2 log or a folder of logs; "
        f"or simulated:SPLIT with SPLIT one of {', '.join(SPLITS)} (never trained on but train)",
    )
    add_model_options(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    kitti = parser.add_argument_group("KITTI")
    kitti.add_argument(
        "--ap",
        choices=AP_KINDS,
        help="40 or 11 recall positions as published, or the exact area, for few frames (default: r40)",
    )
    kitti.add_argument("--frames", type=Path, metavar="FILE", help="names of the frames to take, one a line (a split)")
    nuscenes = parser.add_argument_group("nuScenes")
    nuscenes.add_argument("--version", help="folder of tables, such as v1.0-mini (default: the only one there)")
    nuscenes.add_argument("--split", help="such as mini_val, val, train (default: mini_val or val, as the version has)")
    nuscenes.add_argument(
        "--devkit-python",
        type=Path,
        metavar="FILE",
        help="a Python that has nuscenes-devkit (default: one of its own, made at the first use)",
    )
    both = parser.add_argument_group("KITTI and nuScenes")
    both.add_argument(
        "--detections",
        type=Path,
        metavar="PATH",
        help="score these detections, a folder of KITTI's files or a results file of nuScenes; no model is run",
    )
    both.add_argument(
        "--save-detections",
        type=Path,
        metavar="PATH",
        help="write the detections, a folder of KITTI's files or a results file of nuScenes",
    )
    simulated = parser.add_argument_group("simulated")
    simulated.add_argument("--scenes", type=int, help="number of scenes (default: 200)")
    return parser
