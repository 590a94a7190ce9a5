"""Boxes to vision_msgs and visualization_msgs."""

import importlib.util
import math

import numpy as np
import pytest

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from std_msgs.msg import Header
from visualization_msgs.msg import Marker

from dsvt_ros.io.detections import boxes_from_msg
from dsvt_ros.ros.conversions import label_info_from_classes, markers_from_boxes, msg_from_boxes
from dsvt_ros.structures import Boxes3D

pytestmark = pytest.mark.ros
CLASSES = ("car", "pedestrian", "cyclist")


@pytest.fixture
def header():
    header = Header(frame_id="roof")
    header.stamp.sec, header.stamp.nanosec = 12, 34
    return header


@pytest.fixture
def boxes():
    rows = [[10.0, -2.0, 0.75, 4.0, 2.0, 1.5, math.pi / 2], [-3.0, 4.0, 0.9, 0.5, 0.6, 1.8, -2.0]]
    return Boxes3D(np.array(rows, np.float32), np.array([0.875, 0.5], np.float32), np.array([0, 1]), CLASSES)


def test_message_by_hand(boxes, header):
    message = msg_from_boxes(boxes, header)
    car = message.detections[0]
    assert message.header == header
    assert car.header == header
    assert car.id == ""
    assert (car.results[0].hypothesis.class_id, car.results[0].hypothesis.score) == ("car", 0.875)
    center = car.bbox.center
    assert (center.position.x, center.position.y, center.position.z) == (10.0, -2.0, 0.75)
    assert (center.orientation.x, center.orientation.y) == (0.0, 0.0)
    assert center.orientation.z == pytest.approx(math.sqrt(0.5))
    assert center.orientation.w == pytest.approx(math.sqrt(0.5))
    assert (car.bbox.size.x, car.bbox.size.y, car.bbox.size.z) == (4.0, 2.0, 1.5)
    assert car.results[0].pose.pose == center
    assert not np.any(car.results[0].pose.covariance)


def test_there_and_back(boxes, header):
    back = boxes_from_msg(msg_from_boxes(boxes, header), CLASSES)
    np.testing.assert_allclose(back.boxes, boxes.boxes, rtol=1e-6)
    np.testing.assert_array_equal(back.scores, boxes.scores)
    np.testing.assert_array_equal(back.labels, boxes.labels)


def test_unknown_classes_are_left_out_on_the_way_back(boxes, header):
    back = boxes_from_msg(msg_from_boxes(boxes, header), ("pedestrian",))
    assert back.labels.tolist() == [0]


def test_velocity_has_no_place_in_the_message(boxes, header):
    with_velocity = Boxes3D(np.pad(boxes.boxes, ((0, 0), (0, 2))), boxes.scores, boxes.labels, CLASSES)
    assert msg_from_boxes(with_velocity, header) == msg_from_boxes(boxes, header)


def test_no_boxes(header):
    none = Boxes3D(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), CLASSES)
    message = msg_from_boxes(none, header)
    assert message.header == header
    assert len(message.detections) == 0
    assert len(boxes_from_msg(message, CLASSES)) == 0
    (deleting,) = markers_from_boxes(none, header, lifetime_s=0.5).markers
    assert deleting.action == Marker.DELETEALL


def test_markers(boxes, header):
    deleting, cars, pedestrians, *texts = markers_from_boxes(boxes, header, lifetime_s=1.5).markers
    assert deleting.action == Marker.DELETEALL
    assert {marker.header.frame_id for marker in (cars, pedestrians, *texts)} == {"roof"}
    assert (cars.type, len(cars.points)) == (Marker.LINE_LIST, 26)
    assert [text.text for text in texts] == ["car 0.88", "pedestrian 0.50"]
    assert texts[0].pose.position.z > 0.75 + 0.75
    assert cars.color != pedestrians.color
    assert (cars.lifetime.sec, cars.lifetime.nanosec) == (1, 500_000_000)
    assert len({(marker.ns, marker.id) for marker in (cars, pedestrians, *texts)}) == 4


def test_marker_lines_enclose_the_box_and_point_ahead(boxes, header):
    cars = markers_from_boxes(boxes, header, lifetime_s=0.0).markers[1]
    points = np.array([[p.x, p.y, p.z] for p in cars.points])
    # The car heads along +y: its length lies along y.
    np.testing.assert_allclose(points[:24].min(axis=0), [9.0, -4.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(points[:24].max(axis=0), [11.0, 0.0, 1.5], atol=1e-5)
    np.testing.assert_allclose(points[24], [10.0, -2.0, 0.75], atol=1e-5)
    np.testing.assert_allclose(points[25], [10.0, 2.0, 0.75], atol=1e-5)


def test_arrows_of_moving_objects(boxes, header):
    velocities = np.array([[-3.0, 4.0], [0.1, 0.1]], np.float32)
    moving = Boxes3D(np.concatenate([boxes.boxes, velocities], axis=1), boxes.scores, boxes.labels, CLASSES)
    plain = markers_from_boxes(boxes, header, lifetime_s=0.5).markers
    markers = markers_from_boxes(moving, header, lifetime_s=0.5).markers
    (arrow,) = [marker for marker in markers if marker.ns == "velocities"]
    assert len(markers) == len(plain) + 1
    start, end = arrow.points
    assert (start.x, start.y, start.z) == (10.0, -2.0, 0.75)
    assert (end.x, end.y, end.z) == pytest.approx((7.0, 2.0, 0.75))
    assert (arrow.header, arrow.type, arrow.id) == (header, Marker.ARROW, 0)


def test_label_info(header):
    info = label_info_from_classes(CLASSES, 0.25, header)
    assert [(entry.class_id, entry.class_name) for entry in info.class_map] == list(enumerate(CLASSES))
    assert info.threshold == 0.25
