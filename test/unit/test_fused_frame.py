"""Whole frames in kernels against the detector that runs torch, and the detector that runs them."""

import dataclasses
import functools
import logging

import numpy as np
import pytest
import torch
from fused_fixtures import ALL_KERNELS, DEVICE, interpreted, needs_triton
from small_frames import (
    assert_alike,
    assert_drops_the_farthest,
    assert_same_frame,
    assert_sees_nothing,
    boxes_of,
    network_with_spread_scores,
    options_of,
    points_in,
    stage_by_stage,
)
from test_pointcloud2 import FLOAT32, Packer
from tiny import TINY_CONFIGS, tiny_config

from dsvt_ros import Detector
from dsvt_ros.backends.triton import TritonNetworks
from dsvt_ros.config import Backbone2dConfig, Backbone3dConfig, CenterHeadConfig, DetectorConfig, StageConfig
from dsvt_ros.errors import ConfigError, PointCloudError
from dsvt_ros.fused import frame, ground
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.frame import FusedFrames
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.ground import ground_height
from dsvt_ros.io.pointcloud2 import CloudField, raw_from_msg
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import boxes_to_source

_interpreter = interpreted(*ALL_KERNELS)
pytestmark = needs_triton

OPTIONS = {"postprocess.max_candidates": 14, "engine.profile.voxels": [90]}
STAGES = ["voxelize", "encode", "partition", "sparse", "dense", "decode", "nms", "pack"]


