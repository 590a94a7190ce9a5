"""Poses from TF."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time

from dsvt_ros.errors import ConfigError, DsvtError
from dsvt_ros.poses import matrix_from_quaternion


class TransformError(DsvtError):
    """TF does not know a transform."""


class Transforms:
    """Listens to /tf and /tf_static.

    Args:
        node: Listens.
        because: What needs TF, for the message where tf2_ros is missing.
        instead: What would do without it.

    Raises:
        ConfigError: tf2_ros is not installed.
    """

    def __init__(self, node: Node, because: str, *, instead: str) -> None:
        try:
            import tf2_ros
        except ImportError as error:
            raise ConfigError(
                f"{because}, which needs TF, but tf2_ros cannot be imported ({error}); install tf2_ros "
                f"(apt: ros-<distro>-tf2-ros-py), or {instead}"
            ) from None
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node, spin_thread=False)
        self._errors: tuple[type[Exception], ...] = (tf2_ros.TransformException,)

    def pose(self, target: str, source: str, stamp_ns: int, timeout_s: float = 0.0) -> NDArray[np.float64]:
        """Pose (4, 4) of one frame in another.

        Args:
            target: The frame in which the pose is given.
            source: The frame whose pose is asked for.
            stamp_ns: When; 0 for the newest that is known, as for frames that do not move.
            timeout_s: How long to wait for a transform that is on its way.

        Raises:
            TransformError: There is none; identity is never assumed.
        """
        try:
            found = self._buffer.lookup_transform(
                target, source, Time(nanoseconds=stamp_ns), timeout=Duration(seconds=timeout_s)
            )
        except self._errors as error:
            raise TransformError(f"no transform from {source!r} to {target!r}: {error}") from None
        t, q = found.transform.translation, found.transform.rotation
        return matrix_from_quaternion([t.x, t.y, t.z], [q.x, q.y, q.z, q.w])

    def close(self) -> None:
        """Stop listening."""
        self._listener.unregister()


class SensorPose:
    """Looks up the pose of each cloud's frame in the model's frame.

    Args:
        transforms: TF.
        model_frame: The frame whose axes and ground are the model's.
    """

    def __init__(self, transforms: Transforms, model_frame: str) -> None:
        self._transforms = transforms
        self._model_frame = model_frame

    def at(self, header: Any, timeout_s: float) -> NDArray[np.float64]:
        """Pose (4, 4) of the sensor in the model's frame when the cloud was stamped.

        Args:
            header: std_msgs/Header of the cloud.
            timeout_s: How long to wait for a transform that is on its way.

        Raises:
            TransformError: There is none.
        """
        try:
            return self._transforms.pose(
                self._model_frame, header.frame_id, Time.from_msg(header.stamp).nanoseconds, timeout_s
            )
        except TransformError as error:
            raise TransformError(f"preprocess.model_frame at the cloud's stamp: {error}") from None
