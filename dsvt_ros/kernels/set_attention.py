"""A layer of set attention as two kernels: attention inside each set, and all that follows it row by row.

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
# A finite score for masked slots: even with all of a set masked, no softmax is NaN.
MASKED: tl.constexpr = tl.constexpr(-1e4)


def tiled(weight: Tensor, height: int, width: int) -> Tensor:
    """A weight (N, K) of `torch.nn.Linear` as (N / width, K / height) tiles [k, n] of height by width."""
    rows, columns = weight.shape
    return weight.view(rows // width, width, columns // height, height).permute(0, 2, 3, 1).contiguous()


# Addresses of these change their alignment with the number of voxels or sets; it is no reason to compile anew.
@triton.jit(do_not_specialize_on_alignment=["set_indices", "set_mask"])
def attend(
    qkv,  # (V, 3 D) float16; queries are scaled such that the softmax is one of powers of two
    set_indices,  # (S, L)
    set_mask,  # (S, L)
    attended,  # (S L, D) float16; masked slots are not written
    SET_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,  # SET_SIZE, padded
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a head
    PADDED_WIDTH: tl.constexpr,
):
    """Softmax attention of one head in one set."""
    channels: tl.constexpr = HEADS * WIDTH
    number = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, PADDED_WIDTH)
    in_set = slot < SET_SIZE
    voxel = tl.load(set_indices + number * SET_SIZE + slot, mask=in_set, other=0).to(tl.int32)
    masked = tl.load(set_mask + number * SET_SIZE + slot, mask=in_set, other=1).to(tl.int1)
    in_head = (column < WIDTH)[None, :]
    penalty = tl.where(masked, MASKED, 0.0)[None, :]
    source = voxel[:, None] * (3 * channels) + column[None, :]
    target = (number * SET_SIZE + slot)[:, None] * channels + column[None, :]
    first = tl.program_id(1) * WIDTH
    query = tl.load(qkv + first + source, mask=in_head, other=0.0)
    key = tl.load(qkv + first + channels + source, mask=in_head, other=0.0)
    value = tl.load(qkv + first + 2 * channels + source, mask=in_head, other=0.0)
    scores = tl.dot(query, tl.trans(key)) + penalty
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    result = tl.dot(weights.to(tl.float16), value) / tl.sum(weights, 1)[:, None]
    tl.store(attended + first + target, result.to(tl.float16), mask=in_head & (in_set & ~masked)[:, None])


@triton.jit(do_not_specialize=["num_voxels"], do_not_specialize_on_alignment=["cell_of_voxel"])
def project(
    features,  # (V, D) float16 or float32
    rounded,  # (V, D) float16, the same
    qkv,  # (V, 3 D) float16
    weights,  # tiles of (3 D, D)
    table,  # (cells, 3 D) float16: what each cell's position embedding and the bias add to the projections
    cell_of_voxel,  # (V,)
    num_voxels,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Queries, keys and values for the first layer of a stage."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = (row < num_voxels)[:, None]
    x = ()
    for part in tl.static_range(PARTS):
        at = row[:, None] * (PARTS * CHUNK) + (part * CHUNK + column)[None, :]
        values = tl.load(features + at, mask=inside, other=0.0).to(tl.float16)
        tl.store(rounded + at, values, mask=inside)
        x = x + (values,)
    _project(x, qkv, weights, table, cell_of_voxel, row, inside, CHUNK, PARTS, STAGES)


@triton.jit(do_not_specialize=["num_voxels"], do_not_specialize_on_alignment=["slot_of_voxel", "next_cells"])
def finish_layer(
    attended,  # (S L, D) float16
    slot_of_voxel,  # (V,)
    features,  # (V, D) float16: input of the layer
    block_input,  # (V, D) float16: input of the block, read by its last layer
    output,  # (V, D) float16
    qkv,  # (V, 3 D) float16 of the next layer
    out_weights,  # tiles of (D, D)
    up_weights,  # tiles of (F, D)
    down_weights,  # tiles of (F, D)^T
    vectors,  # (10, D) float32
    up_bias,  # (F,) float32
    next_weights,  # as for `project`, of the next layer
    next_table,
    next_cells,
    num_voxels,
    ENDS_BLOCK: tl.constexpr,
    ENDS_STAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    UP_PARTS: tl.constexpr,  # F / HIDDEN
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output projection, feed-forward network, residual sums and norms; then the next layer's projections."""
    channels: tl.constexpr = PARTS * CHUNK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = (row < num_voxels)[:, None]
    tile = column[:, None] * CHUNK + column[None, :]
    own = row[:, None] * channels + column[None, :]

    slot = tl.load(slot_of_voxel + row, mask=row < num_voxels, other=0).to(tl.int32)
    sums = _zeros(ROWS, CHUNK, PARTS)
    for source in tl.range(PARTS, num_stages=STAGES):
        part = tl.load(attended + slot[:, None] * channels + (source * CHUNK + column)[None, :], mask=inside, other=0.0)
        added = ()
        for n in tl.static_range(PARTS):
            weight = tl.load(out_weights + (n * PARTS + source) * (CHUNK * CHUNK) + tile)
            added = added + (tl.dot(part, weight, sums[n]),)
        sums = added
    sums = _add(sums, features, own, inside, vectors + OUT_BIAS * channels, CHUNK, PARTS)
    x = _halves(_normalize(sums, vectors, 0, CHUNK, PARTS), PARTS)

    # The hidden features exist only HIDDEN channels at a time.
    narrow = tl.arange(0, HIDDEN)
    up_tile = column[:, None] * HIDDEN + narrow[None, :]
    down_tile = narrow[:, None] * CHUNK + column[None, :]
    sums = _zeros(ROWS, CHUNK, PARTS)
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
    sums = _normalize(added, vectors, 1, CHUNK, PARTS)

    # As published, the input is added once more around the layer, and around the block.
    sums = _normalize(_add_rows(sums, features, own, inside, CHUNK, PARTS), vectors, 2, CHUNK, PARTS)
    if ENDS_BLOCK:
        sums = _normalize(_add_rows(sums, block_input, own, inside, CHUNK, PARTS), vectors, 3, CHUNK, PARTS)
    x = _halves(sums, PARTS)
    for part in tl.static_range(PARTS):
        tl.store(output + part * CHUNK + own, x[part], mask=inside)
    if not ENDS_STAGE:
        _project(x, qkv, next_weights, next_table, next_cells, row, inside, CHUNK, PARTS, STAGES)


