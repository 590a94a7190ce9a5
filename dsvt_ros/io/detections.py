"""vision_msgs/Detection3DArray to boxes, without rclpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsvt_ros.structures import Boxes3D


def boxes_from_msg(msg: Any, class_names: tuple[str, ...]) -> Boxes3D:
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
