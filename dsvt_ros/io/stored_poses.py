"""Poses of sensors and boxes as nuScenes and Argoverse 2 store them: quaternions ``w, x, y, z`` in files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError
from dsvt_ros.poses import matrix_from_quaternion


def pose_from_quaternion(rotation: Sequence[float], translation: Sequence[float], where: str) -> NDArray[np.float64]:
    """(4, 4) float64 pose.

    Args:
        rotation: Quaternion w, x, y, z; need not be of length 1 to the last digit.
        translation: x, y, z, metres.
        where: File and record, for messages.

    Raises:
        DataError: One has another length or is not finite, or the quaternion is zero.
    """
    values = [*rotation, *translation]
    if len(rotation) != 4 or len(translation) != 3 or not np.isfinite(values).all() or not np.any(rotation):
        raise DataError(f"{where}: rotation {list(rotation)} and translation {list(translation)} are no pose")
    w, x, y, z = rotation
    return matrix_from_quaternion(translation, [x, y, z, w])


def yaw_of(pose: NDArray[np.float64]) -> float:
    """Heading of a pose's x axis seen from above, radians."""
    return float(np.arctan2(pose[1, 0], pose[0, 0]))


def move_boxes(
    boxes: NDArray[np.float32] | NDArray[np.float64],
    T_target_source: NDArray[np.float64],  # noqa: N803
) -> NDArray[np.float64]:
    """Bring boxes into another frame; headings and velocities are turned as vectors, boxes stay upright.

    Args:
        boxes: (M, 7) or (M, 9) ``[x, y, z, length, width, height, yaw(, vx, vy)]`` in the source frame.
        T_target_source: (4, 4) pose of the source frame in the target frame.

    Returns:
        The same in the target frame, float64.
    """
    rotation = T_target_source[:3, :3]
    moved = boxes.astype(np.float64)
    moved[:, :3] = moved[:, :3] @ rotation.T + T_target_source[:3, 3]
    heading = rotation[:2, :2] @ np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])])
    moved[:, 6] = np.arctan2(heading[1], heading[0])
    if moved.shape[1] == 9:
        moved[:, 7:9] = moved[:, 7:9] @ rotation[:2, :2].T
    return moved
