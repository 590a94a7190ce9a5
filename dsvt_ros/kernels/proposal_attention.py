"""Attention of TransFusion's proposals to the cells around them, without bringing each one's cells together first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_around(
    query,  # (B * Q, D) float32, scaled
    projected,  # (B * cells, 2 D) float32: key and value of every cell
    cells,  # (B * Q,) int64: cell of each proposal in its cloud
    around,  # (K,) int64: what to add to a cell for each of those around it
    attended,  # (B * Q, D) float32
    num_proposals,  # Q
    num_cells,
    outside_penalty,  # added to the scores of cells before the first and beyond the last one
    AROUND: tl.constexpr,  # K
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a head: a power of two
    HEADS_OF_PROGRAM: tl.constexpr,  # a power of two
    KEYS: tl.constexpr,  # of a block
):
    """Softmax attention of one proposal in some heads, block of keys by block of keys."""
    channels: tl.constexpr = HEADS * WIDTH
    proposal = tl.program_id(0)
    cell = tl.load(cells + proposal)
    projected += (proposal // num_proposals).to(tl.int64) * num_cells * (2 * channels)
    first = tl.program_id(1) * (HEADS_OF_PROGRAM * WIDTH)
    channel = first + tl.arange(0, HEADS_OF_PROGRAM * WIDTH)
    own = tl.load(query + proposal * channels + channel)[None, :]
    top = tl.full((HEADS_OF_PROGRAM,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_OF_PROGRAM,), tl.float32)
    sums = tl.zeros((HEADS_OF_PROGRAM, WIDTH), tl.float32)
    for start in range(0, AROUND, KEYS):
        number = start + tl.arange(0, KEYS)
        there = cell + tl.load(around + number, mask=number < AROUND, other=0)
        clamped = tl.minimum(tl.maximum(there, 0), num_cells - 1)
        source = projected + clamped[:, None] * (2 * channels) + channel[None, :]
        key = tl.load(source)
        value = tl.load(source + channels)
        scores = tl.sum(tl.reshape(own * key, (KEYS, HEADS_OF_PROGRAM, WIDTH)), 2)
        scores += tl.where(there == clamped, 0.0, outside_penalty)[:, None]
        scores = tl.where((number < AROUND)[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp(scores - higher[None, :])
        fading = tl.exp(top - higher)
        total = total * fading + tl.sum(weights, 0)
        value = tl.reshape(value, (KEYS, HEADS_OF_PROGRAM, WIDTH))
        sums = sums * fading[:, None] + tl.sum(weights[:, :, None] * value, 0)
        top = higher
    result = tl.reshape(sums / total[:, None], (HEADS_OF_PROGRAM * WIDTH,))
    tl.store(attended + proposal * channels + channel, result)
