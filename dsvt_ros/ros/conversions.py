"""Boxes to vision_msgs and visualization_msgs; the way back is `dsvt_ros.io.detections`."""

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

from dsvt_ros.class_colors import color_of_class
from dsvt_ros.structures import Boxes3D

LABEL_HEIGHT_M = 0.6
"""Height of the letters above a box."""

ARROW_S = 1.0
"""An arrow leads to where an object will be after this time."""

MIN_ARROW_M_S = 0.5
"""Slower objects get no arrow: estimated velocities of parked cars differ from 0 by about as much."""

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


def msg_from_boxes(boxes: Boxes3D, header: Header) -> Detection3DArray:
    """A message with the boxes of one cloud, in the frame and at the time of that cloud.

    Args:
        boxes: In the cloud's frame.
        header: Of the cloud; Detection3D.msg: "header should match the header of the source data".

    Velocities have no place in the message; `markers_from_boxes` shows them.
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


def label_info_from_classes(class_names: tuple[str, ...], score_threshold: float, header: Header) -> LabelInfo:
    """The label of each class name, for those who join later."""
    classes = [VisionClass(class_id=i, class_name=name) for i, name in enumerate(class_names)]
    return LabelInfo(header=header, class_map=classes, threshold=score_threshold)


def markers_from_boxes(boxes: Boxes3D, header: Header, *, lifetime_s: float) -> MarkerArray:
    """Box edges with a line to where the object faces, and a text such as "car 0.87", per box.

    Where boxes have a velocity, an arrow shows that of each moving object.

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
        if len(row) == 9 and math.hypot(*row[7:9]) >= MIN_ARROW_M_S:
            markers.append(_arrow(header, row, i, _color(name, label, 0.95), lifetime))
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


def _arrow(header: Header, row: list[float], number: int, color: ColorRGBA, lifetime: Duration) -> Marker:
    """From the centre of a box with velocity to where it will be."""
    x, y, z = row[:3]
    marker = _marker(header, "velocities", number, Marker.ARROW, lifetime)
    marker.points = [Point(x=x, y=y, z=z), Point(x=x + ARROW_S * row[7], y=y + ARROW_S * row[8], z=z)]
    marker.scale = Vector3(x=0.12, y=0.4, z=0.5)  # diameters of shaft and head, length of the head
    marker.color = color
    return marker


def _color(class_name: str, label: int, alpha: float) -> ColorRGBA:
    red, green, blue = color_of_class(class_name, label)
    return ColorRGBA(r=red, g=green, b=blue, a=alpha)


def _duration(seconds: float) -> Duration:
    nanoseconds = round(seconds * 1e9)
    return Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
