"""The backend triton on a GPU against torch in single precision, for the published models."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from published_networks import LEAST, LIMIT, assert_enough_alike, config_of, published_network
from reference import NAMES

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.triton import TritonNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.comparison import BoxDifference, FoundBoxes, boxes_from_maps, common_proposals
from dsvt_ros.cuda_graph import run_stage
from dsvt_ros.export.networks import named_maps
from dsvt_ros.fused.frame import FusedFrames
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools.verify import Recorder
from dsvt_ros.voxelization import voxelize

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


@functools.lru_cache(maxsize=1)
def opened(name):
    """A network, the same in kernels, and a cloud."""
    network, points = published_network(name)
    return network, TritonNetworks(network), points


@pytest.mark.parametrize("name", NAMES)
def test_published_models(name):
    network, networks, points = opened(name)
    exact = TorchNetworks(network)
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(points, device=DEVICE), network.config)
        features, partition = network.vfe(voxels), partition_sets(voxels.coords, network.config)
        found, expected = networks.sparse(features, partition), exact.sparse(features, partition)
        assert ((found.float() - expected).norm() / expected.norm()).item() < 2e-3
        assert torch.equal(networks.sparse(features, partition), found), "repeated runs give the same bytes"
        ours, theirs = (
            part.dense(scatter_bev(output, partition.coords, network.config.grid_size, 1))
            for part, output in ((networks, found), (exact, expected))
        )
    pairs = zip(*(named_maps(maps) for maps in common_proposals(ours, theirs)), strict=True)
    for (key, values), (_, right) in pairs:
        np.testing.assert_allclose(values.float().cpu(), right.float().cpu(), rtol=0, atol=0.05, err_msg=key)


# --------------------------------------------------------------------------------------------------------- whole frames


def boxes_by_stages(networks, network, config, points):
    """Boxes of the detector that runs stage by stage, and the detector."""
    recorder = Recorder(networks, networks.max_voxels)
    detector = Detector(network, config, DEVICE, recorder)
    detector.detect(points, np.eye(4))
    boxes = boxes_from_maps(recorder.maps, network.config, config.postprocess, LIMIT.score)
    return FoundBoxes(*(values.cpu() for values in vars(boxes).values())), detector


def boxes_of(result, frames, config, like):
    """Boxes of a frame; settled unless the nearest one in `like`, of the same networks, is not."""
    boxes = boxes_from_rows(result.rows[0], frames.model, config.postprocess)
    centers, scores, labels = (torch.as_tensor(v) for v in (boxes.boxes, boxes.scores, boxes.labels))
    distance = torch.cdist(centers[:, :3].double(), like.boxes[:, :3].double())
    distance[labels[:, None] != like.labels[None]] = torch.inf
    nearest, at = distance.min(1)
    return FoundBoxes(centers, scores, labels, like.settled[at] | (nearest > LIMIT.center_m))


@pytest.mark.parametrize("name", NAMES)
def test_whole_frames(name):
    """Boxes of frames against those of torch."""
    (network, networks, points), config = opened(name), config_of(name)
    expected, detector = boxes_by_stages(TorchNetworks(network), network, config, points)
    own, _ = boxes_by_stages(networks, network, config, points)
    frames = FusedFrames(networks, network.config, config)
    result = frames([points], [np.eye(4)])
    assert (result.num_points, result.num_voxels) == (detector.num_points, detector.num_voxels)
    assert result.num_dropped_voxels == 0
    assert_enough_alike(boxes_of(result, frames, config, own), expected)


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_follow_each_other(name):
    """The same bytes again, from the graph and from the kernels launched one by one, whatever came in between."""
    (network, networks, points), config = opened(name), config_of(name)
    frames = FusedFrames(networks, network.config, config)
    first = kept(frames([points], [np.eye(4)]).rows)
    for others in (points[::3], np.tile(points, (3, 1)), points[:0]):
        frames([np.ascontiguousarray(others)], [np.eye(4)])
        assert kept(frames([points], [np.eye(4)]).rows).tobytes() == first.tobytes()
    with torch.inference_mode():
        eager = next(iter(frames._frames.values()))._detect(run_stage).cpu().numpy()
    rows = frames([points], [np.eye(4)]).rows
    assert kept(eager[: rows.size].reshape(rows.shape)).tobytes() == first.tobytes()
    assert len(first) > LEAST


@pytest.mark.parametrize("name", NAMES)
def test_two_clouds_in_a_frame(name):
    """Each as it is alone, but for what rounding makes of it."""
    (network, networks, points), config = opened(name), config_of(name)
    clouds = [points, np.ascontiguousarray(points[::2])]
    frames = FusedFrames(networks, network.config, config)
    both = frames(clouds, [np.eye(4)] * 2).rows
    difference = BoxDifference()
    for rows, cloud in zip(both, clouds, strict=True):
        own, _ = boxes_by_stages(networks, network, config, cloud)
        alone = frames([cloud], [np.eye(4)])
        together = dataclasses.replace(alone, rows=rows[None])
        parts = (boxes_of(result, frames, config, own) for result in (together, alone))
        difference.add(*parts, LIMIT.center_m, LIMIT.score)
    assert difference.expected > LEAST
    assert difference.matched >= LIMIT.min_matched, difference


def kept(rows):
    """(M, columns) rows of boxes that are kept."""
    rows = rows.reshape(-1, rows.shape[-1])
    return rows[rows[:, -1] > 0]
