"""CenterHead at its peaks in plain torch against its full maps."""

import pytest
import torch
from fused_fixtures import DEVICE
from maps_at_peaks import HEADS, ONE_GROUP, head_of, maps_at

from dsvt_ros.export.networks import to_half
from dsvt_ros.padded.peak_head import PaddedPeakHead


def heads(config):
    """A head, and the same for peaks."""
    head, folded = head_of(config)
    return head, PaddedPeakHead(folded).eval()


@HEADS
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
        expected = maps_at(head(bev), ours.columns, index)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:], rtol=1e-4, atol=1e-5)


def test_half_precision():
    head, ours = heads(ONE_GROUP)
    to_half(ours)
    bev = torch.randn(1, 24, 12, 10, device=DEVICE)
    index = torch.arange(0, 120, 3, dtype=torch.int32, device=DEVICE)[None, None]
    with torch.inference_mode():
        found = ours.at_peaks(head.shared_conv(bev).half(), index)
        expected = maps_at(head(bev), ours.columns, index)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
