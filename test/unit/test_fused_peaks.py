"""The peaks of heatmaps against a stable sort by torch."""

import math

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton

from dsvt_ros.fused.peaks import PeakFinder, least_logit

_interpreter = interpreted("peaks")
pytestmark = needs_triton


def heatmaps(clouds, classes, rows, columns, seed=0):
    """Channels-last logits, as many different ones as float16 has around there."""
    torch.manual_seed(seed)
    values = torch.randn(clouds, classes, rows, columns, device=DEVICE) * 2 - 3
    return values.half().to(memory_format=torch.channels_last)


def expected_peaks(heatmap, group_sizes, count, least):
    """(B, G, K) index and logit."""
    indices, logits = [], []
    for part in torch.split(heatmap.float(), group_sizes, dim=1):
        values = part.flatten(1)
        values, order = torch.sort(values, dim=1, descending=True, stable=True)
        order = order.masked_fill(values < least, -1)
        values = values.masked_fill(values < least, -math.inf)
        room = max(0, count - values.shape[1])
        values = torch.nn.functional.pad(values[:, :count], (0, room), value=-math.inf)
        order = torch.nn.functional.pad(order[:, :count], (0, room), value=-1)
        indices.append(order)
        logits.append(values)
    return torch.stack(indices, 1), torch.stack(logits, 1)


def assert_found(heatmap, group_sizes, count, least=-math.inf):
    found = PeakFinder(group_sizes, count, DEVICE)(heatmap, least)
    index, logit = expected_peaks(heatmap, group_sizes, count, least)
    assert torch.equal(found.index.long(), index)
    assert torch.equal(found.logit, logit)
    return found


@pytest.mark.parametrize("least", [-math.inf, -2.0, 0.5, 1.5, 30.0])
def test_random(least):
    assert_found(heatmaps(1, 3, 47, 48), [3], 100, least)


@pytest.mark.parametrize("count", [1, 16, 17, 600])
def test_counts(count):
    assert_found(heatmaps(1, 2, 40, 60), [2], count)


def test_repeated_runs_give_the_same_bytes():
    maps = torch.randint(0, 40, (1, 3, 47, 48), device=DEVICE).half()
    find = PeakFinder([3], 333, DEVICE)
    first, second = find(maps), find(maps)
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.logit, second.logit)


def test_groups_and_clouds():
    assert_found(heatmaps(2, 6, 50, 45), [1, 3, 2], 50)


def test_a_cloud_without_peaks_beside_one_with_many():
    maps = heatmaps(2, 3, 50, 45)
    maps[1] = -9
    found = assert_found(maps, [2, 1], 50, -4.0)
    assert (found.index[1] == -1).all()


@pytest.mark.parametrize("value", [-4.5, 0.0, 2.0, -math.inf, math.inf, 6.1e-5])
def test_all_equal(value):
    """The first cells of the first class."""
    maps = torch.full((1, 3, 70, 60), value, dtype=torch.float16, device=DEVICE)
    found = assert_found(maps, [3], 40)
    assert found.index[0, 0].tolist() == list(range(40))


def test_ties_across_blocks_and_classes():
    """More equal ones than wanted, some higher ones among them."""
    torch.manual_seed(1)
    maps = torch.randint(0, 3, (1, 4, 70, 61), device=DEVICE).half()
    assert_found(maps, [4], 300)
    maps = torch.where(torch.rand(maps.shape, device=DEVICE) < 0.003, maps + 1, -5).half()
    assert_found(maps, [4], 60)
    assert_found(maps, [3, 1], 20)


def test_negative_zero_equals_zero():
    maps = torch.zeros(1, 1, 4, 8, dtype=torch.float16, device=DEVICE)
    maps[0, 0, 0] = -0.0
    assert_found(maps, [1], 20)


def test_fewer_cells_than_wanted():
    found = assert_found(heatmaps(1, 3, 3, 4), [2, 1], 40)
    assert int((found.index[0, 1] >= 0).sum()) == 12


def test_padded_channels():
    """Classes in the first of eight channels."""
    maps = heatmaps(2, 8, 20, 30)
    assert_found(maps[:, :3], [1, 2], 30)


def test_subnormal_and_neighbouring_numbers():
    """Every positive float16, once."""
    bits = torch.arange(0, 31745, device=DEVICE).to(torch.int16)
    torch.manual_seed(0)
    bits = bits[torch.randperm(31744, device=DEVICE)].reshape(1, 1, 124, 256)
    assert_found(bits.view(torch.float16), [1], 100)
    assert_found(-bits.view(torch.float16), [1], 100)


def test_a_map_with_gaps_is_refused():
    with pytest.raises(ValueError, match="without gaps"):
        PeakFinder([3], 5, DEVICE)(heatmaps(1, 3, 8, 9)[..., :7])


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 1e-5, 0.1, 0.5, 0.99, 0.999999, 1.0])
def test_nothing_above_the_threshold_is_lost(threshold):
    x = torch.linspace(-20, 20, 200_001)
    x = x[x < least_logit(threshold)]
    assert not (torch.sigmoid(x) > threshold).any()
    if 0.001 < threshold < 0.999:
        assert torch.sigmoid(x).max() > threshold - 1e-4
