"""How much boxes overlap, all of a group at once."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.box_geometry import EDGE_MARGIN_M
from dsvt_ros.constants import constant

PARALLEL_M = 1e-9
"""Edges that advance less along an axis are taken to advance so much."""


def bev_iou_with_later(boxes: Tensor) -> Tensor:
    """BEV IoU of each box of a group with those after it.

    As `box_geometry.bev_intersection`, of whose terms each says how much of an edge of one box lies within another. An
    edge from s to e, of which a share lies within, adds this share of s x e.

    Args:
        boxes: (G, K, 7).

    Returns:
        (G, K, K) IoU in the upper triangles; the rest holds anything.
    """
    x, y, _, length, width, _, yaw = boxes[..., :7].unbind(-1)
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    number = torch.arange(boxes.shape[1], device=boxes.device)
    # Of two boxes the later one is grown.
    is_later = (number[:, None] > number).to(boxes.dtype) * EDGE_MARGIN_M
    half_length, half_width = length[..., None] / 2 + is_later, width[..., None] / 2 + is_later

    # Row by row the boxes with the edges, seen from the boxes of the columns: their centres and half axes.
    dx, dy = x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]
    cos_there, sin_there = cos[:, None], sin[:, None]
    center = torch.stack([dx * cos_there + dy * sin_there, dy * cos_there - dx * sin_there])
    turned_cos = cos[:, :, None] * cos_there + sin[:, :, None] * sin_there
    turned_sin = sin[:, :, None] * cos_there - cos[:, :, None] * sin_there
    along = torch.stack([half_length * turned_cos, half_length * turned_sin])
    across = torch.stack([half_width * -turned_sin, half_width * turned_cos])
    # Axis, corner, group, row, column; the edge from each corner to the next one.
    signs = constant((1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0), boxes).view(2, 4, 1, 1, 1)
    start = center[:, None] + signs[0] * along[:, None] + signs[1] * across[:, None]
    edge = torch.roll(start, -1, 1) - start

    # Liang-Barsky: an edge is between both lines of an axis from middle - reach to middle + reach.
    inverse = edge.masked_fill(edge.abs() < PARALLEL_M, PARALLEL_M).reciprocal_()
    limits = torch.stack([half_length, half_width]).transpose(2, 3)[:, None]
    middle, reach = -start * inverse, (limits * inverse).abs_()
    before, after = reach - middle, reach + middle
    leaves = torch.minimum(after[0], after[1]).clamp_max_(1)
    enters = torch.minimum(before[0], before[1]).clamp_max_(0)  # with its sign turned round
    share = (leaves + enters).clamp_min_(0)

    # Around the centre of the earlier box, which for its own edges is their own.
    own = share.sum(0) * (2 * half_length * half_width)
    others = (share * (start[0] * edge[1] - start[1] * edge[0])).sum(0)
    shared = (0.5 * (own + others.transpose(1, 2))).clamp_min_(0)
    area = length * width
    return shared / (area[:, :, None] + area[:, None] - shared).clamp_min_(1e-9)
