"""Poses and boxes as data sets store them."""

import math

import numpy as np
import pytest

from dsvt_ros.errors import DataError
from dsvt_ros.io.stored_poses import move_boxes, pose_from_quaternion, yaw_of


def test_quaternion_has_w_first():
    pose = pose_from_quaternion([math.cos(0.2), 0, 0, math.sin(0.2)], [1, 2, 3], "here")
    expected = [[math.cos(0.4), -math.sin(0.4), 0, 1], [math.sin(0.4), math.cos(0.4), 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(pose, expected, atol=1e-15)
    assert yaw_of(pose) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("rotation", "translation"),
    [([1, 0, 0], [0, 0, 0]), ([1, 0, 0, 0], [0, 0]), ([0, 0, 0, 0], [0, 0, 0]), ([1, 0, 0, math.nan], [0, 0, 0])],
)
def test_what_is_no_pose(rotation, translation):
    with pytest.raises(DataError, match=r"here: rotation .* are no pose"):
        pose_from_quaternion(rotation, translation, "here")


@pytest.mark.parametrize("columns", [7, 9])
def test_boxes_turn_with_their_headings_and_velocities(columns):
    quarter = pose_from_quaternion([math.sqrt(0.5), 0, 0, math.sqrt(0.5)], [100, 200, 5], "here")
    box = np.array([[1, 2, 3, 4, 1.8, 1.5, 0.1, 7, 1]], np.float32)[:, :columns]
    moved = move_boxes(box, quarter)
    expected = [98, 201, 8, 4, 1.8, 1.5, 0.1 + math.pi / 2, -1, 7][:columns]
    np.testing.assert_allclose(moved[0], expected, atol=1e-6)
    assert moved.dtype == np.float64
    assert box[0, 0] == 1


def test_no_boxes():
    assert move_boxes(np.zeros((0, 9), np.float32), np.eye(4)).shape == (0, 9)
