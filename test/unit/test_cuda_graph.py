"""Frames as CUDA graphs: on a GPU with real ones, elsewhere with graphs that only remember what would run."""

import contextlib

import pytest
import torch

from dsvt_ros.cuda_graph import WARM_UPS, FrameGraph, run_stage

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def double(values):
    return values * 2


def add(values, other, *, minus):
    return values + other - minus


def two_stages(values, other):
    """A frame of two stages; computes 2 values + other - 1."""
    return lambda stage: stage("add", add, stage("double", double, values), other, minus=1)


def test_a_stage_that_just_runs():
    assert run_stage("any", add, 3, 4, minus=1) == 6


# -------------------------------------------------------------------------------------------------------- without a GPU


class FakeGraph:
    """Replaying it does nothing but tell."""

    def __init__(self, log):
        self.log = log

    def replay(self):
        self.log.append(self)


class FakeEvent:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.ms = float(len(self.clock))

    def synchronize(self):
        pass

    def elapsed_time(self, after):
        return after.ms - self.ms


@pytest.fixture
def fake_cuda(monkeypatch):
    """Gives the replayed graphs, and the pools and error modes of captures."""
    replayed, captures = [], []

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert stream == "the stream of device 1"
        captures.append((graph, pool, capture_error_mode))
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("dsvt_ros.cuda_graph._capture_stream", "the stream of device {}".format)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(replayed))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr("dsvt_ros.cuda_graph.timing_event", lambda: FakeEvent(replayed))
    return replayed, captures


def test_what_is_captured(fake_cuda):
    replayed, captures = fake_cuda
    runs = []

    def frame(stage):
        runs.append(stage)
        return stage("double", double, torch.ones(3))

    graph = FrameGraph(frame, "pool")
    assert runs == [run_stage] * (WARM_UPS + 1), "compiled before it is captured"
    assert graph.output.tolist() == [2, 2, 2]
    ((captured, pool, mode),) = captures
    assert (pool, mode) == ("pool", "thread_local")
    graph.replay()
    graph.replay()
    assert replayed == [captured] * 2
    assert len(runs) == WARM_UPS + 1


def test_what_is_timed(fake_cuda):
    """Each stage as a graph of its own, captured once, with the pool of the whole."""
    replayed, captures = fake_cuda
    graph = FrameGraph(two_stages(torch.ones(3), torch.ones(3)), "pool")
    for _ in range(2):
        replayed.clear()
        assert graph.replay_stages() == {"double": 1.0, "add": 1.0}
        assert replayed == [captured for captured, _, _ in captures[1:]]
    assert len(captures) == 3
    assert {pool for _, pool, _ in captures} == {"pool"}


def test_stages_after_an_attempt_that_failed(fake_cuda):
    values, other = torch.ones(3), torch.ones(4)
    graph = FrameGraph(lambda stage: stage("add", torch.add, stage("double", double, values), other[: len(values)]), 0)
    other.resize_(2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        graph.replay_stages()
    other.resize_(4)
    assert list(graph.replay_stages()) == ["double", "add"]
    assert len(fake_cuda[0]) == 2


def test_the_output_belongs_to_what_was_replayed_last(fake_cuda):
    """The graph of the whole writes to another tensor than those of the stages."""
    outputs = []

    def frame(stage):
        outputs.append(stage("double", double, torch.ones(3)))
        return outputs[-1]

    graph = FrameGraph(frame, "pool")
    whole = outputs[-1]
    graph.replay_stages()
    staged = outputs[-1]
    assert graph.output is staged
    graph.replay()
    assert graph.output is whole
    graph.replay_stages()
    assert graph.output is staged


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@needs_gpu
def test_replays_take_new_inputs():
    values, other = torch.zeros(5, device="cuda"), torch.zeros(5, device="cuda")
    graph = FrameGraph(two_stages(values, other), torch.cuda.graph_pool_handle())
    for number in range(3):
        values.fill_(number)
        other.fill_(10)
        graph.replay()
        assert graph.output.tolist() == [2 * number + 9] * 5


@pytest.mark.gpu
@needs_gpu
def test_stages_one_by_one():
    """Their result is that of the whole."""
    values, other = torch.zeros(5, device="cuda"), torch.zeros(5, device="cuda")
    graph = FrameGraph(two_stages(values, other), torch.cuda.graph_pool_handle())
    for number in range(3):
        values.fill_(number)
        times = graph.replay_stages()
        assert list(times) == ["double", "add"]
        assert all(ms >= 0 for ms in times.values())
        assert graph.output.tolist() == [2 * number - 1] * 5


@pytest.mark.gpu
@needs_gpu
def test_the_whole_after_its_stages():
    values, other = torch.zeros(5, device="cuda"), torch.zeros(5, device="cuda")
    graph = FrameGraph(two_stages(values, other), torch.cuda.graph_pool_handle())
    graph.replay_stages()
    values.fill_(4)
    graph.replay()
    assert graph.output.tolist() == [7] * 5


@pytest.mark.gpu
@needs_gpu
def test_two_graphs_of_one_pool():
    pool = torch.cuda.graph_pool_handle()
    values, other = torch.ones(5, device="cuda"), torch.ones(5, device="cuda")
    first = FrameGraph(two_stages(values, other), pool)
    second = FrameGraph(two_stages(other, values), pool)
    values.fill_(3)
    for _ in range(2):
        first.replay()
        assert first.output.tolist() == [6] * 5
        second.replay()
        assert second.output.tolist() == [4] * 5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_on_two_devices():
    for device in range(2):
        with torch.cuda.device(device):
            values, other = torch.zeros(5, device="cuda"), torch.zeros(5, device="cuda")
            graph = FrameGraph(two_stages(values, other), torch.cuda.graph_pool_handle())
            values.fill_(3)
            graph.replay()
            assert graph.output.tolist() == [5] * 5
