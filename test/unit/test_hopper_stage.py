"""The convolutions of a first stage on lists of tiles, which only a Hopper GPU can run.

A fault in how parts of the kernel wait for each other may be one that never ends: run this with `timeout 60`.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fused_fixtures import DEVICE, needs_triton
from tiny import randomize
from torch import nn

from dsvt_ros.config import Backbone2dConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused import launch
from dsvt_ros.fused.bev import FusedBevBackbone
from dsvt_ros.fused.convolution import BevRows
from dsvt_ros.fused.first_block import FirstBlock
from dsvt_ros.fused.hopper_stage import HopperStage
from dsvt_ros.fused.launch import is_hopper
from dsvt_ros.fused.residual_block import FusedBlock
from dsvt_ros.fused.structures import Grid
from dsvt_ros.fused.tiles import every_tile, tiles_of
from dsvt_ros.model.bev_backbone import BevBackbone, ResidualBlock
from dsvt_ros.model.fold import folded_copy

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.skipif(not is_hopper(DEVICE), reason="needs a Hopper GPU"),
]

CHANNELS = 128


@pytest.fixture
def _poisoned(monkeypatch):
    """Cells that nothing writes are not a number."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    blocks = [ResidualBlock(64, CHANNELS, 1, downsample=True), ResidualBlock(CHANNELS, CHANNELS, 1, downsample=False)]
    head = nn.Module()
    head.dense_head = nn.Sequential(*blocks)
    first, second = folded_copy(randomize(head).dense_head).to(DEVICE)
    return HopperStage(FirstBlock(first), [FusedBlock(second)])


def voxels_in(occupied, seed=0):
    """Features, behind which there is garbage, and the grid of voxels in (B, H, W) cells."""
    _, height, width = occupied.shape
    count = int(occupied.sum())
    number = torch.where(occupied, occupied.flatten().cumsum(0).view_as(occupied) - 1, -1).int()
    grid = Grid(
        (width, height, 1),
        number.transpose(1, 2).flatten().to(DEVICE),
        torch.zeros(count, dtype=torch.int32, device=DEVICE),
        torch.tensor([count], dtype=torch.int32, device=DEVICE),
    )
    generator = torch.Generator().manual_seed(seed)
    features = torch.full((count + 3, 64), torch.nan)
    features[:count] = torch.randn(count, 64, generator=generator)
    return features.half().to(DEVICE), grid


def inputs_of(stage, occupied, seed=0):
    """What goes into the convolutions on tiles: a map, and products."""
    return stage._first.gather(*voxels_in(occupied, seed))


def occupied_cells(height, width, clouds=1, share=0.0, holes=0, seed=0):
    """(B, H, W) bool; some at random, none in square holes."""
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand(clouds, height, width, generator=generator) < share
    for _ in range(holes):
        y, x = (int(torch.randint(0, extent, (1,), generator=generator)) for extent in (height, width))
        occupied[:, y : y + 50, x : x + 60] = False
    return occupied


def in_a_corner(height, width):
    occupied = torch.zeros(2, height, width, dtype=torch.bool)
    occupied[0, 0, 0] = occupied[0, -1, -1] = occupied[1, height // 2, width // 3] = True
    return occupied


def convolved(stage, number, x, added):
    """(B, 128, H, W) float32 of torch."""
    conv = stage._convolutions[number]
    weight = conv.matrix.view(3, 3, CHANNELS, CHANNELS).permute(3, 2, 0, 1).float()
    return F.relu(F.conv2d(x.image().float(), weight, conv.bias, padding=1) + added)


def added_products(x, products):
    """(B, 128, H, W) float32 of what voxels add to their cells."""
    features, voxel_at = products
    added = torch.zeros(x.rows.shape, device=DEVICE)
    cells = (voxel_at >= 0).nonzero()[:, 0]
    added[cells] = features[voxel_at[cells].long()].float()
    return BevRows(added, x.height, x.width).image()


def assert_same_bytes(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.rows.view(torch.int16), theirs.rows.view(torch.int16))


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    "occupied",
    [
        occupied_cells(7, 15, share=0.1),
        occupied_cells(8, 15, share=0.1),
        occupied_cells(20, 15, share=0.1),
        occupied_cells(33, 17),
        occupied_cells(95, 120),
        in_a_corner(111, 95),
        occupied_cells(90, 83, clouds=3, share=0.001),
        occupied_cells(468, 468, share=0.2, holes=20),
        occupied_cells(180, 180, share=1.0),
    ],
    ids=["1 tile", "2 tiles", "3 tiles", "no voxels", "none, larger", "corners", "3 clouds", "holes", "all cells"],
)
def test_each_convolution(stage, occupied):
    """As torch's; and the same bytes as if no tile were left out."""
    x, products = inputs_of(stage, occupied)
    found = stage._convolve(x, products, stage._list(x, products[1]))
    added = [added_products(x, products), 0, found[0].image().float()]
    for number, (before, after) in enumerate(zip([x, *found[:2]], found, strict=True)):
        expected = convolved(stage, number, before, added[number])
        ours = after.image().float()
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-3
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)
        cells = after.rows.view(-1, after.height + 1, after.width + 1, CHANNELS)
        assert (cells[:, -1] == 0).all()
        assert (cells[:, :, -1] == 0).all()
    assert_same_bytes(found, stage._convolve(x, products, every_tile(tiles_of(x), 3, DEVICE)))


