"""A model of three sweeps over DDS: clouds and odometry come from this process, the node is another one."""

import importlib.util
import math

import numpy as np
import pytest
from harness import OdometryPublisher, make_cloud, random_points
from moving import SECOND, Drive, Exact, seen_from

pytestmark = pytest.mark.ros

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 10
MOUNTING = (0.4, 0.0, 1.2, 0.0, 0.1, -0.5)


@pytest.fixture(scope="module")
def node(start_node, sweep_model):
    node = start_node(
        model=sweep_model,
        motion__source="odometry",
        motion__wait_s=1.0,
        preprocess__mounting=list(MOUNTING),
        diagnostics__period_s=0.2,
    )
    node.wait_for("active")
    return node


@pytest.fixture
def connected(node, client):
    client.connect()
    return client


@pytest.fixture(scope="module")
def odometry(client):
    return OdometryPublisher(client.node)


def cloud_of(world, motion, stamp_ns):
    points = np.concatenate([seen_from(world[:, :3], motion.pose_at(stamp_ns, "lidar")), world[:, 3:]], axis=1)
    return make_cloud(points.astype(np.float32), stamp_ns), points.astype(np.float32)


def world_of(drive):
    """Points of the fixed frame with an intensity, around where the drive begins."""
    points = random_points(3000).astype(np.float64)
    points[:, :3] += drive.origin
    return points


def expected_boxes(model, clouds, motion, stamps):
    """What the detector finds in the clouds, newest first."""
    import torch

    from dsvt_ros.detector import Detector
    from dsvt_ros.sweeps import Sweep, merge_sweeps

    sweeps = [
        Sweep(torch.as_tensor(np.pad(points, ((0, 0), (0, 1)))), stamp, motion.pose_at(stamp, "lidar"))
        for points, stamp in zip(clouds, stamps, strict=True)
    ]
    return Detector.load(model).detect(merge_sweeps(sweeps, age_column=4))


def assert_same(answer, expected):
    from dsvt_ros.io.detections import boxes_from_msg

    found = boxes_from_msg(answer, expected.class_names)
    assert len(expected) > 0
    np.testing.assert_allclose(found.boxes[:, :6], expected.boxes[:, :6], atol=2e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)


def test_without_odometry_each_cloud_is_alone_and_that_is_said(connected, node, sweep_model):
    drive = Drive(start_ns=START)
    motion = Exact(drive, MOUNTING)
    for k in range(3):
        cloud, points = cloud_of(world_of(drive), motion, START + k * PERIOD)
        answer = connected.ask(cloud)
    assert_same(answer, expected_boxes(sweep_model, [points], motion, [START + 2 * PERIOD]))
    assert "1 of 3 sweeps: older sweeps are left out: no odometry has come from /dsvt_detector/input" in node.output
    status, values = connected.status()
    assert status.level == b"\x01"
    assert "no odometry has come" in status.message
    assert values["sweeps"] == "1 of 3"
    assert values["motion"].startswith("unknown: nobody publishes on /dsvt_detector/input/odometry")


