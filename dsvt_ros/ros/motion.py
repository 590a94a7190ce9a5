"""Where the sensor is, from TF or an odometry topic, for merging sweeps and motion compensation."""

from __future__ import annotations

import numpy as np
from nav_msgs.msg import Odometry as OdometryMsg
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.motion import Motion, MotionError, Odometry, Stationary
from dsvt_ros.ros.node_config import MotionConfig
from dsvt_ros.ros.transforms import TransformError, Transforms

THROTTLE_S = 5.0
"""The same complaint is logged at most this often."""

QUEUE = 100
"""Messages that wait while the executor takes in a large cloud: half a second of fast odometry."""


class TfMotion:
    """The motion of a sensor as TF tells it.

    Args:
        transforms: TF.
        fixed_frame: A frame that does not move and never jumps (REP 105: odom, not map).
    """

    def __init__(self, transforms: Transforms, fixed_frame: str) -> None:
        self._transforms = transforms
        self._fixed_frame = fixed_frame

    def pose_at(self, stamp_ns: int, frame_id: str, wait_s: float = 0.0) -> NDArray[np.float64]:
        """See `Motion.pose_at`."""
        try:
            return self._transforms.pose(self._fixed_frame, frame_id, stamp_ns, wait_s)
        except TransformError as error:
            raise MotionError(f"motion.fixed_frame: {error}") from None


class SensorMotion:
    """Listens to whatever tells where the sensor is.

    Args:
        node: Subscribes to ``~/input/odometry``.
        config: Which source.
        preprocess: Says where the sensor sits on the vehicle.
        transforms: TF, None where tf2_ros is missing.
    """

    def __init__(
        self, node: Node, config: MotionConfig, preprocess: PreprocessConfig, transforms: Transforms | None
    ) -> None:
        self._node = node
        self._transforms = transforms
        self._tf = TfMotion(transforms, config.fixed_frame) if transforms and config.source in ("auto", "tf") else None
        self._stationary = Stationary() if config.source == "stationary" else None
        topic = node.resolve_topic_name("~/input/odometry")
        self._odometry = Odometry(topic, preprocess, self._static_pose)
        self._subscription = None
        if config.source in ("auto", "odometry"):
            # Best effort hears every publisher.
            qos = QoSProfile(depth=QUEUE, reliability=ReliabilityPolicy.BEST_EFFORT)
            self._subscription = node.create_subscription(OdometryMsg, topic, self._on_odometry, qos)

    def current(self) -> Motion:
        """The source for one cloud: in ``auto`` odometry as soon as any arrived, TF before."""
        if self._stationary is not None:
            return self._stationary
        if len(self._odometry) or self._tf is None:
            return self._odometry
        return self._tf

    def describe(self) -> str:
        """The source in words."""
        if self._stationary is not None:
            return "stationary"
        if self.current() is self._tf:
            return "tf"
        if len(self._odometry):
            return f"odometry on {self._odometry.topic}"
        no_tf = ", and tf2_ros is not installed" if self._transforms is None else ""
        return f"unknown: nobody publishes on {self._odometry.topic}{no_tf}"

    def close(self) -> None:
        """Stop listening to the odometry."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None

    def _on_odometry(self, msg: OdometryMsg) -> None:
        try:
            self._odometry.add(msg)
        except MotionError as error:
            self._node.get_logger().warning(str(error), throttle_duration_sec=THROTTLE_S)

    def _static_pose(self, base_frame: str, sensor_frame: str) -> NDArray[np.float64] | None:
        if self._transforms is None:
            return None
        try:
            return self._transforms.pose(base_frame, sensor_frame, stamp_ns=0)
        except TransformError:
            return None
