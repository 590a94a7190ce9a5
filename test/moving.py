"""A vehicle that drives through a world that stands still, in double precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from dsvt_ros.motion import MotionError
from dsvt_ros.poses import pose_matrix

SECOND = 10**9


class Drive:
    """Constant velocity in the fixed frame while turning evenly about a fixed axis: interpolation is exact."""

    def __init__(self, origin=(0.0, 0.0, 0.0), velocity=(20.0, 5.0, 0.3), yaw_rate=0.6, heading=0.4, start_ns=0):
        self.origin, self.velocity = np.array(origin), np.array(velocity)
        self.yaw_rate, self.heading, self.start_ns = yaw_rate, heading, start_ns

    def vehicle(self, stamp_ns):
        seconds = (stamp_ns - self.start_ns) / 1e9
        pose = pose_matrix((0, 0, 0, 0, 0, self.heading + self.yaw_rate * seconds))
        pose[:3, 3] = self.origin + seconds * self.velocity
        return pose

    def odometry(self, stamp_ns, child_frame_id="base_link"):
        """A nav_msgs/Odometry."""
        pose = self.vehicle(stamp_ns)
        x, y, z = pose[:3, 3].tolist()
        half = math.atan2(pose[1, 0], pose[0, 0]) / 2
        sec, nanosec = divmod(stamp_ns, SECOND)
        return SimpleNamespace(
            header=SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec), frame_id="odom"),
            child_frame_id=child_frame_id,
            pose=SimpleNamespace(
                pose=SimpleNamespace(
                    position=SimpleNamespace(x=x, y=y, z=z),
                    orientation=SimpleNamespace(x=0.0, y=0.0, z=math.sin(half), w=math.cos(half)),
                )
            ),
        )


class Exact:
    """The motion of a sensor on a drive, known exactly, between two times or always."""

    def __init__(self, drive, mounting=(), first_ns=-math.inf, last_ns=math.inf):
        self.drive, self.mounting = drive, pose_matrix(mounting)
        self.first_ns, self.last_ns = first_ns, last_ns
        self.asked = []

    def pose_at(self, stamp_ns, frame_id, wait_s=0.0):
        self.asked.append((stamp_ns, wait_s))
        if not self.first_ns <= stamp_ns <= self.last_ns:
            raise MotionError(f"nothing is known at {stamp_ns}")
        return self.drive.vehicle(stamp_ns) @ self.mounting


def seen_from(world, pose):
    """(N, 3) float32 of points (N, 3) of the fixed frame, as a sensor of that pose sees them."""
    return ((world - pose[:3, 3]) @ pose[:3, :3]).astype(np.float32)


def odometry_msg(drive, stamp_ns):
    """What the drive says, as a message of rosbags."""
    from dsvt_ros.io.bags import typestore

    types, plain = typestore().types, drive.odometry(stamp_ns)
    p, q = plain.pose.pose.position, plain.pose.pose.orientation
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // SECOND, nanosec=stamp_ns % SECOND)
    zero = types["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
    pose = types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](x=p.x, y=p.y, z=p.z),
        orientation=types["geometry_msgs/msg/Quaternion"](x=q.x, y=q.y, z=q.z, w=q.w),
    )
    return types["nav_msgs/msg/Odometry"](
        header=types["std_msgs/msg/Header"](stamp=stamp, frame_id="odom"),
        child_frame_id=plain.child_frame_id,
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            twist=types["geometry_msgs/msg/Twist"](linear=zero, angular=zero), covariance=np.zeros(36)
        ),
    )


def write_odometry(writer, drive, start_ns, period_ns, number=21):
    """Write messages of the drive to the topic /odom of a bag."""
    for stamp_ns in range(start_ns, start_ns + number * period_ns, period_ns):
        writer.write_message("/odom", odometry_msg(drive, stamp_ns), stamp_ns)
