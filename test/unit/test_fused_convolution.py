"""Convolutions on rows of cells by kernels against those of torch."""

import pytest
import torch
from bev_cases import assert_same, half_exact, image_of, rows_of
from fused_fixtures import DEVICE, interpreted, needs_triton
from torch import nn

from dsvt_ros.errors import EngineError
from dsvt_ros.fused import launch
from dsvt_ros.fused.convolution import BevRows, FusedConvolution
from dsvt_ros.fused.upsampling import Upsampling

_interpreter = interpreted("convolution")
pytestmark = needs_triton


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [(3, 1), (3, 2), (3, 3), (1, 1), (1, 2), (2, 2)],
    ids=["3x3", "3x3/2", "3x3/3", "1x1", "1x1/2", "2x2/2"],
)
@pytest.mark.parametrize("shape", [(2, 9, 13), (1, 6, 8), (2, 2, 3)], ids=["odd", "even", "small"])
def test_kernels_and_strides(kernel, stride, shape):
    conv = half_exact(nn.Conv2d(24, 40, kernel, stride, padding=int(kernel == 3)))
    clouds, height, width = shape
    image = image_of(clouds, 24, height, width)
    assert_same(FusedConvolution(conv)(rows_of(image)), torch.relu(conv(image)))


@pytest.mark.parametrize(("before", "after"), [(16, 16), (5, 3), (96, 128), (128, 96), (80, 200), (320, 16), (256, 64)])
def test_channels(before, after):
    conv = half_exact(nn.Conv2d(before, after, 3, padding=1))
    image = image_of(1, before, 5, 4)
    assert_same(FusedConvolution(conv)(rows_of(image)), torch.relu(conv(image)))


@pytest.mark.parametrize("stride", [1, 2])
def test_without_bias_and_without_relu(stride):
    conv = half_exact(nn.Conv2d(16, 16, 3, stride, padding=1, bias=False))
    image = image_of(1, 16, 7, 5)
    found = FusedConvolution(conv)(rows_of(image), relu=False)
    assert (found.rows < 0).any()
    assert_same(found, conv(image))


def test_residual():
    conv = half_exact(nn.Conv2d(16, 24, 3, padding=1))
    image, residual = image_of(2, 16, 9, 7), image_of(2, 24, 9, 7, seed=1)
    found = FusedConvolution(conv)(rows_of(image), residual=rows_of(residual))
    assert_same(found, torch.relu(conv(image) + residual))


def test_products():
    """They are some columns of longer rows; cells without a voxel get nothing."""
    conv = half_exact(nn.Conv2d(16, 16, 3, padding=1))
    image = image_of(2, 16, 9, 7)
    voxel_at = torch.full((2, 10, 8), -1, dtype=torch.int32, device=DEVICE)
    voxel_at[:, 2:5, 3:7] = torch.arange(24, device=DEVICE).view(2, 3, 4).flip(2)
    products = torch.full((30, 40), torch.nan, dtype=torch.float16, device=DEVICE)
    products[:24, 16:32] = image_of(24, 16, seed=1)
    added = torch.zeros_like(image)
    added[:, :, 2:5, 3:7] = products[voxel_at[:, 2:5, 3:7].long(), 16:32].permute(0, 3, 1, 2)
    found = FusedConvolution(conv)(rows_of(image), products=(products[:, 16:32], voxel_at.flatten()))
    assert_same(found, torch.relu(conv(image) + added))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2)])
def test_output_in_wider_rows(kernel, stride):
    """All of its own columns is written, and nothing of the others."""
    conv = half_exact(nn.Conv2d(16, 16, kernel, stride, padding=int(kernel == 3)))
    image = image_of(1, 16, 7, 6)
    height, width = 7 // stride, 6 // stride
    wide = torch.full(((height + 1) * (width + 1), 48), torch.nan, dtype=torch.float16, device=DEVICE)
    found = FusedConvolution(conv)(rows_of(image), output=wide[:, 16:32])
    assert found.rows.data_ptr() == wide[:, 16:].data_ptr()
    assert_same(BevRows(wide[:, 16:32].contiguous(), height, width), torch.relu(conv(image)))
    assert wide[:, :16].isnan().all()
    assert wide[:, 32:].isnan().all()


def test_channels_that_lie_apart():
    conv = half_exact(nn.Conv2d(24, 16, 3, padding=1))
    image = image_of(1, 24, 5, 6)
    sources = torch.cat([torch.arange(8), torch.arange(16) + 16]).to(DEVICE)
    apart = image.new_zeros(1, 32, 5, 6)
    apart[:, sources] = image
    assert_same(FusedConvolution(conv, sources)(rows_of(apart)), torch.relu(conv(image)))


@pytest.mark.parametrize("classes", [1, 3, 10])
def test_to_maps(classes):
    conv = half_exact(nn.Conv2d(16, classes, 3, padding=1))
    image = image_of(2, 16, 9, 7)
    found = FusedConvolution(conv).to_maps(rows_of(image), classes)
    assert found.is_contiguous()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), conv(image), rtol=2e-3, atol=2e-3)


def test_repeated_runs_give_the_same_bytes():
    conv = FusedConvolution(half_exact(nn.Conv2d(96, 128, 3, padding=1)))
    rows = rows_of(image_of(1, 96, 9, 7))
    assert torch.equal(conv(rows).rows, conv(rows).rows)


@pytest.mark.parametrize("make", [FusedConvolution, Upsampling])
def test_weights_beyond_float16(make):
    conv = (nn.Conv2d if make is FusedConvolution else nn.ConvTranspose2d)(16, 16, 2, 2).requires_grad_(False)
    conv.weight[3, 4, 0, 1] = -1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16 \(65504\): use torch"):
        make(conv)


def test_more_cells_than_the_kernels_can_number(monkeypatch):
    conv = FusedConvolution(half_exact(nn.Conv2d(16, 16, 3, padding=1)))
    rows = rows_of(image_of(1, 16, 30, 30))
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 961 * 16)
    conv(rows)
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 961 * 16 - 1)
    with pytest.raises(EngineError, match="961 rows are more than the kernels can number; use torch or tensorrt"):
        conv(rows)


@pytest.mark.parametrize("kernel", [3, 4])
def test_kernels_that_would_need_another_padding(kernel):
    with pytest.raises(EngineError, match=f"of {kernel} by {kernel} have a padding of 1, not 0"):
        FusedConvolution(nn.Conv2d(16, 16, kernel, kernel))
