"""The kernel for Hopper GPUs against torch and against the kernels that it stands in for."""

from dataclasses import dataclass

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from torch.nn.functional import gelu, layer_norm

from dsvt_ros.fused.launch import MAX_COLUMNS, ROWS, descriptor, num_warps
from dsvt_ros.fused.weights import half

_interpreter = interpreted("hopper_layer", "set_attention")
pytestmark = needs_triton
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

CHANNELS, HIDDEN, CHUNK = 192, 384, 64
CELLS = 144
MORE = 70
"""Rows of room beyond those that count: more than a block."""
LIMIT = 1e-3
"""The error of a row as a share of its size: three times what rounding to float16 in between makes of most rows."""


# ---------------------------------------------------------------------------------------------------- order of channels


def channel_of_column():
    """The channel in each column of a block of sums: thread t of four has columns 8 i + 2 t and 8 i + 2 t + 1."""
    at = [(column // 8, column % 8 // 2, column % 2) for column in range(CHUNK)]
    return torch.tensor([32 * (i // 4) + 8 * t + 2 * (i % 4) + j for i, t, j in at])


def combined(bases, number):
    """The place of a register, lane or warp in a layout: the sum of the bases of its set bits."""
    places = [base for bit, base in enumerate(bases) if number >> bit & 1]
    return tuple(sum(place[axis] for place in places) for axis in (0, 1))


def test_a_thread_has_the_same_elements_before_and_after():
    """`_natural` and `_paired_sums` rename registers, and move nothing."""
    from dsvt_ros.kernels.hopper_layer import NATURAL

    layout, channels = NATURAL.value, channel_of_column().tolist()
    for warp in range(4):
        for lane in range(32):
            begin = [combined(layout.lane_bases, lane), combined(layout.warp_bases, warp)]
            found = set()
            for register in range(32):
                parts = [combined(layout.reg_bases, register), *begin]
                found.add((sum(part[0] for part in parts), sum(part[1] for part in parts)))
            row = 16 * warp + lane // 4
            columns = [8 * i + 2 * (lane % 4) + j for i in range(8) for j in range(2)]
            assert found == {(r, channels[column]) for r in (row, row + 8) for column in columns}


@pytest.mark.parametrize("with_qkv", [False, True])
def test_weights_in_the_order_of_their_use(with_qkv):
    """The kernel's products, block by block as it reads them, are those of the matrices."""
    from dsvt_ros.kernels.hopper_layer import weight_blocks

    generator = torch.Generator().manual_seed(0)

    def whole(rows, columns):  # numbers whose sums are exact
        return torch.randint(-3, 4, (rows, columns), generator=generator).float()

    out, up, down = whole(CHANNELS, CHANNELS), whole(HIDDEN, CHANNELS), whole(CHANNELS, HIDDEN)
    qkv = whole(3 * CHANNELS, CHANNELS) if with_qkv else None
    x, y, z = whole(2, CHANNELS), whole(2, HIDDEN), whole(2, CHANNELS)
    stream = weight_blocks(out, up, down, qkv)
    assert stream.dtype == torch.float16
    tiles = iter(stream.float().view(-1, 3, CHUNK, CHUNK))
    channels = channel_of_column()

    def split(rows):
        return list(rows.split(CHUNK, 1))

    def paired(rows):
        return [part[:, channels] for part in split(rows)]

    def product(parts):
        return sum(part @ block.T for part, block in zip(parts, next(tiles), strict=True))

    for expected in paired(x @ out.T):
        assert torch.equal(product(split(x)), expected)
    sums = [torch.zeros(2, CHUNK) for _ in range(3)]
    for up_expected, hidden in zip(split(x @ up.T), split(y), strict=True):
        assert torch.equal(product(paired(x)), up_expected)
        sums = [own + hidden @ block.T for own, block in zip(sums, next(tiles), strict=True)]
    assert all(torch.equal(*both) for both in zip(sums, paired(y @ down.T), strict=True))
    if qkv is not None:
        for expected in paired(z @ qkv.T):
            assert torch.equal(product(paired(z)), expected)
    assert next(tiles, None) is None


# ----------------------------------------------------------------------------------------------------------- the kernel


@dataclass(frozen=True)
class Inputs:
    """A layer's parameters, and rows with garbage beyond the number of voxels."""

    out: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    qkv: torch.Tensor
    vectors: torch.Tensor
    up_bias: torch.Tensor
    table: torch.Tensor
    attended: torch.Tensor
    features: torch.Tensor
    block_input: torch.Tensor
    cell_of_voxel: torch.Tensor
    position: torch.Tensor
    num_voxels: torch.Tensor


def inputs_of(voxels, more):
    generator = torch.Generator(DEVICE).manual_seed(voxels)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, device=DEVICE) * scale

    def weight(rows, columns):
        return half(normal(rows, columns, scale=columns**-0.5)).float()

    vectors = normal(10, CHANNELS, scale=0.2)
    vectors[2::2] += 1  # of norms
    rows = normal(3, voxels + more, CHANNELS).half()
    rows[:, voxels:] = torch.nan
    cells = torch.randint(0, CELLS, (voxels + more,), generator=generator, device=DEVICE, dtype=torch.int32)
    cells[voxels:] = 2**30
    position = torch.full_like(cells, 2**30)
    position[:voxels] = torch.randperm(voxels, generator=generator, device=DEVICE)
    return Inputs(
        weight(CHANNELS, CHANNELS), weight(HIDDEN, CHANNELS), weight(CHANNELS, HIDDEN), weight(3 * CHANNELS, CHANNELS),
        vectors, normal(HIDDEN, scale=0.2), half(normal(CELLS, 3 * CHANNELS, scale=0.2)), *rows, cells, position,
        torch.tensor([voxels], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip


def poisoned(given):
    """Where output and queries, keys and values go."""
    rows = given.features
    return torch.full_like(rows, torch.nan), rows.new_full((len(rows), 3 * CHANNELS), torch.nan)


def by_torch(given, ends_block):
    """In single precision."""
    vectors = given.vectors

    def norm(x, which):
        return layer_norm(x, (CHANNELS,), vectors[2 + 2 * which], vectors[3 + 2 * which])

    features = given.features.float()
    x = norm(features + given.attended.float() @ given.out.T + vectors[0], 0)
    x = norm(x + gelu(x @ given.up.T + given.up_bias) @ given.down.T + vectors[1], 1)
    x = norm(x + features, 2)
    if ends_block:
        x = norm(x + given.block_input.float(), 3)
    voxels = int(given.num_voxels)
    projected = x @ given.qkv.T + given.table[given.cell_of_voxel.clamp(max=CELLS - 1).long()].float()
    qkv = torch.empty_like(projected)
    qkv[given.position[:voxels].long()] = projected[:voxels]
    return x, qkv


def by_triton(given, ends_block):
    """The kernels of other GPUs."""
    from dsvt_ros.kernels import set_attention as kernels

    output, qkv = poisoned(given)
    out, up = (half(kernels.tiled(weight, CHUNK, CHUNK)) for weight in (given.out, given.up))
    down = half(kernels.tiled(given.down, CHUNK, CHUNK).transpose(0, 1))
    count = len(output)
    kernels.finish_layer[(-(-count // ROWS),)](
        given.attended, given.features, given.block_input, output, out, up, down, given.vectors, given.up_bias,
        given.num_voxels, ENDS_BLOCK=ends_block, CHUNK=CHUNK, PARTS=3, HIDDEN=CHUNK, UP_PARTS=6, ROWS=ROWS, STAGES=3,
        num_warps=8,
    )  # fmt: skip
    kernels.project[-(-3 * CHANNELS // MAX_COLUMNS), -(-count // ROWS)](
        descriptor(output, ROWS, CHUNK), descriptor(half(given.qkv.T), CHUNK, MAX_COLUMNS), given.table,
        given.cell_of_voxel, given.position, qkv, given.num_voxels, CHANNELS=CHANNELS, CHUNK=CHUNK,
        COLUMNS=MAX_COLUMNS, ROWS=ROWS, STAGES=3, num_warps=num_warps(output.device),
    )  # fmt: skip
    return output, qkv


def by_gluon(given, ends_block, with_qkv):
    from dsvt_ros.kernels import hopper_layer as kernels
    from dsvt_ros.kernels.hopper_ring import MAX_REGISTERS, NUM_WARPS

    output, qkv = poisoned(given)
    weights = kernels.weight_blocks(given.out, given.up, given.down, given.qkv if with_qkv else None)
    described = (kernels.descriptor(rows) for rows in (given.attended, given.features, given.block_input, weights))
    kernels.finish_and_project[(torch.cuda.get_device_properties(DEVICE).multi_processor_count,)](
        *described, output, qkv, given.vectors, given.up_bias, given.table, given.cell_of_voxel, given.position,
        given.num_voxels, ENDS_BLOCK=ends_block, WITH_QKV=with_qkv, num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return output, qkv


def worst(found, expected):
    """The largest error of a row as a share of its size."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("with_qkv", [False, True], ids=["last layer", "with qkv"])
@pytest.mark.parametrize("ends_block", [False, True], ids=["in a block", "ends a block"])
@pytest.mark.parametrize("more", [0, MORE], ids=["full", "with room"])
@pytest.mark.parametrize("voxels", [1, 63, 64, 65, 128, 1000, 40_870])
def test_rows(voxels, more, ends_block, with_qkv):
    """Every voxel's row is right, and no other is written."""
    given = inputs_of(voxels, more)
    output, qkv = by_gluon(given, ends_block, with_qkv)
    expected, expected_qkv = by_torch(given, ends_block)
    other, other_qkv = by_triton(given, ends_block)
    assert worst(output[:voxels], expected[:voxels]) < LIMIT
    assert worst(output[:voxels], other[:voxels]) < LIMIT
    assert output[voxels:].isnan().all()
    if with_qkv:
        assert worst(qkv[:voxels], expected_qkv[:voxels]) < LIMIT
        assert worst(qkv[:voxels], other_qkv[:voxels]) < LIMIT
        assert qkv[voxels:].isnan().all()
    else:
        assert qkv.isnan().all()


@needs_hopper
@pytest.mark.gpu
def test_no_voxels():
    given = inputs_of(0, MORE)
    assert all(rows.isnan().all() for rows in by_gluon(given, True, True))


@needs_hopper
@pytest.mark.gpu
def test_repeated_runs_give_the_same_bytes():
    given = inputs_of(40_870, MORE)
    first = by_gluon(given, True, True)
    for _ in range(5):
        again = by_gluon(given, True, True)
        assert all(torch.equal(*(rows[:40_870] for rows in both)) for both in zip(first, again, strict=True))
