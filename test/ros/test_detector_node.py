"""The node over DDS: its own process answers the clouds of this one."""

import time

import numpy as np
import pytest
from harness import make_cloud, random_points

pytestmark = pytest.mark.ros

CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE, SHUTDOWN = 1, 2, 3, 4, 5
STAMP_NS = 1_700_000_000_123_456_789


@pytest.fixture(scope="module")
def node(start_node, small_model):
    node = start_node(model=small_model, diagnostics__period_s=0.2)
    node.wait_for("active")
    return node


@pytest.fixture
def connected(node, client):
    client.connect()
    return client


def stamp_ns(header):
    return header.stamp.sec * 10**9 + header.stamp.nanosec


def test_answer_repeats_the_header_and_equals_the_detector(connected, small_model):
    from dsvt_ros.detector import Detector
    from dsvt_ros.io.detections import boxes_from_msg

    points = random_points(5000)
    answer = connected.ask(make_cloud(points, STAMP_NS, "roof_lidar"))
    assert (answer.header.frame_id, stamp_ns(answer.header)) == ("roof_lidar", STAMP_NS)
    assert all(detection.header == answer.header and detection.id == "" for detection in answer.detections)

    detector = Detector.load(small_model)
    expected = detector.detect(points)
    assert len(expected) > 0
    found = boxes_from_msg(answer, expected.class_names)
    np.testing.assert_allclose(found.boxes[:, :6], expected.boxes[:, :6], atol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_markers_and_times_come_with_the_answer(connected):
    connected.ask(make_cloud(random_points(10), STAMP_NS))
    connected.spin_for(0.3)
    connected.markers.clear()
    connected.latency_ms.clear()
    answer = connected.ask(make_cloud(random_points(3000), time.time_ns()))
    assert connected.spin_until(lambda: connected.markers and connected.latency_ms)
    deleting, *others = connected.markers[-1].markers
    assert deleting.action == deleting.DELETEALL
    texts = [marker.text for marker in others if marker.type == marker.TEXT_VIEW_FACING]
    assert len(texts) == len(answer.detections)
    assert 0 < connected.latency_ms[-1] < 20_000


def test_label_info_reaches_late_subscribers(connected):
    classes = {entry.class_id: entry.class_name for entry in connected.label_info[-1].class_map}
    assert classes == {0: "car", 1: "pedestrian", 2: "cyclist"}


def without_z(cloud):
    cloud.fields = [field for field in cloud.fields if field.name != "z"]


def too_little_data(cloud):
    cloud.data = cloud.data[:-16]


def no_point_step(cloud):
    cloud.point_step = 0


def field_beyond_the_point(cloud):
    cloud.fields[2].offset = 14


@pytest.mark.parametrize("break_cloud", [without_z, too_little_data, no_point_step, field_beyond_the_point])
def test_unreadable_cloud_is_refused_and_the_next_one_answered(connected, node, break_cloud):
    refused = int(connected.status()[1]["clouds refused"])
    cloud = make_cloud(random_points(100), STAMP_NS)
    break_cloud(cloud)
    connected.publisher.publish(cloud)
    assert connected.spin_until(lambda: int(connected.status()[1]["clouds refused"]) == refused + 1)
    assert "cloud refused" in node.output
    assert stamp_ns(connected.ask(make_cloud(random_points(100), STAMP_NS + 1)).header) == STAMP_NS + 1


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((0, 4)),
        np.array([[10.0, 0.0, 0.5, 0.1]]),
        np.full((50, 4), np.nan),
        np.full((50, 4), np.inf),
        np.zeros((50, 4)),
        np.full((50, 4), 500.0),
    ],
    ids=["empty", "one point", "NaN", "Inf", "missing returns", "out of range"],
)
def test_cloud_with_little_in_it_is_answered(connected, points):
    assert stamp_ns(connected.ask(make_cloud(points, STAMP_NS)).header) == STAMP_NS


def test_under_load_no_cloud_is_answered_twice_and_all_are_counted(connected):
    before = connected.status()[1]
    connected.detections.clear()
    for i in range(20):
        connected.publisher.publish(make_cloud(random_points(20_000), STAMP_NS + i))
        connected.spin_for(0.01)
    assert connected.spin_until(lambda: any(stamp_ns(d.header) == STAMP_NS + 19 for d in connected.detections))
    stamps = [stamp_ns(d.header) - STAMP_NS for d in connected.detections]
    assert stamps == sorted(set(stamps))

    def counted():
        after = connected.status()[1]
        names = ("received", "answered", "dropped")
        received, answered, dropped = (int(after[f"clouds {n}"]) - int(before[f"clouds {n}"]) for n in names)
        return answered == len(stamps) and received == answered + dropped

    assert connected.spin_until(counted, 5.0)


def test_diagnostics_tell_the_state(connected):
    connected.ask(make_cloud(random_points(1000), time.time_ns()))
    status, values = connected.status()
    assert status.name == "dsvt_detector: detector"
    assert values["state"] == "active"
    assert (values["model"], values["backend"]) == ("small", "torch")
    assert values["publishers on the input"] == "1"


def test_live_parameter_takes_effect_on_the_next_cloud(connected):
    cloud = make_cloud(random_points(5000), STAMP_NS)
    assert len(connected.ask(cloud).detections) > 0
    assert connected.set_parameter("postprocess.score_threshold", 1.0).successful
    assert len(connected.ask(cloud).detections) == 0
    assert connected.get_parameter("postprocess.score_threshold").double_value == 1.0
    assert connected.set_parameter("postprocess.score_threshold", 0.3).successful


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("postprocess.score_threshold", 1.5, "1.0"),
        ("postprocess.nms_geometry", "round", "exact, dsvt_release"),
        ("model", "waymo_pillar", "read-only"),
        ("preprocess.min_range", float("nan"), "Max: 100.0"),
    ],
)
def test_impossible_change_is_refused(connected, name, value, reason):
    result = connected.set_parameter(name, value)
    assert not result.successful
    assert reason in result.reason


def test_defaults_are_those_of_the_model(connected):
    assert connected.get_parameter("preprocess.find_ground").bool_value is True
    assert list(connected.get_parameter("postprocess.nms_iou").double_array_value) == [0.2, 0.3, 0.3]
    assert list(connected.get_parameter("preprocess.sensor_pose").double_array_value) == []


def test_lifecycle_by_service(connected):
    cloud = make_cloud(random_points(500), STAMP_NS)
    assert connected.change_state(DEACTIVATE)
    assert connected.spin_until(lambda: connected.publisher.get_subscription_count() == 0)
    assert connected.status()[1]["state"] == "inactive"
    assert connected.change_state(ACTIVATE)
    connected.connect()
    connected.ask(cloud)
    assert connected.change_state(DEACTIVATE)
    assert connected.change_state(CLEANUP)
    assert not connected.change_state(ACTIVATE)
    connected.label_info.clear()
    assert connected.change_state(CONFIGURE)
    assert connected.change_state(ACTIVATE)
    connected.connect()
    assert stamp_ns(connected.ask(cloud).header) == STAMP_NS


def test_z_interrupt_ends_the_node_cleanly(connected, node):
    for _ in range(3):
        connected.publisher.publish(make_cloud(random_points(200_000), STAMP_NS))
        connected.spin_for(0.05)
    exit_code, seconds = node.end()
    assert (exit_code, "Traceback" in node.output) == (0, False), node.output
    assert seconds < 2.5
