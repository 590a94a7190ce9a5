import numpy as np
import pytest

from dsvt_ros.average_precision import ScoredMatches, average_precision, join, match_frame


def boxes(*centers):
    return np.array([[x, y, 0, 4, 2, 1.5, 0] for x, y in centers], np.float32).reshape(-1, 7)


def test_matching_by_hand():
    truth = boxes((0, 0), (20, 0), (40, 0))
    found = boxes((0.2, 0), (0.4, 0), (20, 0), (60, 0))
    scores = np.array([0.5, 0.9, 0.8, 0.7], np.float32)
    matches = match_frame(found, scores, truth, np.array([False, True, False]), 0.5)
    # By score: 0.9 takes the first object, 0.8 hits an ignored one, 0.7 and 0.5 are false alarms.
    assert matches.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert matches.hits.tolist() == [True, False, False]
    assert matches.num_objects == 2


def test_ignored_object_never_takes_the_hit():
    truth = boxes((0, 0), (0.1, 0))
    matches = match_frame(boxes((0, 0)), np.ones(1, np.float32), truth, np.array([True, False]), 0.5)
    assert matches.hits.tolist() == [True]


def test_area_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    matches = ScoredMatches(scores, np.array([True, False, True, False]), 4)
    # Recall 0.25 at precision 1, then 0.5 at 2/3.
    assert average_precision(matches) == pytest.approx(100 * (0.25 * 1 + 0.25 * 2 / 3))


def test_perfect_none_and_nothing():
    ones = np.ones(3, np.float32)
    assert average_precision(ScoredMatches(ones, np.ones(3, bool), 3)) == pytest.approx(100)
    assert average_precision(ScoredMatches(ones[:0], np.ones(0, bool), 3)) == 0
    assert np.isnan(average_precision(ScoredMatches(ones[:0], np.ones(0, bool), 0)))


def test_joined_frames_are_ranked_together():
    first = ScoredMatches(np.array([0.9, 0.2], np.float32), np.array([True, False]), 1)
    second = ScoredMatches(np.array([0.5], np.float32), np.array([True]), 1)
    assert average_precision(join([first, second])) == pytest.approx(100)
    assert match_frame(boxes(), np.ones(0, np.float32), boxes((0, 0)), np.zeros(1, bool), 0.5).num_objects == 1
