"""Convolutions on rows of cells by kernels against those of torch."""

import copy

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import TINY_CONFIGS, randomize, tiny_network
from torch import nn

from dsvt_ros.bev import scatter_bev
from dsvt_ros.config import Backbone2dConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused import bev
from dsvt_ros.fused.bev import (
    NARROW,
    NARROW_FROM,
    BevRows,
    FirstBlock,
    FusedBevBackbone,
    FusedConvolution,
    FusedHeatmaps,
    Upsampling,
    every_tile,
    list_tiles,
    room_for,
    sum_taps,
    tiles_of,
)
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.structures import Grid
from dsvt_ros.model.bev_backbone import BevBackbone, ResidualBlock
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.fold import folded_copy

_interpreter = interpreted("convolution")
pytestmark = needs_triton


def rows_of(image):
    """A (B, C, H, W) map as rows of cells, in the channels that there is room for."""
    clouds, channels, height, width = image.shape
    rows = image.new_zeros(clouds, height + 1, width + 1, room_for(channels), dtype=torch.float16)
    rows[:, :height, :width, :channels] = image.permute(0, 2, 3, 1)
    return BevRows(rows.flatten(0, 2), height, width)


def image_of(*shape, seed=0):
    """Values that float16 holds."""
    torch.manual_seed(seed)
    return torch.randn(shape, device=DEVICE).half().float()


def half_exact(conv, seed=0):
    """A convolution with weights that float16 holds, and a bias."""
    torch.manual_seed(seed)
    with torch.no_grad():
        conv.weight.copy_((torch.randn_like(conv.weight) * conv.weight[0].numel() ** -0.5).half())
        if conv.bias is not None:
            conv.bias.normal_()
    return conv.to(DEVICE).requires_grad_(False)


def assert_same(found, expected):
    """The map, with nothing in the channels and cells around it."""
    assert (found.height, found.width) == expected.shape[2:]
    channels = expected.shape[1]
    ours = found.image()[:, :channels].float()
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-3
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)
    assert_nothing_around(found, channels)


def assert_nothing_around(found, channels):
    cells = found.rows.view(-1, found.height + 1, found.width + 1, found.rows.shape[1])
    assert (cells[:, -1] == 0).all()
    assert (cells[:, :, -1] == 0).all()
    assert (cells[..., channels:] == 0).all()


# ------------------------------------------------------------------------------------------------------ one convolution


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


@pytest.mark.parametrize(("before", "after"), [(16, 16), (5, 3), (96, 128), (128, 96), (80, 200), (320, 16)])
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


@pytest.mark.parametrize("shape", [(2, 9, 13), (1, 2, 3), (1, 8, 13)], ids=["3 blocks", "small", "1 block"])
def test_few_channels_of_many(shape):
    """Of which one kernel reads its input once for three taps, in blocks that overlap."""
    conv = half_exact(nn.Conv2d(NARROW_FROM, NARROW, 3, padding=1))
    clouds, height, width = shape
    image = image_of(clouds, NARROW_FROM, height, width)
    assert_same(FusedConvolution(conv)(rows_of(image)), torch.relu(conv(image)))


def test_few_channels_with_more_than_that_kernel_does(monkeypatch):
    monkeypatch.setattr(bev, "NARROW", 16)
    monkeypatch.setattr(bev, "NARROW_FROM", 16)
    test_products()
    test_output_in_wider_rows(3, 1)
    test_without_bias_and_without_relu(1)


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


# ----------------------------------------------------------------------------------------------------------- upsampling


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
    image = image_of(1, 16, 2, bev.ROWS + 3)
    expected = torch.relu(conv(image))
    cells = (expected.shape[2] + 1) * (expected.shape[3] + 1)
    output = torch.full((cells, 16), torch.nan, dtype=torch.float16, device=DEVICE)
    assert_same(Upsampling(conv)(rows_of(image), output=output), expected)


# ------------------------------------------------------------------------------------------------------- voxels to rows


def pillars(size, count, clouds, channels, room, seed=0):
    """`pillars_in` cells at random."""
    cells = torch.randperm(clouds * size[0] * size[1], generator=torch.Generator().manual_seed(seed))[:count]
    return pillars_in(size, cells.sort().values, clouds, channels, room, seed)


