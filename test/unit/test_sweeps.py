"""A static world seen from a moving sensor collapses onto itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moving import SECOND, Drive, Exact, seen_from

from dsvt_ros.config import PointFeature, PreprocessConfig
from dsvt_ros.errors import PointCloudError
from dsvt_ros.model.folder import open_model
from dsvt_ros.motion import Odometry, Stationary
from dsvt_ros.sweeps import Sweep, SweepBuffer, merge_sweeps

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
MOUNTING = (1.1, -0.3, 1.8, 0.02, -0.15, 1.2)
CPU = torch.device("cpu")

DEMO = open_model("demo").model
MODEL = dataclasses.replace(DEMO, features=(*DEMO.features, PointFeature("time")), sweeps=4)
CONFIG = PreprocessConfig(min_range=0.1)

far = st.floats(-1e6, 1e6)


def cloud(world, pose):
    """The world as a cloud of x, y, z, intensity and a time that is not the age."""
    columns = np.tile(np.float32([0.5, 77.0]), (len(world), 1))
    return np.concatenate([seen_from(world, pose), columns], axis=1)


def world_around(drive, number=50, seed=0):
    return drive.origin + np.random.default_rng(seed).uniform((-80, -80, 20), (80, 80, 180), (number, 3))


def add(buffer, world, motion, stamp_ns, config=CONFIG, truth=None, **options):
    points = cloud(world, (truth or motion).pose_at(stamp_ns, "lidar"))
    return buffer.add(points, stamp_ns, "lidar", motion, config, **options)


@settings(deadline=None)
@given(st.tuples(far, far, far), st.floats(-2, 2), st.integers(1, 10))
def test_static_world_collapses_a_million_metres_away(origin, yaw_rate, number):
    drive = Drive(origin, yaw_rate=yaw_rate, start_ns=START)
    motion = Exact(drive, MOUNTING)
    world = world_around(drive)
    stamps = [START - k * PERIOD for k in range(number)]
    poses = [motion.pose_at(stamp_ns, "lidar") for stamp_ns in stamps]
    sweeps = [Sweep(torch.as_tensor(cloud(world, T)), stamp, T) for stamp, T in zip(stamps, poses, strict=True)]
    merged = merge_sweeps(sweeps, age_column=4).reshape(number, len(world), 5)
    assert (merged[:, :, :3] - merged[0, :, :3]).abs().max() < 1e-3
    np.testing.assert_allclose(merged[:, 0, 4], np.arange(number) * 0.05, atol=1e-6)
    assert (merged[:, :, 3] == 0.5).all()


@settings(deadline=None)
@given(st.tuples(far, far, far), st.floats(-2, 2), st.integers(0, SECOND // 50))
def test_static_world_collapses_with_odometry_in_between(origin, yaw_rate, lag_ns):
    drive = Drive(origin, yaw_rate=yaw_rate, start_ns=START)
    odometry = Odometry("/odom", PreprocessConfig(mounting=MOUNTING), lambda base, sensor: None)
    for k in range(-2, 12):
        odometry.add(drive.odometry(START + k * SECOND // 50 - lag_ns))
    buffer, world = SweepBuffer(MODEL, CPU), world_around(drive)
    for k in range(5):
        found = add(buffer, world, odometry, START + k * PERIOD, truth=Exact(drive, MOUNTING))
    assert (found.num_sweeps, found.num_wanted, found.problem) == (4, 4, "")
    merged = found.points.reshape(4, len(world), 5)
    assert (merged[:, :, :3] - merged[0, :, :3]).abs().max() < 1e-3


def test_input_is_not_changed():
    points = torch.ones(3, 5)
    merge_sweeps([Sweep(points, START, np.eye(4))], age_column=4)
    assert (points == 1).all()


def test_sweep_without_points():
    moved = np.eye(4)
    moved[0, 3] = 2.0
    sweeps = [Sweep(torch.zeros(0, 5), START, np.eye(4)), Sweep(torch.ones(1, 5), START - SECOND // 4, moved)]
    assert merge_sweeps(sweeps, age_column=4).tolist() == [[3, 1, 1, 1, 0.25]]


class TestBuffer:
    drive = Drive(start_ns=START)
    world = world_around(drive)

    def filled(self, number=3, **options):
        buffer, motion = SweepBuffer(MODEL, CPU), Exact(self.drive, MOUNTING)
        for k in range(number):
            add(buffer, self.world, motion, START + k * PERIOD, **options)
        return buffer

    def next(self, buffer, motion=None, stamp_ns=START + 3 * PERIOD, config=CONFIG, **options):
        motion = motion or Exact(self.drive, MOUNTING)
        return add(buffer, self.world, motion, stamp_ns, config, truth=Exact(self.drive, MOUNTING), **options)

    def test_fills_up_to_the_number_of_the_model(self):
        assert self.next(self.filled(2)).num_sweeps == 3
        assert self.next(self.filled(3)).num_sweeps == 4
        found = self.next(self.filled(6), stamp_ns=START + 6 * PERIOD)
        assert (found.num_sweeps, len(found.points)) == (4, 4 * len(self.world))
        np.testing.assert_allclose(found.points[:: len(self.world), 4], [0, 0.05, 0.1, 0.15], atol=1e-6)

    def test_number_and_age_may_change_between_two_clouds(self):
        assert self.next(self.filled(), config=PreprocessConfig(sweeps=2)).num_sweeps == 2
        assert self.next(self.filled(), config=PreprocessConfig(sweeps=1)).num_sweeps == 1
        assert self.next(self.filled(), config=PreprocessConfig(max_sweep_age=0.11)).num_sweeps == 3

    def test_sweeps_before_a_gap_are_too_old(self):
        found = self.next(self.filled(), stamp_ns=START + SECOND)
        assert (found.num_sweeps, found.problem) == (1, "")

    def test_stamps_that_go_back_begin_anew(self):
        buffer = self.filled()
        assert self.next(buffer, stamp_ns=START - SECOND).num_sweeps == 1
        assert self.next(buffer, stamp_ns=START - SECOND + PERIOD).num_sweeps == 2

    def test_same_stamp_again_replaces_the_sweep(self):
        assert self.next(self.filled(), stamp_ns=START + 2 * PERIOD).num_sweeps == 3

    def test_another_sensor_begins_anew(self):
        buffer = self.filled()
        found = buffer.add(np.ones((2, 5)), START + 3 * PERIOD, "other", Exact(self.drive), CONFIG)
        assert found.num_sweeps == 1

    def test_sweeps_that_cannot_be_placed_are_left_out(self):
        motion = Exact(self.drive, MOUNTING, first_ns=START + PERIOD)
        found = self.next(self.filled(), motion)
        assert found.num_sweeps == 3
        assert found.problem == f"1 older sweeps are left out: nothing is known at {START}"
        assert (found.points[:, 4] < 0.11).all()

    def test_without_a_pose_the_new_cloud_is_alone_and_serves_later(self):
        buffer = self.filled()
        motion = Exact(self.drive, MOUNTING, last_ns=START + 2 * PERIOD)
        found = self.next(buffer, motion)
        assert (found.num_sweeps, len(found.points)) == (1, len(self.world))
        assert found.problem == f"older sweeps are left out: nothing is known at {START + 3 * PERIOD}"
        assert self.next(buffer, stamp_ns=START + 4 * PERIOD).num_sweeps == 4

    def test_waits_only_where_there_is_motion(self):
        present = Exact(self.drive, MOUNTING)
        self.next(self.filled(), present, wait_s=0.2)
        assert [stamp_ns for stamp_ns, wait_s in present.asked if wait_s] == [START + 3 * PERIOD]
        absent = Exact(self.drive, MOUNTING, first_ns=math.inf)
        self.next(self.filled(), absent, wait_s=0.2)
        assert not any(wait_s for _, wait_s in absent.asked)

    def test_odometry_that_jumps_is_not_believed(self):
        class Jump(Exact):
            def pose_at(self, stamp_ns, frame_id, wait_s=0.0):
                pose = super().pose_at(stamp_ns, frame_id)
                pose[0, 3] += 1000.0 if stamp_ns > START + PERIOD else 0.0
                return pose

        found = self.next(self.filled(), Jump(self.drive, MOUNTING))
        assert found.num_sweeps == 2
        assert found.problem == "2 older sweeps are left out: the sensor jumped by 1003.0 m in 0.15 s"

    def test_missing_returns_do_not_move_with_the_sweep(self):
        buffer = SweepBuffer(MODEL, CPU)
        for k in range(2):
            points = np.array([[0, 0, 0, 0, 0], [math.nan, 0, 0, 0, 0], [5, 0, 0, 1, 0]], np.float32)
            found = buffer.add(points, START + k * PERIOD, "lidar", Exact(self.drive), CONFIG)
        assert (found.num_sweeps, len(found.points)) == (2, 2)

    def test_single_sweep_model_gets_its_cloud(self):
        buffer = SweepBuffer(DEMO, CPU)
        points = np.ones((3, 4), np.float32)
        for k in range(2):
            found = buffer.add(points, START + k, "lidar", Exact(self.drive, first_ns=math.inf), CONFIG)
        assert (found.num_sweeps, found.num_wanted, found.problem) == (1, 1, "")
        np.testing.assert_array_equal(found.points, points)

    def test_clouds_that_are_not_answered_serve_as_older_sweeps(self):
        buffer, motion = self.filled(1), Exact(self.drive, MOUNTING)
        for k in (1, 2):
            points = cloud(self.world, motion.pose_at(START + k * PERIOD, "lidar"))
            assert buffer.keep(points, START + k * PERIOD, "lidar", motion, CONFIG) == ""
        found = self.next(buffer)
        merged = found.points.reshape(4, len(self.world), 5)
        np.testing.assert_allclose(merged[:, 0, 4], [0, 0.05, 0.1, 0.15], atol=1e-6)
        assert (merged[:, :, :3] - merged[0, :, :3]).abs().max() < 1e-3

    def test_sensor_that_stands(self):
        buffer = SweepBuffer(MODEL, CPU)
        for k in range(3):
            found = buffer.add(np.full((1, 5), k + 1.0), START + k * PERIOD, "lidar", Stationary(), CONFIG)
        np.testing.assert_allclose(found.points, [[3, 3, 3, 3, 0], [2, 2, 2, 2, 0.05], [1, 1, 1, 1, 0.1]], atol=1e-6)


class TestMotionCompensation:
    drive = Drive((3e5, -5e6, 100.0), velocity=(30.0, -10.0, 0.5), yaw_rate=1.0, start_ns=START)
    motion = Exact(drive, MOUNTING)
    config = PreprocessConfig(motion_compensation=True)

    def skewed(self, stamp_ns, first_s, last_s, number=2000):
        """Points measured one after the other, and when."""
        world = world_around(self.drive, number)
        offsets = np.linspace(first_s, last_s, number).astype(np.float32)
        rows = [
            cloud(point[None], self.motion.pose_at(stamp_ns + round(float(offset) * 1e9), "lidar"))
            for point, offset in zip(world, offsets, strict=True)
        ]
        return world, np.concatenate(rows), offsets

    @pytest.mark.parametrize(("first_s", "last_s"), [(0.0, 0.1), (-0.1, 0.0), (-0.05, 0.05), (0.02, 0.02)])
    def test_points_come_to_where_they_are_seen_at_the_stamp(self, first_s, last_s):
        world, points, offsets = self.skewed(START, first_s, last_s)
        buffer = SweepBuffer(DEMO, CPU)
        found = buffer.add(points[:, :4], START, "lidar", self.motion, self.config, point_times=offsets.copy)
        expected = seen_from(world, self.motion.pose_at(START, "lidar"))
        assert np.abs(points[:, :3] - expected).max() > 0.5
        np.testing.assert_allclose(found.points[:, :3], expected, atol=2e-3)
        assert found.problem == ""

    def test_compensated_sweeps_collapse(self):
        buffer = SweepBuffer(MODEL, CPU)
        for k in range(3):
            _, points, offsets = self.skewed(START + k * 2 * PERIOD, 0.0, 0.1, 300)
            found = buffer.add(
                points, START + k * 2 * PERIOD, "lidar", self.motion, self.config, point_times=offsets.copy
            )
        merged = found.points.reshape(3, 300, 5)
        assert (merged[:, :, :3] - merged[0, :, :3]).abs().max() < 4e-3

    def test_missing_returns_and_unknown_times(self):
        points = np.array([[0, 0, 0, 0], [5, 0, 0, 1], [5, 0, 0, 2]], np.float32)
        offsets = np.array([0.1, math.nan, 0.1], np.float32)
        buffer = SweepBuffer(DEMO, CPU)
        found = buffer.add(points, START, "lidar", self.motion, self.config, point_times=offsets.copy).points
        assert found[:, 3].tolist() == [1, 2]
        np.testing.assert_allclose(found[0, :3], [5, 0, 0], atol=1e-5)
        assert (found[1, :3] - found[0, :3]).norm() > 2

    def test_without_motion_points_stay_and_that_is_said(self):
        absent = Exact(self.drive, first_ns=math.inf)
        points = np.ones((2, 4), np.float32)
        found = SweepBuffer(DEMO, CPU).add(
            points, START, "lidar", absent, self.config, point_times=lambda: np.float32([0, 0.1])
        )
        np.testing.assert_array_equal(found.points, points)
        assert found.problem.startswith("points are not compensated for motion: nothing is known")

    @pytest.mark.parametrize("config", [config, CONFIG])
    def test_points_without_times_stay_and_that_is_said_where_it_matters(self, config):
        def no_times():
            raise PointCloudError("the cloud has no time of each point")

        points = np.ones((2, 4), np.float32)
        found = SweepBuffer(DEMO, CPU).add(points, START, "lidar", self.motion, config, point_times=no_times)
        np.testing.assert_array_equal(found.points, points)
        assert ("not compensated for motion: the cloud has no time" in found.problem) == config.motion_compensation

    def test_last_point_is_waited_for(self):
        _, points, offsets = self.skewed(START, 0.0, 0.1, 5)
        buffer = SweepBuffer(DEMO, CPU)
        buffer.add(points[:, :4], START - PERIOD, "lidar", self.motion, self.config)
        motion = Exact(self.drive, MOUNTING)
        buffer.add(points[:, :4], START, "lidar", motion, self.config, wait_s=0.3, point_times=offsets.copy)
        ((stamp_ns, wait_s),) = [asked for asked in motion.asked if asked[1]]
        assert (stamp_ns, wait_s) == (pytest.approx(START + 2 * PERIOD, abs=100), 0.3)
