"""Boxes of peaks, and greedy non-maximum suppression inside each group of classes.

`decode` makes rows of boxes, sorted by descending score, or `sort_rows` sorts boxes that are made already; `overlaps`
tells for each pair whether the better box would remove the other; and `settle` finds out who survives. Boxes are
[x, y, z, length, width, height, yaw(, vx, vy)]; behind each, its row has score, label and whether it is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

PI: tl.constexpr = tl.constexpr(3.141592653589793)
EDGE_MARGIN_M: tl.constexpr = tl.constexpr(1e-4)  # as in `box_geometry`
BITS: tl.constexpr = tl.constexpr(32)  # boxes of a word


@triton.jit
def decode(
    index,  # (B G, K) (class * H + row) * W + column; -1 in rows without a peak, which are the last ones
    logit,  # (B G, K)
    values,  # (B G, K, NUM_VALUES) of the branches
    first_class,  # (G,) of each group
    labels,  # (classes,) labels, group by group
    weights,  # (classes,) of the predicted IoU in each label's score
    place,  # x and y of the map's corner, x and y extent of a cell, lower and upper limits of a centre's x, y, z
    rows,  # (B G, K, COLUMNS)
    num_groups,
    num_cells,
    map_width,
    threshold,
    K: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTER: tl.constexpr,  # first column of each branch; -1 where there is none
    CENTER_Z: tl.constexpr,
    DIM: tl.constexpr,
    ROT: tl.constexpr,
    VEL: tl.constexpr,
    IOU: tl.constexpr,  # -1: the score is the heatmap's
    LIMITED: tl.constexpr,
    SLOTS: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Decode some peaks of one group and put each at its rank."""
    row = tl.program_id(1)
    index += row * K
    logit += row * K
    values += row * K * NUM_VALUES
    rows += row * K * COLUMNS
    first = tl.load(first_class + row % num_groups)

    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    score, at, label, valid = _score(
        index, logit, values, first, labels, weights, slot, num_cells, threshold, K, NUM_VALUES, IOU
    )
    rank = tl.zeros((SLOTS,), tl.int32)
    for start in tl.static_range(0, K, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        rival_score, _, _, rival_valid = _score(
            index, logit, values, first, labels, weights, rival, num_cells, threshold, K, NUM_VALUES, IOU
        )
        rank += _num_better(score, valid, slot, rival_score, rival_valid, rival, K)

    there = (slot < K) & (at >= 0)
    value = values + slot * NUM_VALUES
    cell = tl.maximum(at, 0) % num_cells
    x = ((cell % map_width).to(tl.float32) + tl.load(value + CENTER, mask=there, other=0.0)) * tl.load(place + 2)
    y = ((cell // map_width).to(tl.float32) + tl.load(value + CENTER + 1, mask=there, other=0.0)) * tl.load(place + 3)
    x += tl.load(place)
    y += tl.load(place + 1)
    z = tl.load(value + CENTER_Z, mask=there, other=0.0)
    yaw = _atan2(tl.load(value + ROT + 1, mask=there, other=0.0), tl.load(value + ROT, mask=there, other=0.0))
    if LIMITED:
        valid &= (x >= tl.load(place + 4)) & (y >= tl.load(place + 5)) & (z >= tl.load(place + 6))
        valid &= (x <= tl.load(place + 7)) & (y <= tl.load(place + 8)) & (z <= tl.load(place + 9))

    target, inside = rows + rank * COLUMNS, slot < K
    tl.store(target, x, mask=inside)
    tl.store(target + 1, y, mask=inside)
    tl.store(target + 2, z, mask=inside)
    for axis in tl.static_range(3):
        tl.store(target + 3 + axis, tl.exp(tl.load(value + DIM + axis, mask=there, other=0.0)), mask=inside)
    tl.store(target + 6, yaw, mask=inside)
    if VEL >= 0:
        for axis in tl.static_range(2):
            tl.store(target + 7 + axis, tl.load(value + VEL + axis, mask=there, other=0.0), mask=inside)
    tl.store(target + COLUMNS - 3, score, mask=inside)
    tl.store(target + COLUMNS - 2, label.to(tl.float32), mask=inside)
    tl.store(target + COLUMNS - 1, valid.to(tl.float32), mask=inside)


@triton.jit
def sort_rows(
    boxes,  # (B, K, COLUMNS - 3)
    scores,  # (B, K)
    labels,  # (B, K)
    keep,  # (B, K)
    rows,  # (B, K, COLUMNS)
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Put some boxes at their ranks."""
    row = tl.program_id(1)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < K
    score = tl.load(scores + row * K + slot, mask=inside, other=0.0)
    valid = tl.load(keep + row * K + slot, mask=inside, other=0).to(tl.int1)
    rank = tl.zeros((SLOTS,), tl.int32)
    for start in tl.static_range(0, K, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        rival_score = tl.load(scores + row * K + rival, mask=rival < K, other=0.0)
        rival_valid = tl.load(keep + row * K + rival, mask=rival < K, other=0).to(tl.int1)
        rank += _num_better(score, valid, slot, rival_score, rival_valid, rival, K)
    source, target = boxes + (row * K + slot) * (COLUMNS - 3), rows + (row * K + rank) * COLUMNS
    for column in tl.static_range(COLUMNS - 3):
        tl.store(target + column, tl.load(source + column, mask=inside, other=0.0), mask=inside)
    label = tl.load(labels + row * K + slot, mask=inside, other=0)
    tl.store(target + COLUMNS - 3, score, mask=inside)
    tl.store(target + COLUMNS - 2, label.to(tl.float32), mask=inside)
    tl.store(target + COLUMNS - 1, valid.to(tl.float32), mask=inside)


@triton.jit
def overlaps(
    rows,  # (B G, K, COLUMNS)
    limits,  # (classes,) IoU above which a box of each label is removed
    words,  # (B G, PADDED / BITS, PADDED): bit i of [w, j]: box w BITS + i removes the later box j
    turn,  # that all boxes are turned by first, rad
    K: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    SAME_LABEL: tl.constexpr,  # whether boxes remove only those of their own label
    LATER: tl.constexpr,
):
    """One word of some boxes; not written where no box is kept, or none comes later."""
    word, row = tl.program_id(0), tl.program_id(2)
    first = word * BITS
    later_first = tl.program_id(1) * LATER
    if later_first + LATER <= first:
        return
    rows += row * K * COLUMNS
    i, j = first + tl.arange(0, BITS), later_first + tl.arange(0, LATER)
    kept = tl.load(rows + i * COLUMNS + COLUMNS - 1, mask=i < K, other=0.0) > 0
    later_kept = tl.load(rows + j * COLUMNS + COLUMNS - 1, mask=j < K, other=0.0) > 0
    if (tl.max(kept.to(tl.int32)) == 0) | (tl.max(later_kept.to(tl.int32)) == 0):
        return
    x, y, length, width, yaw, label = _box(rows, i, K, COLUMNS)
    later_x, later_y, later_length, later_width, later_yaw, later_label = _box(rows, j, K, COLUMNS)
    limit = tl.load(limits + later_label.to(tl.int32))
    x, y, length, width, label = x[:, None], y[:, None], length[:, None], width[:, None], label[:, None]
    cos, sin = tl.cos(yaw + turn)[:, None], tl.sin(yaw + turn)[:, None]
    later_length, later_width = later_length[None, :], later_width[None, :]
    later_cos, later_sin = tl.cos(later_yaw + turn)[None, :], tl.sin(later_yaw + turn)[None, :]

    # Seen from the better box, so that coordinates far from the origin cost no precision.
    from_x, from_y = later_x[None, :] - x, later_y[None, :] - y
    reach = (_diagonal(length, width) + _diagonal(later_length, later_width)) / 2
    pair = kept[:, None] & later_kept[None, :] & (i[:, None] < j[None, :])
    pair &= from_x * from_x + from_y * from_y < reach * reach
    if SAME_LABEL:
        pair &= label == later_label[None, :]
    if tl.max(pair.to(tl.int32)) > 0:
        grown_length, grown_width = later_length + 2 * EDGE_MARGIN_M, later_width + 2 * EDGE_MARGIN_M
        zero = tl.zeros((BITS, LATER), tl.float32)
        cross = _clipped_cross(
            zero, zero, length, width, cos, sin, from_x, from_y, grown_length, grown_width, later_cos, later_sin
        )
        cross += _clipped_cross(
            from_x, from_y, grown_length, grown_width, later_cos, later_sin, zero, zero, length, width, cos, sin
        )
        shared = tl.maximum(0.5 * cross, 0.0)
        union = length * width + later_length * later_width - shared
        pair &= tl.div_rn(shared, tl.maximum(union, 1e-9)) > limit[None, :]
    bit = (pair.to(tl.int32) << tl.arange(0, BITS)[:, None]).to(tl.int32)
    tl.store(words + (row * (PADDED // BITS) + word) * PADDED + j, tl.sum(bit, 0))


@triton.jit
def settle(rows, words, K: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """Drop every box of a group that a survivor removes.

    A box survives if no survivor removes it. Repeating that from "all survive" settles box after box.
    """
    row = tl.program_id(0)
    number = tl.arange(0, PADDED)
    word = tl.arange(0, PADDED // BITS)
    mark = rows + (row * K + number) * COLUMNS + COLUMNS - 1
    kept = (tl.load(mark, mask=number < K, other=0.0) > 0).to(tl.int32)
    removes = tl.load(
        words + (row * (PADDED // BITS) + word[:, None]) * PADDED + number[None, :],
        mask=word[:, None] * BITS <= number[None, :],
        other=0,
    )
    bit = tl.arange(0, BITS)[None, :]
    alive = kept
    changed = 1
    while changed > 0:
        survivors = tl.sum(tl.reshape(alive, (PADDED // BITS, BITS)) << bit, 1).to(tl.int32)
        removed = tl.max(((removes & survivors[:, None]) != 0).to(tl.int32), 0)
        left = kept * (1 - removed)
        changed = tl.max((left != alive).to(tl.int32))
        alive = left
    tl.store(mark, alive.to(tl.float32), mask=number < K)


@triton.jit
def _score(
    index,
    logit,
    values,
    first,
    labels,
    weights,
    slot,
    num_cells,
    threshold,
    K: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    IOU: tl.constexpr,
):
    """Score after rectification, index, label and whether the heatmap's score exceeds the threshold."""
    at = tl.load(index + slot, mask=slot < K, other=-1)
    there = at >= 0
    score = tl.sigmoid(tl.load(logit + slot, mask=there, other=float("-inf")))
    label = tl.load(labels + first + tl.maximum(at, 0) // num_cells)
    valid = there & (score > threshold)
    if IOU >= 0:
        iou = tl.load(values + slot * NUM_VALUES + IOU, mask=there, other=0.0)
        weight = tl.load(weights + label)
        score = _power(score, 1 - weight) * _power(tl.minimum(tl.maximum((iou + 1) / 2, 0.0), 1.0), weight)
    return tl.where(there, score, 0.0), at, label, valid


@triton.jit
def _num_better(score, valid, slot, rival_score, rival_valid, rival, K: tl.constexpr):
    """How many rivals come before each box: by score, then by place; boxes that are not kept come last, and NaN."""
    score = tl.where(valid & (score == score), score, -1.0)
    rival_score = tl.where(rival_valid & (rival_score == rival_score), rival_score, -1.0)
    higher = rival_score[None, :] > score[:, None]
    earlier = (rival_score[None, :] == score[:, None]) & (rival[None, :] < slot[:, None])
    return tl.sum(((higher | earlier) & (rival < K)[None, :]).to(tl.int32), 1)


@triton.jit
def _power(base, exponent):
    """`base ** exponent`, neither of which is negative."""
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(base)))


@triton.jit
def _atan2(y, x):
    """The angle of (x, y), rad; like Cephes' `atanf` within a few 1e-7."""
    high, low = tl.maximum(tl.abs(x), tl.abs(y)), tl.minimum(tl.abs(x), tl.abs(y))
    ratio = tl.div_rn(low, tl.where(high == 0, 1.0, high))
    steep = ratio > 0.41421356237309503
    t = tl.where(steep, tl.div_rn(ratio - 1, ratio + 1), ratio)
    u = t * t
    p = 8.05374449538e-2 * u - 1.38776856032e-1
    p = p * u + 1.99777106478e-1
    p = p * u - 3.33329491539e-1
    angle = p * u * t + t + tl.where(steep, PI / 4, 0.0)
    angle = tl.where(tl.abs(y) > tl.abs(x), PI / 2 - angle, angle)
    angle = tl.where(x < 0, PI - angle, angle)
    return tl.where(y.to(tl.int32, bitcast=True) < 0, -angle, angle)


@triton.jit
def _box(rows, number, K: tl.constexpr, COLUMNS: tl.constexpr):
    at, inside = rows + number * COLUMNS, number < K
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    length, width = tl.load(at + 3, mask=inside, other=0.0), tl.load(at + 4, mask=inside, other=0.0)
    yaw, label = tl.load(at + 6, mask=inside, other=0.0), tl.load(at + COLUMNS - 2, mask=inside, other=0.0)
    return x, y, length, width, yaw, label


@triton.jit
def _diagonal(length, width):
    return tl.sqrt(length * length + width * width)


@triton.jit
def _clipped_cross(
    x, y, length, width, cos, sin, clip_x, clip_y, clip_length, clip_width, clip_cos, clip_sin
):
    """Sum over the edges of a box, clipped to the inside of another one, of start x end (`box_geometry`)."""
    half_x, half_y = clip_length / 2, clip_width / 2
    total = tl.zeros_like(clip_x + x)
    for edge in tl.static_range(4):
        # Counter-clockwise from front left.
        start_x, start_y = _corner(x, y, length, width, cos, sin, edge)
        end_x, end_y = _corner(x, y, length, width, cos, sin, (edge + 1) % 4)
        local_x, local_y = _turned_back(start_x - clip_x, start_y - clip_y, clip_cos, clip_sin)
        local_end_x, local_end_y = _turned_back(end_x - clip_x, end_y - clip_y, clip_cos, clip_sin)
        enter_x, leave_x = _between(local_x, local_end_x - local_x, half_x)
        enter_y, leave_y = _between(local_y, local_end_y - local_y, half_y)
        enter = tl.minimum(tl.maximum(tl.maximum(enter_x, enter_y), 0.0), 1.0)
        leave = tl.minimum(tl.maximum(tl.minimum(leave_x, leave_y), 0.0), 1.0)
        edge_x, edge_y = end_x - start_x, end_y - start_y
        ax, ay = start_x + enter * edge_x, start_y + enter * edge_y
        bx, by = start_x + leave * edge_x, start_y + leave * edge_y
        total += tl.where(leave > enter, ax * by - ay * bx, 0.0)
    return total


@triton.jit
def _corner(x, y, length, width, cos, sin, number: tl.constexpr):
    along = length * (0.5 if number == 0 or number == 3 else -0.5)
    across = width * (0.5 if number < 2 else -0.5)
    return along * cos - across * sin + x, along * sin + across * cos + y


@triton.jit
def _turned_back(x, y, cos, sin):
    return cos * x + sin * y, cos * y - sin * x


@triton.jit
def _between(start, delta, half):
    """The share of an edge that lies between two lines, from entering to leaving."""
    parallel = tl.abs(delta) < 1e-9
    inside = tl.abs(start) <= half
    safe = tl.where(parallel, 1.0, delta)
    at_low, at_high = (-half - start) / safe, (half - start) / safe
    enter = tl.where(parallel, tl.where(inside, 0.0, 2.0), tl.minimum(at_low, at_high))
    leave = tl.where(parallel, tl.where(inside, 1.0, -1.0), tl.maximum(at_low, at_high))
    return enter, leave
