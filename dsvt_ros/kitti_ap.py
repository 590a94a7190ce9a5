"""Average precision on the KITTI object data set, seen from above (BEV) and in 3D.

What counts, at each of three difficulties, follows the data set's development kit (``evaluate_object.cpp``):

- An object counts if it is of the class, higher than `MIN_HEIGHT_PX` in the image, and neither more occluded nor more
  truncated than the difficulty allows. Harder objects, and those of a neighbouring class (Van for Car, Person_sitting
  for Pedestrian), are *ignored*: they need not be found, and a detection of them is no false alarm.
- Detections lower than `MIN_HEIGHT_PX` in the image are no false alarms.

There are three ways to a figure, all in percent:

- ``r40`` and ``r11`` repeat the kit, so that figures can be compared with published ones. It picks the score thresholds
  at which recall comes closest to 0, 1/40, 2/40 ..., matches anew at each of them (every object, in the order of the
  file, takes the free detection that it overlaps most), and averages the interpolated precision of the thresholds
  1 to 40, or 0, 4, 8 ... 40. Precision is looked up by the *number* of the threshold. With fewer than 40 objects there
  are fewer thresholds than recall positions, and the missing ones count as precision 0: a perfect detector of five
  objects gets 4/40 = 10 %.
- ``exact`` is the area under the interpolated curve of all detections, without recall positions: 100 % for a perfect
  detector of any number of objects. Detections take objects in the order of their scores (`match_overlaps`), which
  needs no threshold. A detection that is too low in the image but fits an object that counts is a hit; in the kit it
  takes the object out of the count.

DontCare areas are regions of the image where objects are not labelled. The kit compares them in the metric that it
evaluates, and they have no box in BEV and 3D, so there a detection inside them is a false alarm all the same: ``r40``
and ``r11`` count it, ``exact`` does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.average_precision import ScoredMatches, average_precision, join, match_overlaps
from dsvt_ros.box_geometry import iou_matrix
from dsvt_ros.io.kitti import KittiObjects, upright_boxes

DIFFICULTIES = ("easy", "moderate", "hard")
MIN_HEIGHT_PX = {"easy": 40.0, "moderate": 25.0, "hard": 25.0}
MAX_OCCLUSION = {"easy": 0, "moderate": 1, "hard": 2}
MAX_TRUNCATION = {"easy": 0.15, "moderate": 0.30, "hard": 0.50}

METRICS = ("3d", "bev")
AP_KINDS = ("r40", "r11", "exact")

DONT_CARE = "DontCare"
NUM_POSITIONS = 41
"""Recall positions of the development kit: 0, 1/40 ... 1."""


@dataclass(frozen=True)
class KittiClass:
    """A class that is evaluated.

    Attributes:
        type: Its name in label files.
        neighbor: Class whose objects are ignored, or None.
        min_ious: Least overlap of a match: the kit's, then a looser one.
    """

    type: str
    neighbor: str | None
    min_ious: tuple[float, float]


CLASSES = {
    "car": KittiClass("Car", "Van", (0.7, 0.5)),
    "pedestrian": KittiClass("Pedestrian", "Person_sitting", (0.5, 0.25)),
    "cyclist": KittiClass("Cyclist", None, (0.5, 0.25)),
}


@dataclass(frozen=True)
class KittiFrame:
    """Labels and detections of one frame.

    Attributes:
        labels: What is there, DontCare areas included.
        detections: Boxes with scores, down to low ones.
        shown: Those that the detector gives at its own score threshold; they are counted as found objects.
    """

    labels: KittiObjects
    detections: KittiObjects
    shown: KittiObjects


@dataclass(frozen=True)
class KittiResult:
    """How well objects were detected.

    Attributes:
        ap: Class, then measure such as ``3d@0.7``, then difficulty, to AP in percent; NaN where no object counts.
        found: Class, then difficulty, to the number of objects that a shown box matches (3D, looser overlap), and the
            number of objects that count.
        num_frames: Frames.
    """

    ap: dict[str, dict[str, dict[str, float]]]
    found: dict[str, dict[str, tuple[int, int]]]
    num_frames: int


def evaluate_kitti(
    frames: Iterable[KittiFrame], kind: str = "r40", classes: Sequence[str] = tuple(CLASSES)
) -> KittiResult:
    """Average precision and found objects.

    Args:
        frames: Labels and detections.
        kind: One of `AP_KINDS`.
        classes: Names out of `CLASSES`.
    """
    frames = list(frames)
    ap: dict[str, dict[str, dict[str, float]]] = {}
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name in classes:
        described = CLASSES[name]
        ap[name], found[name] = {}, {}
        for metric in METRICS:
            pairs = [_pairs(frame.labels, frame.detections, described, metric) for frame in frames]
            for min_iou in described.min_ious:
                ap[name][f"{metric}@{min_iou:g}"] = {
                    difficulty: _average_precision([pair.at(difficulty) for pair in pairs], min_iou, kind)
                    for difficulty in DIFFICULTIES
                }
        shown = [_pairs(frame.labels, frame.shown, described, "3d") for frame in frames]
        for difficulty in DIFFICULTIES:
            matches = join([_by_score(pair.at(difficulty), described.min_ious[-1]) for pair in shown] or [_NOTHING])
            found[name][difficulty] = int(matches.hits.sum()), matches.num_objects
    return KittiResult(ap, found, len(frames))


# ------------------------------------------------------------------------------------------ what counts where


@dataclass(frozen=True)
class _Candidates:
    """What one frame adds at one difficulty.

    Attributes:
        overlap: (K, T) IoU of detections and objects.
        scores: (K,) scores.
        own: (K,) bool, detections of the class.
        low: (K,) bool, detections of any class that are too low in the image.
        dont_care: (K,) bool, detections in areas without labels.
        ignored: (T,) bool, objects that need not be found.
    """

    overlap: NDArray[np.float64]
    scores: NDArray[np.float64]
    own: NDArray[np.bool_]
    low: NDArray[np.bool_]
    dont_care: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True)
class _Pairs:
    """Detections, and objects of a class and its neighbour, of one frame."""

    overlap: NDArray[np.float64]
    scores: NDArray[np.float64]
    own: NDArray[np.bool_]
    heights: NDArray[np.float64]
    dont_care: NDArray[np.bool_]
    objects: KittiObjects
    neighbors: NDArray[np.bool_]

    def at(self, difficulty: str) -> _Candidates:
        _, top, _, bottom = self.objects.image_boxes.T
        ignored = (
            self.neighbors
            | (bottom - top <= MIN_HEIGHT_PX[difficulty])
            | (self.objects.occlusion > MAX_OCCLUSION[difficulty])
            | (self.objects.truncation > MAX_TRUNCATION[difficulty])
        )
        low = self.heights < MIN_HEIGHT_PX[difficulty]
        return _Candidates(self.overlap, self.scores, self.own, low, self.dont_care, ignored)


def _pairs(labels: KittiObjects, detections: KittiObjects, described: KittiClass, metric: str) -> _Pairs:
    neighbors = labels.of_types(described.neighbor) if described.neighbor else np.zeros(len(labels), bool)
    relevant = labels.of_types(described.type) | neighbors
    objects = labels.select(relevant)
    boxes, truth = torch.as_tensor(upright_boxes(detections)), torch.as_tensor(upright_boxes(objects))
    areas = labels.image_boxes[labels.of_types(DONT_CARE)]
    scores = detections.scores
    return _Pairs(
        overlap=iou_matrix(boxes, truth, bev=metric == "bev").numpy(),
        scores=np.where(np.isnan(scores), 1.0, scores),
        own=detections.of_types(described.type),
        heights=np.abs(detections.image_boxes[:, 3] - detections.image_boxes[:, 1]),
        dont_care=_covered_share(detections.image_boxes, areas) > described.min_ious[0],
        objects=objects,
        neighbors=neighbors[relevant],
    )


def _covered_share(boxes: NDArray[np.float64], areas: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) greatest share of each image box (K, 4) that one of the areas (A, 4) covers; 0 without areas."""
    low = np.maximum(boxes[:, None, :2], areas[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], areas[None, :, 2:])
    covered = (high - low).clip(min=0).prod(axis=2)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    share: NDArray[np.float64] = covered.max(axis=1, initial=0.0) / np.maximum(size, 1e-9)
    return share


