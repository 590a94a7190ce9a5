"""The detector as its users call it: what it refuses, what it survives, and what it must not depend on."""

import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_pointcloud2 import FLOAT32, Packer
from tiny import tiny_points, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.errors import ConfigError, ModelError, PointCloudError
from dsvt_ros.io.pointcloud2 import CloudField, raw_from_msg
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the demo model, biased so that boxes come out."""
    torch.manual_seed(0)
    network = DSVT(open_model("demo").model)
    with torch.no_grad():
        network.dense_head.heads_list[0].hm[1].bias.fill_(0.3)
    path = tmp_path_factory.mktemp("demo") / "random.safetensors"
    save_file({k: v for k, v in network.state_dict().items() if v.is_floating_point()}, path)
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return Detector.load("demo", weights, device="cpu")


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    return rng.uniform([-50, -50, -0.2, 0], [50, 50, 2, 1], (4000, 4)).astype(np.float32)


def test_boxes_have_the_documented_form(detector, points):
    found = detector.detect(points)
    assert len(found) > 0
    assert found.boxes.shape == (len(found), 7)
    assert found.boxes.dtype == np.float32
    assert found.class_names == ("car", "pedestrian", "cyclist")
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    for label in np.unique(found.labels):
        scores = found.scores[found.labels == label]
        assert (np.diff(scores) <= 0).all()
    assert (np.diff(found.labels) >= 0).all()
    assert set(detector.timing_ms) == {
        "preprocess", "voxelize", "encode", "partition", "sparse", "scatter", "dense", "decode", "nms",
    }  # fmt: skip


def test_times_are_those_of_the_last_cloud(detector, points):
    detector.detect(points)
    assert "dense" in detector.timing_ms
    detector.detect(points[:0])
    assert set(detector.timing_ms) == {"preprocess", "voxelize"}


def test_same_cloud_same_bytes(detector, points):
    first, second = detector.detect(points), detector.detect(points)
    assert first.boxes.tobytes() == second.boxes.tobytes()
    assert first.scores.tobytes() == second.scores.tobytes()


def test_one_cloud_after_the_other(detector, points):
    for found, cloud in zip(detector.detect_all([points, points[:2000]]), [points, points[:2000]], strict=True):
        assert found.boxes.tobytes() == detector.detect(cloud).boxes.tobytes()


@pytest.mark.parametrize(
    "cloud",
    [
        np.zeros((0, 4), np.float32),
        np.zeros((100, 4), np.float32),
        np.full((100, 4), np.nan, np.float32),
        np.full((100, 4), np.inf, np.float32),
        np.full((100, 4), 500, np.float32),
    ],
    ids=["empty", "missing returns", "nan", "inf", "outside"],
)
def test_nothing_to_see_is_no_boxes(detector, cloud):
    assert len(detector.detect(cloud)) == 0


def test_one_point(detector):
    detector.detect(np.array([[5, 5, 0.5, 0.5]], np.float32))


def test_two_million_points(detector):
    rng = np.random.default_rng(1)
    detector.detect(rng.uniform(-60, 60, (2_000_000, 4)).astype(np.float32))


def test_accepts_tensors_lists_and_doubles(detector, points):
    expected = detector.detect(points)
    for same in (torch.as_tensor(points), points.astype(np.float64), points.tolist(), np.asfortranarray(points)):
        np.testing.assert_array_equal(detector.detect(same).boxes, expected.boxes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "given",
    [
        lambda points: points[::-1],
        lambda points: np.frombuffer(points.tobytes(), np.float32).reshape(points.shape),
        lambda points: points.astype(">f4"),
        lambda points: np.repeat(points, 2, axis=1)[:, ::2],
    ],
    ids=["backwards", "read-only", "big-endian", "every other column"],
)
def test_points_of_any_array(detector, points, given):
    expected, found = detector.detect(points), detector.detect(given(points))
    assert np.allclose(found.boxes, expected.boxes, atol=1e-5)


def test_points_that_are_no_numbers(detector):
    with pytest.raises(PointCloudError, match="points must be an array of numbers: could not convert"):
        detector.detect([["a", "b", "c", "d"]])


def test_received_clouds(detector, points):
    fields = [CloudField(name, 4 * i + 1, FLOAT32) for i, name in enumerate("zyxi")]
    cloud = Packer(fields, 19).cloud([points[:, [2, 1, 0, 3]].astype(float).tolist()])
    found = detector.detect(raw_from_msg(cloud, ("x", "y", "z", "intensity")))
    np.testing.assert_array_equal(found.boxes, detector.detect(points).boxes)
    with pytest.raises(PointCloudError, match=r"takes 4 columns .* got an array of shape \(4000, 3\)"):
        detector.detect(raw_from_msg(cloud, "xyz"))


@pytest.mark.parametrize("shape", [(10, 3), (10, 5), (40,), (2, 5, 4)])
def test_wrong_columns_are_named(detector, shape):
    with pytest.raises(PointCloudError, match=r"takes 4 columns \(x, y, z, intensity\)"):
        detector.detect(np.ones(shape, np.float32))


def test_input_is_left_alone(detector, points):
    before = points.copy()
    detector.detect(points)
    np.testing.assert_array_equal(points, before)


def test_pose_moves_boxes_back(weights, points):
    """The same scene seen by a sensor that is turned and raised gives the same boxes in that sensor's frame."""
    pose = [1.5, -0.7, 1.2, 0, 0, 0.6]
    plain = Detector.load("demo", weights, device="cpu", overrides={"preprocess.find_ground": False})
    posed = Detector.load("demo", weights, device="cpu", overrides={"preprocess.sensor_pose": pose})
    cos, sin = math.cos(0.6), math.sin(0.6)
    seen = points.astype(np.float64)
    seen[:, :3] -= pose[:3]
    seen[:, :2] = seen[:, :2] @ np.array([[cos, -sin], [sin, cos]])
    expected, found = plain.detect(points), posed.detect(seen)
    assert abs(len(found) - len(expected)) <= 0.02 * len(expected)  # rounding moves points across cells
    yaw = np.array([0.6])
    center = found.boxes[:, :2] @ np.array([[cos, sin], [-sin, cos]]) + pose[:2]
    distance = np.linalg.norm(center[:, None] - expected.boxes[None, :, :2], axis=-1)
    nearest = distance.argmin(1)
    close = distance.min(1) < 1e-2
    assert close.mean() > 0.9
    turn = found.boxes[close, 6] + yaw - expected.boxes[nearest[close], 6]
    assert np.median(np.abs(np.sin(turn))) < 1e-2
    np.testing.assert_allclose(
        np.median(found.boxes[close, 2] + pose[2] - expected.boxes[nearest[close], 2]), 0, atol=1e-3
    )


