"""Heads whose full maps say what their branches give at peaks."""

from __future__ import annotations

import pytest
import torch
from fused_fixtures import DEVICE
from tiny import randomize

from dsvt_ros.config import CenterHeadConfig
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.fold import folded_copy

ONE_GROUP = CenterHeadConfig(shared_channels=64)
TWO_GROUPS = CenterHeadConfig(
    shared_channels=8,
    branches=("center", "center_z", "dim", "rot", "vel", "iou", "hm"),
    groups=(("pedestrian",), ("cyclist", "car")),
    bias_before_norm=True,
)
HEATMAP_FIRST = CenterHeadConfig(shared_channels=32, branches=("hm", "rot", "dim", "center_z", "center"))

HEADS = pytest.mark.parametrize(
    "config", [ONE_GROUP, TWO_GROUPS, HEATMAP_FIRST], ids=["one group", "two groups", "heatmap first"]
)


class _Network(torch.nn.Module):
    def __init__(self, config: CenterHeadConfig):
        super().__init__()
        self.dense_head = CenterHead(config, 24, 3)


def head_of(config: CenterHeadConfig) -> tuple[CenterHead, CenterHead]:
    """A head of 24 channels and three classes, and the same with folded batch norms."""
    torch.manual_seed(0)
    head = randomize(_Network(config)).dense_head.to(DEVICE)
    return head, folded_copy(head)


def maps_at(maps, names, index: torch.Tensor) -> torch.Tensor:
    """(B, G, K, columns) of the maps with these names, from (B, G, K) peaks; rows without one (-1) hold anything."""
    parts = []
    for name in names:
        values = getattr(maps, name).unflatten(1, (index.shape[1], -1)).flatten(3)
        cell = (index.long() % values.shape[3])[:, :, None]
        parts.append(values.gather(3, cell.expand(-1, -1, values.shape[2], -1)).transpose(2, 3))
    return torch.cat(parts, 3)
