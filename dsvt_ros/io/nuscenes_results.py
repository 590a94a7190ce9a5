"""Detections as nuScenes takes them: the JSON file of its detection task.

``attribute_name`` is asked of every box, though a lidar detector without velocities can only guess. The guess is the
usual one (as in OpenPCDet): what moves faster than `MOVING_M_S` is ``moving`` or ``with_rider``, what does not is what
most objects of its class are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError
from dsvt_ros.io.nuscenes import read_json
from dsvt_ros.io.stored_poses import move_boxes
from dsvt_ros.structures import Boxes3D

DETECTION_NAMES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
ALIASES = {"vehicle": "car", "cyclist": "bicycle"}
"""Classes of models trained on other data, and what comes closest."""

MAX_BOXES = 500
"""Boxes of one sample; the kit refuses more."""

MOVING_M_S = 0.2

# Attribute of a moving object, then of one that stands still.
_ATTRIBUTES = {
    "car": ("vehicle.moving", "vehicle.parked"),
    "truck": ("vehicle.moving", "vehicle.parked"),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "trailer": ("vehicle.moving", "vehicle.parked"),
    "construction_vehicle": ("vehicle.moving", "vehicle.parked"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    "motorcycle": ("cycle.with_rider", "cycle.without_rider"),
    "bicycle": ("cycle.with_rider", "cycle.without_rider"),
    "traffic_cone": ("", ""),
    "barrier": ("", ""),
}


def detection_name(class_name: str) -> str | None:
    """The class of the detection task that a model's class stands for; None for others."""
    name = class_name.lower()
    name = ALIASES.get(name, name)
    return name if name in DETECTION_NAMES else None


def records_from_boxes(
    token: str,
    boxes: Boxes3D,
    T_global_sensor: NDArray[np.float64],  # noqa: N803
) -> list[dict[str, Any]]:
    """The boxes of one sample as the results file lists them.

    Args:
        token: Of the sample.
        boxes: In the frame of its cloud; classes that are not in the task are left out, and of more than `MAX_BOXES`
            boxes those with the lowest scores.
        T_global_sensor: (4, 4) pose of that frame in the global one.
    """
    moved = move_boxes(boxes.boxes, T_global_sensor)
    velocities = moved[:, 7:9] if moved.shape[1] == 9 else np.zeros((len(moved), 2))
    names = [detection_name(name) for name in boxes.class_names]
    records = []
    for i in np.argsort(-boxes.scores, kind="stable"):
        name = names[boxes.labels[i]]
        if name is None:
            continue
        x, y, z, length, width, height, yaw = moved[i, :7].tolist()
        velocity = velocities[i].tolist()
        records.append(
            {
                "sample_token": token,
                "translation": [x, y, z],
                "size": [width, length, height],
                "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
                "velocity": velocity,
                "detection_name": name,
                "detection_score": float(boxes.scores[i]),
                "attribute_name": attribute_name(name, float(np.hypot(*velocity))),
            }
        )
    return records[:MAX_BOXES]


def attribute_name(name: str, speed_m_s: float) -> str:
    """The likely attribute of an object of class `name`; empty for classes without attributes."""
    moving, still = _ATTRIBUTES[name]
    return moving if speed_m_s > MOVING_M_S else still


def write_results(path: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a results file.

    Args:
        path: The file.
        records: `records_from_boxes` of every sample of the split, by token.

    Raises:
        DataError: It cannot be written.
    """
    meta = {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
    try:
        path.write_text(json.dumps({"meta": meta, "results": records}) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def read_results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of every sample of a results file, by token.

    Raises:
        DataError: The file is missing or is something else.
    """
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise DataError(f"{path} holds no nuScenes results: expected the keys meta and results")
    return results
