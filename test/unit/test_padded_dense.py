"""The dense network in few calls of the library against its modules."""

import pytest
import torch
from fused_fixtures import DEVICE
from tiny import TINY_CONFIGS, tiny_network

from dsvt_ros.comparison import common_proposals
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import named_maps
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.structures import Grid, PeakMaps
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.padded.dense import LibraryConvolutions, PlainCalls, convolution_calls, place

CONFIGS = pytest.mark.parametrize("name", list(TINY_CONFIGS))


def grid_of(size, clouds, share=0.3):
    """Pillars in some cells, with more room than pillars."""
    torch.manual_seed(0)
    nx, ny, _ = size
    occupied = torch.rand(clouds * nx * ny, device=DEVICE) < share
    cells = occupied.nonzero()[:, 0].int()
    voxel_of_cell = torch.where(occupied, occupied.cumsum(0) - 1, -1).int()
    room = torch.nn.functional.pad(cells, (0, 7))
    return Grid(size, voxel_of_cell, room, cells.new_tensor([len(cells)]))


def features_of(grid, channels):
    """Those of pillars, and garbage."""
    features = torch.randn(len(grid.cell_of_voxel), channels, device=DEVICE).half()
    features[int(grid.num_voxels) :] = torch.nan
    return features


def test_place():
    grid = grid_of((5, 4, 1), 2)
    features = features_of(grid, 3)
    found = place(features, grid)
    expected = torch.zeros(2, 3, 4, 5, dtype=torch.float16, device=DEVICE)
    for row, cell in enumerate(grid.cell_of_voxel[: int(grid.num_voxels)].tolist()):
        expected[cell // 20, :, cell % 4, cell // 4 % 5] = features[row]
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("clouds", [1, 2])
@CONFIGS
def test_same_as_modules(name, clouds):
    network = tiny_network(0, name).to(DEVICE)
    backbone, head = folded_copy(network.backbone_2d), folded_copy(network.dense_head)
    library = LibraryConvolutions(backbone, PeakHead(head) if isinstance(head, CenterHead) else head, network.config)
    grid = grid_of((*network.config.grid_size[:2], 1), clouds)
    features = features_of(grid, 16)
    with torch.inference_mode():
        found = library(features, grid)
        bev = place(features, grid).float()
        expected = network.dense_head(network.backbone_2d(bev))
        if isinstance(found, PeakMaps):
            torch.testing.assert_close(found.logits.float(), expected.heatmap, rtol=0, atol=1e-2)
            shared = network.dense_head.shared_conv(network.backbone_2d(bev))
            torch.testing.assert_close(found.shared.float(), shared, rtol=0, atol=1e-2)
            return
    for cloud in range(clouds):  # which proposals come first hangs on tiny differences
        ours, theirs = (
            type(maps)(**{key: part[cloud, None] for key, part in named_maps(maps)}) for maps in (found, expected)
        )
        pairs = [named_maps(maps) for maps in common_proposals(ours, theirs)]
        assert pairs[0][0][1].shape[-1] >= 18
        for (key, ours), (_, theirs) in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2, msg=key)


def test_a_cudnn_without_fused_convolutions(monkeypatch):
    def lacking(*_args):
        raise RuntimeError("not in this build")

    monkeypatch.setattr("dsvt_ros.padded.dense.CudnnCalls.with_relu", lacking)
    assert isinstance(convolution_calls(DEVICE), PlainCalls)


def test_weights_beyond_float16():
    network = tiny_network()
    network.backbone_2d.blocks[1][0].conv2.weight[0, 0] = 1e6
    backbone, head = folded_copy(network.backbone_2d), folded_copy(network.dense_head)
    with pytest.raises(EngineError, match="beyond the range of float16"):
        LibraryConvolutions(backbone, PeakHead(head), network.config)