# ------------------------------------------------------------------------------------------ average precision


def _average_precision(frames: list[_Candidates], min_iou: float, kind: str) -> float:
    if not any((~frame.ignored).any() for frame in frames):
        return float("nan")
    if kind == "exact":
        return average_precision(join([_by_score(frame, min_iou) for frame in frames]))
    precision = _precision_at_positions(frames, min_iou)
    return 100.0 * float(np.mean(precision[1:] if kind == "r40" else precision[::4]))


def _by_score(frame: _Candidates, min_iou: float) -> ScoredMatches:
    """Matches in the order of the scores: ``exact``, and the objects that were found."""
    own = frame.own
    tolerated = (frame.low | frame.dont_care)[own]
    return match_overlaps(frame.overlap[own], frame.scores[own].astype(np.float32), frame.ignored, min_iou, tolerated)


def _precision_at_positions(frames: list[_Candidates], min_iou: float) -> NDArray[np.float64]:
    """(41,) interpolated precision at the kit's recall positions; 0 where no threshold reaches them."""
    hits = np.concatenate([_scores_of_hits(frame, min_iou) for frame in frames])
    thresholds = _score_thresholds(hits, sum(int((~frame.ignored).sum()) for frame in frames))
    true, false = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for frame in frames:
        counts = _count(frame, min_iou, thresholds)
        true += counts[0]
        false += counts[1]
    precision = np.zeros(NUM_POSITIONS)
    precision[: len(thresholds)] = true / np.maximum(true + false, 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _scores_of_hits(frame: _Candidates, min_iou: float) -> NDArray[np.float64]:
    """Scores of the detections that objects take if each takes the free one with the highest score."""
    free = frame.own | frame.low
    scores = []
    for i in range(len(frame.ignored)):
        candidates = free & (frame.overlap[:, i] > min_iou)
        if not candidates.any():
            continue
        best = int(np.argmax(np.where(candidates, frame.scores, -np.inf)))
        free[best] = False
        if not frame.ignored[i] and not frame.low[best]:
            scores.append(frame.scores[best])
    return np.array(scores, np.float64)


def _score_thresholds(scores: NDArray[np.float64], num_objects: int) -> NDArray[np.float64]:
    """Scores of hits at which recall comes closest to the positions 0, 1/40, 2/40 ..., one position each."""
    scores = np.sort(scores)[::-1]
    chosen, position = [], 0.0
    for i, score in enumerate(scores):
        recall, next_recall = (i + 1) / num_objects, (i + 2) / num_objects
        if i < len(scores) - 1 and next_recall - position < position - recall:
            continue
        chosen.append(score)
        position += 1 / (NUM_POSITIONS - 1)
    return np.array(chosen[:NUM_POSITIONS], np.float64)


def _count(
    frame: _Candidates, min_iou: float, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True and false positives of a frame at every threshold (P,), matched for each of them anew."""
    free = (frame.own | frame.low) & (frame.scores >= thresholds[:, None])
    true = np.zeros(len(thresholds), np.int64)
    every = np.arange(len(thresholds))
    for i in range(len(frame.ignored)):
        fits = frame.overlap[:, i] > min_iou
        if not fits.any():
            continue
        # The greatest overlap, or the first of the low detections if only those fit.
        rank = np.where(fits, np.where(frame.low, 0.0, frame.overlap[:, i]), -1.0)
        rank = np.where(free, rank, -1.0)
        best = np.argmax(rank, axis=1)
        taken = rank[every, best] >= 0
        free[every[taken], best[taken]] = False
        if not frame.ignored[i]:
            true += taken & ~frame.low[best]
    false = (free & frame.own & ~frame.low).sum(axis=1)
    return true, false


_NOTHING = ScoredMatches(np.zeros(0, np.float32), np.zeros(0, bool), 0)
