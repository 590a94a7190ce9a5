"""How well a network detects on simulated scans that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.average_precision import ScoredMatches, average_precision, join, match_frame
from dsvt_ros.config import ModelConfig
from dsvt_ros.detector import Detector
from dsvt_ros.structures import Boxes3D
from dsvt_ros.training.simulator import Scan, SceneStream, cast

# An object counts if a network could know of it.
MIN_POINTS = 5
MIN_IOU = {"car": 0.5, "pedestrian": 0.25, "cyclist": 0.25}
# Low enough that the precision-recall curve is complete.
SCORE_THRESHOLD = 0.02


@dataclass(frozen=True)
class SimulatedResult:
    """Average precision on simulated scans, and what the objects were like.

    Attributes:
        ap: Class name to AP in percent, 3D IoU at least `MIN_IOU`.
        range_m: (T,) distance of every object that counts.
        num_points: (T,) returns on it.
        occlusion: (T,) share of its returns that others took.
        labels: (T,) its class.
        num_scenes: Scans.
    """

    ap: dict[str, float]
    range_m: NDArray[np.float32]
    num_points: NDArray[np.int64]
    occlusion: NDArray[np.float32]
    labels: NDArray[np.int64]
    num_scenes: int


def evaluate_simulated(detector: Detector, stream: SceneStream, scenes: Iterable[int]) -> SimulatedResult:
    """Detect on scenes of `stream` and score the boxes.

    Args:
        detector: Should keep boxes down to `SCORE_THRESHOLD`, or the precision-recall curve ends early.
        stream: Where the scenes come from.
        scenes: Their numbers.
    """
    names = detector.model.class_names
    matches: dict[str, list[ScoredMatches]] = {name: [] for name in names}
    seen: list[NDArray[np.float64]] = []
    num_scenes = 0
    for index in scenes:
        num_scenes += 1
        scan = cast([stream[index]], seed=index, device=detector.device)
        truth, ignored = _truth(scan, detector.model)
        found = detector.detect(scan.points)
        for label, name in enumerate(names):
            mine, theirs = found.labels == label, truth.labels == label
            matches[name].append(
                match_frame(found.boxes[mine], found.scores[mine], truth.boxes[theirs], ignored[theirs], MIN_IOU[name])
            )
        kept = ~ignored
        distance = np.linalg.norm(truth.boxes[kept, :2], axis=1)
        points, hidden = scan.num_points.cpu().numpy()[kept], scan.occlusion.cpu().numpy()[kept]
        seen.append(np.stack([distance, points, hidden, truth.labels[kept]]))
    table = np.concatenate(seen, axis=1)
    return SimulatedResult(
        ap={name: average_precision(join(frames)) for name, frames in matches.items()},
        range_m=table[0].astype(np.float32),
        num_points=table[1].astype(np.int64),
        occlusion=table[2].astype(np.float32),
        labels=table[3].astype(np.int64),
        num_scenes=num_scenes,
    )


def _truth(scan: Scan, model: ModelConfig) -> tuple[Boxes3D, NDArray[np.bool_]]:
    """True boxes of a scan, and which of them do not count: too few points, or outside the model's range."""
    boxes = scan.boxes.cpu().numpy()
    limits = model.point_cloud_range
    inside = (boxes[:, :2] >= limits[:2]).all(1) & (boxes[:, :2] <= limits[3:5]).all(1)
    ignored = ~inside | (scan.num_points.cpu().numpy() < MIN_POINTS)
    scores = np.ones(len(boxes), np.float32)
    return Boxes3D(boxes, scores, scan.labels.cpu().numpy(), model.class_names), ignored
