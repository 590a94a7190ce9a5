"""The BEV backbone and CenterHead's heatmaps in kernels against torch."""

import copy

import pytest
import torch
from bev_cases import Head, assert_nothing_around, pillars
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import TINY_CONFIGS, randomize, tiny_network

from dsvt_ros.config import Backbone2dConfig
from dsvt_ros.fused.bev import FusedBevBackbone
from dsvt_ros.fused.heatmaps import FusedHeatmaps
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.fold import folded_copy

_interpreter = interpreted("convolution", "first_block", "multiply", "upsampling")
pytestmark = needs_triton


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
@pytest.mark.parametrize("count", [0, 90])
def test_backbone_and_heatmaps(name, count):
    """Also on a grid of an odd number of cells, where the model allows that."""
    network = tiny_network(0, name).to(DEVICE)
    reference, head = folded_copy(network.backbone_2d), folded_copy(network.dense_head)
    features, grid, image = pillars((14, 12) if name == "tiny_proposals" else (15, 11), count, 2, 16, 100)
    backbone = FusedBevBackbone(copy.deepcopy(reference))
    expected = reference(image)
    rows = backbone(features, grid)
    found = backbone.image(rows)
    assert found.shape == expected.shape
    assert ((found.float() - expected).norm() / expected.norm()).item() < 2e-3
    assert_nothing_around(rows, rows.rows.shape[1])
    assert torch.isfinite(rows.rows).all()
    if isinstance(head, CenterHead):
        at_peaks = PeakHead(copy.deepcopy(head))
        convolutions = (at_peaks.shared_conv[0], at_peaks.heatmap_hidden, at_peaks.heatmap)
        heatmaps = FusedHeatmaps(*convolutions, backbone.sources, 3)
        logits, shared = heatmaps(rows)
        for ours, theirs in ((logits, head(expected).heatmap), (shared, head.shared_conv(expected))):
            assert ours.shape == theirs.shape
            assert ((ours.float() - theirs).norm() / theirs.norm()).item() < 2e-3
        assert shared.stride(1) == 1


def test_backbone_of_unusual_widths():
    """Stages that are upsampled by 1, 2 and 4 to channels of which some blocks are padded."""
    config = Backbone2dConfig(
        blocks=(1, 1, 1), strides=(1, 2, 2), channels=(16, 24, 80), upsample_strides=(1, 2, 4),
        upsample_channels=(24, 40, 96),
    )  # fmt: skip
    torch.manual_seed(0)
    reference = folded_copy(randomize(Head(BevBackbone(config, 48))).dense_head).to(DEVICE)
    features, grid, image = pillars((12, 8), 40, 2, 48, 60)
    backbone = FusedBevBackbone(copy.deepcopy(reference))
    rows = backbone(features, grid)
    found, expected = backbone.image(rows), reference(image)
    assert found.shape == expected.shape
    assert ((found.float() - expected).norm() / expected.norm()).item() < 2e-3
    assert_nothing_around(rows, rows.rows.shape[1])
