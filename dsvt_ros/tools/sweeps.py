"""Clouds for commands: those of bags together with the sweeps before them, where the model wants several."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from dsvt_ros.detector import Detector
from dsvt_ros.errors import DataError
from dsvt_ros.io.bag_motion import motion_from_bag
from dsvt_ros.io.bags import is_bag
from dsvt_ros.io.clouds import Scan, select_columns
from dsvt_ros.io.point_times import offsets_from_msg
from dsvt_ros.motion import Motion, Stationary, Unknown
from dsvt_ros.sweeps import MergedSweeps, SweepBuffer


def add_motion_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--odometry-topic`` and ``--stationary``."""
    motion = parser.add_mutually_exclusive_group()
    motion.add_argument(
        "--odometry-topic",
        metavar="TOPIC",
        help="nav_msgs/Odometry of a bag, for models of several sweeps and preprocess.motion_compensation",
    )
    motion.add_argument(
        "--stationary", action="store_true", default=None, help="the same for a sensor that does not move"
    )


def merged_clouds(
    options: argparse.Namespace, paths: Sequence[str], opened: Sequence[Iterator[Scan]], detector: Detector
) -> Iterator[tuple[Scan, MergedSweeps]]:
    """Every scan, and what the detector is to see of it.

    Files stay as they are: their column of ages, if they have one, is that of sweeps merged beforehand.

    Args:
        options: With those of `add_motion_options`.
        paths: Files and bags.
        opened: Their scans.
        detector: Says which columns, and how many sweeps.

    Raises:
        DataError: A bag lacks the topic of the odometry, or nothing needs to know the motion that was given.
    """
    model, config = detector.model, detector.config.preprocess
    needs_motion = model.age_column is not None or config.motion_compensation
    asked_for = needs_motion and any(is_bag(Path(path)) for path in paths)
    if (options.odometry_topic or options.stationary) and not asked_for:
        given = "--stationary" if options.stationary else "--odometry-topic"
        raise DataError(
            f"{given} is for bags, and for models of several sweeps or preprocess.motion_compensation: nothing here "
            f"asks how the sensor moves"
        )
    fill = {feature.name: feature.fill for feature in model.features[3:]}
    for path, scans in zip(paths, opened, strict=True):
        sweeps = SweepBuffer(model, detector.device)
        motion: Motion | None = None
        for scan in scans:
            points = select_columns(scan, model.feature_names, fill)
            if not needs_motion or scan.stamp_ns is None or scan.message is None:
                yield scan, MergedSweeps(torch.as_tensor(points), 1, 1)
                continue
            motion = motion or _motion(options, Path(path), detector)
            point_times = partial(offsets_from_msg, scan.message, scan.stamp_ns)
            yield scan, sweeps.add(points, scan.stamp_ns, scan.frame_id, motion, config, point_times=point_times)


def _motion(options: argparse.Namespace, bag: Path, detector: Detector) -> Motion:
    if options.stationary:
        return Stationary()
    if options.odometry_topic is None:
        return Unknown("name the vehicle's odometry with --odometry-topic, or say --stationary")
    return motion_from_bag(bag, options.odometry_topic, detector.config.preprocess)
