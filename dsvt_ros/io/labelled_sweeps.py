"""Sweeps with labels: what the readers of nuScenes and Argoverse 2 have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.io.clouds import Scan

Axes = Literal["x_forward", "x_right"]
"""As `ModelConfig.axes`: x forward, y left (REP 103), or x right, y forward (nuScenes); z up."""


@dataclass(frozen=True, eq=False)
class PosedScan:
    """A cloud and where it was measured.

    Attributes:
        scan: The cloud, with a stamp.
        T_fixed_sensor: (4, 4) float64 pose of its frame in one that does not move with the vehicle.
    """

    scan: Scan
    T_fixed_sensor: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LabelledSweep:
    """A cloud, those before it, and the objects in it.

    Attributes:
        scans: The labelled cloud, then earlier ones, newest first.
        axes: Axes of the clouds' frame.
        T_level_sensor: (4, 4) float64 pose of the labelled cloud's frame in the level frame, which has its x axis
            forward, z up and its origin on the ground below that of the cloud.
        boxes: (M, 7) float64 ``[x, y, z, length, width, height, yaw]``, z at the centre, frame of the labelled cloud.
        class_names: M names, as the data set has them.
        num_points: (M,) int64, returns on each object.
    """

    scans: tuple[PosedScan, ...]
    axes: Axes
    T_level_sensor: NDArray[np.float64]
    boxes: NDArray[np.float64]
    class_names: tuple[str, ...]
    num_points: NDArray[np.int64]