def pillars_in(size, cells, clouds, channels, room, seed=0):
    """Features of pillars, behind which there is garbage, their grid, and the same as a (B, C, H, W) map."""
    width, height = size
    count = len(cells)
    generator = torch.Generator().manual_seed(seed)
    features = torch.full((room, channels), torch.nan, dtype=torch.float16)
    features[:count] = torch.randn(count, channels, generator=generator)
    voxel_of_cell = torch.full((clouds * width * height,), -1, dtype=torch.int32)
    voxel_of_cell[cells] = torch.arange(count, dtype=torch.int32)
    cell_of_voxel = torch.full((room,), clouds * width * height - 1, dtype=torch.int32)
    cell_of_voxel[:count] = cells
    grid = Grid(
        (width, height, 1),
        voxel_of_cell.to(DEVICE),
        cell_of_voxel.to(DEVICE),
        torch.tensor([count], dtype=torch.int32, device=DEVICE),
    )
    coords = torch.stack([cells // (width * height), 0 * cells, cells % height, cells // height % width], 1).int()
    image = scatter_bev(features[:count].float(), coords, (width, height, 1), clouds)
    return features.to(DEVICE), grid, image.to(DEVICE)


def residual_block(before, after, stride, seed=0):
    torch.manual_seed(seed)
    return folded_copy(randomize(Head(ResidualBlock(before, after, stride, downsample=True))).dense_head).to(DEVICE)


class Head(nn.Module):
    """What `randomize` takes."""

    def __init__(self, module):
        super().__init__()
        self.dense_head = module


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
    width, height = 3 * bev.GATHER_CELLS * stride, 3
    cells = torch.tensor([(bev.GATHER_CELLS * stride + x) * height + 1])
    features, grid, image = pillars_in((width, height), cells, 1, 16, 2)
    assert_same(FirstBlock(block)(features, grid), block(image))


@pytest.mark.parametrize(("before", "after"), [(48, 96), (192, 128), (16, 8)])
def test_channels_of_the_first_block(before, after):
    block = residual_block(before, after, 1)
    features, grid, image = pillars((6, 5), 12, 1, before, 20)
    assert_same(FirstBlock(block)(features, grid), block(image))


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


# ---------------------------------------------------------------------------------------------------------------- tiles


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


def occupied_cells(height, width, clouds, *cells):
    """(B, H, W) bool with some cells (cloud, y, x) of voxels."""
    occupied = torch.zeros(clouds, height, width, dtype=torch.bool)
    for cell in cells:
        occupied[cell] = True
    return occupied


def distances_of(occupied):
    """(B, down, across) Chebyshev distance of each tile of 8 by 16 to the nearest voxel or cell beyond the map."""
    clouds, height, width = occupied.shape
    down, across = -(-(height + 1) // 8), -(-(width + 1) // 16)
    around = torch.ones(clouds, down * 8 + 2, across * 16 + 2, dtype=torch.bool)
    around[:, 1 : height + 1, 1 : width + 1] = occupied
    result = torch.empty(clouds, down, across, dtype=torch.int64)
    for cloud, y, x in torch.cartesian_prod(*map(torch.arange, result.shape)).tolist():
        at = around[cloud].nonzero() - 1
        beyond_y = torch.maximum(y * 8 - at[:, 0], at[:, 0] - (y * 8 + 7))
        beyond_x = torch.maximum(x * 16 - at[:, 1], at[:, 1] - (x * 16 + 15))
        result[cloud, y, x] = torch.maximum(beyond_y, beyond_x).clamp(min=0).min()
    return result


@pytest.mark.parametrize("reach", [3, 4, 5])
@pytest.mark.parametrize(
    "occupied",
    [
        occupied_cells(48, 80, 1),
        occupied_cells(47, 79, 1),
        occupied_cells(48, 80, 1, (0, 0, 0), (0, 47, 79), (0, 0, 79), (0, 47, 0)),
        occupied_cells(48, 80, 1, (0, 23, 31), (0, 24, 48)),
        occupied_cells(41, 70, 3, (0, 20, 30), (2, 28, 52)),
        occupied_cells(5, 9, 2, (1, 2, 3)),
        torch.ones(2, 20, 40, dtype=torch.bool),
    ],
    ids=["no voxels", "full tiles", "corners", "tile borders", "several clouds", "one tile", "all cells"],
)
def test_lists_of_tiles(occupied, reach, monkeypatch):
    """For each radius all tiles within it, and then all others backwards; in several steps where there are many."""
    monkeypatch.setattr(bev, "LIST_BLOCK", 16)
    clouds, height, width = occupied.shape
    voxel_at = torch.full((clouds, height + 1, width + 1), -1, dtype=torch.int32)
    voxel_at[:, :height, :width] = torch.where(occupied, occupied.flatten().cumsum(0).view_as(occupied) - 1, -1)
    x = BevRows(torch.empty(voxel_at.numel(), 16, device=DEVICE), height, width)
    distances = distances_of(occupied).flatten()
    count = len(distances)
    assert distances.unique().numel() > 1 or count < 40
    listed = list_tiles(x, voxel_at.flatten().to(DEVICE), first_radius=2, reach=reach).cpu()
    assert len(listed) == reach - 1
    for radius, row in enumerate(listed, start=2):
        near, far = (distances <= radius).nonzero()[:, 0], (distances > radius).nonzero()[:, 0]
        assert row[0] == len(near)
        assert torch.equal(row[4 : 4 + count].long(), torch.cat([near, far.flip(0)]))


def test_every_tile():
    x = BevRows(torch.empty(2 * 21 * 41, 1), 20, 40)
    assert tiles_of(x) == (3, 3, 2)
    assert every_tile(tiles_of(x), 2, torch.device("cpu"))[:, :22].tolist() == [[18, 0, 0, 0, *range(18)]] * 2


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [FusedConvolution, Upsampling])
def test_weights_beyond_float16(make):
    conv = (nn.Conv2d if make is FusedConvolution else nn.ConvTranspose2d)(16, 16, 2, 2).requires_grad_(False)
    conv.weight[3, 4, 0, 1] = -1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16 \(65504\): use torch"):
        make(conv)


@pytest.mark.parametrize("kernel", [3, 4])
def test_kernels_that_would_need_another_padding(kernel):
    with pytest.raises(EngineError, match=f"of {kernel} by {kernel} have a padding of 1, not 0"):
        FusedConvolution(nn.Conv2d(16, 16, kernel, kernel))


def test_first_channels_that_the_kernels_do_not_take():
    with pytest.raises(EngineError, match="powers of two as first channels, not 192"):
        FirstBlock(residual_block(16, 192, 1))
