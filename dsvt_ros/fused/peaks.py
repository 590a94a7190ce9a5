"""The highest peaks of CenterHead's heatmaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048
"""Cells that a program looks at."""
SLOTS = 16
"""Peaks that it ranks at once."""


@dataclass(frozen=True)
class Peaks:
    """The K highest logits of each of G groups of classes in each of B clouds, by descending logit.

    Equal ones come by their index; where there are fewer than K, empty rows follow.

    Attributes:
        index: (B, G, K) int32, where in the group: ``(class * H + row) * W + column``; -1 in empty rows.
        logit: (B, G, K) float32; -inf in empty rows.
    """

    index: Tensor
    logit: Tensor


class PeakFinder:
    """Finds them in three kernels."""

    def __init__(self, group_sizes: Sequence[int], max_candidates: int, device: torch.device) -> None:
        """Make ready.

        Args:
            group_sizes: Classes of each group; the heatmap has a channel for each class, group by group.
            max_candidates: K.
            device: Where the heatmaps are.
        """
        self._num_groups, self._count = len(group_sizes), max_candidates
        first = [sum(group_sizes[:group]) for group in range(len(group_sizes) + 1)]
        group_of_class = [group for group, size in enumerate(group_sizes) for _ in range(size)]
        self._first_class = torch.tensor(first, dtype=torch.int32, device=device)
        self._group_of_class = torch.tensor(group_of_class, dtype=torch.int32, device=device)

    def __call__(self, heatmap: Tensor, least: float = -math.inf) -> Peaks:
        """Find the peaks.

        Args:
            heatmap: (B, classes, H, W) float16 logits, of any strides where a row follows the other without a gap.
            least: Lower logits are no peaks; the fewer remain, the quicker it goes.
        """
        from dsvt_ros.kernels import peaks as kernels

        clouds, classes, rows, columns = heatmap.shape
        if heatmap.dtype != torch.float16 or heatmap.stride(2) != columns * heatmap.stride(3):
            raise ValueError(f"want a float16 heatmap without gaps, got {heatmap.dtype}, strides {heatmap.stride()}")
        blocks = -(-rows * columns // BLOCK)
        pairs = clouds * self._num_groups
        counters = heatmap.new_zeros(pairs, kernels.COUNTERS.value, dtype=torch.int32)
        lowest = counters.new_empty(pairs, 3)
        gathered = counters.new_empty(pairs, self._count, 2)
        num_equal = counters.new_empty(clouds, classes, blocks)
        index = counters.new_empty(clouds, self._num_groups, self._count)
        logit = torch.empty_like(index, dtype=torch.float32)

        programs = (blocks, classes, clouds)
        maps = (heatmap, heatmap.stride(0), heatmap.stride(1), heatmap.stride(3), rows * columns, least)
        groups = (self._group_of_class, self._first_class, self._num_groups)
        kernels.count_keys[programs](*maps, self._group_of_class, self._num_groups, counters, BLOCK=BLOCK)
        kernels.select[programs](*maps, *groups, counters, lowest, gathered, num_equal, K=self._count, BLOCK=BLOCK)
        kernels.place[programs](
            *maps, *groups, lowest, gathered, num_equal, index, logit, K=self._count, BLOCK=BLOCK, SLOTS=SLOTS
        )
        return Peaks(index, logit)


def least_logit(score_threshold: float) -> float:
    """A logit such that every lower one has a score below the threshold, however the sigmoid is rounded."""
    share = score_threshold - 1e-6
    return math.log(share / (1 - share)) if share > 0 else -math.inf
