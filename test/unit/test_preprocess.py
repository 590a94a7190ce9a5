import math

import numpy as np
import pytest
import torch

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import boxes_to_source, drop_missing, scale_features, transform
from dsvt_ros.structures import Boxes3D


@pytest.fixture(scope="module")
def model():
    return open_model("demo").model


def test_missing_returns_are_dropped(model):
    nan, inf = math.nan, math.inf
    points = torch.tensor(
        [[1, 0, 0, 0.5], [0, 0, 0, 0.5], [nan, 0, 0, 0.5], [inf, 1, 1, 0.5], [0.05, 0, 0.05, 1], [2, 0, 0, nan]]
    )
    kept = drop_missing(points, model, PreprocessConfig(min_range=0.1))
    assert kept.tolist() == [[1, 0, 0, 0.5], [2, 0, 0, 0]]


def test_intensity_rule(model):
    points = torch.tensor([[1.0, 2.0, 3.0, 127.5]])
    by_model = scale_features(points, model, PreprocessConfig(intensity_scale=1 / 255))
    assert by_model[0].tolist() == pytest.approx([1, 2, 3, math.tanh(0.5)])
    assert torch.equal(scale_features(points, model, PreprocessConfig(scale_features=False)), points)


def test_boxes_return_to_the_sensor_frame():
    pose = pose_matrix((0.5, -0.2, 1.73, 0.02, -0.03, 0.7))
    box = np.array([[10, 4, 0.8, 4, 2, 1.5, 1.2]], np.float32)
    back = boxes_to_source(Boxes3D(box, np.ones(1, np.float32), np.zeros(1, np.int64), ("car",)), pose).boxes
    center = torch.as_tensor(back[:, :3])
    np.testing.assert_allclose(transform(center, torch.as_tensor(pose).float()), box[:, :3], atol=1e-5)
    assert back[0, 6] == pytest.approx(1.2 - 0.7, abs=2e-3)


def test_velocities_return_to_the_sensor_frame():
    """They turn as headings do, and do not move."""
    pose = pose_matrix((0.5, -0.2, 1.73, 0.0, 0.0, 0.7))
    speed, yaw = 5.0, 1.2
    box = np.array([[10, 4, 0.8, 4, 2, 1.5, yaw, speed * math.cos(yaw), speed * math.sin(yaw)]], np.float32)
    back = boxes_to_source(Boxes3D(box, np.ones(1, np.float32), np.zeros(1, np.int64), ("car",)), pose).boxes
    assert back[0, 6] == pytest.approx(0.5, abs=1e-6)
    assert back[0, 7:].tolist() == pytest.approx([speed * math.cos(0.5), speed * math.sin(0.5)], abs=1e-5)
