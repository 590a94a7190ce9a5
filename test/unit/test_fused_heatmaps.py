"""CenterHead's last convolution as products that each cell sums."""

import pytest
import torch
from bev_cases import half_exact, image_of, rows_of
from fused_fixtures import DEVICE, interpreted, needs_triton
from torch import nn

from dsvt_ros.fused.heatmaps import sum_taps
from dsvt_ros.fused.tiles import tiles_of

_interpreter = interpreted("heatmaps")
pytestmark = needs_triton


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(9, 17), (8, 16), (7, 15)])
def test_sum_of_taps(height, width, classes):
    """What a cell has for neighbours in other tiles, too; nothing comes from cells beyond the map."""
    conv = half_exact(nn.Conv2d(16, classes, 3, padding=1))
    image = image_of(2, 16, height, width)
    x = rows_of(image)
    across, down, clouds = tiles_of(x)
    cells = torch.full((clouds, 9 * classes, down * 8, across * 16), torch.nan, device=DEVICE)
    taps = conv.weight.permute(2, 3, 0, 1).reshape(9 * classes, 16)
    cells[..., :height, :width] = torch.einsum("kc,bchw->bkhw", taps, image)
    products = cells.unflatten(2, (down, 8)).unflatten(4, (across, 16)).permute(0, 2, 4, 1, 3, 5)
    found = sum_taps(products.reshape(-1, 9 * classes, 128), conv.bias, x, classes)
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), conv(image), rtol=2e-3, atol=2e-3)
