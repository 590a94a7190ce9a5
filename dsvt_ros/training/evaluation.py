"""How well a network detects on simulated scans that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.average_precision import ScoredMatches, average_precision, join, match_frame
from dsvt_ros.config import DetectorConfig, with_overrides
from dsvt_ros.detector import Detector
from dsvt_ros.model.dsvt import DSVT
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


def evaluate_simulated(
    network: DSVT, defaults: DetectorConfig, stream: SceneStream, num_scenes: int, device: torch.device
) -> SimulatedResult:
    """Detect on the first scenes of `stream` and score the boxes.

    The detector gets the scans as a user's sensor would send them (sensor frame, height unknown).
    """
    config = with_overrides(defaults, {"postprocess.score_threshold": SCORE_THRESHOLD})
    detector = Detector(network, config, device)
    names = network.config.class_names
    matches: dict[str, list[ScoredMatches]] = {name: [] for name in names}
    seen: list[NDArray[np.float64]] = []
    for index in range(num_scenes):
        scan = cast([stream[index]], seed=index, device=device)
        truth, ignored = _truth(scan, network)
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


def _truth(scan: Scan, network: DSVT) -> tuple[Boxes3D, NDArray[np.bool_]]:
    """True boxes of a scan, and which of them do not count: too few points, or outside the model's range."""
    boxes = scan.boxes.cpu().numpy()
    limits = network.config.point_cloud_range
    inside = (boxes[:, :2] >= limits[:2]).all(1) & (boxes[:, :2] <= limits[3:5]).all(1)
    ignored = ~inside | (scan.num_points.cpu().numpy() < MIN_POINTS)
    scores = np.ones(len(boxes), np.float32)
    return Boxes3D(boxes, scores, scan.labels.cpu().numpy(), network.config.class_names), ignored