def turned(boxes, quarter):
    """Boxes in axes turned by so many quarter turns: x, y, heading and velocity."""
    angle = quarter * math.pi / 2
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = boxes.astype(np.float64)
    moved[:, :2] = moved[:, :2] @ rotation.T
    moved[:, 7:9] = moved[:, 7:9] @ rotation.T
    moved[:, 6] += angle
    return moved


@pytest.mark.parametrize("model_axes", ["x_forward", "x_right"])
@pytest.mark.parametrize("cloud_axes", ["model", "x_forward", "x_right"])
def test_axes_of_clouds_and_of_the_model(tmp_path, model_axes, cloud_axes):
    """The same street in clouds of any axes gives the same boxes, each in the axes of its cloud."""
    folder = write_tiny_model(tmp_path / "model", name="tiny_voxel")
    description = yaml.safe_load((folder / "model.yaml").read_text())
    description["model"]["axes"] = model_axes
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    plain = Detector.load(folder, backend="torch", device="cpu")
    expected = plain.detect(tiny_points(900))  # in the model's axes

    overrides = {"preprocess.cloud_axes": cloud_axes}
    detector = Detector.load(folder, backend="torch", device="cpu", overrides=overrides)
    # From x_forward to x_right everything turns left by a quarter: forward becomes y.
    quarter = {"x_forward": 0, "x_right": 1, "model": {"x_forward": 0, "x_right": 1}[model_axes]}[cloud_axes]
    quarter -= {"x_forward": 0, "x_right": 1}[model_axes]
    seen = tiny_points(900)
    seen[:, :2] = turned(np.pad(seen[:, :2], ((0, 0), (0, 7))), quarter)[:, :2]
    for found in (detector.detect(seen), detector.detect(seen, detector.pose_in_model(np.eye(4)))):
        same = turned(expected.boxes, quarter)
        distance = np.linalg.norm(found.boxes[:, None, :3] - same[None, :, :3], axis=-1)
        nearest = distance.argmin(1)
        close = distance.min(1) < 1e-3  # rounding moves points across cells
        assert close.mean() > 0.9
        np.testing.assert_allclose(found.boxes[close][:, 7:], same[nearest[close]][:, 7:], rtol=0, atol=1e-2)
        heading = found.boxes[close, 6] - same[nearest[close], 6]
        assert np.median(np.abs(np.sin(heading))) < 1e-3
        assert np.median(np.cos(heading)) > 0.99


def test_ground_is_found_wherever_the_sensor_is(detector):
    rng = np.random.default_rng(2)
    radius, angle = rng.uniform(2, 40, 20000), rng.uniform(-np.pi, np.pi, 20000)
    ground = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.zeros(20000), np.zeros(20000)], 1)
    things = rng.uniform([-20, -20, 0, 0], [20, 20, 2, 1], (2000, 4))
    cloud = np.concatenate([ground, things]).astype(np.float32)
    low = cloud - np.float32([0, 0, 1.73, 0])
    on_ground, below = detector.detect(cloud), detector.detect(low)
    assert len(on_ground) == len(below)
    np.testing.assert_allclose(on_ground.boxes[:, 2] - 1.73, below.boxes[:, 2], atol=0.02)


def test_live_options_change_between_clouds(weights, points):
    detector = Detector.load("demo", weights, device="cpu")
    before = len(detector.detect(points))
    detector.configure({"postprocess.score_threshold": 0.9})
    assert len(detector.detect(points)) < before
    with pytest.raises(ConfigError, match="cannot change while"):
        detector.configure({"postprocess.max_candidates": 10})
    with pytest.raises(ConfigError, match="did you mean"):
        detector.configure({"postprocess.score": 0.1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "dmo"}, ModelError, "no model dmo: expected one of demo"),
        ({"model": "waymo_pillar", "weights": None}, ModelError, "comes without weights"),
        ({"backend": "tensorflow"}, ConfigError, "backend must be one of"),
        ({"device": "gpu"}, ConfigError, "device must be"),
        ({"overrides": {"postprocess.nms_iou": [0.1, 0.2]}}, ConfigError, "one for each of car, pedestrian, cyclist"),
        ({"weights": "/nowhere/w.pth"}, ModelError, "no weights file"),
    ],
)
def test_wrong_arguments(weights, arguments, error, message):
    with pytest.raises(error, match=message):
        Detector.load(**({"weights": weights, "device": "cpu"} | arguments))


def test_weights_of_another_model(waymo_checkpoint):
    with pytest.raises(ModelError, match=r"missing|misshapen"):
        Detector.load("demo", waymo_checkpoint, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(weights):
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        Detector.load("demo", weights, device="cuda")
