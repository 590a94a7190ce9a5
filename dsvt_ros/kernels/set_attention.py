"""A layer of set attention as three kernels: projections, attention inside each set, and all that follows row by row.

Features are float16 in memory, sums and norms float32 in registers. Letters as in `structures.py`; F channels of the
feed-forward network, H heads. Every output element is written by one program, so repeated runs give the same bytes.

Triton's blocks have powers of two as extents, and a feature of 192 channels is none. So a feature is held as a tuple
of PARTS blocks of CHUNK channels each (192 = 3 * 64), and a weight matrix lies in memory as tiles of CHUNK by CHUNK
(`tiled`), in the order in which they are read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Rows of `vectors`, one layer's parameters of D elements each.
OUT_BIAS: tl.constexpr = tl.constexpr(0)
DOWN_BIAS: tl.constexpr = tl.constexpr(1)
NORM: tl.constexpr = tl.constexpr(2)  # weight and bias of norm1, norm2, the encoder's and the block's norm
LAYER_NORM_EPS: tl.constexpr = tl.constexpr(1e-5)
# Added to the scores of slots that hold no voxel; finite, so that no softmax is NaN.
MASKED: tl.constexpr = tl.constexpr(-1e4)


def tiled(weight: Tensor, height: int, width: int) -> Tensor:
    """A weight (N, K) of `torch.nn.Linear` as (N / width, K / height) tiles [k, n] of height by width."""
    rows, columns = weight.shape
    return weight.view(rows // width, width, columns // height, height).permute(0, 2, 3, 1).contiguous()


@triton.jit
def attend(
    qkv,  # (V, 3 D) float16, voxels set after set; queries are scaled such that the softmax is one of powers of two
    order,  # (V,) int32, which voxels these are
    set_start,  # (S + 1,) int32, where each set begins in `order`
    num_sets,  # (1,) int32
    attended,  # (V, D) float16
    SLOTS: tl.constexpr,  # of a set, padded
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a head
    PADDED_WIDTH: tl.constexpr,
):
    """Softmax attention of one head in one set."""
    channels: tl.constexpr = HEADS * WIDTH
    head, number = tl.program_id(0), tl.program_id(1)
    # All at once: what a program waits for, one after the other, is what it takes.
    total, first, end = tl.load(num_sets), tl.load(set_start + number), tl.load(set_start + number + 1)
    if number >= total:
        return
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, PADDED_WIDTH)[None, :]
    in_set = slot < end - first
    voxel = tl.load(order + first + slot, mask=in_set, other=0)
    # Where there is room, one more channel of ones: the second product then gives the sum of the weights, too.
    is_sum = column == WIDTH
    ones = is_sum & in_set[:, None]
    penalty = tl.where(in_set, 0.0, MASKED)[None, :]
    source = qkv + head * WIDTH + (first + slot)[:, None] * (3 * channels) + column
    target = attended + head * WIDTH + voxel[:, None] * channels + column
    present = in_set[:, None] & (column < WIDTH)
    query = tl.load(source, mask=present, other=0.0)
    key = tl.load(source + channels, mask=present, other=0.0)
    value = tl.load(source + 2 * channels, mask=present, other=0.0)
    if PADDED_WIDTH > WIDTH:
        value = tl.where(ones, 1.0, value.to(tl.float32)).to(tl.float16)
    scores = tl.dot(query, tl.trans(key)) + penalty
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    result = tl.dot(weights.to(tl.float16), value)
    sums = tl.sum(tl.where(is_sum, result, 0.0), 1) if PADDED_WIDTH > WIDTH else tl.sum(weights, 1)
    tl.store(target, (result / sums[:, None]).to(tl.float16), mask=present)


@triton.jit
def project(
    features,  # descriptor of (V, D) float16, blocks [ROWS, CHUNK]
    weights,  # descriptor of (D, 3 D) float16, blocks [CHUNK, COLUMNS]
    table,  # (cells, 3 D) float16: what each cell's position embedding and the bias add to the projections
    cell_of_voxel,  # (V,) int32
    position,  # (V,) int32, where in the order of sets each voxel is
    qkv,  # (V, 3 D) float16, in that order
    num_voxels,  # (1,) int32
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Queries, keys and values of a layer, in the order in which its sets are read.

    Rows beyond the number of voxels are not written.
    """
    first_row, first_column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    count = tl.load(num_voxels)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, ROWS)
    inside = row < count
    cell = tl.load(cell_of_voxel + row, mask=inside, other=0)
    place = tl.load(position + row, mask=inside, other=0)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in tl.range(CHANNELS // CHUNK, num_stages=STAGES):
        sums = tl.dot(features.load([first_row, part * CHUNK]), weights.load([part * CHUNK, first_column]), sums)
    column = first_column + tl.arange(0, COLUMNS)
    present = (column < 3 * CHANNELS)[None, :]
    added = table + cell[:, None] * (3 * CHANNELS) + column[None, :]
    sums += tl.load(added, mask=present, other=0.0).to(tl.float32)
    own = qkv + place[:, None] * (3 * CHANNELS) + column[None, :]
    tl.store(own, sums.to(tl.float16), mask=inside[:, None] & present)


@triton.jit
def finish_layer(
    attended,  # (V, D) float16
    features,  # (V, D) float16: input of the layer
    block_input,  # (V, D) float16: input of the block, read by its last layer
    output,  # (V, D) float16
    out_weights,  # tiles of (D, D)
    up_weights,  # tiles of (F, D)
    down_weights,  # tiles of (F, D)^T
    vectors,  # (10, D) float32
    up_bias,  # (F,) float32
    num_voxels,  # (1,) int32
    ENDS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UP_PARTS: tl.constexpr,  # F / HIDDEN
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output projection, feed-forward network, residual sums and norms."""
    channels: tl.constexpr = PARTS * CHUNK
    first_row = tl.program_id(0) * ROWS
    count = tl.load(num_voxels)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = (row < count)[:, None]
    tile = column[:, None] * CHUNK + column[None, :]
    own = row[:, None] * channels + column[None, :]
    norms = vectors + NORM * channels

    sums = zeros(ROWS, CHUNK, PARTS)
    for source in tl.range(PARTS, num_stages=STAGES):
        part = tl.load(attended + source * CHUNK + own, mask=inside, other=0.0)
        added = ()
        for n in tl.static_range(PARTS):
            weight = tl.load(out_weights + (n * PARTS + source) * (CHUNK * CHUNK) + tile)
            added = added + (tl.dot(part, weight, sums[n]),)
        sums = added
    sums = _add(sums, features, own, inside, vectors + OUT_BIAS * channels, CHUNK, PARTS)
    x = halves(normalize(sums, norms, CHUNK, PARTS), PARTS)

    # The hidden features exist only HIDDEN channels at a time.
    narrow = tl.arange(0, HIDDEN)
    up_tile = column[:, None] * HIDDEN + narrow[None, :]
    down_tile = narrow[:, None] * CHUNK + column[None, :]
    sums = zeros(ROWS, CHUNK, PARTS)
    for j in tl.range(UP_PARTS, num_stages=STAGES):
        hidden = tl.zeros((ROWS, HIDDEN), tl.float32)
        for k in tl.static_range(PARTS):
            weight = tl.load(up_weights + (j * PARTS + k) * (CHUNK * HIDDEN) + up_tile)
            hidden = tl.dot(x[k], weight, hidden)
        active = _gelu(hidden + tl.load(up_bias + j * HIDDEN + narrow)[None, :]).to(tl.float16)
        added = ()
        for n in tl.static_range(PARTS):
            weight = tl.load(down_weights + (j * PARTS + n) * (CHUNK * HIDDEN) + down_tile)
            added = added + (tl.dot(active, weight, sums[n]),)
        sums = added
    added = ()
    for n in tl.static_range(PARTS):
        bias = tl.load(vectors + DOWN_BIAS * channels + n * CHUNK + column)
        added = added + (sums[n] + x[n].to(tl.float32) + bias[None, :],)
    sums = normalize(added, norms + 2 * channels, CHUNK, PARTS)

    # As published, the input is added once more around the layer, and around the block.
    sums = normalize(_add_rows(sums, features, own, inside, CHUNK, PARTS), norms + 4 * channels, CHUNK, PARTS)
    if ENDS_BLOCK:
        sums = normalize(_add_rows(sums, block_input, own, inside, CHUNK, PARTS), norms + 6 * channels, CHUNK, PARTS)
    x = halves(sums, PARTS)
    for part in tl.static_range(PARTS):
        tl.store(output + part * CHUNK + own, x[part], mask=inside)


@triton.jit
def normalize(x, parameters, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """Layer norm of rows; `parameters` (2, D) are its weight and bias."""
    channels: tl.constexpr = PARTS * CHUNK
    total = tl.sum(x[0], 1)
    for part in tl.static_range(1, PARTS):
        total += tl.sum(x[part], 1)
    mean = (total / channels)[:, None]
    total = tl.sum((x[0] - mean) * (x[0] - mean), 1)
    for part in tl.static_range(1, PARTS):
        total += tl.sum((x[part] - mean) * (x[part] - mean), 1)
    scale = tl.rsqrt(total / channels + LAYER_NORM_EPS)[:, None]
    column = tl.arange(0, CHUNK)
    result = ()
    for part in tl.static_range(PARTS):
        at = parameters + part * CHUNK + column
        weight, bias = tl.load(at), tl.load(at + channels)
        result = result + ((x[part] - mean) * scale * weight[None, :] + bias[None, :],)
    return result


@triton.jit
def _add(x, rows, own, inside, bias, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    column = tl.arange(0, CHUNK)
    result = ()
    for part in tl.static_range(PARTS):
        more = tl.load(rows + part * CHUNK + own, mask=inside, other=0.0).to(tl.float32)
        result = result + (x[part] + more + tl.load(bias + part * CHUNK + column)[None, :],)
    return result


@triton.jit
def _add_rows(x, rows, own, inside, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    result = ()
    for part in tl.static_range(PARTS):
        more = tl.load(rows + part * CHUNK + own, mask=inside, other=0.0).to(tl.float32)
        result = result + (x[part] + more,)
    return result


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """Features whose sums are yet to come."""
    result = ()
    for _ in tl.static_range(PARTS):
        result = result + (tl.zeros((ROWS, CHUNK), tl.float32),)
    return result


@triton.jit
def halves(x, PARTS: tl.constexpr):
    """Features in float16."""
    result = ()
    for part in tl.static_range(PARTS):
        result = result + (x[part].to(tl.float16),)
    return result


@triton.jit
def _gelu(x):
    """GELU within 2e-4 of the one by erf, less than float16 rounds off above 0.4.

    The normal distribution's integral is 0.5 plus an odd polynomial, fitted on [-4, 4] such that it is exactly 0 and 1
    beyond. An erf of the library would take longer than the layer's whole attention.
    """
    t = tl.minimum(tl.maximum(x, -4.0), 4.0)
    return x * (gelu_slope(t * t) * t + 0.5)


@triton.jit
def gelu_slope(u):
    """What the integral gains over 0.5, divided by x, as a polynomial of u = x * x <= 16."""
    p = 2.25881986e-08 * u - 1.58882664e-06
    p = p * u + 4.77638772e-05
    p = p * u - 0.000812187386
    p = p * u + 0.00876369061
    p = p * u - 0.0645544115
    return p * u + 0.397870266
