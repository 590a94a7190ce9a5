"""Whole frames in plain torch against the detector that runs stage by stage, and the choice between them."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import TINY_CONFIGS, randomize, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.backends.choice import open_networks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.torch_frames import TorchFrameNetworks
from dsvt_ros.comparison import BoxDifference, FoundBoxes
from dsvt_ros.config import DetectorConfig, EngineConfig, with_overrides
from dsvt_ros.errors import EngineError
from dsvt_ros.fused import frame
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import boxes_to_source

THRESHOLD = 0.3
MARGIN = 0.01
OPTIONS = {
    "postprocess.score_threshold": THRESHOLD,
    "postprocess.max_candidates": 40,
    "engine.profile.voxels": [150],
    "preprocess.find_ground": False,
}
CONFIGS = pytest.mark.parametrize("name", list(TINY_CONFIGS))


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch):
    monkeypatch.setattr(frame, "MIN_POINTS", 64)


@functools.cache
def network_of(name):
    """A network whose scores lie far apart."""
    torch.manual_seed(0)
    network = randomize(DSVT(TINY_CONFIGS[name]()))
    head = network.dense_head
    with torch.no_grad():
        for output in [head.heatmap_head[1]] if name == "tiny_proposals" else [g.hm[1] for g in head.heads_list]:
            output.weight.mul_(40)
    return network.to(DEVICE)


@functools.cache
def networks_of(name):
    return TorchFrameNetworks(network_of(name))


def config_of(**changes):
    return with_overrides(DetectorConfig(), OPTIONS | changes)


def frames_of(name, **changes):
    return frame.FusedFrames(networks_of(name), network_of(name).config, config_of(**changes))


def stage_by_stage(name, room=None, **changes):
    networks = TorchNetworks(network_of(name))
    networks.max_voxels = room
    return Detector(network_of(name), config_of(**changes), DEVICE, networks)


def points_of(name, count, seed=0):
    low, high = np.array(network_of(name).config.point_cloud_range).reshape(2, 3)
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(low, high, (count, 3)), rng.uniform(0, 1, count)]).astype(np.float32)


def boxes_of(frames, clouds, poses=None):
    """Boxes of each cloud in its own frame, and the result."""
    poses = [np.eye(4)] * len(clouds) if poses is None else poses
    result = frames(clouds, poses)
    found = [boxes_from_rows(rows, frames.model, DetectorConfig().postprocess) for rows in result.rows]
    return [boxes_to_source(boxes, pose) for boxes, pose in zip(found, poses, strict=True)], result


def assert_alike(found, expected):
    """All boxes but those at the threshold or the last candidates, in both directions."""
    difference = BoxDifference()
    difference.add(as_found(found), as_found(expected), 0.02, MARGIN)
    assert difference.expected > 2, "there is something to compare"
    assert difference.matched == 1
    assert difference.size_m.largest < 0.02
    assert difference.yaw_rad.largest < 0.02


def as_found(boxes):
    scores = torch.as_tensor(boxes.scores)
    settled = scores > max(THRESHOLD, boxes.scores.min(initial=1)) + MARGIN
    return FoundBoxes(torch.as_tensor(boxes.boxes), scores, torch.as_tensor(boxes.labels), settled)


@CONFIGS
def test_same_as_stage_by_stage(name):
    """Two clouds, of sensors that stand and look elsewhere; boxes come back into their frames.

    With these, no two cells are so alike that rounding decides which one becomes the last proposal.
    """
    clouds = [points_of(name, 60), points_of(name, 44, seed=2)]
    poses = [np.eye(4), pose_matrix([0.4, -0.2, 0.3, 0.02, -0.01, 0.7])]
    reference = stage_by_stage(name)
    found, result = boxes_of(frames_of(name), clouds, poses)
    num_points = num_voxels = 0
    for cloud, pose, ours in zip(clouds, poses, found, strict=True):
        assert_alike(ours, reference.detect(cloud, pose))
        num_points += reference.num_points
        num_voxels += reference.num_voxels
    assert (result.num_points, result.num_voxels, result.num_dropped_voxels) == (num_points, num_voxels, 0)


def test_more_voxels_than_room():
    points = points_of("tiny", 120)
    (found,), result = boxes_of(frames_of("tiny", **{"engine.profile.voxels": [40]}), [points])
    reference = stage_by_stage("tiny", room=40)
    assert_alike(found, reference.detect(points, np.eye(4)))
    assert result.num_voxels == reference.num_voxels
    assert result.num_dropped_voxels == reference.num_dropped_voxels == result.num_voxels - 40


@CONFIGS
def test_nothing_to_see(name):
    """The dense network would see objects in its own biases."""
    frames = frames_of(name, **{"postprocess.score_threshold": 0.0})
    for cloud in (points_of(name, 0), points_of(name, 60) + np.float32([99, 0, 0, 0])):
        (found,), result = boxes_of(frames, [cloud])
        assert len(found) == 0
        assert (result.num_points, result.num_voxels, result.num_dropped_voxels) == (0, 0, 0)


@CONFIGS
def test_repeated_runs_give_the_same_bytes(name):
    """Whatever came in between, and from the graph as from one stage after the other."""
    frames, points = frames_of(name), points_of(name, 50)
    first = frames([points], [np.eye(4)]).rows.tobytes()
    frames([points_of(name, 60, seed=1)], [np.eye(4)])
    frames([points_of(name, 100, seed=1)], [np.eye(4)])
    for timed in (False, True, False):
        assert frames([points], [np.eye(4)], timed=timed).rows.tobytes() == first
    assert list(frames._frames) == [(64, 1), (128, 1)]


def test_a_frame_that_fails_to_begin():
    """Those before it end at once: the next one may take memory on the host that they are read from."""
    frames, points = frames_of("tiny"), points_of("tiny", 50)
    expected = frames([points], [np.eye(4)]).rows.tobytes()
    before = frames.begin([points], [np.eye(4)])
    with pytest.raises(ValueError, match="broadcast"):
        frames.begin([points_of("tiny", 60, seed=1)], [np.eye(3)])
    assert not frames._under_way
    assert frames([points], [np.eye(4)]).rows.tobytes() == expected
    assert before().rows.tobytes() == expected


def test_detector():
    detector = Detector(network_of("tiny"), config_of(), DEVICE, networks_of("tiny"))
    assert (detector.backend, detector.precision) == ("torch", "fp16")
    points = points_of("tiny", 90)
    assert_alike(detector.detect(points), stage_by_stage("tiny").detect(points))
    before = detector.detect(points)
    threshold = float(np.median(before.scores))
    detector.configure({"postprocess.score_threshold": threshold})
    after = detector.detect(points)
    assert after.scores.tolist() == before.scores[before.scores > threshold].tolist()


# --------------------------------------------------------------------------------------------------------- the choice


def opened(folder, device, **options):
    network = network_of("tiny")
    source = open_model(folder)
    config = dataclasses.replace(EngineConfig(), **options)
    return open_networks("torch", network, source, source.weights, torch.device(device), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "fp16", TorchFrameNetworks), ("cuda", "fp32", TorchNetworks), ("cpu", "fp16", TorchNetworks)],
)
def test_precision(folder, device, precision, expected):
    networks, reason = opened(folder, device, precision=precision)
    assert type(networks) is expected
    assert networks.precision == ("fp16" if expected is TorchFrameNetworks else "fp32")
    assert reason == "asked for"


def test_weights_beyond_float16(folder, monkeypatch):
    def fail(_model):
        raise EngineError("weights of up to 1e+05 are beyond the range of float16 (65504)")

    monkeypatch.setattr("dsvt_ros.backends.torch_frames.TorchFrameNetworks", fail)
    networks, reason = opened(folder, "cuda")
    assert networks.precision == "fp32"
    assert reason == "asked for; in single precision: weights of up to 1e+05 are beyond the range of float16 (65504)"


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_frames_that_fail(folder, monkeypatch, caplog, backend):
    """Every kind of frame: torch goes on without them."""

    def fail(*_args):
        raise EngineError("a frame fails here")

    def choose(*_args, **_options):
        failed = _options.get("failed", {})
        return (TorchNetworks(network_of("tiny")), "the end") if failed else (networks_of("tiny"), "")

    monkeypatch.setattr("dsvt_ros.detector.FusedFrames", fail)
    monkeypatch.setattr("dsvt_ros.detector.open_networks", choose)
    detector = Detector.load(folder, backend=backend, device="cpu")
    assert (detector.precision, detector.backend_reason) == ("fp32", "the end")
    assert "a frame fails here" in caplog.text
