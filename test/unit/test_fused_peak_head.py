"""CenterHead at its peaks against its full maps."""

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from maps_at_peaks import HEADS, ONE_GROUP, TWO_GROUPS, head_of, maps_at

from dsvt_ros.export.networks import to_half
from dsvt_ros.fused.peak_head import PeakHead

_interpreter = interpreted("peak_head")
pytestmark = needs_triton


def heads(config):
    """A head, and the same for peaks."""
    head, folded = head_of(config)
    return head, PeakHead(folded).eval()


def features(clouds, rows, columns):
    """Channels last, as networks have them that run in half precision."""
    return torch.randn(clouds, 24, rows, columns, device=DEVICE).to(memory_format=torch.channels_last)


@HEADS
def test_every_cell_of_a_small_map(config):
    """Also those at the border and in the corners, in every class."""
    head, ours = heads(config)
    groups = max(1, len(config.groups))
    bev = features(2, 4, 5)
    index = torch.arange(20, dtype=torch.int32, device=DEVICE).repeat(2, groups, 1)
    index[:, -1, 12:] += 20
    with torch.inference_mode():
        maps = head(bev)
        heatmap, shared = ours(bev)
        found = ours.at_peaks(shared, index)
        again = ours.at_peaks(shared, index)
    torch.testing.assert_close(heatmap, maps.heatmap, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, maps_at(maps, ours.columns, index), rtol=1e-4, atol=1e-5)
    assert torch.equal(found, again)


@pytest.mark.parametrize("num_peaks", [0, 1, 14, 15])
def test_rows_without_a_peak(num_peaks):
    """Nothing is read for them; the rest is as it is."""
    head, ours = heads(TWO_GROUPS)
    bev = features(1, 6, 9)
    index = torch.randint(0, 54, (1, 2, 16), dtype=torch.int32, device=DEVICE)
    index[:, 1, num_peaks:] = -1
    with torch.inference_mode():
        found = ours.at_peaks(ours(bev)[1], index)
        expected = maps_at(head(bev), ours.columns, index)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1, :num_peaks], expected[:, 1, :num_peaks], rtol=1e-4, atol=1e-5)


def test_a_map_with_room_around_it():
    """What lies around it in memory is not read."""
    _, ours = heads(ONE_GROUP)
    index = torch.arange(30, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
    with torch.inference_mode():
        _, shared = ours(features(2, 5, 6))
        room = torch.full((2, 8, 9, 72), torch.nan, device=DEVICE)
        inner = room[:, 2:7, 1:7, :64].permute(0, 3, 1, 2)
        inner.copy_(shared)
        assert torch.equal(ours.at_peaks(inner, index), ours.at_peaks(shared, index))


def test_a_map_of_one_cell():
    head, ours = heads(ONE_GROUP)
    bev = features(1, 1, 1)
    index = torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        found = ours.at_peaks(ours(bev)[1], index)
        torch.testing.assert_close(found, maps_at(head(bev), ours.columns, index), rtol=1e-4, atol=1e-5)


def test_half_precision():
    """Nearer to single precision than a few roundings."""
    head, ours = heads(ONE_GROUP)
    to_half(ours)
    ours.to(memory_format=torch.channels_last)
    bev = features(1, 12, 10)
    index = torch.arange(0, 120, 3, dtype=torch.int32, device=DEVICE)[None, None]
    with torch.inference_mode():
        heatmap, shared = ours(bev.half())
        assert heatmap.dtype == shared.dtype == torch.float16
        assert heatmap.stride(2) == 10 * heatmap.stride(3)
        found = ours.at_peaks(shared, index)
        maps = head(bev)
    torch.testing.assert_close(heatmap.float(), maps.heatmap, rtol=0, atol=5e-3)
    torch.testing.assert_close(found, maps_at(maps, ours.columns, index), rtol=0, atol=5e-3)


def test_columns():
    _, ours = heads(TWO_GROUPS)
    assert ours.columns == {"center": 0, "center_z": 2, "dim": 3, "rot": 6, "vel": 8, "iou": 10}
