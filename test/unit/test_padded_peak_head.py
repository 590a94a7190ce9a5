"""CenterHead at its peaks in plain torch against its full maps."""

import pytest
import torch
from fused_fixtures import DEVICE
from tiny import randomize

from dsvt_ros.config import CenterHeadConfig
from dsvt_ros.export.networks import to_half
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.padded.peak_head import PaddedPeakHead

CONFIGS = {
    "one group": CenterHeadConfig(shared_channels=64),
    "two groups": CenterHeadConfig(
        shared_channels=8,
        branches=("center", "center_z", "dim", "rot", "vel", "iou", "hm"),
        groups=(("pedestrian",), ("cyclist", "car")),
        bias_before_norm=True,
    ),
    "heatmap first": CenterHeadConfig(shared_channels=32, branches=("hm", "rot", "dim", "center_z", "center")),
}


class Network(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_head = CenterHead(config, 24, 3)


def heads(config):
    """A head, and the same for peaks."""
    torch.manual_seed(0)
    head = randomize(Network(config)).dense_head.to(DEVICE)
    with torch.no_grad():
        return head, PaddedPeakHead(folded_copy(head)).eval()


def maps_at(maps, index, head, num_groups):
    """(B, G, K, columns) of the full maps at each peak."""
    cells = maps.heatmap.shape[2] * maps.heatmap.shape[3]
    cell = (index.long() % cells)[:, :, None]
    parts = []
    for name in head.columns:
        values = getattr(maps, name).unflatten(1, (num_groups, -1)).flatten(3)
        parts.append(values.gather(3, cell.expand(-1, -1, values.shape[2], -1)).transpose(2, 3))
    return torch.cat(parts, 3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (1, 7)])
def test_every_cell_of_a_small_map(config, shape):
    """Also those at the border and in the corners, in every class; and rows without a peak."""
    head, ours = heads(config)
    groups, cells = max(1, len(config.groups)), shape[0] * shape[1]
    bev = torch.randn(2, 24, *shape, device=DEVICE)
    index = torch.arange(-1, cells, dtype=torch.int32, device=DEVICE).repeat(2, groups, 1)
    index[:, -1, 3:] += cells
    with torch.inference_mode():
        found = ours.at_peaks(head.shared_conv(bev), index)
        expected = maps_at(head(bev), index, ours, groups)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:], rtol=1e-4, atol=1e-5)


def test_half_precision():
    head, ours = heads(CONFIGS["one group"])
    to_half(ours)
    bev = torch.randn(1, 24, 12, 10, device=DEVICE)
    index = torch.arange(0, 120, 3, dtype=torch.int32, device=DEVICE)[None, None]
    with torch.inference_mode():
        found = ours.at_peaks(head.shared_conv(bev).half(), index)
        expected = maps_at(head(bev), index, ours, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
