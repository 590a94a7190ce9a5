"""From the frame of a data set to that of a model."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsvt_ros.config import DetectorConfig, PointFeature, with_overrides
from dsvt_ros.io.clouds import Scan
from dsvt_ros.io.labelled_sweeps import PosedScan
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools.sweep_detection import T_model_sensor, detect, low_scores, num_sweeps, suit_intensity

DEMO = open_model("demo").model
TILT = 0.1
# A sensor with nuScenes's axes, 1.84 m above the ground, that looks down to the front.
FORWARD, RIGHT, UP = (0, np.cos(TILT), np.sin(TILT)), (1, 0, 0), (0, -np.sin(TILT), np.cos(TILT))
T_LEVEL_NUSCENES = np.eye(4)
T_LEVEL_NUSCENES[:3, :3] = np.stack([FORWARD, np.negative(RIGHT), UP])
T_LEVEL_NUSCENES[2, 3] = 1.84
T_LEVEL_EGO = np.eye(4)
T_LEVEL_EGO[2, 3] = 0.33


def moved(pose, vector):
    return pose[:3, :3] @ vector


def model(**changes):
    return dataclasses.replace(DEMO, **changes)


def test_models_of_the_same_axes_see_clouds_as_they_are():
    pose = T_model_sensor(model(axes="x_right", ground_z=-1.84), "x_right", T_LEVEL_NUSCENES)
    np.testing.assert_allclose(pose, np.eye(4), atol=1e-12)
    pose = T_model_sensor(model(ground_z=0.5), "x_forward", T_LEVEL_EGO)
    np.testing.assert_allclose(pose[:3, 3], [0, 0, 0.83])
    np.testing.assert_array_equal(pose[:3, :3], np.eye(3))


def test_nuscenes_is_levelled_and_turned_for_other_models():
    pose = T_model_sensor(model(ground_z=-1.0), "x_right", T_LEVEL_NUSCENES)
    np.testing.assert_allclose(moved(pose, FORWARD), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(moved(pose, RIGHT), [0, -1, 0], atol=1e-12)
    np.testing.assert_allclose(pose[:3, 3], [0, 0, 0.84], atol=1e-12)


def test_argoverse_is_turned_for_models_of_nuscenes():
    pose = T_model_sensor(model(axes="x_right", ground_z=-1.84), "x_forward", T_LEVEL_EGO)
    np.testing.assert_allclose(moved(pose, (1, 0, 0)), [0, 1, 0], atol=1e-12)  # forward
    np.testing.assert_allclose(moved(pose, (0, 1, 0)), [-1, 0, 0], atol=1e-12)  # left
    assert np.linalg.det(pose) == pytest.approx(1)
    np.testing.assert_allclose(pose[:3, 3], [0, 0, -1.51], atol=1e-12)


class FakeDetector:
    """Keeps what it is given."""

    def __init__(self, model, **overrides):
        self.model = model
        self.config = with_overrides(DetectorConfig(), overrides)
        self.device = torch.device("cpu")

    def configure(self, overrides):
        self.config = with_overrides(self.config, overrides)

    def detect(self, points, pose):
        self.seen = SimpleNamespace(points=np.asarray(points), pose=pose, config=self.config)
        return "boxes"


def posed(x, stamp_s, sensor_x, intensity=100.0):
    """A point at `x` in the frame of a sensor at `sensor_x`."""
    points = np.array([[x, 0, 1, intensity, 3], [np.nan, 0, 0, 0, 0]], np.float32)
    pose = np.eye(4)
    pose[0, 3] = 1e6 + sensor_x
    return PosedScan(Scan("cloud", points, ("x", "y", "z", "intensity", "ring"), round(stamp_s * 1e9)), pose)


SCANS = [posed(10, 7.0, 5.0), posed(10.5, 6.9, 4.5), posed(11, 6.7, 4.0), posed(11.5, 6.4, 3.5)]
SEVERAL = model(features=(*DEMO.features, PointFeature("time")), sweeps=3)


def test_single_sweeps_for_models_without_time():
    detector = FakeDetector(DEMO)
    assert num_sweeps(detector) == 1
    assert detect(detector, SCANS, np.eye(4)) == "boxes"
    np.testing.assert_array_equal(detector.seen.points[0], [10, 0, 1, 100])
    assert len(detector.seen.points) == 2


@pytest.mark.parametrize(("wanted", "ages"), [(0, [0, 0.1, 0.3]), (2, [0, 0.1]), (9, [0, 0.1, 0.3])])
def test_several_sweeps_are_merged_where_the_first_one_is(wanted, ages):
    detector = FakeDetector(SEVERAL, **{"preprocess.sweeps": wanted})
    assert num_sweeps(detector) == (wanted or 3)
    detect(detector, SCANS, np.eye(4))
    # The fourth is older than preprocess.max_sweep_age.
    expected = [[10, 0, 1, 100, age] for age in ages]
    np.testing.assert_allclose(detector.seen.points, expected, atol=1e-6)


def test_too_few_sweeps_are_taken_as_they_are():
    detector = FakeDetector(SEVERAL)
    detect(detector, SCANS[:1], np.eye(4))
    np.testing.assert_allclose(detector.seen.points, [[10, 0, 1, 100, 0]])


def test_intensities():
    for axes, overrides, scale in (
        ("x_forward", {}, 1 / 255),
        ("x_right", {}, 1),
        ("x_forward", {"preprocess.intensity_scale": 0.5}, 0.5),
    ):
        detector = FakeDetector(model(axes=axes), **overrides)
        suit_intensity(detector, list(overrides))
        assert detector.config.preprocess.intensity_scale == pytest.approx(scale)


def test_low_scores_are_let_through_meanwhile():
    detector = FakeDetector(DEMO, **{"postprocess.score_threshold": 0.4})
    with low_scores(detector):
        assert detector.config.postprocess.score_threshold == 0.02
    assert detector.config.postprocess.score_threshold == 0.4
    lower = FakeDetector(DEMO, **{"postprocess.score_threshold": 0.0})
    with low_scores(lower):
        assert lower.config.postprocess.score_threshold == 0.0
