"""Recall, precision and AP by range, on frames that were worked by hand."""

import math

import numpy as np
import pytest

from dsvt_ros.range_ap import RangeFrame, ScoredCenters, evaluate_ranges


def found(*rows):
    """Detections from (x, y, score)."""
    table = np.array(rows, np.float64).reshape(-1, 3)
    return ScoredCenters(table[:, :2], table[:, 2].astype(np.float32))


def frame(objects, detections, shown=None, counts=None):
    objects = np.array(objects, np.float64).reshape(-1, 2)
    counts = np.ones(len(objects), bool) if counts is None else np.array(counts, bool)
    return RangeFrame(objects, counts, detections, detections if shown is None else shown)


def test_figures_of_two_ranges_and_both():
    # Near: two objects, one found; one false alarm with the highest score. Far: one object, found.
    objects = [(5, 0), (0, 8), (20, 0)]
    detections = found((5.5, 0, 0.8), (-9, 0, 0.9), (20, 1.9, 0.7))
    near, far, whole = evaluate_ranges([frame(objects, detections)], (0, 15, 30))
    assert (near.num_objects, near.num_found, near.num_false) == (2, 1, 1)
    assert (near.recall, near.precision) == (0.5, 0.5)
    # False alarm first, then a hit: precision 1/2 up to recall 1/2.
    assert near.ap == pytest.approx(25.0)
    assert (far.num_objects, far.num_found, far.num_false, far.ap) == (1, 1, 0, pytest.approx(100.0))
    # Miss, hit, hit: precision 2/3 up to recall 2/3.
    assert (whole.num_objects, whole.num_found, whole.num_false) == (3, 2, 1)
    assert whole.ap == pytest.approx(100 * 4 / 9)
    assert (whole.near_m, whole.far_m) == (0, 30)


def test_two_metres_are_too_far():
    assert evaluate_ranges([frame([(10, 0)], found((11.999, 0, 0.5)))], (0, 20))[0].num_found == 1
    (_, whole) = evaluate_ranges([frame([(10, 0)], found((12.0, 0, 0.5)))], (0, 20))
    assert (whole.num_found, whole.num_false, whole.ap) == (0, 1, 0.0)


def test_the_best_detection_takes_the_nearest_object_and_a_second_one_is_a_false_alarm():
    twice = found((10, 0.5, 0.9), (10, 0.1, 0.6))
    assert evaluate_ranges([frame([(10, 0)], twice)], (0, 20))[0].num_false == 1
    # The better one is nearer to the second object and leaves the first one to the other.
    both = found((10, 1.2, 0.9), (10, 1.0, 0.6))
    assert evaluate_ranges([frame([(10, 0), (10, 2)], both)], (0, 20))[0].num_found == 2


def test_a_hit_belongs_to_the_range_of_its_object():
    near, far, _ = evaluate_ranges([frame([(14.5, 0)], found((15.5, 0, 0.9)))], (0, 15, 30))
    assert (near.num_found, near.num_false) == (1, 0)
    assert (far.num_objects, far.num_found, far.num_false) == (0, 0, 0)


def test_objects_that_do_not_count_excuse_detections_but_take_none_away():
    objects, counts = [(10, 0), (10, 1)], [True, False]
    only_ignored = evaluate_ranges([frame(objects, found((10, 2.5, 0.9)), counts=counts)], (0, 20))[0]
    assert (only_ignored.num_objects, only_ignored.num_found, only_ignored.num_false) == (1, 0, 0)
    nearer_to_ignored = evaluate_ranges([frame(objects, found((10, 0.9, 0.9)), counts=counts)], (0, 20))[0]
    assert (nearer_to_ignored.num_found, nearer_to_ignored.num_false) == (1, 0)


def test_objects_beyond_the_last_edge_excuse_detections_too():
    whole = evaluate_ranges([frame([(20.5, 0)], found((19.5, 0, 0.9)))], (0, 20))[-1]
    assert (whole.num_objects, whole.num_found, whole.num_false) == (0, 0, 0)


def test_shown_boxes_give_recall_and_all_give_ap():
    detections, shown = found((10, 0, 0.1), (0, 10, 0.9)), found((0, 10, 0.9))
    whole = evaluate_ranges([frame([(10, 0), (0, 10)], detections, shown)], (0, 20))[-1]
    assert (whole.recall, whole.precision, whole.ap) == (0.5, 1.0, 100.0)


def test_scores_are_ranked_over_all_frames():
    # A hit of 0.9 in one frame, a false alarm of 0.8 and a hit of 0.7 in another.
    frames = [
        frame([(10, 0)], found((10, 0, 0.9))),
        frame([(10, 0)], found((0, 5, 0.8), (10, 0, 0.7))),
    ]
    # Precision 1 up to recall 1/2, then 2/3.
    assert evaluate_ranges(frames, (0, 20))[-1].ap == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))


def test_nothing_is_not_zero():
    for frames in ([], [frame([], found())]):
        whole = evaluate_ranges(frames, (0, 20))[-1]
        assert whole.num_objects == 0
        assert all(math.isnan(value) for value in (whole.recall, whole.precision, whole.ap))
    missed = evaluate_ranges([frame([(10, 0)], found())], (0, 20))[-1]
    assert (missed.recall, missed.ap) == (0.0, 0.0)
    assert math.isnan(missed.precision)
