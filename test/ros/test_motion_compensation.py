"""Points that were measured one after the other on a moving vehicle, over DDS."""

import array

import numpy as np
import pytest
from harness import OdometryPublisher, make_cloud, random_points
from moving import SECOND, Drive, Exact, seen_from

pytestmark = pytest.mark.ros

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 10


@pytest.fixture(scope="module")
def node(start_node, small_model):
    node = start_node(
        model=small_model,
        motion__source="odometry",
        preprocess__motion_compensation="true",
        preprocess__find_ground="false",
        diagnostics__period_s=0.2,
    )
    node.wait_for("active")
    return node


@pytest.fixture
def connected(node, client):
    client.connect()
    return client


def cloud_with_times(points, offsets_ns, stamp_ns):
    """A PointCloud2 as Ouster's driver makes it: t is nanoseconds after the stamp."""
    from sensor_msgs.msg import PointField

    names = ("x", "y", "z", "intensity", "t")
    rows = np.zeros(len(points), np.dtype([(name, "u4" if name == "t" else "f4") for name in names]))
    for name, column in zip(names, (*points.T, offsets_ns), strict=True):
        rows[name] = column
    cloud = make_cloud(points, stamp_ns, "base_link")
    cloud.point_step, cloud.row_step = 20, 20 * len(points)
    cloud.fields.append(PointField(name="t", offset=16, datatype=PointField.UINT32, count=1))
    cloud.data = array.array("B", rows.tobytes())
    return cloud


def share_of_twins(expected, found):
    """How many of the expected boxes were found to the centimetre."""
    distance = np.abs(expected.boxes[:, None, :6] - found.boxes[None, :, :6]).max(axis=2)
    return (distance.min(axis=1) < 0.01).mean()


def test_boxes_are_those_of_a_cloud_measured_at_once(connected, small_model):
    from dsvt_ros.detector import Detector
    from dsvt_ros.io.detections import boxes_from_msg

    odometry = OdometryPublisher(connected.node)
    assert connected.spin_until(odometry.is_heard)
    drive = Drive(velocity=(15.0, 4.0, 0.0), yaw_rate=1.0, start_ns=START)
    motion = Exact(drive)
    for k in range(-1, 16):
        odometry.publish(drive, START + k * SECOND // 50)
    connected.spin_for(0.5)
    world = random_points(3000)
    offsets_ns = np.sort(np.random.default_rng(1).integers(0, PERIOD, len(world)))
    for stamp_ns in (START, START + PERIOD):
        seen = [
            seen_from(point[None, :3], motion.pose_at(int(stamp_ns + offset), "base_link"))
            for point, offset in zip(world.astype(np.float64), offsets_ns, strict=True)
        ]
        points = np.concatenate([np.concatenate(seen), world[:, 3:]], axis=1)
        answer = connected.ask(cloud_with_times(points, offsets_ns, stamp_ns))
    at_once = seen_from(world[:, :3].astype(np.float64), motion.pose_at(stamp_ns, "base_link"))
    detector = Detector.load(small_model, overrides={"preprocess.find_ground": False})
    expected = detector.detect(np.concatenate([at_once, world[:, 3:]], axis=1))
    found = boxes_from_msg(answer, expected.class_names)
    # Not all: points that a fraction of a millimetre moves over the edge of a voxel may decide on a box.
    assert share_of_twins(expected, found) > 0.95
    assert share_of_twins(expected, detector.detect(points)) < 0.5
    assert "not compensated" not in connected.status()[0].message


def test_cloud_without_times_is_answered_and_that_is_said(connected):
    connected.ask(make_cloud(random_points(100), START + 2 * PERIOD, "base_link"))
    status, _ = connected.status()
    assert status.level == b"\x01"
    assert "not compensated for motion: the cloud has no time of each point, only the fields x, y, z" in status.message
