"""Which labels count for a model's classes."""

import dataclasses

import pytest

from dsvt_ros.errors import ModelError
from dsvt_ros.io.nuscenes_results import DETECTION_NAMES
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools.label_classes import ARGOVERSE2, NUSCENES

DEMO = open_model("demo").model


def with_classes(*names):
    return dataclasses.replace(DEMO, class_names=names)


def test_the_demo_on_nuscenes():
    evaluated = NUSCENES.evaluated(DEMO)
    assert evaluated == ["car", "pedestrian", "bicycle"]
    assert NUSCENES.ignored("car", evaluated) == {"truck", "bus", "trailer", "construction_vehicle", "ignore"}
    assert NUSCENES.ignored("bicycle", evaluated) == {"motorcycle", "ignore"}
    assert NUSCENES.ignored("pedestrian", evaluated) == {"ignore"}


def test_a_model_with_all_classes_has_to_tell_them_apart():
    evaluated = NUSCENES.evaluated(with_classes(*DETECTION_NAMES))
    assert evaluated == list(DETECTION_NAMES)
    assert NUSCENES.ignored("car", evaluated) == {"ignore"}
    assert NUSCENES.ignored("barrier", evaluated) == set()


def test_the_demo_on_argoverse():
    evaluated = ARGOVERSE2.evaluated(DEMO)
    assert evaluated == ["REGULAR_VEHICLE", "PEDESTRIAN", "BICYCLIST"]
    assert {"BUS", "BOX_TRUCK"} < ARGOVERSE2.ignored("REGULAR_VEHICLE", evaluated)
    assert "BICYCLE" in ARGOVERSE2.ignored("BICYCLIST", evaluated)
    assert "BICYCLIST" not in ARGOVERSE2.ignored("PEDESTRIAN", evaluated)


def test_classes_of_one_label_are_one():
    assert NUSCENES.evaluated(with_classes("Vehicle", "CAR", "tree")) == ["car"]


def test_a_model_of_other_things():
    with pytest.raises(ModelError, match=r"demo has the classes tree; expected one of car, truck"):
        NUSCENES.evaluated(with_classes("tree"))
