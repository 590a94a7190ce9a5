"""Lists of tiles against distances worked out one by one."""

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton

from dsvt_ros.fused import tiles
from dsvt_ros.fused.convolution import BevRows
from dsvt_ros.fused.tiles import every_tile, list_tiles, tiles_of

_interpreter = interpreted("tiles")
pytestmark = needs_triton


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
    monkeypatch.setattr(tiles, "LIST_BLOCK", 16)
    clouds, height, width = occupied.shape
    voxel_at = torch.full((clouds, height + 1, width + 1), -1, dtype=torch.int32)
    voxel_at[:, :height, :width] = torch.where(occupied, occupied.flatten().cumsum(0).view_as(occupied) - 1, -1)
    x = BevRows(torch.empty(voxel_at.numel(), 16, device=DEVICE), height, width)
    distances = distances_of(occupied).flatten()
    count = len(distances)
    assert distances.unique().numel() > 1 or count < 40
    listed = list_tiles(x, voxel_at.flatten().to(DEVICE), first_radius=2, reach=reach).cpu()
    assert len(listed) == reach - 1
    assert 4 * listed.stride(0) % 16 == 0, "kernels are compiled for lists that begin at multiples of 16 bytes"
    for radius, row in enumerate(listed, start=2):
        near, far = (distances <= radius).nonzero()[:, 0], (distances > radius).nonzero()[:, 0]
        assert row[0] == len(near)
        assert torch.equal(row[4 : 4 + count].long(), torch.cat([near, far.flip(0)]))


def test_every_tile():
    x = BevRows(torch.empty(2 * 21 * 41, 1), 20, 40)
    assert tiles_of(x) == (3, 3, 2)
    listed = every_tile(tiles_of(x), 2, torch.device("cpu"))
    assert listed[:, :22].tolist() == [[18, 0, 0, 0, *range(18)]] * 2
    assert 4 * listed.stride(0) % 16 == 0
