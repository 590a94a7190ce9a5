"""How the demonstration counts, on hand-made frames."""

import numpy as np

from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools.scoring import score_frame

CLASSES = ("car", "pedestrian", "cyclist")
LIMITS = (-50.0, -50.0, -3.0, 50.0, 50.0, 3.0)
SIZES = {0: (4.0, 2.0, 1.5), 1: (0.6, 0.6, 1.7), 2: (1.8, 0.6, 1.7)}


def objects(*rows):
    """Boxes from (label, x, y, score)."""
    boxes = [[x, y, 0.0, *SIZES[label], 0.0] for label, x, y, _ in rows]
    return Boxes3D(
        np.array(boxes, np.float32).reshape(-1, 7),
        np.array([row[3] for row in rows], np.float32),
        np.array([row[0] for row in rows], np.int64),
        CLASSES,
    )


def counts(boxes, truth, num_points):
    score = score_frame(boxes, truth, np.array(num_points, np.int64), LIMITS)
    return score.num_known, score.num_found, score.num_false


def test_match_needs_class_and_distance():
    truth = objects((0, 10, 0, 1), (1, 20, 0, 1), (1, 30, 0, 1), (2, 40, 0, 1))
    boxes = objects((0, 10.9, 0, 0.9), (1, 20.5, 0, 0.8), (1, 30.7, 0, 0.7), (1, 40, 0, 0.6))
    # The car and the first pedestrian; the second is 0.7 m off, the cyclist was taken for a pedestrian.
    assert counts(boxes, truth, [100, 100, 100, 100]) == (4, 2, 2)


def test_overlap_matches_at_any_distance():
    # 1.5 m apart along 4 m: IoU 2.5 / 5.5 = 0.45.
    assert counts(objects((0, 11.5, 0, 0.9)), objects((0, 10, 0, 1)), [100]) == (1, 1, 0)
    # 2.5 m apart: IoU 1.5 / 6.5 = 0.23.
    assert counts(objects((0, 12.5, 0, 0.9)), objects((0, 10, 0, 1)), [100]) == (1, 0, 1)


def test_object_matches_once():
    assert counts(objects((0, 10, 0, 0.9), (0, 10.2, 0, 0.8)), objects((0, 10, 0, 1)), [100]) == (1, 1, 1)


def test_few_points_count_neither_way():
    truth = objects((0, 10, 0, 1), (0, 20, 0, 1), (0, 30, 0, 1), (0, 60, 0, 1))
    boxes = objects((0, 10, 0, 0.9), (0, 20, 0, 0.9), (0, 30, 0, 0.9), (0, 60, 0, 0.9))
    # 19 points: neither. 4 points: a box there is false. Beyond the range: neither.
    assert counts(boxes, truth, [20, 19, 4, 500]) == (1, 1, 1)


def test_nothing():
    assert counts(objects(), objects(), []) == (0, 0, 0)
    assert counts(objects(), objects((0, 1, 1, 1)), [50]) == (1, 0, 0)
    assert counts(objects((0, 1, 1, 1)), objects(), []) == (0, 0, 1)
