"""Attention pooling: the maximum of a pooled voxel's slots asks, the slots answer.

Features are float16 in memory, sums, softmax and norm float32 in registers. Letters as in `structures.py`; P slots.
Every output element is written by one program, so repeated runs give the same bytes.

Products that are the same for all rows are left to `convolution.multiply`: keys and values are projected once a voxel,
queries once a pooled voxel, all without biases. That of the keys changes no softmax, and weights that sum to 1 carry
that of the values through to the output, where it is part of the bias. So an empty slot is one of zeros.

As in `set_attention`, a feature is a tuple of PARTS blocks of CHUNK channels. Queries, keys and values have theirs in
such an order that every block holds CHUNK / HEADS channels of each head, side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsvt_ros.kernels.set_attention import halves, normalize, zeros

# Rows of `vectors`, D elements each.
QUERY_BIAS: tl.constexpr = tl.constexpr(0)
OUT_BIAS: tl.constexpr = tl.constexpr(1)
NORM: tl.constexpr = tl.constexpr(2)  # weight and bias


@triton.jit
def find_maximum(
    features,  # (V, D) float16
    pooled,  # (V', P) int32, voxel in each slot; -1 where there is none
    num_pooled,  # (1,) int32
    maximum,  # (V', D) float16
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The maximum of the slots, channel by channel; empty ones are zeros."""
    channels: tl.constexpr = PARTS * CHUNK
    first_row = tl.program_id(0) * ROWS
    count = tl.load(num_pooled)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, ROWS)
    inside = row < count
    own = row[:, None] * channels + tl.arange(0, CHUNK)[None, :]
    voxels = _load_voxels(pooled, row, inside, SLOTS)
    for part in tl.static_range(PARTS):
        largest = _gather(features + part * CHUNK, voxels[0], channels, CHUNK)
        for slot in tl.static_range(1, SLOTS):
            largest = tl.maximum(largest, _gather(features + part * CHUNK, voxels[slot], channels, CHUNK))
        tl.store(maximum + part * CHUNK + own, largest, mask=inside[:, None])


@triton.jit
def attend(
    queries,  # (V', D) float16, scaled such that the softmax is one of powers of two
    projected,  # (V, 2 D) float16, keys and values
    pooled,  # (V', P) int32
    num_pooled,  # (1,) int32
    positions,  # (P, D) float32, what the position embedding of each slot adds to keys
    vectors,  # (4, D) float32
    attended,  # (V', D) float16
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Softmax attention of all heads over the slots."""
    channels: tl.constexpr = PARTS * CHUNK
    first_row = tl.program_id(0) * ROWS
    count = tl.load(num_pooled)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = row < count
    own = row[:, None] * channels + column[None, :]
    voxels = _load_voxels(pooled, row, inside, SLOTS)
    query = ()
    for part in tl.static_range(PARTS):
        asked = tl.load(queries + part * CHUNK + own, mask=inside[:, None], other=0.0).to(tl.float32)
        query = query + (asked + tl.load(vectors + QUERY_BIAS * channels + part * CHUNK + column)[None, :],)

    scores = ()
    for slot in tl.static_range(SLOTS):
        score = tl.zeros((ROWS, HEADS), tl.float32)
        for part in tl.static_range(PARTS):
            key = _gather(projected + part * CHUNK, voxels[slot], 2 * channels, CHUNK).to(tl.float32)
            key += tl.load(positions + slot * channels + part * CHUNK + column)[None, :]
            score += tl.sum(tl.reshape(query[part] * key, (ROWS, HEADS, CHUNK // HEADS)), 2)
        scores = scores + (score,)
    weights = _softmax(scores, SLOTS)

    for part in tl.static_range(PARTS):
        values = projected + channels + part * CHUNK
        sums = tl.zeros((ROWS, HEADS, CHUNK // HEADS), tl.float32)
        for slot in tl.static_range(SLOTS):
            value = _gather(values, voxels[slot], 2 * channels, CHUNK).to(tl.float32)
            sums += weights[slot][:, :, None] * tl.reshape(value, (ROWS, HEADS, CHUNK // HEADS))
        result = tl.reshape(sums, (ROWS, CHUNK)).to(tl.float16)
        tl.store(attended + part * CHUNK + own, result, mask=inside[:, None])


@triton.jit
def finish(
    attended,  # descriptor of (V', D) float16, blocks [ROWS, CHUNK]
    out_weights,  # descriptor of (D, D) float16, blocks [CHUNK, CHUNK]
    maximum,  # (V', D) float16
    num_pooled,  # (1,) int32
    vectors,  # (4, D) float32
    output,  # (V', D) float16
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output projection, residual sum with the maximum, and norm."""
    channels: tl.constexpr = PARTS * CHUNK
    first_row = tl.program_id(0) * ROWS
    count = tl.load(num_pooled)
    if first_row >= count:
        return
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNK)
    inside = (row < count)[:, None]
    own = row[:, None] * channels + column[None, :]
    sums = zeros(ROWS, CHUNK, PARTS)
    for source in tl.range(PARTS, num_stages=STAGES):
        block = attended.load([first_row, source * CHUNK])
        added = ()
        for part in tl.static_range(PARTS):
            added = added + (tl.dot(block, out_weights.load([source * CHUNK, part * CHUNK]), sums[part]),)
        sums = added
    x = ()
    for part in tl.static_range(PARTS):
        more = tl.load(maximum + part * CHUNK + own, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(vectors + OUT_BIAS * channels + part * CHUNK + column)
        x = x + (sums[part] + more + bias[None, :],)
    x = halves(normalize(x, vectors + NORM * channels, CHUNK, PARTS), PARTS)
    for part in tl.static_range(PARTS):
        tl.store(output + part * CHUNK + own, x[part], mask=inside)


@triton.jit
def _load_voxels(pooled, row, inside, SLOTS: tl.constexpr):
    """The voxels of some rows, slot by slot."""
    result = ()
    for slot in tl.static_range(SLOTS):
        result = result + (tl.load(pooled + row * SLOTS + slot, mask=inside, other=-1),)
    return result


@triton.jit
def _gather(rows, voxel, STRIDE: tl.constexpr, CHUNK: tl.constexpr):
    """The first CHUNK channels of some rows; zeros where there is no voxel."""
    source = rows + voxel[:, None] * STRIDE + tl.arange(0, CHUNK)[None, :]
    return tl.load(source, mask=(voxel >= 0)[:, None], other=0.0)


@triton.jit
def _softmax(scores, SLOTS: tl.constexpr):
    """Weights that sum to 1, slot by slot."""
    largest = scores[0]
    for slot in tl.static_range(1, SLOTS):
        largest = tl.maximum(largest, scores[slot])
    powers = ()
    total = tl.zeros_like(largest)
    for slot in tl.static_range(SLOTS):
        power = tl.exp2(scores[slot] - largest)
        powers = powers + (power,)
        total += power
    weights = ()
    for slot in tl.static_range(SLOTS):
        weights = weights + (powers[slot] / total,)
    return weights
