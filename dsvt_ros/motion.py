"""Where a sensor is at a given time, in a frame that does not move with it."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import DsvtError
from dsvt_ros.poses import matrix_from_quaternion, pose_matrix, slerp

KEEP_S = 10.0
"""Older poses are forgotten; as long as TF remembers by default."""

MAX_GAP_S = 1.0
"""Between two poses further apart than this, nothing is known; stamps that go back by more are a new start."""

MAX_EXTRAPOLATION_S = 0.05
"""How far beyond the newest pose the motion is taken to go on: braking at 10 m/s2, that is wrong by 2.5 cm."""

TWIST_BASE_S = 0.05
"""Velocities are differences of poses at least this far apart, if there are such: closer ones are mostly noise."""

StaticPose: TypeAlias = Callable[[str, str], "NDArray[np.float64] | None"]
"""Pose (4, 4) of the second frame in the first, where neither moves; None if it is not known."""


class MotionError(DsvtError):
    """Nobody knows where the sensor was at a time."""


class Motion(Protocol):
    """Where a sensor is."""

    def pose_at(self, stamp_ns: int, frame_id: str, wait_s: float = 0.0) -> NDArray[np.float64]:
        """Pose (4, 4) of a sensor in a frame that does not move with it, such as odom.

        Args:
            stamp_ns: When.
            frame_id: The sensor's frame.
            wait_s: How long to wait for news that are on their way.

        Raises:
            MotionError: It is not known; the message says why.
        """


class Stationary:
    """The motion of a sensor that does not move, such as one beside a road."""

    def pose_at(self, stamp_ns: int, frame_id: str, wait_s: float = 0.0) -> NDArray[np.float64]:
        """Identity, at any time."""
        return np.eye(4)


class Unknown:
    """The motion of a sensor that nobody tells about.

    Args:
        advice: How to tell it.
    """

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def pose_at(self, stamp_ns: int, frame_id: str, wait_s: float = 0.0) -> NDArray[np.float64]:
        """Nothing but the advice, as a `MotionError`."""
        raise MotionError(f"nobody says how the sensor moved; {self._advice}")


class Odometry:
    """The motion of a sensor on a vehicle, from the vehicle's nav_msgs/Odometry.

    Between two messages positions are interpolated linearly and rotations on the shortest turn. Beyond the newest one
    the motion goes on with constant velocity, for `MAX_EXTRAPOLATION_S` at most. The velocity is the difference of
    the newest poses, not the message's twist, which many publishers leave empty or give in another frame.

    Where the sensor sits on the vehicle says `PreprocessConfig.mounting`, or else, in this order: the odometry is the
    sensor's own (child_frame_id is the sensor's frame); a static transform. The pose in the model's frame will not do:
    that frame may be turned against the vehicle.

    One thread may add while others ask.

    Args:
        topic: Where the messages come from.
        config: Says where the sensor sits.
        static_pose: Asked for the sensor's pose in the odometry's child frame.
        keep_s: Poses older than the newest by more are forgotten.
    """

    def __init__(self, topic: str, config: PreprocessConfig, static_pose: StaticPose, keep_s: float = KEEP_S) -> None:
        self.topic = topic
        self._config = config
        self._static_pose = static_pose
        self._keep_ns = math.inf if math.isinf(keep_s) else round(keep_s * 1e9)
        self._changed = threading.Condition()
        self._base_frame = ""
        self._stamps_ns: list[int] = []
        self._poses: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []

    def __len__(self) -> int:
        return len(self._stamps_ns)

    def add(self, msg: Any) -> None:
        """Take in a nav_msgs/Odometry of rclpy or rosbags.

        Stamps that go back by more than `MAX_GAP_S` (a bag that starts again) or another child frame begin anew;
        other messages out of order are passed over.

        Raises:
            MotionError: Its pose is not finite, or its quaternion zero.
        """
        p, q = msg.pose.pose.position, msg.pose.pose.orientation
        position, quaternion = np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w])
        length = float(np.linalg.norm(quaternion))
        if not (np.isfinite(position).all() and math.isfinite(length) and length > 0):
            raise MotionError(f"got an odometry pose that is none: position {position}, quaternion {quaternion}")
        stamp_ns = msg.header.stamp.sec * 10**9 + msg.header.stamp.nanosec
        with self._changed:
            newest_ns = self._stamps_ns[-1] if self._stamps_ns else None
            restarted = newest_ns is not None and newest_ns - stamp_ns > MAX_GAP_S * 1e9
            if restarted or msg.child_frame_id != self._base_frame:
                self._stamps_ns, self._poses = [], []
                self._base_frame = msg.child_frame_id
            elif newest_ns is not None and stamp_ns <= newest_ns:
                return
            self._stamps_ns.append(stamp_ns)
            self._poses.append((position, quaternion / length))
            if stamp_ns - self._stamps_ns[0] > 2 * self._keep_ns:  # seldom: it moves all the others
                old = bisect_left(self._stamps_ns, stamp_ns - int(self._keep_ns))
                del self._stamps_ns[:old], self._poses[:old]
            self._changed.notify_all()

    def pose_at(self, stamp_ns: int, frame_id: str, wait_s: float = 0.0) -> NDArray[np.float64]:
        """See `Motion.pose_at`."""
        with self._changed:
            if wait_s > 0:
                self._changed.wait_for(lambda: self._reaches(stamp_ns), wait_s)
            T_odom_base = self._vehicle_at(stamp_ns)
            base_frame = self._base_frame
        return T_odom_base @ self._mounting(base_frame, frame_id)

    def _reaches(self, stamp_ns: int) -> bool:
        return bool(self._stamps_ns) and stamp_ns - self._stamps_ns[-1] <= MAX_EXTRAPOLATION_S * 1e9

    def _vehicle_at(self, stamp_ns: int) -> NDArray[np.float64]:
        stamps = self._stamps_ns
        if not stamps:
            raise MotionError(f"no odometry has come from {self.topic}")
        after = bisect_left(stamps, stamp_ns)
        if after < len(stamps) and stamps[after] == stamp_ns:
            return matrix_from_quaternion(*self._poses[after])
        if after == 0:
            raise MotionError(f"the odometry begins {(stamps[0] - stamp_ns) / 1e9:.3f} s after the cloud")
        before = after - 1
        if after == len(stamps):
            ahead_s = (stamp_ns - stamps[-1]) / 1e9
            if ahead_s > MAX_EXTRAPOLATION_S:
                raise MotionError(
                    f"the newest odometry is {ahead_s:.3f} s older than the cloud; at most {MAX_EXTRAPOLATION_S:g} s "
                    "are extrapolated"
                )
            if len(stamps) == 1:
                raise MotionError("a single odometry message does not tell a velocity")
            after = before
            before = max(bisect_left(stamps, stamps[after] - round(TWIST_BASE_S * 1e9) + 1) - 1, 0)
        gap_s = (stamps[after] - stamps[before]) / 1e9
        if gap_s > MAX_GAP_S:
            raise MotionError(f"the odometry has a gap of {gap_s:.1f} s there; at most {MAX_GAP_S:g} s are bridged")
        fraction = (stamp_ns - stamps[before]) / (stamps[after] - stamps[before])
        (start, start_turn), (end, end_turn) = self._poses[before], self._poses[after]
        position = start + fraction * (end - start)
        return matrix_from_quaternion(position, slerp(start_turn, end_turn, fraction))

    def _mounting(self, base_frame: str, sensor_frame: str) -> NDArray[np.float64]:
        if self._config.mounting:
            return pose_matrix(self._config.mounting)
        if base_frame.lstrip("/") == sensor_frame.lstrip("/"):
            return np.eye(4)
        found = self._static_pose(base_frame, sensor_frame)
        if found is not None:
            return found
        raise MotionError(
            f"the odometry is that of {base_frame!r}, and no static transform says where {sensor_frame!r} sits on it; "
            "give its pose in preprocess.mounting"
        )