@triton.jit
def _project(
    x,
    qkv,
    weights,
    table,
    cell_of_voxel,
    row,
    inside,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    width: tl.constexpr = 3 * PARTS * CHUNK
    column = tl.arange(0, CHUNK)
    tile = column[:, None] * CHUNK + column[None, :]
    cell = tl.load(cell_of_voxel + row[:, None], mask=inside, other=0).to(tl.int32)
    for n in tl.range(3 * PARTS, num_stages=STAGES):
        projected = tl.load(table + cell * width + (n * CHUNK + column)[None, :], mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(PARTS):
            weight = tl.load(weights + (n * PARTS + k) * (CHUNK * CHUNK) + tile)
            projected = tl.dot(x[k], weight, projected)
        at = row[:, None] * width + (n * CHUNK + column)[None, :]
        tl.store(qkv + at, projected.to(tl.float16), mask=inside)


@triton.jit
def _normalize(x, vectors, which: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """Layer norm of rows."""
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
        at = vectors + (NORM + 2 * which) * channels + part * CHUNK + column
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
def _zeros(ROWS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    result = ()
    for _ in tl.static_range(PARTS):
        result = result + (tl.zeros((ROWS, CHUNK), tl.float32),)
    return result


@triton.jit
def _halves(x, PARTS: tl.constexpr):
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
    u = t * t
    p = 2.25881986e-08 * u - 1.58882664e-06
    p = p * u + 4.77638772e-05
    p = p * u - 0.000812187386
    p = p * u + 0.00876369061
    p = p * u - 0.0645544115
    p = p * u + 0.397870266
    return x * (p * t + 0.5)
