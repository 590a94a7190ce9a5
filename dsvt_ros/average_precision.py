"""Average precision of detections against true boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.box_geometry import iou_matrix


@dataclass(frozen=True)
class ScoredMatches:
    """Detections of one class over all frames, each a hit or a false alarm, and how many objects there were.

    Attributes:
        scores: (K,) scores.
        hits: (K,) bool, True where the detection was matched to an object that counts.
        num_objects: Objects that count.
    """

    scores: NDArray[np.float32]
    hits: NDArray[np.bool_]
    num_objects: int


def match_frame(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    truth: NDArray[np.float32],
    ignored: NDArray[np.bool_],
    min_iou: float,
    *,
    bev: bool = False,
) -> ScoredMatches:
    """Match the detections of one class in one frame to its true boxes.

    In order of descending score every detection takes the free object that it overlaps most, if by `min_iou` or more.
    Detections whose best object is an ignored one count neither as hit nor as false alarm.

    Args:
        boxes: (K, 7) detected boxes.
        scores: (K,) their scores.
        truth: (T, 7) true boxes of the class.
        ignored: (T,) bool, objects that need not be found (too few points, say).
        min_iou: Least IoU of a match.
        bev: Compare seen from above instead of in 3D.

    Returns:
        Matches of this frame, ordered by descending score.
    """
    overlap = iou_matrix(torch.as_tensor(boxes), torch.as_tensor(truth), bev=bev).numpy()
    return match_overlaps(overlap, scores, ignored, min_iou)


def match_overlaps(
    overlap: NDArray[np.float32] | NDArray[np.float64],
    scores: NDArray[np.float32],
    ignored: NDArray[np.bool_],
    min_iou: float,
    tolerated: NDArray[np.bool_] | None = None,
) -> ScoredMatches:
    """As `match_frame`, from the overlaps of detections and objects.

    Args:
        overlap: (K, T) IoU of every detection with every object.
        scores: (K,) scores of the detections.
        ignored: (T,) bool, objects that need not be found.
        min_iou: Least IoU of a match.
        tolerated: (K,) bool, detections that are no false alarms either if they match nothing; None: no such ones.
    """
    order = np.argsort(-scores, kind="stable")
    overlap, scores = overlap[order], scores[order]
    free = np.ones(len(ignored), bool)
    hits = np.zeros(len(scores), bool)
    counted = np.ones(len(scores), bool) if tolerated is None else ~tolerated[order]
    for i in range(len(scores)):
        candidates = np.where(free & (overlap[i] >= min_iou), overlap[i], -1.0)
        # Objects that count go first: an ignored one never steals the hit.
        best = _argmax(np.where(ignored, -1.0, candidates))
        if best is not None:
            hits[i], counted[i], free[best] = True, True, False
            continue
        best = _argmax(candidates)
        if best is not None:
            counted[i], free[best] = False, False
    return ScoredMatches(scores[counted], hits[counted], int((~ignored).sum()))


def join(frames: list[ScoredMatches]) -> ScoredMatches:
    """Matches of several frames as one."""
    return ScoredMatches(
        np.concatenate([frame.scores for frame in frames]),
        np.concatenate([frame.hits for frame in frames]),
        sum(frame.num_objects for frame in frames),
    )


def precision_recall(matches: ScoredMatches) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each detection, by descending score; both (K,)."""
    hits = matches.hits[np.argsort(-matches.scores, kind="stable")]
    found = np.cumsum(hits)
    return found / np.arange(1, len(hits) + 1), found / max(matches.num_objects, 1)


def average_precision(matches: ScoredMatches) -> float:
    """Area under the interpolated precision-recall curve, in percent; NaN if there are no objects.

    Precision at a recall is interpolated as the best precision at that or any higher recall. The area is exact; no
    recall positions are sampled.
    """
    if matches.num_objects == 0:
        return float("nan")
    precision, recall = precision_recall(matches)
    if len(precision) == 0:
        return 0.0
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return 100.0 * float(np.sum(np.diff(recall, prepend=0.0) * best))


def _argmax(values: NDArray[np.float64]) -> int | None:
    """Index of the largest value, or None if none is positive."""
    if len(values) == 0:
        return None
    best = int(np.argmax(values))
    return best if values[best] > 0 else None
