"""Compares detected boxes with known objects, as ``dsvt demo`` counts them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.box_geometry import iou_matrix
from dsvt_ros.structures import Boxes3D

MIN_POINTS = 20
"""An object with at least so many points must be found."""

IGNORED_POINTS = 5
"""An object with fewer points than `MIN_POINTS` but at least so many may be found: a box on it is not false."""

MAX_DISTANCE_M = {"pedestrian": 0.6}
"""Greatest distance of the centres of a match, by class."""

OTHER_MAX_DISTANCE_M = 1.0
MIN_BEV_IOU = 0.3
"""Boxes that overlap more than this match at any distance of their centres."""


@dataclass(frozen=True)
class FrameScore:
    """What was found in one cloud.

    Attributes:
        known: (T,) bool, objects that must be found.
        found: (T,) bool, objects that were found, whether they had to or not.
        false: (M,) bool, boxes where there is no such object.
    """

    known: NDArray[np.bool_]
    found: NDArray[np.bool_]
    false: NDArray[np.bool_]

    @property
    def num_known(self) -> int:
        """Objects that must be found."""
        return int(self.known.sum())

    @property
    def num_found(self) -> int:
        """Those of them that were found."""
        return int((self.known & self.found).sum())

    @property
    def num_false(self) -> int:
        """Boxes where there is no object of their class."""
        return int(self.false.sum())


def score_frame(boxes: Boxes3D, truth: Boxes3D, num_points: NDArray[np.int64], limits: tuple[float, ...]) -> FrameScore:
    """Match boxes to objects of their class, the highest score first; each object matches once.

    Args:
        boxes: Detected.
        truth: Known objects in the same frame, with the same classes.
        num_points: (T,) points on each object.
        limits: x, y, z minimum and x, y, z maximum of the model; objects beyond need not be found.
    """
    centers = truth.boxes[:, :2]
    inside = ((centers >= limits[:2]) & (centers <= limits[3:5])).all(axis=1)
    known = inside & (num_points >= MIN_POINTS)
    free = num_points >= IGNORED_POINTS
    distance = np.linalg.norm(boxes.boxes[:, None, :3] - truth.boxes[None, :, :3], axis=2)
    overlap = iou_matrix(torch.as_tensor(boxes.boxes[:, :7]), torch.as_tensor(truth.boxes[:, :7]), bev=True).numpy()
    reach = np.array([MAX_DISTANCE_M.get(name, OTHER_MAX_DISTANCE_M) for name in truth.class_names])
    fits = (distance <= reach[truth.labels]) | (overlap > MIN_BEV_IOU)
    fits &= boxes.labels[:, None] == truth.labels[None, :]

    found = np.zeros(len(truth), bool)
    false = np.zeros(len(boxes), bool)
    for box in np.argsort(-boxes.scores, kind="stable"):
        candidates = np.flatnonzero(fits[box] & free)
        if not len(candidates):
            false[box] = True
            continue
        # An object that counts goes before one that does not, then the nearest.
        best = min(candidates, key=lambda i: (not known[i], distance[box, i]))
        found[best], free[best] = True, False
    return FrameScore(known, found, false)
