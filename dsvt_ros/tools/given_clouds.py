"""Clouds of commands that measure or compare: read from files or simulated, and made smaller or larger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.errors import ConfigError, DataError
from dsvt_ros.io.clouds import Scan, open_clouds, select_columns
from dsvt_ros.model.folder import open_model
from dsvt_ros.poses import axes_matrix
from dsvt_ros.training.layout import make_scene
from dsvt_ros.training.lidar import WAYMO_TOP, Sensor
from dsvt_ros.training.simulator import SensedScene, cast
from dsvt_ros.voxelization import voxelize

Cloud = NDArray[np.float32]

NUM_SIMULATED = 8
SIMULATED = "simulated"
SIMULATED_POINTS = 170_000
"""Of a sweep of the Waymo Open Dataset's upper lidar, both returns together."""
FIRST_SCENE = 13
"""It and the seven after it have 10,000 to 15,000 occupied pillars each; not all streets are as long."""
SENSOR_HEIGHT_M = 2.1
JITTER_M = 0.03
"""Standard deviation of the distance along each axis between a point and its copies."""


def given_clouds(
    sources: Sequence[str], columns: tuple[str, ...], model: ModelConfig, config: PreprocessConfig
) -> Iterator[Cloud]:
    """Clouds in the model's columns, each read or simulated when asked for.

    Args:
        sources: Point files, bags, or ``simulated[:POINTS]`` for `NUM_SIMULATED` turns of a lidar.
        columns: Those of files that do not name theirs.
        model: Whose columns to take.
        config: Names the axes that simulated clouds have.

    Raises:
        ConfigError: The number of simulated points is not one positive number.
        DataError: A file cannot be read, or there are no clouds in any.
    """
    fill = {feature.name: feature.fill for feature in model.features[3:]}
    axes = config.axes_of_clouds(model)
    empty = True
    for source in sources:
        kind, _, number = source.partition(":")
        scans: Iterator[Scan]
        if kind == SIMULATED:
            count = _point_count("--cloud simulated", number) if number else SIMULATED_POINTS
            scenes = range(FIRST_SCENE, FIRST_SCENE + NUM_SIMULATED)
            scans = (simulated_scan(count, scene, model, axes) for scene in scenes)
        else:
            scans = open_clouds(source, columns)
        for scan in scans:
            empty = False
            yield select_columns(scan, model.feature_names, fill)
    if empty:
        raise DataError(f"{', '.join(sources)}: no clouds in there")


def point_counts(option: str, text: str) -> list[int]:
    """Comma-separated numbers of points; `ConfigError` for anything else."""
    return [_point_count(option, number) for number in text.split(",")]


def _point_count(option: str, text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"{option}: expected a positive number of points, such as 60000, got {text!r}")
    return count


def simulated_scan(num_points: int, seed: int, model: ModelConfig, axes: str = "x_forward") -> Scan:
    """One turn of a 64-beam lidar in a random street, computed on the CPU: the same bytes on every machine.

    Args:
        num_points: Exactly so many; the turn has as many columns as that needs.
        seed: Of the scene and of all noise.
        model: Gives the height of the ground.
        axes: ``x_forward`` or ``x_right``.
    """
    random = np.random.default_rng(seed)
    scene = make_scene(random)
    sensor = Sensor(WAYMO_TOP, SENSOR_HEIGHT_M, stagger=random.random(WAYMO_TOP.num_beams))
    # What part of the rays comes back depends on the scene: once to see, once with as many columns as are needed.
    share = len(cast([SensedScene(scene, sensor)], seed=seed).points) / (WAYMO_TOP.num_columns * WAYMO_TOP.num_beams)
    columns = math.ceil(1.01 * num_points / (share * WAYMO_TOP.num_beams)) + 8
    sensor = dataclasses.replace(sensor, lidar=dataclasses.replace(WAYMO_TOP, num_columns=columns))
    points = resized(cast([SensedScene(scene, sensor)], seed=seed).points.numpy(), num_points, seed)
    points[:, :3] = points[:, :3] @ axes_matrix(axes)[:3, :3].T
    points[:, 2] += model.ground_z
    return Scan(f"{SIMULATED}#{seed}", points, ("x", "y", "z", "intensity"))


def num_pillars(cloud: Cloud, model: ModelConfig) -> int:
    """Occupied pillars of `waymo_pillar`'s grid, a common measure of clouds for whatever `model`."""
    xyz = torch.from_numpy(cloud[:, :3].copy())
    xyz[:, 2] -= model.ground_z
    return len(voxelize(xyz, open_model("waymo_pillar").model))


def resized(cloud: Cloud, num_points: int, seed: int) -> Cloud:
    """A random part of the points, or all of them and copies some centimetres apart.

    Args:
        cloud: (N, C) x, y, z first; N is not 0.
        num_points: Rows of the result.
        seed: Of the choice and of the distances.
    """
    random = np.random.default_rng(seed)
    if num_points <= len(cloud):
        return cloud[np.sort(random.choice(len(cloud), num_points, replace=False))]
    larger = np.tile(cloud, (-(-num_points // len(cloud)), 1))[:num_points]
    copies = larger[len(cloud) :, :3]
    copies += random.normal(0.0, JITTER_M, copies.shape).astype(np.float32)
    return larger