@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.0), (4e5, -5e6, 300.0)])
def test_sweeps_are_merged_where_odometry_says(connected, odometry, sweep_model, origin):
    assert connected.spin_until(odometry.is_heard)
    # A new start of time for each drive: sweeps and odometry of the last one are forgotten.
    start = START + (-SECOND * 100 if origin[0] else SECOND * 100)
    drive = Drive(origin, velocity=(12.0, -3.0, 0.2), yaw_rate=0.8, start_ns=start)
    motion, world = Exact(drive, MOUNTING), world_of(drive)
    stamps, clouds = [start + k * PERIOD for k in range(4)], []
    for k in range(-2, 18):
        odometry.publish(drive, start + k * SECOND // 50 - 7_000_000)
    connected.spin_for(0.5)
    for stamp_ns in stamps:
        cloud, points = cloud_of(world, motion, stamp_ns)
        answer = connected.ask(cloud)
        clouds.append(points)
    expected = expected_boxes(sweep_model, clouds[:0:-1], motion, stamps[:0:-1])
    alone = expected_boxes(sweep_model, clouds[-1:], motion, stamps[-1:])
    assert_same(answer, expected)
    assert len(alone) != len(expected) or not np.allclose(alone.boxes, expected.boxes, atol=1e-2)
    status, values = connected.status()
    assert values["sweeps"] == "3 of 3"
    assert "left out" not in status.message


def test_odometry_that_comes_after_the_cloud_is_waited_for(connected, odometry):
    start = START - 200 * SECOND
    drive = Drive(start_ns=start)
    motion, world = Exact(drive, MOUNTING), world_of(drive)
    for k in range(-2, 6):
        odometry.publish(drive, start + k * SECOND // 50)
    connected.spin_for(0.5)
    connected.ask(cloud_of(world, motion, start)[0])
    number = len(connected.detections)
    connected.publisher.publish(cloud_of(world, motion, start + 2 * PERIOD)[0])  # newest odometry: PERIOD
    connected.spin_for(0.3)
    assert len(connected.detections) == number
    odometry.publish(drive, start + 2 * PERIOD + SECOND // 50)
    assert connected.spin_until(lambda: len(connected.detections) > number, 5.0)
    assert connected.status()[1]["sweeps"] == "2 of 3"


def test_clouds_that_were_replaced_serve_as_older_sweeps(connected, odometry, sweep_model):
    start = START - 250 * SECOND
    drive = Drive(start_ns=start)
    motion, world = Exact(drive, MOUNTING), world_of(drive)
    for k in range(-2, 6):
        odometry.publish(drive, start + k * SECOND // 50)
    connected.spin_for(0.5)
    connected.ask(cloud_of(world, motion, start)[0])
    before = int(connected.status()[1]["clouds dropped"])
    stamps, clouds = [start + k * PERIOD for k in (2, 3, 4)], []
    for stamp_ns in stamps:  # the first waits for odometry while the last replaces the one between
        cloud, points = cloud_of(world, motion, stamp_ns)
        connected.publisher.publish(cloud)
        connected.spin_for(0.2)
        clouds.append(points)
    number = len(connected.detections)
    for k in range(6, 25):
        odometry.publish(drive, start + k * SECOND // 50)
    assert connected.spin_until(lambda: len(connected.detections) == number + 2, 5.0)
    assert_same(connected.detections[-1], expected_boxes(sweep_model, clouds[::-1], motion, stamps[::-1]))
    values = connected.status()[1]
    assert int(values["clouds dropped"]) == before + 1
    assert values["sweeps"] == "3 of 3"


def test_odometry_that_stops_costs_the_sweeps_not_the_answer(connected, odometry):
    start = START - 300 * SECOND
    drive = Drive(start_ns=start)
    motion, world = Exact(drive, MOUNTING), world_of(drive)
    for k in range(6):
        odometry.publish(drive, start + k * SECOND // 50)
    connected.spin_for(0.5)
    for k in range(4):
        answer = connected.ask(cloud_of(world, motion, start + (k + 20) * PERIOD)[0])
    assert answer.header.stamp.nanosec == 300_000_000
    status, values = connected.status()
    assert values["sweeps"] == "1 of 3"
    assert "newest odometry is 2.200 s older than the cloud" in status.message


def test_number_of_sweeps_may_change_while_the_node_runs(connected, odometry):
    start = START - 400 * SECOND
    drive = Drive(start_ns=start)
    motion, world = Exact(drive, MOUNTING), world_of(drive)
    for k in range(-2, 30):
        odometry.publish(drive, start + k * SECOND // 50)
    connected.spin_for(0.5)
    for sweeps, shown in ((2, "2 of 2"), (0, "3 of 3")):
        assert connected.set_parameter("preprocess.sweeps", sweeps).successful
        for k in range(3):
            connected.ask(cloud_of(world, motion, start + (k + (0 if sweeps else 3)) * PERIOD)[0])
        assert connected.status()[1]["sweeps"] == shown
    refused = connected.set_parameter("preprocess.sweeps", 101)
    assert not refused.successful


def test_impossible_odometry_is_told_and_passed_over(connected, node, odometry):
    odometry.publish(Drive((math.nan, 0.0, 0.0), start_ns=START), START)
    node.wait_for("got an odometry pose that is none")
    connected.ask(make_cloud(random_points(100), START))


@pytest.mark.skipif(importlib.util.find_spec("tf2_ros") is not None, reason="tf2_ros is installed")
def test_z_without_tf2_ros_tf_is_refused(start_node, sweep_model):
    node = start_node(model=sweep_model, motion__source="tf")
    assert node.process.wait(60) == 1
    assert "motion.source is tf, which needs TF, but tf2_ros cannot be imported" in node.output
    assert "or set it to odometry" in node.output
