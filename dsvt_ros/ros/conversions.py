"""Boxes to vision_msgs and visualization_msgs, and back."""

from __future__ import annotations

import math

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from std_msgs.msg import ColorRGBA, Header
from vision_msgs.msg import (
    BoundingBox3D,
    Detection3D,
    Detection3DArray,
    LabelInfo,
    ObjectHypothesisWithPose,
    VisionClass,
)
from visualization_msgs.msg import Marker, MarkerArray

from dsvt_ros.structures import Boxes3D

CLASS_COLORS = {
    "car": (0.20, 0.60, 1.00),
    "vehicle": (0.20, 0.60, 1.00),
    "truck": (0.55, 0.40, 0.95),
    "bus": (0.95, 0.75, 0.15),
    "pedestrian": (1.00, 0.35, 0.30),
    "cyclist": (0.25, 0.80, 0.35),
    "bicycle": (0.25, 0.80, 0.35),
    "motorcycle": (0.10, 0.75, 0.70),
}
"""Red, green, blue of the class names that models share, lower case."""

OTHER_COLORS = ((0.90, 0.45, 0.80), (0.65, 0.65, 0.65), (0.75, 0.60, 0.35), (0.85, 0.85, 0.35))
"""Of all other classes, by label."""

LABEL_HEIGHT_M = 0.6
"""Height of the letters above a box."""

_EDGES = (
    (0, 1),
    (1, 3),
    (3, 2),
    (2, 0),
    (4, 5),
    (5, 7),
    (7, 6),
    (6, 4),
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
)
_CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
# Each edge's two ends, then a line from the centre to half a length beyond the front.
_LINES = np.concatenate([_CORNERS[np.array(_EDGES).reshape(-1)], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])


def color_of_class(class_name: str, label: int) -> tuple[float, float, float]:
    """Red, green, blue in [0, 1]; the same in every picture of this package."""
    return CLASS_COLORS.get(class_name.lower(), OTHER_COLORS[label % len(OTHER_COLORS)])


def msg_from_boxes(boxes: Boxes3D, header: Header) -> Detection3DArray:
    """A message with the boxes of one cloud, in the frame and at the time of that cloud.

    Args:
        boxes: In the cloud's frame.
        header: Of the cloud; Detection3D.msg: "header should match the header of the source data".
    """
    detections = []
    for row, score, label in zip(boxes.boxes.tolist(), boxes.scores.tolist(), boxes.labels.tolist(), strict=True):
        pose = _pose(row)
        # Covariance stays zero, which vision_msgs reads as unknown.
        result = ObjectHypothesisWithPose()
        result.hypothesis.class_id = boxes.class_names[label]
        result.hypothesis.score = min(max(score, 0.0), 1.0)
        result.pose.pose = pose
        size = Vector3(x=row[3], y=row[4], z=row[5])
        detections.append(Detection3D(header=header, results=[result], bbox=BoundingBox3D(center=pose, size=size)))
    return Detection3DArray(header=header, detections=detections)


def boxes_from_msg(msg: Detection3DArray, class_names: tuple[str, ...]) -> Boxes3D:
    """Boxes of a message; the first result of a detection counts, as publishers sort them.

    Args:
        msg: Of rclpy or rosbags; detections of classes that are not in `class_names` are left out.
        class_names: Names in label order.
    """
    rows, scores, labels = [], [], []
    for detection in msg.detections:
        if not detection.results or detection.results[0].hypothesis.class_id not in class_names:
            continue
        center, size = detection.bbox.center, detection.bbox.size
        q = center.orientation
        yaw = math.atan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y * q.y + q.z * q.z))
        position = center.position
        rows.append([position.x, position.y, position.z, size.x, size.y, size.z, yaw])
        scores.append(detection.results[0].hypothesis.score)
        labels.append(class_names.index(detection.results[0].hypothesis.class_id))
    return Boxes3D(
        boxes=np.array(rows, dtype=np.float32).reshape(-1, 7),
        scores=np.array(scores, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        class_names=class_names,
    )


def label_info_from_classes(class_names: tuple[str, ...], score_threshold: float, header: Header) -> LabelInfo:
    """The label of each class name, for those who join later."""
    classes = [VisionClass(class_id=i, class_name=name) for i, name in enumerate(class_names)]
    return LabelInfo(header=header, class_map=classes, threshold=score_threshold)


def markers_from_boxes(boxes: Boxes3D, header: Header, *, lifetime_s: float) -> MarkerArray:
    """Box edges with a line to where the object faces, and a text such as "car 0.87", per box.

    The first marker deletes those of the cloud before. One line list per class holds the edges of
    all its boxes: RViz draws it faster than a marker for each.
    """
    lifetime = _duration(lifetime_s)
    markers = [Marker(header=header, action=Marker.DELETEALL)]
    if not len(boxes):
        return MarkerArray(markers=markers)
    lines = _box_lines(boxes)
    for label in np.unique(boxes.labels).tolist():
        name = boxes.class_names[label]
        marker = _marker(header, f"{name}/boxes", label, Marker.LINE_LIST, lifetime)
        marker.scale.x = 0.06
        marker.color = _color(name, label, 0.95)
        points = lines[boxes.labels == label].reshape(-1, 3).tolist()
        marker.points = [Point(x=x, y=y, z=z) for x, y, z in points]
        markers.append(marker)
    for i, (row, score, label) in enumerate(
        zip(boxes.boxes.tolist(), boxes.scores.tolist(), boxes.labels.tolist(), strict=True)
    ):
        name = boxes.class_names[label]
        marker = _marker(header, "labels", i, Marker.TEXT_VIEW_FACING, lifetime)
        marker.pose.position = Point(x=row[0], y=row[1], z=row[2] + row[5] / 2 + LABEL_HEIGHT_M)
        marker.scale.z = LABEL_HEIGHT_M
        marker.color = _color(name, label, 1.0)
        marker.text = f"{name} {score:.2f}"
        markers.append(marker)
    return MarkerArray(markers=markers)


def _box_lines(boxes: Boxes3D) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(M, 26, 3) float64: the ends of the lines of every box, in the boxes' frame."""
    rows = boxes.boxes.astype(np.float64)
    local = _LINES * rows[:, None, 3:6]
    cos, sin = np.cos(rows[:, 6:7]), np.sin(rows[:, 6:7])
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y, local[..., 2]], axis=-1) + rows[:, None, :3]


def _pose(row: list[float]) -> Pose:
    half_yaw = row[6] / 2
    return Pose(
        position=Point(x=row[0], y=row[1], z=row[2]),
        orientation=Quaternion(x=0.0, y=0.0, z=math.sin(half_yaw), w=math.cos(half_yaw)),
    )


def _marker(header: Header, namespace: str, number: int, kind: int, lifetime: Duration) -> Marker:
    marker = Marker(header=header, ns=namespace, id=number, type=kind, action=Marker.ADD)
    marker.lifetime = lifetime
    return marker


def _color(class_name: str, label: int, alpha: float) -> ColorRGBA:
    red, green, blue = color_of_class(class_name, label)
    return ColorRGBA(r=red, g=green, b=blue, a=alpha)


def _duration(seconds: float) -> Duration:
    nanoseconds = round(seconds * 1e9)
    return Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
