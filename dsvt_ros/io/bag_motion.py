"""The motion of a bag's sensor, from its odometry and static transforms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import DataError
from dsvt_ros.io.bags import ODOMETRY, TRANSFORMS, messages_from_bag, topic_of_type, topics_of_bag
from dsvt_ros.motion import Odometry
from dsvt_ros.poses import matrix_from_quaternion

STATIC_TRANSFORMS = "/tf_static"


class StaticTransforms:
    """Frames that do not move against each other, as a tree.

    Each has at most one parent; which of several is given last counts.
    """

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, NDArray[np.float64]]] = {}

    def add(self, parent: str, child: str, T_parent_child: NDArray[np.float64]) -> None:  # noqa: N803
        """Put a frame under its parent."""
        self._parents[child.lstrip("/")] = (parent.lstrip("/"), T_parent_child)

    def pose(self, target: str, source: str) -> NDArray[np.float64] | None:
        """Pose (4, 4) of one frame in another, None if nothing connects them."""
        above_target, above_source = self._ancestors(target.lstrip("/")), self._ancestors(source.lstrip("/"))
        for frame, T_frame_source in above_source.items():
            if frame in above_target:
                return np.asarray(np.linalg.inv(above_target[frame]) @ T_frame_source)
        return None

    def _ancestors(self, frame: str) -> dict[str, NDArray[np.float64]]:
        """The frame's pose in itself and in all frames above it, nearest first."""
        poses = {frame: np.eye(4)}
        pose = np.eye(4)
        while frame in self._parents:
            frame, T_parent_child = self._parents[frame]
            if frame in poses:  # a loop
                break
            pose = T_parent_child @ pose
            poses[frame] = pose
        return poses


def motion_from_bag(path: Path, topic: str, config: PreprocessConfig) -> Odometry:
    """All odometry of a topic; where the sensor sits may also come from the bag's ``/tf_static``.

    Raises:
        DataError: There is no such topic, it is no nav_msgs/Odometry or is empty, or a message is damaged.
        MotionError: A message holds no pose.
    """
    name = topic_of_type(path, topic, ODOMETRY).name
    odometry = Odometry(name, config, _static_transforms(path).pose, keep_s=math.inf)
    for message in messages_from_bag(path, [name]):
        odometry.add(message.decode())
    if not len(odometry):
        raise DataError(f"{path}: {name} has no messages")
    return odometry


def _static_transforms(path: Path) -> StaticTransforms:
    transforms = StaticTransforms()
    topics = [t.name for t in topics_of_bag(path) if (t.name, t.message_type) == (STATIC_TRANSFORMS, TRANSFORMS)]
    for message in messages_from_bag(path, topics):
        for stamped in message.decode().transforms:
            t, q = stamped.transform.translation, stamped.transform.rotation
            pose = matrix_from_quaternion([t.x, t.y, t.z], [q.x, q.y, q.z, q.w])
            transforms.add(stamped.header.frame_id, stamped.child_frame_id, pose)
    return transforms
