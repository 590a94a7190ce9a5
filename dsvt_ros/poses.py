"""Rigid poses in double precision: a million metres from the origin, float32 knows positions to 6 cm only.

Quaternions are ``x, y, z, w``, as in geometry_msgs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pose_matrix(pose: tuple[float, ...]) -> NDArray[np.float64]:
    """(4, 4) transform of ``x, y, z, roll, pitch, yaw`` (REP 103: fixed axes, roll about x first); () is identity."""
    matrix = np.eye(4)
    if pose:
        x, y, z, roll, pitch, yaw = pose
        matrix[:3, 3] = x, y, z
        cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (math.cos, math.sin))
        matrix[:3, :3] = [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    return matrix


def axes_matrix(axes: str) -> NDArray[np.float64]:
    """(4, 4) transform from axes x forward, y left (REP 103) to ``x_forward``, the same, or ``x_right``, y forward."""
    return pose_matrix((0.0, 0.0, 0.0, 0.0, 0.0, math.pi / 2 if axes == "x_right" else 0.0))


def matrix_from_quaternion(position: ArrayLike, quaternion: ArrayLike) -> NDArray[np.float64]:
    """(4, 4) transform of a position, m, and a quaternion other than zero, which need not have unit length."""
    quaternion = np.asarray(quaternion, np.float64)
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = position
    return matrix


def relative_pose(T_fixed_target: NDArray[np.float64], T_fixed_source: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: N803
    """(4, 4) T_target_source; far from the origin positions are subtracted before anything else is lost."""
    inverse = T_fixed_target[:3, :3].T
    T_target_source = np.eye(4)
    T_target_source[:3, :3] = inverse @ T_fixed_source[:3, :3]
    T_target_source[:3, 3] = inverse @ (T_fixed_source[:3, 3] - T_fixed_target[:3, 3])
    return T_target_source


def slerp(start: NDArray[np.float64], end: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
    """Unit quaternion on the shorter turn from `start` (fraction 0) to `end` (1); it goes on beyond both."""
    cos = float(start @ end)
    if cos < 0:
        end, cos = -end, -cos
    # The angle from its sine too: near 1 the cosine alone loses small turns.
    angle = math.atan2(float(np.linalg.norm(end - cos * start)), cos)
    if angle < 1e-9:
        return start
    turned = (math.sin((1 - fraction) * angle) * start + math.sin(fraction * angle) * end) / math.sin(angle)
    return np.asarray(turned / np.linalg.norm(turned))