def test_some_tiles_are_left_out(stage):
    """Of a large map with few voxels most are, the fewer the farther voxels reach."""
    x, products = inputs_of(stage, in_a_corner(300, 300))
    counts = stage._list(x, products[1])[:, 0].tolist()
    assert counts == sorted(counts)
    assert counts[-1] < math.prod(tiles_of(x)) / 2


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("number", [0, 1, 2], ids=["products", "nothing added", "a map added"])
def test_numbers_of_tiles(stage, number):
    """None, fewer than programs, a partner for some or all, and several turns; in any order."""
    x, products = inputs_of(stage, occupied_cells(239, 319, share=0.3))
    grid = tiles_of(x)
    count, programs = math.prod(grid), stage._programs
    residual = x if number == 2 else None
    added = products if number == 0 else None
    (tiles,) = every_tile(grid, 1, DEVICE)
    every = stage._launch(number, x, tiles, residual, added)
    tiles[4 : 4 + count] = tiles[4 : 4 + count][torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    some = [0, 1, 2, 3, programs - 1, programs, programs + 1, 2 * programs - 1, 2 * programs, 2 * programs + 1]
    for active in [*some, 3 * programs, 4 * programs + 7, count - 1, count]:
        tiles[0] = active
        found = stage._launch(number, x, tiles, residual, added)
        computed = torch.zeros(count, dtype=torch.bool, device=DEVICE)
        computed[tiles[4 : 4 + active].long()] = True
        # This map is of whole tiles.
        cells = computed.view(240 // 8, 320 // 16).repeat_interleave(8, 0).repeat_interleave(16, 1).flatten()
        expected = torch.where(cells[:, None], every.rows, stage._constants[number])
        assert torch.equal(found.rows.view(torch.int16), expected.view(torch.int16)), active


def test_repeated_runs_give_the_same_bytes(stage):
    """Of several inputs, one right after the other, with something else on the GPU at the same time."""
    maps = [
        occupied_cells(468, 468, share=0.2, holes=30),
        occupied_cells(468, 468, share=0.19),
        in_a_corner(333, 468),
        occupied_cells(200, 151, share=0.01, clouds=2),
    ]
    inputs = [inputs_of(stage, occupied, seed) for seed, occupied in enumerate(maps)]
    lists = [stage._list(x, products[1]) for x, products in inputs]
    every = [every_tile(tiles_of(x), 3, DEVICE) for x, _ in inputs]
    expected = [stage._convolve(x, products, tiles) for (x, products), tiles in zip(inputs, every, strict=True)]
    different = torch.zeros(len(inputs), 3, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        found = [stage._convolve(x, products, tiles) for (x, products), tiles in zip(inputs, lists, strict=True)]
        for ours, theirs, row in zip(found, expected, different, strict=True):
            for one, two, cell in zip(ours, theirs, row, strict=True):
                cell += (one.rows.view(torch.int16) != two.rows.view(torch.int16)).any()
    matrix = torch.randn(2048, 2048, device=DEVICE).half()
    for _ in range(300):
        graph.replay()
        with torch.cuda.stream(other):
            torch.mm(matrix, matrix)
            matrix.roll(1, 0)
    torch.cuda.synchronize()
    assert different.tolist() == [[0, 0, 0]] * len(inputs)


@pytest.mark.parametrize("occupied", [in_a_corner(60, 90), occupied_cells(60, 90, share=0.3)], ids=["few", "many"])
def test_backbone(occupied):
    """Of two stages, the first of which is the kernel's."""
    config = Backbone2dConfig(
        blocks=(2, 1), strides=(1, 2), channels=(CHANNELS, 64), upsample_strides=(1, 2), upsample_channels=(64, 64)
    )  # fmt: skip
    torch.manual_seed(0)
    head = nn.Module()
    head.dense_head = BevBackbone(config, 64)
    reference = folded_copy(randomize(head).dense_head).to(DEVICE)
    backbone = FusedBevBackbone(copy.deepcopy(reference))
    assert isinstance(backbone._first, HopperStage)
    assert not backbone._stages[0]
    features, grid = voxels_in(occupied)
    image = torch.zeros(*occupied.shape, 64, device=DEVICE)
    image[occupied.to(DEVICE)] = features[: int(occupied.sum())].float()
    expected = reference(image.permute(0, 3, 1, 2))
    found = backbone.image(backbone(features, grid)).float()
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3


def test_other_stages_are_not_taken(stage):
    def first(channels, stride):
        return FirstBlock(ResidualBlock(64, channels, stride, downsample=True).to(DEVICE))

    second = FusedBlock(ResidualBlock(CHANNELS, CHANNELS, 1, downsample=False).to(DEVICE))
    assert HopperStage.take(first(CHANNELS, 1), [second])
    assert not HopperStage.take(first(CHANNELS, 2), [second])
    assert not HopperStage.take(first(64, 1), [])


def test_more_cells_than_the_kernels_can_number(stage, monkeypatch):
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 961 * CHANNELS - 1)
    with pytest.raises(EngineError, match="961 rows are more than the kernels can number"):
        stage(*voxels_in(occupied_cells(30, 30)))
