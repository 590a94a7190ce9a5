"""For how many voxels TensorRT engines should be built, from the clouds that a sensor gives.

A cloud is padded to the room of the engine that it takes, and the padding is computed like the rest. Several engines
(buckets) waste less of it, each at the price of its own build and memory.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dsvt_ros.capacity import Capacity, capacity_for, default_voxels
from dsvt_ros.config import ModelConfig

STEP = 1024
"""Rooms are multiples of this, as no build differs much within."""
HEADROOM = 0.1
"""Of the largest cloud seen: the next one may be larger."""
MAX_BUCKETS = 3
MIN_SAVING = 0.1
"""Share of the work that one more bucket must save."""


@dataclass(frozen=True)
class Spread:
    """Some of the values of a quantity."""

    minimum: int
    median: int
    p95: int
    maximum: int


@dataclass(frozen=True)
class Buckets:
    """Engines of fixed room, and what they do with the clouds.

    Attributes:
        voxels: Room of each, increasing.
        clouds: Number of clouds that take each of them.
        cut: How many of the clouds of the last one lose voxels.
        padding: Share of the engines' work that is spent on padding.
    """

    voxels: tuple[int, ...]
    clouds: tuple[int, ...]
    cut: int
    padding: float


@dataclass(frozen=True)
class ProfilePlan:
    """What was seen, and what follows from it.

    Attributes:
        clouds: Number of clouds that have voxels; the others say nothing about engines.
        voxels: Of these clouds.
        sets: Of these clouds, for each window shift; of all stages together.
        default: What is built unless told otherwise.
        proposed: Engines with room for every cloud seen.
        dynamic: Minimum, optimum and maximum of one engine for any of them, the alternative.
    """

    clouds: int
    voxels: Spread
    sets: tuple[Spread, Spread]
    default: Buckets
    proposed: Buckets
    dynamic: tuple[int, int, int]


def plan_profile(clouds: Sequence[Capacity], model: ModelConfig) -> ProfilePlan:
    """Propose engines.

    Args:
        clouds: Voxels and sets of each; at least one with voxels.
        model: The network.

    Raises:
        ValueError: No cloud has voxels.
    """
    seen = sorted((cloud for cloud in clouds if cloud.voxels > 0), key=lambda cloud: cloud.voxels)
    if not seen:
        raise ValueError("no cloud has voxels")
    voxels = [cloud.voxels for cloud in seen]
    cells = math.prod(model.grid_size)
    # Not beyond the grid; three are the fewest that have a minimum, an optimum and a maximum.
    largest = min(_round_up(math.ceil(voxels[-1] * (1 + HEADROOM))), max(cells, voxels[-1], 3))
    sizes = _choose(voxels, largest, model)
    optimum = min(max(_round_up(_quantile(voxels, 0.5)), 2), largest - 1)
    minimum = min(max(int(voxels[0] * (1 - HEADROOM)) // STEP * STEP, 1), optimum - 1)
    first, second = (_spread([sum(stage.sets[shift] for stage in cloud.stages) for cloud in seen]) for shift in (0, 1))
    return ProfilePlan(
        clouds=len(seen),
        voxels=_spread(voxels),
        sets=(first, second),
        default=_use((default_voxels(model),), seen, model),
        proposed=_use(sizes, seen, model),
        dynamic=(minimum, optimum, largest),
    )


def work(model: ModelConfig, counts: Capacity) -> int:
    """Multiplications of an attention layer in each block; pooling, layer norms and the like left out.

    A voxel is projected four times (query, key, value, result) and goes through the feed-forward network; in a set
    every slot meets every other one twice (scores, weighted sum).
    """
    backbone = model.backbone_3d
    width = backbone.channels
    of_voxel = 4 * width * width + 2 * width * backbone.ffn_channels
    return sum(
        room.voxels * of_voxel + room.sets[shift] * 2 * stage.set_size**2 * width
        for stage, shifts, room in zip(backbone.stages, backbone.shifts, counts.stages, strict=True)
        for shift in shifts
    )


def _choose(voxels: Sequence[int], largest: int, model: ModelConfig) -> tuple[int, ...]:
    """The fewest rooms that waste little: one more only where it saves enough.

    Args:
        voxels: Of each cloud, in ascending order.
        largest: The room that all of them fit into.
        model: The network.
    """
    # The largest one is there for the largest cloud, and not for the headroom alone.
    candidates = sorted({_round_up(count) for count in voxels if _round_up(count) < min(voxels[-1], largest)})
    fitting = {size: bisect_right(voxels, size) for size in (*candidates, largest)}
    cost = {size: _work_of_room(model, size) for size in fitting}

    def total(sizes: tuple[int, ...]) -> int:
        served = [0, *(fitting[size] for size in sizes)]
        counts = (after - before for before, after in itertools.pairwise(served))
        return sum(count * cost[size] for size, count in zip(sizes, counts, strict=True))

    best: tuple[int, ...] = (largest,)
    for extra in range(1, min(MAX_BUCKETS, len(candidates) + 1)):
        choice = min(((*some, largest) for some in itertools.combinations(candidates, extra)), key=total)
        if total(choice) > (1 - MIN_SAVING) * total(best):
            break
        best = choice
    return best


def _use(sizes: tuple[int, ...], clouds: Sequence[Capacity], model: ModelConfig) -> Buckets:
    """What engines with room for `sizes` voxels do with the clouds."""
    served = [0] * len(sizes)
    cut = needed = spent = 0
    for cloud in clouds:
        index = bisect_left(sizes, cloud.voxels)
        if index == len(sizes):
            index, cut = index - 1, cut + 1
        served[index] += 1
        room = _work_of_room(model, sizes[index])
        needed += min(work(model, cloud), room)
        spent += room
    return Buckets(sizes, tuple(served), cut, 1 - needed / spent)


def _work_of_room(model: ModelConfig, voxels: int) -> int:
    return work(model, capacity_for(model, voxels))


def _round_up(count: int) -> int:
    return -(-count // STEP) * STEP


def _spread(values: Sequence[int]) -> Spread:
    ordered = sorted(values)
    return Spread(ordered[0], _quantile(ordered, 0.5), _quantile(ordered, 0.95), ordered[-1])


def _quantile(ordered: Sequence[int], share: float) -> int:
    """One of the values that were seen, the higher one of two neighbours."""
    return ordered[math.ceil(share * (len(ordered) - 1))]
