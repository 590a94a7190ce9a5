"""From voxels to a map, by kernels against torch."""

import pytest
import torch
from bev_cases import assert_same, pillars, pillars_in, residual_block
from fused_fixtures import interpreted, needs_triton

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.first_block import GATHER_CELLS, FirstBlock

_interpreter = interpreted("convolution", "first_block", "multiply")
pytestmark = needs_triton


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "count", "room"),
    [((13, 9), 60, 70), ((8, 12), 50, 50), ((7, 7), 0, 20), ((5, 3), 30, 40)],
    ids=["odd", "even", "no voxels", "all cells"],
)
def test_first_block(stride, size, count, room):
    """Voxels of two clouds."""
    block = residual_block(16, 32, stride)
    features, grid, image = pillars(size, count, 2, 16, room)
    assert_same(FirstBlock(block)(features, grid), block(image))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("x", [-3, -2, -1, 0, 1, 2], ids=lambda x: f"{x:+}")
def test_a_voxel_where_parts_of_lines_meet(stride, x):
    """Alone, and far from all others; one of the parts then has nothing but its border."""
    block = residual_block(16, 16, stride)
    width, height = 3 * GATHER_CELLS * stride, 3
    cells = torch.tensor([(GATHER_CELLS * stride + x) * height + 1])
    features, grid, image = pillars_in((width, height), cells, 1, 16, 2)
    assert_same(FirstBlock(block)(features, grid), block(image))


@pytest.mark.parametrize(("before", "after"), [(48, 96), (192, 128), (16, 8)])
def test_channels_of_the_first_block(before, after):
    block = residual_block(before, after, 1)
    features, grid, image = pillars((6, 5), 12, 1, before, 20)
    assert_same(FirstBlock(block)(features, grid), block(image))


def test_first_channels_that_the_kernels_do_not_take():
    with pytest.raises(EngineError, match="powers of two as first channels, not 192"):
        FirstBlock(residual_block(16, 192, 1))
