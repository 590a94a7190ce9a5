"""Transposed convolutions on rows of cells against those of torch."""

import pytest
import torch
from bev_cases import assert_same, half_exact, image_of, rows_of
from fused_fixtures import DEVICE, interpreted, needs_triton
from torch import nn

from dsvt_ros.fused.convolution import BevRows
from dsvt_ros.fused.launch import ROWS
from dsvt_ros.fused.upsampling import Upsampling

_interpreter = interpreted("convolution", "upsampling")
pytestmark = needs_triton


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize(("before", "after"), [(16, 16), (24, 96), (72, 192)])
def test_upsampling(stride, before, after):
    """Into some columns of wider rows."""
    conv = half_exact(nn.ConvTranspose2d(before, after, stride, stride))
    image = image_of(2, before, 5, 7)
    upsampling = Upsampling(conv)
    columns = slice(16, 16 + upsampling.channels_out)
    cells = 2 * (5 * stride + 1) * (7 * stride + 1)
    wide = torch.full((cells, columns.stop + 16), torch.nan, dtype=torch.float16, device=DEVICE)
    found = upsampling(rows_of(image), output=wide[:, columns])
    assert_same(BevRows(wide[:, columns].contiguous(), found.height, found.width), torch.relu(conv(image)))
    assert wide[:, :16].isnan().all()
    assert wide[:, columns.stop :].isnan().all()


def test_upsampling_of_longer_lines_than_a_block():
    conv = half_exact(nn.ConvTranspose2d(16, 16, 2, 2))
    image = image_of(1, 16, 2, ROWS + 3)
    expected = torch.relu(conv(image))
    cells = (expected.shape[2] + 1) * (expected.shape[3] + 1)
    output = torch.full((cells, 16), torch.nan, dtype=torch.float16, device=DEVICE)
    assert_same(Upsampling(conv)(rows_of(image), output=output), expected)
