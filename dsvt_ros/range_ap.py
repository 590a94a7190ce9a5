"""Recall, precision and average precision by range, for data without a benchmark of its own.

Seen from above, a detection fits an object of its class whose centre is less than `MAX_DISTANCE_M` away: the middle of
the nuScenes thresholds. It asks whether an object was found, not whether its box has the right size. In the order of
their scores detections take the nearest free object; an object that does not count (`RangeFrame.counts`) only goes to
a detection that fits none that does, and that detection is then neither a hit nor a false alarm.

All frames are matched once, whatever the range. A hit belongs to the range of its object, a false alarm to its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.average_precision import ScoredMatches, average_precision, join

MAX_DISTANCE_M = 2.0

DEFAULT_EDGES_M = (0.0, 15.0, 30.0, 50.0)
"""Ends of the ranges, horizontal distances from the sensor."""

_UNMATCHED = -1


@dataclass(frozen=True, eq=False)
class ScoredCenters:
    """Detections of one class in one frame.

    Attributes:
        centers: (K, 2) float64 x, y, metres from the sensor.
        scores: (K,) scores.
    """

    centers: NDArray[np.float64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RangeFrame:
    """Objects and detections of one class in one frame.

    Attributes:
        objects: (T, 2) float64 centres x, y, metres from the sensor.
        counts: (T,) bool, False for objects that need not be found.
        detections: Down to low scores, for the precision-recall curve.
        shown: Those that the detector gives at its own score threshold.
    """

    objects: NDArray[np.float64]
    counts: NDArray[np.bool_]
    detections: ScoredCenters
    shown: ScoredCenters


@dataclass(frozen=True)
class RangeFigures:
    """How well the objects of one class were detected in one range.

    Attributes:
        near_m: Least distance, inclusive.
        far_m: Greatest distance, exclusive.
        num_objects: Objects that count.
        num_found: Of these, how many a shown box fits.
        num_false: Shown boxes that fit no object.
        ap: Area under the precision-recall curve, percent; NaN without objects.
    """

    near_m: float
    far_m: float
    num_objects: int
    num_found: int
    num_false: int
    ap: float

    @property
    def recall(self) -> float:
        """Share of the objects that were found; NaN without objects."""
        return self.num_found / self.num_objects if self.num_objects else float("nan")

    @property
    def precision(self) -> float:
        """Share of the shown boxes that fit an object; NaN without boxes."""
        num_shown = self.num_found + self.num_false
        return self.num_found / num_shown if num_shown else float("nan")


def evaluate_ranges(frames: Iterable[RangeFrame], edges_m: Sequence[float] = DEFAULT_EDGES_M) -> list[RangeFigures]:
    """Figures of each range between neighbouring edges, then of all ranges together.

    Args:
        frames: Objects and detections of one class.
        edges_m: At least two distances, increasing.
    """
    frames = list(frames)
    of_all = [(_matched(frame, frame.detections), _matched(frame, frame.shown)) for frame in frames]
    figures = []
    for near_m, far_m in [*itertools.pairwise(edges_m), (edges_m[0], edges_m[-1])]:
        detections, shown = [_NOTHING], [_NOTHING]
        for frame, (matched_detections, matched_shown) in zip(frames, of_all, strict=True):
            detections.append(_in_range(frame, frame.detections, matched_detections, near_m, far_m))
            shown.append(_in_range(frame, frame.shown, matched_shown, near_m, far_m))
        hits = join(shown).hits
        curve = join(detections)
        num_found = int(hits.sum())
        num_false = len(hits) - num_found
        figures.append(RangeFigures(near_m, far_m, curve.num_objects, num_found, num_false, average_precision(curve)))
    return figures


def _matched(frame: RangeFrame, found: ScoredCenters) -> NDArray[np.int64]:
    """(K,) row of the object that each detection takes, or -1."""
    distance = np.linalg.norm(found.centers[:, None] - frame.objects[None], axis=2)
    matched = np.full(len(found.scores), _UNMATCHED)
    free = np.ones(len(frame.objects), bool)
    for i in np.argsort(-found.scores, kind="stable"):
        fits = free & (distance[i] < MAX_DISTANCE_M)
        if (fits & frame.counts).any():
            fits &= frame.counts
        if fits.any():
            matched[i] = np.argmin(np.where(fits, distance[i], np.inf))
            free[matched[i]] = False
    return matched


def _in_range(
    frame: RangeFrame, found: ScoredCenters, matched: NDArray[np.int64], near_m: float, far_m: float
) -> ScoredMatches:
    """Hits and false alarms of a range."""
    own = frame.counts & _between(frame.objects, near_m, far_m)
    # The added row answers for detections that took no object.
    hits = np.append(own, False)[matched]
    false = (matched == _UNMATCHED) & _between(found.centers, near_m, far_m)
    chosen = hits | false
    return ScoredMatches(found.scores[chosen], hits[chosen], int(own.sum()))


def _between(centers: NDArray[np.float64], near_m: float, far_m: float) -> NDArray[np.bool_]:
    distance = np.linalg.norm(centers, axis=1)
    within: NDArray[np.bool_] = (distance >= near_m) & (distance < far_m)
    return within


_NOTHING = ScoredMatches(np.zeros(0, np.float32), np.zeros(0, bool), 0)