def micro_config():
    """Of which a frame takes least."""
    return dataclasses.replace(
        tiny_config(),
        name="micro",
        backbone_3d=Backbone3dConfig(
            channels=16, ffn_channels=16, num_heads=1,
            stages=(StageConfig(1, 32, windows=((8, 12, 1), (16, 12, 1)), offsets=((0, 0, 0), (4, 6, 0))),),
        ),
        backbone_2d=Backbone2dConfig(
            blocks=(1,), strides=(2,), channels=(16,), upsample_strides=(1,), upsample_channels=(16,)
        ),
        head=CenterHeadConfig(shared_channels=16, branches=("center", "center_z", "dim", "rot", "hm")),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _few_points(monkeypatch):
    """Interpreted kernels take their time."""
    monkeypatch.setattr(frame, "MIN_POINTS", 64)
    monkeypatch.setattr(ground, "CELL_ROWS", 1024)


@functools.cache
def network_of(name="micro"):
    """A network over 16 by 12 columns."""
    model = (TINY_CONFIGS | {"micro": micro_config})[name]()
    model = dataclasses.replace(model, point_cloud_range=(-2.56, -1.92, -2.0, 2.56, 1.92, 4.0))
    network = network_with_spread_scores(model)
    if name == "micro":
        for group in network.dense_head.heads_list:
            group.hm[1].bias.fill_(-6)
    return network


@functools.cache
def triton_networks(name="micro"):
    return TritonNetworks(network_of(name))


def config_of(**changes):
    return options_of(**OPTIONS | changes)


def frames_of(name="micro", **changes):
    return FusedFrames(triton_networks(name), network_of(name).config, config_of(**changes))


def torch_detector(name="micro", room=None, **changes):
    return stage_by_stage(network_of(name), config_of(**changes), room)


def points_of(count, seed=0):
    return points_in(network_of().config, count, seed)


def assert_same_bytes(found, expected):
    assert found.boxes.tobytes() == expected.boxes.tobytes()
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert found.labels.tolist() == expected.labels.tolist()


# ---------------------------------------------------------------------------------------------------- frames and torch


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_same_as_torch(name):
    assert_same_frame(frames_of(name), network_of(name), config_of(), 40, 24)


def test_more_voxels_than_room():
    """The farthest are dropped, as where an exported network is full."""
    frames = frames_of(**{"engine.profile.voxels": [10, 40]})
    assert_drops_the_farthest(frames, torch_detector(room=40), points_of(120), 40)


def test_preprocessing():
    """Scaled columns, near returns, and rows and columns that are no numbers."""
    changes = {"preprocess.scale_features": True, "preprocess.intensity_scale": 0.5, "preprocess.min_range": 1.0}
    points = points_of(60)
    points[::7, 3] = np.nan
    points[::9] = np.nan
    points[5, 2], points[50, 1] = np.inf, -np.inf
    reference = torch_detector(**changes)
    (found,), result = boxes_of(frames_of(**changes), [points])
    assert_alike(found, reference.detect(points, np.eye(4)))
    assert result.num_points == reference.num_points < 50


# ---------------------------------------------------------------------------------------------------- what is no object


@pytest.mark.parametrize("name", ["micro", "tiny_proposals"])
def test_nothing_to_see(name):
    """The dense network would see objects in its own biases."""
    points = points_of(60)
    points[:30, 0] += 9
    points[30:, 1] = np.nan
    frames = frames_of(name, **{"postprocess.score_threshold": 0.0})
    for cloud in (points[:0], points) if name == "micro" else (points,):
        assert_sees_nothing(frames, cloud)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_cloud_beside_another(empty):
    clouds = [points_of(40), points_of(40)]
    clouds[empty] = clouds[empty][:0]
    found, result = boxes_of(frames_of(), clouds)
    assert len(found[empty]) == 0
    assert_alike(found[1 - empty], torch_detector().detect(points_of(40), np.eye(4)))
    assert result.num_points == 40


# ------------------------------------------------------------------------------------------------- one frame and others


def test_two_clouds_equal_each_alone():
    clouds = [points_of(30, seed) for seed in range(2)]
    frames = frames_of()
    found, result = boxes_of(frames, clouds)
    alone = [boxes_of(frames, [cloud]) for cloud in clouds]
    for ours, ((theirs,), _) in zip(found, alone, strict=True):
        assert_alike(ours, theirs)
    assert result.num_voxels == sum(one.num_voxels for _, one in alone)


def test_repeated_runs_give_the_same_bytes():
    """Whatever came in between, whatever holds the points, and whatever room there is for them."""
    frames, points = frames_of(), points_of(50)
    ((first,), result) = boxes_of(frames, [points])
    assert len(first) > 3
    boxes_of(frames, [points_of(100, seed=1)])
    doubles = torch.as_tensor(points.astype(np.float64))
    for same in (points, doubles, torch.as_tensor(points, device=DEVICE))[0 if DEVICE.type == "cuda" else 1 :]:
        (found,), other = boxes_of(frames, [same])
        assert_same_bytes(found, first)
        assert other.num_voxels == result.num_voxels
    assert list(frames._frames) == [(64, 1), (128, 1)]


def test_every_size_of_frame_gives_the_same_boxes(monkeypatch):
    points, frames = points_of(50), frames_of()
    (first,), _ = boxes_of(frames, [points])
    monkeypatch.setattr(frame, "MIN_POINTS", 1024)
    (found,), _ = boxes_of(frames, [points])
    assert_same_bytes(found, first)
    assert list(frames._frames) == [(64, 1), (1024, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_clouds_on_host_and_device_in_one_frame():
    clouds = [points_of(30, seed) for seed in range(3)]
    frames = frames_of()
    expected = frames(clouds, [np.eye(4)] * 3).rows.tobytes()
    for there in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
        given = [torch.as_tensor(cloud, device=DEVICE) if i in there else cloud for i, cloud in enumerate(clouds)]
        assert frames(given, [np.eye(4)] * 3).rows.tobytes() == expected


def test_frames_that_overlap():
    """Of one size and of others, ended in any order, and again."""
    frames = frames_of()
    clouds = [points_of(count, seed) for seed, count in enumerate((30, 90, 20))]
    expected = [frames([cloud], [np.eye(4)]).rows.tobytes() for cloud in clouds]
    ends = [frames.begin([cloud], [np.eye(4)]) for cloud in clouds]
    for number in (2, 0, 1, 0):
        assert ends[number]().rows.tobytes() == expected[number]


def test_uploads_pass_frames_that_are_under_way(monkeypatch):
    """And only these: where the device does nothing, a cloud is there sooner on the frame's own way."""
    upload, seen = frame.FrameInputs.upload, []

    def noted(self, *arguments, overlaps):
        seen.append(overlaps)
        upload(self, *arguments, overlaps=overlaps)

    monkeypatch.setattr(frame.FrameInputs, "upload", noted)
    frames = frames_of()
    seen.clear()  # a GPU has run a frame already
    begin = functools.partial(frames.begin, [points_of(20)], [np.eye(4)])
    first, second = begin(), begin()
    second()  # ends the first one too
    assert not frames._under_way
    begin()()
    third, _ = begin(), begin()
    third()
    begin()
    assert seen == [False, True, False, False, True, True]
    assert first().rows.tobytes() == third().rows.tobytes()


@pytest.mark.parametrize(
    ("voxels", "points", "clouds", "room"),
    [((), 10**6, 1, 36), ((), 10**6, 3, 108), ((), 20, 3, 20), ((7, 50), 10**6, 2, 100), ((7, 50), 64, 2, 64)],
)
def test_room_for_voxels(voxels, points, clouds, room):
    frames = frames_of(**{"engine.profile.voxels": list(voxels)})
    assert frames.room_for_voxels(points, clouds) == room


# --------------------------------------------------------------------------------------------------------- the detector


def triton_detector(**changes):
    return Detector(network_of(), config_of(**changes), DEVICE, triton_networks())


def test_stages_of_other_backends_are_not_made(monkeypatch):
    monkeypatch.setattr("dsvt_ros.detector.folded_copy", lambda _: pytest.fail("another copy of the encoder"))
    triton_detector()
    with pytest.raises(pytest.fail.Exception, match="another copy"):
        torch_detector()


def test_detector(caplog):
    """Counts, and a single warning until a cloud fits again."""
    detector, reference = triton_detector(**{"engine.profile.voxels": [40]}), torch_detector()
    many, few = points_of(60), points_of(30)
    reference.detect(many)
    counts = (60, reference.num_voxels, reference.num_voxels - 40)
    with caplog.at_level(logging.WARNING):
        for points in (many, many.tolist()):
            detector.detect(points)
            assert (detector.num_points, detector.num_voxels, detector.num_dropped_voxels) == counts
    (message,) = caplog.messages
    assert message.startswith(f"{reference.num_voxels} voxels, room for 40: the farthest are dropped")
    assert_alike(detector.detect(few), reference.detect(few))
    assert (detector.num_points, detector.num_dropped_voxels) == (30, 0)
    with caplog.at_level(logging.WARNING):
        detector.detect(many)
    assert len(caplog.messages) == 2


def test_one_cloud_after_the_other():
    """Boxes, counts and poses are those of the cloud whose answer came last; the first cloud waits for the second."""
    detector = triton_detector(**{"preprocess.find_ground": True})
    clouds = [points_of(50, seed) + np.float32([0, 0, seed / 8, 0]) for seed in range(2)]
    expected = [(detector.detect(cloud), detector.num_voxels, detector.T_model_source) for cloud in clouds]
    taken = []
    answers = detector.detect_all(taken.append(number) or cloud for number, cloud in enumerate(clouds))
    for boxes, num_voxels, pose in expected:
        assert_same_bytes(next(answers), boxes)
        assert detector.num_voxels == num_voxels
        assert (detector.T_model_source == pose).all()
        assert taken == [0, 1]
    assert next(answers, None) is None
    assert list(detector.detect_all([])) == []


def test_clouds_before_one_that_is_refused_are_answered():
    detector, points = triton_detector(), points_of(50)
    expected = detector.detect(points)
    answers = detector.detect_all([points, points[:, :3], points])
    assert_same_bytes(next(answers), expected)
    with pytest.raises(PointCloudError, match="takes 4 columns"):
        next(answers)
    assert next(answers, None) is None


def test_warm_up_reads_received_clouds(monkeypatch):
    """Or the kernel that does would be compiled while the first one waits."""
    monkeypatch.setattr("dsvt_ros.detector.WARM_UP_POINTS", {DEVICE.type: (2,)})
    read = []
    monkeypatch.setattr(CloudDecoder, "__call__", lambda _, clouds, *_others, **_options: read.append(clouds))
    triton_detector().warm_up()
    (((cloud, first_row),),) = read
    assert (cloud.shape, first_row) == ((2, 4), 0)


def test_options_change_between_clouds():
    detector, points = triton_detector(), points_of(50)
    before = detector.detect(points)
    threshold = float(np.median(before.scores))
    detector.configure({"postprocess.score_threshold": threshold})
    assert not detector._frames._frames, "graphs hold the options that they were captured with"
    after = detector.detect(points)
    higher = before.scores > threshold
    assert 0 < len(after) < len(before)
    assert (after.boxes == before.boxes[higher]).all()
    assert (after.scores == before.scores[higher]).all()
    with pytest.raises(ConfigError, match="cannot change while"):
        detector.configure({"postprocess.max_candidates": 10})


def test_options_that_stages_do_not_take():
    """Those before stay, with all that was captured."""
    frames, points = frames_of(), points_of(50)
    expected = frames([points], [np.eye(4)]).rows.tobytes()
    made = dict(frames._frames)
    end = frames.begin([points], [np.eye(4)])
    with pytest.raises(ConfigError, match="at most 1024 candidates"):
        frames.configure(config_of(**{"postprocess.max_candidates": 2000}))
    assert frames._frames == made
    assert end().rows.tobytes() == frames([points], [np.eye(4)]).rows.tobytes() == expected


def test_the_ground_is_found():
    points = points_of(60)
    points[:, 2] = np.where(np.arange(60) % 3, -1.2, points[:, 2])
    expected = torch_detector(**{"preprocess.find_ground": True}).detect(points)
    assert_alike(triton_detector(**{"preprocess.find_ground": True}).detect(points), expected)
    unmoved = torch_detector().detect(points)
    assert len(unmoved) != len(expected) or np.abs(unmoved.boxes - expected.boxes).max() > 0.1


def test_the_ground_is_found_for_some_clouds():
    """Of two equal clouds, one with a pose that turns it."""
    points = points_of(60)
    points[:, 2] = np.where(np.arange(60) % 3, -1.2, points[:, 2])
    turn = pose_matrix([0.0, 0, 7, 0, 0, np.pi])
    frames = frames_of(**{"preprocess.find_ground": True})
    result = frames([points, points], [np.eye(4), turn], seeks_ground=[False, True])
    height = torch_detector().model.ground_z - ground_height(torch.as_tensor(points)).item()
    assert (result.poses[0] == np.eye(4)).all()
    assert result.poses[1][2, 3] == pytest.approx(height, abs=1e-6)
    assert (turn[:3, 3] == [0, 0, 7]).all(), "the caller's pose stays as it is"
    expected = torch_detector().detect(points, result.poses[1])
    boxes = boxes_from_rows(result.rows[1], frames.model, DetectorConfig().postprocess)
    assert_alike(boxes_to_source(boxes, result.poses[1]), expected)


def test_the_ground_is_found_only_where_the_options_say_so():
    for changes in ({}, {"preprocess.find_ground": True, "preprocess.sensor_pose": [0, 0, 1, 0, 0, 0]}):
        with pytest.raises(ConfigError, match="the ground is found with"):
            frames_of(**changes)([points_of(3)], [np.eye(4)], seeks_ground=[True])


def test_detector_of_received_clouds():
    detector, points = triton_detector(), points_of(50)
    names = network_of().config.feature_names
    fields = [CloudField(name, 4 * i + 5, FLOAT32) for i, name in enumerate(names)]
    message = Packer(fields, 22, row_padding=3).cloud(points.astype(float).reshape(2, -1, 4).tolist())
    found = detector.detect(raw_from_msg(message, names))
    assert len(found) > 3
    assert_same_bytes(found, detector.detect(points))


def test_times_of_stages():
    """Those of the last cloud, while they are asked for, and on a GPU; boxes are the same."""
    detector, points = triton_detector(), points_of(50)
    with detector.timed_stages():
        first = detector.detect(points)
        assert list(detector.timing_ms) == (STAGES if DEVICE.type == "cuda" else [])
    assert_alike(first, torch_detector().detect(points))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_frames_with_and_without_times():
    detector, clouds = triton_detector(), [points_of(50, seed) for seed in range(2)]
    expected = [detector.detect(cloud) for cloud in clouds]
    for _ in range(2):
        with detector.timed_stages():
            assert_same_bytes(detector.detect(clouds[0]), expected[0])
        assert_same_bytes(detector.detect(clouds[1]), expected[1])
        assert detector.timing_ms == {}
