"""Whole frames in plain torch against the detector that runs stage by stage, and the choice between them."""

import contextlib
import dataclasses
import functools
import gc
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
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
from tiny import TINY_CONFIGS, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.backends.choice import open_networks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.torch_frames import TorchFrameNetworks
from dsvt_ros.config import EngineConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused import frame
from dsvt_ros.model.folder import open_model

OPTIONS = {"postprocess.max_candidates": 40, "engine.profile.voxels": [150]}
CONFIGS = pytest.mark.parametrize("name", list(TINY_CONFIGS))


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch):
    monkeypatch.setattr(frame, "MIN_POINTS", 64)


@functools.cache
def network_of(name):
    return network_with_spread_scores(TINY_CONFIGS[name]())


@functools.cache
def networks_of(name):
    return TorchFrameNetworks(network_of(name))


def config_of(**changes):
    return options_of(**OPTIONS | changes)


def frames_of(name, **changes):
    return frame.FusedFrames(networks_of(name), network_of(name).config, config_of(**changes))


def reference_of(name, room=None):
    return stage_by_stage(network_of(name), config_of(), room)


def points_of(name, count, seed=0):
    return points_in(network_of(name).config, count, seed)


@CONFIGS
def test_same_as_stage_by_stage(name):
    assert_same_frame(frames_of(name), network_of(name), config_of(), 60, 60)


def test_more_voxels_than_room():
    frames = frames_of("tiny", **{"engine.profile.voxels": [40]})
    assert_drops_the_farthest(frames, reference_of("tiny", room=40), points_of("tiny", 120), 40)


@CONFIGS
def test_nothing_to_see(name):
    """The dense network would see objects in its own biases."""
    frames = frames_of(name, **{"postprocess.score_threshold": 0.0})
    for cloud in (points_of(name, 0), points_of(name, 60) + np.float32([99, 0, 0, 0])):
        assert_sees_nothing(frames, cloud)


@CONFIGS
def test_a_single_voxel(name):
    """Is enough to see something, however little rounding leaves to be compared."""
    (found,), result = boxes_of(frames_of(name), [points_of(name, 1)])
    assert len(found) > 0
    assert (result.num_points, result.num_voxels) == (1, 1)


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


def test_frames_end_in_the_order_in_which_they_began(monkeypatch):
    """Each once, and before the next one takes the memory on the host that it is read from."""
    frames, result, ended = frames_of("tiny"), frame._Frame._result, []
    clouds = [points_of("tiny", count) for count in (20, 30, 40, 50, 60)]
    expected = [frames([cloud], [np.eye(4)]).rows.tobytes() for cloud in clouds]

    def noted(*arguments):
        found = result(*arguments)
        ended.append(found.num_points)
        return found

    monkeypatch.setattr(frame._Frame, "_result", noted)
    ends = [frames.begin([cloud], [np.eye(4)]) for cloud in clouds[:2]]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # both outputs are written
    assert ended == []
    assert ends[1]().rows.tobytes() == expected[1]
    assert ended == [20, 30]
    ends += [frames.begin([cloud], [np.eye(4)]) for cloud in clouds[2:4]]
    assert ended == [20, 30], "two may be under way"
    ends.append(frames.begin([clouds[4]], [np.eye(4)]))
    assert ended == [20, 30, 40]
    frames.configure(config_of())
    assert ended == [20, 30, 40, 50, 60]
    assert [end().rows.tobytes() for end in ends] == expected
    assert ended == [20, 30, 40, 50, 60]


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


def test_a_first_frame_that_fails(monkeypatch):
    """On a GPU one runs at once, so that whoever opened the networks can choose others."""

    def fail(*_args, **_options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(frame.FusedFrames, "begin", fail)
    monkeypatch.setattr(frame, "on_device", lambda _: contextlib.nullcontext())
    networks = mock.Mock(device=torch.device("cuda"), otherwise="use others")
    networks.name = "made-up"
    message = "a whole frame of backend made-up fails here; use others: no such instruction"
    with pytest.raises(EngineError, match=message):
        frame.FusedFrames(networks, network_of("tiny").config, config_of())


def test_memory_is_free_at_once():
    """That of frames goes before others are made, and that of results with them, without the garbage collector."""
    frames, points = frames_of("tiny"), points_of("tiny", 50)
    collects = gc.isenabled()
    gc.disable()
    try:
        end = frames.begin([points], [np.eye(4)])
        result, made = weakref.ref(end()), weakref.ref(frames._frames[64, 1])
        assert result() is not None
        del end
        assert result() is None
        frames.configure(config_of())
        assert made() is None
    finally:
        if collects:
            gc.enable()


def test_detector():
    detector = Detector(network_of("tiny"), config_of(), DEVICE, networks_of("tiny"))
    assert (detector.backend, detector.precision) == ("torch", "fp16")
    points = points_of("tiny", 90)
    assert_alike(detector.detect(points), reference_of("tiny").detect(points))
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
