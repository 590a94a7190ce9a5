"""Odometry in time: interpolated, extrapolated a little, otherwise refused."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moving import SECOND, Drive

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.motion import MotionError, Odometry, Stationary
from dsvt_ros.poses import pose_matrix

MS = SECOND // 1000
START = 1_700_000_000 * SECOND


def unknown(base, sensor):
    return None


def odometry(drive, stamps_ns, config=None, static_pose=unknown):
    result = Odometry("/odom", config or PreprocessConfig(), static_pose)
    for stamp_ns in stamps_ns:
        result.add(drive.odometry(stamp_ns))
    return result


@settings(deadline=None)
@given(
    st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(-1e3, 1e3)),
    st.floats(-2, 2),
    st.integers(-20, 245),
)
def test_between_and_shortly_after_messages(origin, yaw_rate, millisecond):
    drive = Drive(origin, yaw_rate=yaw_rate, start_ns=START)
    motion = odometry(drive, [START + 20 * MS * k for k in range(-2, 11)])
    stamp_ns = START + millisecond * MS + 12_345
    found = motion.pose_at(stamp_ns, "base_link")
    np.testing.assert_allclose(found, drive.vehicle(stamp_ns), rtol=0, atol=2e-8)


@pytest.mark.parametrize(
    ("stamps_ms", "at_ms", "message"),
    [
        ([], 0, "no odometry has come from /odom"),
        ([0], 10, "a single odometry message"),
        ([0, 20], -1, r"begins 0\.001 s after the cloud"),
        ([0, 20], 80, r"newest odometry is 0\.060 s older than the cloud; at most 0\.05 s"),
        ([0, 20, 1500, 1520], 700, r"gap of 1\.5 s"),
        ([0, 1500], 1510, r"gap of 1\.5 s"),
    ],
)
def test_what_is_not_known_is_refused(stamps_ms, at_ms, message):
    motion = odometry(Drive(start_ns=START), [START + ms * MS for ms in stamps_ms])
    with pytest.raises(MotionError, match=message):
        motion.pose_at(START + at_ms * MS, "base_link")


def test_a_wait_ends_with_the_message_that_was_missing():
    drive = Drive(start_ns=START)
    motion = odometry(drive, [START, START + 20 * MS])
    late = threading.Timer(0.1, lambda: motion.add(drive.odometry(START + 120 * MS)))
    late.start()
    found = motion.pose_at(START + 100 * MS, "base_link", wait_s=10.0)
    late.join()
    np.testing.assert_allclose(found, drive.vehicle(START + 100 * MS), atol=1e-9)
    with pytest.raises(MotionError):
        motion.pose_at(START + 300 * MS, "base_link", wait_s=0.01)


def test_a_bag_that_starts_again_begins_anew():
    drive = Drive(start_ns=START)
    motion = odometry(drive, [START + 20 * MS * k for k in range(200)])
    motion.add(drive.odometry(START + 20 * MS))
    assert len(motion) == 1


def test_messages_out_of_order_are_passed_over():
    drive = Drive(start_ns=START)
    motion = odometry(drive, [START, START + 40 * MS, START + 20 * MS, START + 40 * MS])
    assert len(motion) == 2


def test_another_vehicle_frame_begins_anew():
    drive = Drive(start_ns=START)
    motion = odometry(drive, [START, START + 20 * MS])
    motion.add(drive.odometry(START + 40 * MS, "base_footprint"))
    assert len(motion) == 1


def test_old_poses_are_forgotten():
    drive = Drive(start_ns=START)
    motion = odometry(drive, [START + 100 * MS * k for k in range(1000)])
    assert 100 < len(motion) <= 201


@pytest.mark.parametrize(("field", "value"), [("x", math.nan), ("w", math.inf)])
def test_impossible_poses_are_refused(field, value):
    message = Drive().odometry(START)
    setattr(message.pose.pose.position if field == "x" else message.pose.pose.orientation, field, value)
    with pytest.raises(MotionError, match="got an odometry pose that is none"):
        odometry(Drive(), []).add(message)


def test_unset_rotation_is_refused():
    message = Drive().odometry(START)
    message.pose.pose.orientation.z = message.pose.pose.orientation.w = 0.0
    with pytest.raises(MotionError, match="quaternion"):
        odometry(Drive(), []).add(message)


STATIC, NUMBERS, MODEL = (1.0, 0, 2, 0, 0, 0.1), (2.0, 0, 1, 0, 0, 0.2), (0.0, 0, 1.8, 0, 0.05, 0)


@pytest.mark.parametrize(
    ("mounting", "sensor", "expected"),
    [(NUMBERS, "lidar", NUMBERS), ((), "lidar", STATIC), ((), "/base_link", ())],
)
def test_where_the_sensor_sits(mounting, sensor, expected):
    asked = []

    def static_pose(base, sensor):
        asked.append((base, sensor))
        return pose_matrix(STATIC)

    drive = Drive()
    motion = odometry(drive, [START], PreprocessConfig(mounting=mounting, sensor_pose=MODEL), static_pose)
    found = motion.pose_at(START, sensor)
    np.testing.assert_allclose(found, drive.vehicle(START) @ pose_matrix(expected), rtol=0, atol=1e-6)
    assert asked in ([], [("base_link", "lidar")])


def test_unknown_mounting_is_an_error_neither_identity_nor_the_pose_in_the_model():
    motion = odometry(Drive(), [START], PreprocessConfig(sensor_pose=MODEL))
    with pytest.raises(
        MotionError, match=r"that of 'base_link', and no static .* where 'lidar' .*preprocess\.mounting"
    ):
        motion.pose_at(START, "lidar")


def test_stationary():
    np.testing.assert_array_equal(Stationary().pose_at(5, "lidar"), np.eye(4))
