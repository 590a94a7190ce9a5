"""BEV maps as images and as rows of cells, and what convolves them."""

import torch
from fused_fixtures import DEVICE
from tiny import randomize
from torch import nn

from dsvt_ros.bev import scatter_bev
from dsvt_ros.fused.convolution import BevRows, room_for
from dsvt_ros.fused.structures import Grid
from dsvt_ros.model.bev_backbone import ResidualBlock
from dsvt_ros.model.fold import folded_copy


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


class Head(nn.Module):
    """What `randomize` takes."""

    def __init__(self, module):
        super().__init__()
        self.dense_head = module


def residual_block(before, after, stride, seed=0):
    torch.manual_seed(seed)
    return folded_copy(randomize(Head(ResidualBlock(before, after, stride, downsample=True))).dense_head).to(DEVICE)
