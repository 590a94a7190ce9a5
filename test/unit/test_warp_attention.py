"""Attention inside sets against torch: in registers of warps, and by the kernel for what these do not hold."""

import importlib
import math
from dataclasses import dataclass

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton

_interpreter = interpreted("set_attention", "warp_attention")
pytestmark = needs_triton

ROWS = 16
SIZES = (1, 17, 2, 15, 16, 31, 32, 33, 36, 3, 47, 48, 64, 65, 80, 90)
"""Of sets: around those of pieces, and those of models."""
MORE = 70
LIMIT = 2e-3
"""The error of a row as a share of its size; float16 rounds off up to 5e-4 of the result and of each weight."""
HEADS = {
    "waymo_pillar": (8, 24, 36),
    "waymo_voxel": (8, 24, 48),
    "nuscenes_pillar": (8, 16, 90),
    "demo": (4, 16, 36),
    "odd": (3, 8, 20),
    "most": (2, 32, 96),
}
"""Heads, their channels, slots of a set."""


@dataclass(frozen=True)
class Inputs:
    """Sets of voxels in any order, with garbage behind them."""

    heads: int
    set_size: int
    sizes: list[int]
    qkv: torch.Tensor
    order: torch.Tensor
    set_start: torch.Tensor
    num_sets: torch.Tensor


def inputs_of(name, scale=0.8, num_sets=None):
    heads, width, set_size = HEADS[name]
    sizes = [size for size in SIZES if size <= set_size][:num_sets]
    voxels, channels = sum(sizes), heads * width
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(voxels + MORE, 3 * channels, generator=generator).mul_(scale).half()
    qkv[voxels:] = torch.nan
    order = torch.full((voxels + MORE,), 2**30, dtype=torch.int32)
    order[:voxels] = torch.randperm(voxels, generator=generator)
    start = torch.full((len(sizes) + 1 + MORE,), 2**30, dtype=torch.int32)
    start[: len(sizes) + 1] = torch.tensor([0, *sizes]).cumsum(0)
    parts = (qkv, order, start, torch.tensor([len(sizes)], dtype=torch.int32))
    return Inputs(heads, set_size, sizes, *(part.to(DEVICE) for part in parts))


def by_torch(given):
    """In double precision; one row a voxel."""
    channels = given.qkv.shape[1] // 3
    rows = []
    for part in given.qkv[: sum(given.sizes)].double().split(given.sizes):
        query, key, value = part.view(len(part), 3, given.heads, -1).permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.transpose(1, 2) * math.log(2), -1)
        rows.append((weights @ value).transpose(0, 1).reshape(-1, channels))
    attended = given.qkv.new_empty((sum(given.sizes), channels), dtype=torch.float64)
    attended[given.order[: sum(given.sizes)].long()] = torch.cat(rows)
    return attended


def launched(kernel, given, programs, **options):
    channels = given.qkv.shape[1] // 3
    width = channels // given.heads
    attended = given.qkv.new_full((len(given.qkv), channels), torch.nan)
    kernel[programs, len(given.set_start) - 1](
        given.qkv, given.order, given.set_start, given.num_sets, attended, HEADS=given.heads, WIDTH=width,
        PADDED_WIDTH=max(16, 1 << (width - 1).bit_length()), **options,
    )  # fmt: skip
    return attended


def by_warps(given):
    kernels = importlib.import_module("dsvt_ros.kernels.warp_attention")
    warps = math.gcd(given.heads, 4)
    pieces = -(-given.set_size // ROWS)
    return launched(kernels.attend, given, given.heads // warps, PIECES=pieces, num_warps=warps)


def by_blocks(given):
    kernels = importlib.import_module("dsvt_ros.kernels.set_attention")
    slots = max(16, 1 << (given.set_size - 1).bit_length())
    return launched(kernels.attend, given, given.heads, SLOTS=slots, num_warps=4)


needs_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter knows nothing of registers"),
)
both = pytest.mark.parametrize("attend", [by_blocks, pytest.param(by_warps, marks=needs_gpu)])


@both
@pytest.mark.parametrize("name", HEADS)
def test_sets(attend, name):
    """Every voxel's row is right, and no other is written."""
    given = inputs_of(name)
    attended, expected = attend(given), by_torch(given)
    voxels = len(expected)
    assert ((attended[:voxels] - expected).norm(dim=1) / expected.norm(dim=1)).max().item() < LIMIT
    assert attended[voxels:].isnan().all()


@both
def test_scores_far_apart(attend):
    """Weights of nearly 1 and 0."""
    given = inputs_of("waymo_pillar", scale=6)
    expected = by_torch(given)
    error = (attend(given)[: len(expected)] - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max().item() < LIMIT


@both
def test_no_sets(attend):
    assert attend(inputs_of("waymo_pillar", num_sets=0)).isnan().all()


@both
def test_repeated_runs_give_the_same_bytes(attend):
    given = inputs_of("waymo_voxel")
    assert torch.equal(*(attend(given)[: sum(given.sizes)] for _ in range(2)))


# ---------------------------------------------------------------------------------------------------- order of channels


def combined(bases, number):
    """The place of a register or lane in a layout: the sum of the bases of its set bits."""
    places = [base for bit, base in enumerate(bases) if number >> bit & 1]
    return [sum(place[axis] for place in places) for axis in range(3)]


def elements(layout, lane):
    """Row and channel of what a thread of the first warp has."""
    begin = combined(layout.lane_bases, lane)
    found = (combined(layout.reg_bases, register) for register in range(2 ** len(layout.reg_bases)))
    return {(begin[1] + more[1], begin[2] + more[2]) for more in found}


@pytest.mark.parametrize("width", [16, 32])
def test_a_thread_loads_what_it_multiplies(width):
    """Nothing moves between threads: thread t of four has columns 8 i + 2 t and 8 i + 2 t + 1 of queries and keys."""
    kernels = importlib.import_module("dsvt_ros.kernels.warp_attention")
    rows, values = kernels._rows_layout(4, width), kernels._values_layout(4, width)
    channels = torch.arange(width)
    operand = channels.view(4, width // 8, 2).transpose(0, 1).flatten()
    grouped = channels.view(8, width // 8).T.flatten()
    for lane in range(32):
        quarter, eighth = lane % 4, lane // 4
        pairs = [8 * i + 2 * quarter + j for i in range(width // 8) for j in (0, 1)]
        own = {(row, int(operand[column])) for row in (eighth, eighth + 8) for column in pairs}
        assert elements(rows, lane) == own
        # Results, too, in the order of values.
        assert own == {(row, int(grouped[column])) for row in (eighth, eighth + 8) for column in pairs}
        keys = [8 * i + 2 * quarter + j for i in (0, 1) for j in (0, 1)]
        columns = range(eighth, width, 8)
        assert elements(values, lane) == {(key, int(grouped[column])) for key in keys for column in columns}
