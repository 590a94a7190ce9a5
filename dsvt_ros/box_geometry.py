"""Overlap of boxes that stand upright: corners, intersection areas, BEV and 3D IoU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.constants import constant

# One box of a pair is grown by this much on every side, so that edges of equal or touching boxes never coincide: on
# a shared edge, rounding would decide whether it counts once, twice or not at all.
EDGE_MARGIN_M = 1e-4


def bev_corners(boxes: Tensor) -> Tensor:
    """Corners seen from above, counter-clockwise from front left.

    Args:
        boxes: (..., 7) ``[x, y, z, length, width, height, yaw]``.

    Returns:
        (..., 4, 2) x and y.
    """
    signs = constant((0.5, 0.5, -0.5, 0.5, -0.5, -0.5, 0.5, -0.5), boxes).view(4, 2)
    local = signs * boxes[..., None, 3:5]
    cos, sin = torch.cos(boxes[..., 6, None]), torch.sin(boxes[..., 6, None])
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack([x, y], dim=-1) + boxes[..., None, :2]


def bev_intersection(first: Tensor, second: Tensor) -> Tensor:
    """Area shared by pairs of boxes seen from above, m².

    The boundary of the intersection consists of the parts of each box's edges that lie in the other box, so its area
    follows from Green's theorem over the clipped edges: no polygon has to be sorted.

    Args:
        first: (P, 7) boxes.
        second: (P, 7) boxes.

    Returns:
        (P,) areas, exact to about `EDGE_MARGIN_M` times the perimeter.
    """
    # Relative to one of them, so that coordinates far from the origin cost no precision.
    origin = first[:, :2]
    first = torch.cat([torch.zeros_like(origin), first[:, 2:]], dim=1)
    second = torch.cat([second[:, :2] - origin, second[:, 2:3], second[:, 3:6] + 2 * EDGE_MARGIN_M, second[:, 6:]], 1)
    # Both ways in one call: on a GPU the number of operations counts, not their size.
    one_way, other_way = _clipped_cross(torch.cat([first, second]), torch.cat([second, first])).chunk(2)
    return (0.5 * (one_way + other_way)).clamp_min(0)


def _clipped_cross(boxes: Tensor, clip: Tensor) -> Tensor:
    """Sum over the edges of `boxes`, clipped to the inside of `clip`, of start x end."""
    start = bev_corners(boxes)
    end = torch.roll(start, -1, dims=1)
    cos, sin = torch.cos(clip[:, 6]), torch.sin(clip[:, 6])
    rotation = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 1, 2, 2)
    local_start = (rotation @ (start - clip[:, None, :2])[..., None])[..., 0]
    half = clip[:, None, 3:5] / 2

    # Liang-Barsky: the share [enter, leave] of each edge between the two lines of each axis.
    delta = torch.roll(local_start, -1, dims=1) - local_start
    parallel = delta.abs() < 1e-9
    safe = delta.masked_fill(parallel, 1.0)
    at_low, at_high = (-half - local_start) / safe, (half - local_start) / safe
    enter, leave = torch.minimum(at_low, at_high), torch.maximum(at_low, at_high)
    between = local_start.abs() <= half
    inside, outside = parallel & between, parallel & ~between
    enter = enter.masked_fill(inside, 0.0).masked_fill(outside, 2.0).amax(-1).clamp(0, 1)
    leave = leave.masked_fill(inside, 1.0).masked_fill(outside, -1.0).amin(-1).clamp(0, 1)

    edge = end - start
    a, b = start + enter[..., None] * edge, start + leave[..., None] * edge
    cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return torch.where(leave > enter, cross, torch.zeros_like(cross)).sum(1)


def bev_iou_pairs(first: Tensor, second: Tensor) -> Tensor:
    """BEV IoU of (P, 7) and (P, 7) boxes, pair by pair."""
    overlap = bev_intersection(first, second)
    area = first[:, 3] * first[:, 4] + second[:, 3] * second[:, 4]
    return overlap / (area - overlap).clamp_min(1e-9)


def iou_3d_pairs(first: Tensor, second: Tensor) -> Tensor:
    """3D IoU of (P, 7) and (P, 7) upright boxes, pair by pair."""
    top = torch.minimum(first[:, 2] + first[:, 5] / 2, second[:, 2] + second[:, 5] / 2)
    bottom = torch.maximum(first[:, 2] - first[:, 5] / 2, second[:, 2] - second[:, 5] / 2)
    overlap = bev_intersection(first, second) * (top - bottom).clamp_min(0)
    volume = first[:, 3:6].prod(1) + second[:, 3:6].prod(1)
    return overlap / (volume - overlap).clamp_min(1e-9)


def iou_matrix(first: Tensor, second: Tensor, *, bev: bool) -> Tensor:
    """(M, K) IoU of every box of `first` (M, 7) with every box of `second` (K, 7).

    Only pairs whose circumscribed circles meet are computed.
    """
    i, j = circles_meet(first, second).nonzero(as_tuple=True)
    iou = first.new_zeros(len(first), len(second))
    iou[i, j] = (bev_iou_pairs if bev else iou_3d_pairs)(first[i], second[j])
    return iou


def circles_meet(first: Tensor, second: Tensor) -> Tensor:
    """(M, K) bool, whether the circumscribed circles of (M, 7) and (K, 7) boxes meet: others do not overlap."""
    radius = torch.linalg.vector_norm(first[:, 3:5], dim=1) / 2
    other_radius = torch.linalg.vector_norm(second[:, 3:5], dim=1) / 2
    meet: Tensor = torch.cdist(first[:, :2], second[:, :2]) < radius[:, None] + other_radius[None]
    return meet
