"""Detections as records of a nuScenes results file."""

import json
import math

import numpy as np
import pytest

from dsvt_ros.errors import DataError
from dsvt_ros.io.nuscenes_results import (
    DETECTION_NAMES,
    attribute_name,
    detection_name,
    read_results,
    records_from_boxes,
    write_results,
)
from dsvt_ros.structures import Boxes3D

CLASSES = ("car", "tree", "cyclist")
QUARTER = np.array([[0, -1, 0, 1000], [1, 0, 0, 2000], [0, 0, 1, 5], [0, 0, 0, 1]], np.float64)


def boxes(rows, scores, labels, columns=9):
    return Boxes3D(
        np.array(rows, np.float32).reshape(-1, 9)[:, :columns],
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        CLASSES,
    )


def test_a_box_in_the_global_frame():
    found = boxes([[1, 2, 3, 4, 1.5, 2, 0, 3, 0.5]], [0.5], [0])
    (record,) = records_from_boxes("token", found, QUARTER)
    assert record["translation"] == [998, 2001, 8]
    assert record["size"] == [1.5, 4, 2]
    np.testing.assert_allclose(record["rotation"], [math.sqrt(0.5), 0, 0, math.sqrt(0.5)], atol=1e-12)
    np.testing.assert_allclose(record["velocity"], [-0.5, 3])
    assert (record["sample_token"], record["detection_name"], record["detection_score"]) == ("token", "car", 0.5)
    assert record["attribute_name"] == "vehicle.moving"


def test_without_velocities_all_stands_still():
    found = boxes([[1, 2, 3, 4, 1.5, 2, 0, 3, 0]] * 2, [0.5, 0.4], [0, 2], columns=7)
    car, cyclist = records_from_boxes("token", found, QUARTER)
    assert (car["velocity"], car["attribute_name"]) == ([0, 0], "vehicle.parked")
    assert (cyclist["detection_name"], cyclist["attribute_name"]) == ("bicycle", "cycle.without_rider")


def test_other_classes_are_left_out_and_so_are_the_lowest_scores():
    count = 700
    scores = np.random.default_rng(0).permutation(count) / count
    found = boxes(np.ones((count, 9)), scores, [0, 1] * (count // 2))
    records = records_from_boxes("token", found, QUARTER)
    assert len(records) == count // 2
    found = boxes(np.ones((count, 9)), scores, [0] * count)
    kept = [record["detection_score"] for record in records_from_boxes("token", found, QUARTER)]
    np.testing.assert_allclose(kept, np.sort(scores)[::-1][:500], atol=1e-6)


def test_no_boxes():
    assert records_from_boxes("token", boxes([], [], []), QUARTER) == []


def test_names():
    assert [detection_name(name) for name in ("Vehicle", "cyclist", "barrier", "tree")] == [
        "car",
        "bicycle",
        "barrier",
        None,
    ]


def test_attributes_are_of_the_class():
    kinds = {name: {attribute_name(name, speed).split(".")[0] for speed in (0, 0.2, 0.3)} for name in DETECTION_NAMES}
    assert kinds.pop("pedestrian") == {"pedestrian"}
    assert kinds.pop("bicycle") == kinds.pop("motorcycle") == {"cycle"}
    assert kinds.pop("barrier") == kinds.pop("traffic_cone") == {""}
    assert set(map(frozenset, kinds.values())) == {frozenset({"vehicle"})}
    assert attribute_name("pedestrian", 0.3) == "pedestrian.moving"
    assert attribute_name("bus", 0.2) == "vehicle.stopped"


def test_file(tmp_path):
    path = tmp_path / "results.json"
    records = {"a": records_from_boxes("a", boxes(np.ones((1, 9)), [0.5], [0]), QUARTER), "b": []}
    write_results(path, records)
    assert read_results(path) == records
    meta = json.loads(path.read_text())["meta"]
    assert {key for key, used in meta.items() if used} == {"use_lidar"}
    assert set(meta) == {"use_camera", "use_lidar", "use_radar", "use_map", "use_external"}
    path.write_text('{"meta": {}}')
    with pytest.raises(DataError, match="holds no nuScenes results"):
        read_results(path)
    with pytest.raises(DataError, match="cannot be written"):
        write_results(tmp_path / "nowhere" / "results.json", records)
