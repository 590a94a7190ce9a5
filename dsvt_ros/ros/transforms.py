"""Where the sensor is in the model's frame, from TF."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time

from dsvt_ros.errors import ConfigError, DsvtError


class TransformError(DsvtError):
    """TF has no transform for a cloud."""


class SensorPose:
    """Looks up the pose of each cloud's frame in the model's frame.

    Args:
        node: Listens to /tf and /tf_static.
        model_frame: The frame whose axes and ground are the model's.

    Raises:
        ConfigError: tf2_ros is not installed.
    """

    def __init__(self, node: Node, model_frame: str) -> None:
        try:
            import tf2_ros
        except ImportError as error:
            raise ConfigError(
                f"preprocess.model_frame is {model_frame!r}, which needs TF, but tf2_ros cannot be "
                f"imported ({error}); install tf2_ros (apt: ros-<distro>-tf2-ros-py), or give numbers in "
                "preprocess.sensor_pose instead"
            ) from None
        self._model_frame = model_frame
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node, spin_thread=False)
        self._errors: tuple[type[Exception], ...] = (tf2_ros.TransformException,)

    def at(self, header: Any, timeout_s: float) -> NDArray[np.float64]:
        """Pose (4, 4) of the sensor in the model's frame when the cloud was stamped.

        Args:
            header: std_msgs/Header of the cloud.
            timeout_s: How long to wait for a transform that is on its way.

        Raises:
            TransformError: There is none; identity is never assumed.
        """
        try:
            found = self._buffer.lookup_transform(
                self._model_frame,
                header.frame_id,
                Time.from_msg(header.stamp),
                timeout=Duration(seconds=timeout_s),
            )
        except self._errors as error:
            raise TransformError(
                f"no transform from {header.frame_id!r} to preprocess.model_frame "
                f"{self._model_frame!r} at the cloud's stamp: {error}"
            ) from None
        return matrix_from_transform(found.transform)

    def close(self) -> None:
        """Stop listening."""
        self._listener.unregister()


def matrix_from_transform(transform: Any) -> NDArray[np.float64]:
    """(4, 4) float64 of a geometry_msgs/Transform."""
    q, t = transform.rotation, transform.translation
    x, y, z, w = np.array([q.x, q.y, q.z, q.w]) / np.sqrt(q.x**2 + q.y**2 + q.z**2 + q.w**2)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w), t.x],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w), t.y],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y), t.z],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
