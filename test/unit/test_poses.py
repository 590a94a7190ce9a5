"""Rotations against Rodrigues' formula."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.poses import matrix_from_quaternion, pose_matrix, relative_pose, slerp

axes = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1)


def quaternion(axis, angle):
    unit = np.asarray(axis) / np.linalg.norm(axis)
    return np.append(unit * math.sin(angle / 2), math.cos(angle / 2))


def rotation(axis, angle):
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@settings(deadline=None)
@given(axes, st.floats(-3.1, 3.1), st.floats(0.2, 5))
def test_matrix_of_any_quaternion(axis, angle, length):
    found = matrix_from_quaternion([1, 2, 3], quaternion(axis, angle) * length)
    np.testing.assert_allclose(found[:3, :3], rotation(axis, angle), atol=1e-12)
    assert found[:, 3].tolist() == [1, 2, 3, 1]


@settings(deadline=None)
@given(axes, st.floats(-3, 3), st.floats(-3, 3), st.floats(-0.5, 1.5), st.booleans())
def test_slerp_turns_evenly_and_beyond_the_end(axis, start, turn, fraction, negated):
    end = quaternion(axis, start + turn) * (-1 if negated else 1)
    found = slerp(quaternion(axis, start), end, fraction)
    expected = rotation(axis, start + fraction * turn)
    np.testing.assert_allclose(matrix_from_quaternion([0, 0, 0], found)[:3, :3], expected, atol=1e-9)


def test_small_turns_are_not_lost():
    start, turn = quaternion((0, 0, 1), 0.3), 1e-6
    found = slerp(start, quaternion((0, 0, 1), 0.3 + turn), 0.5)
    np.testing.assert_allclose(found, quaternion((0, 0, 1), 0.3 + turn / 2), atol=1e-15)


def test_relative_pose_is_exact_a_million_metres_away():
    target, source = pose_matrix((1, 2, 0.5, 0.1, -0.2, 2.5)), pose_matrix((1.25, 2.5, 0.25, 0.1, -0.2, 2.0))
    near = relative_pose(target, source)
    np.testing.assert_allclose(target @ near, source, atol=1e-15)
    for pose in (target, source):
        pose[:3, 3] += (1e6, -2e6, 1e3)
    np.testing.assert_allclose(relative_pose(target, source), near, atol=1e-9)


def test_pose_matrix_follows_rep_103():
    matrix = pose_matrix((1, 2, 3, 0, 0, math.pi / 2))
    np.testing.assert_allclose(matrix @ [1, 0, 0, 1], [1, 3, 3, 1], atol=1e-12)  # yaw: x turns to y
    np.testing.assert_allclose(pose_matrix((0, 0, 0, 0, math.pi / 2, 0)) @ [1, 0, 0, 1], [0, 0, -1, 1], atol=1e-12)
    np.testing.assert_allclose(pose_matrix((0, 0, 0, math.pi / 2, 0, 0)) @ [0, 1, 0, 1], [0, 0, 1, 1], atol=1e-12)
    np.testing.assert_array_equal(pose_matrix(()), np.eye(4))
