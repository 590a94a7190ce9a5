"""Counts and times between two reports."""

import math

import pytest

from dsvt_ros.ros.counters import Counters, percentile


def test_report_counts_since_the_last_one_and_in_all():
    counters = Counters()
    counters.received(replaced=False)
    counters.received(replaced=True)
    counters.answered(10.0, 20.0)
    counters.report()
    counters.received(replaced=False)
    counters.refused("no z")
    report = counters.report()
    assert (report.counts.received, report.counts.dropped, report.counts.answered) == (3, 1, 1)
    assert (report.recent.received, report.recent.refused, report.recent.answered) == (1, 1, 0)
    assert report.processing_ms == ()
    assert report.last_error == "no z"


def test_age_of_the_last_cloud():
    counters = Counters()
    assert counters.report().since_cloud_s is None
    counters.received(replaced=False)
    assert 0 <= counters.report().since_cloud_s < 1
    counters.restart()
    assert counters.report().since_cloud_s is None


def test_percentile_of_nothing_is_nan():
    assert math.isnan(percentile((), 95))
    assert percentile((1.0, 2.0, 3.0), 50) == pytest.approx(2.0)
