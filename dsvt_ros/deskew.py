"""Motion compensation: a cloud as if all its points had been measured at one instant.

A turning lidar takes some 0.1 s for a cloud. On a vehicle at 20 m/s its last points are off by 2 m against its first.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.motion import Motion
from dsvt_ros.poses import relative_pose

NUM_KNOTS = 17
"""Poses along a cloud; in between, points are moved linearly: 0.5 mm off at 100 m when turning at 1 rad/s."""


def sensor_path(
    motion: Motion, stamp_ns: int, frame_id: str, first_s: float, last_s: float, wait_s: float
) -> NDArray[np.float64]:
    """Poses of the sensor while it measured a cloud, in its own frame at the cloud's stamp.

    Args:
        motion: Where the sensor is.
        stamp_ns: The cloud's stamp.
        frame_id: The sensor's frame.
        first_s: Time of the first point after the stamp, s; negative if it came before.
        last_s: The same of the last point.
        wait_s: How long to wait for the newest pose.

    Returns:
        (`NUM_KNOTS`, 4, 4), evenly spaced in time from first to last point.

    Raises:
        MotionError: Where the sensor was is not known all the time.
    """
    newest_ns = stamp_ns + round(max(last_s, 0.0) * 1e9)
    motion.pose_at(newest_ns, frame_id, wait_s)  # once it is known, so is the rest
    at_stamp = motion.pose_at(stamp_ns, frame_id)
    knots_ns = [stamp_ns + round(offset * 1e9) for offset in np.linspace(first_s, last_s, NUM_KNOTS)]
    return np.stack([relative_pose(at_stamp, motion.pose_at(knot_ns, frame_id)) for knot_ns in knots_ns])


def compensate(
    points: Tensor,
    offsets_s: Tensor,
    first_s: float,
    last_s: float,
    path: NDArray[np.float64],
) -> Tensor:
    """Move each point from where the sensor was when it measured it to where it was at the cloud's stamp.

    Args:
        points: (N, C) float32, metres, each in the sensor's frame at its own time.
        offsets_s: (N,) float32, time of each point after the stamp.
        first_s: Time of the path's first pose.
        last_s: Time of its last pose.
        path: (K, 4, 4), see `sensor_path`.

    Returns:
        (N, C), in the sensor's frame at the stamp; the columns after x, y, z stay.
    """
    knots = torch.as_tensor(path[:, :3], dtype=points.dtype, device=points.device)
    last = len(knots) - 1
    position = (offsets_s - first_s) * (last / max(last_s - first_s, 1e-9))
    before = position.floor().clamp(0, last - 1).long()
    fraction = (position - before).clamp(0, 1)[:, None, None]
    moves = torch.lerp(knots[before], knots[before + 1], fraction)
    xyz = (moves[:, :, :3] * points[:, None, :3]).sum(2) + moves[:, :, 3]
    return torch.cat([xyz, points[:, 3:]], dim=1)
