import numpy as np
import pytest

from dsvt_ros.training.drive import make_drive
from dsvt_ros.training.layout import SceneConfig
from dsvt_ros.training.lidar import VLP16, Sensor


def drive(**changes):
    config = SceneConfig(("street",), (1.0,), reach_m=30.0, turn_share=0.0)
    return list(make_drive(3, 4, sensor=Sensor(VLP16), config=config, **changes))


def test_same_seed_same_bytes():
    for first, second in zip(drive(), drive(), strict=True):
        assert first.points.tobytes() == second.points.tobytes()
        assert first.boxes.tobytes() == second.boxes.tobytes()


def test_frames_follow_each_other():
    frames = drive(period_s=0.1, speed=5.0)
    assert [frame.stamp_ns for frame in frames] == [0, 100_000_000, 200_000_000, 300_000_000]
    steps = np.diff([frame.ego_pose[0] for frame in frames])
    assert steps == pytest.approx([0.5, 0.5, 0.5])
    for frame in frames:
        assert len(frame.boxes) == len(frame.labels) == len(frame.num_points) == len(frame.track_ids)
        assert len(np.unique(frame.track_ids)) == len(frame.track_ids)
        assert frame.num_points.sum() > 0


def test_tracks_move_with_their_velocity():
    first, *_, last = drive(period_s=0.1, speed=5.0)
    seconds = last.stamp_ns * 1e-9
    common, rows, later = np.intersect1d(first.track_ids, last.track_ids, return_indices=True)
    assert len(common) > 5
    moved = last.boxes[later, :2] + (last.ego_pose[0] - first.ego_pose[0], 0.0) - first.boxes[rows, :2]
    np.testing.assert_allclose(moved, first.velocities[rows] * seconds, atol=1e-3)
    assert np.abs(first.velocities).max() > 0.5


def test_bad_times_are_refused():
    with pytest.raises(ValueError, match="period_s"):
        list(make_drive(0, 2, 0.0))
