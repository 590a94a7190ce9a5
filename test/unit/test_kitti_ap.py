"""Average precision of tiny scenes, worked out by hand in the comments."""

import numpy as np
import pytest

from dsvt_ros.io.kitti import KittiObjects
from dsvt_ros.kitti_ap import KittiFrame, evaluate_kitti


def objects(*rows):
    """Objects from ``(type, x, score, options)``, side by side 20 m ahead; options: occlusion, height_px, up, left."""
    rows = [(*row, {})[:4] for row in rows]
    count = len(rows)
    left = np.array([row[3].get("left", 0.0) for row in rows])
    height = np.array([row[3].get("height_px", 50.0) for row in rows])
    sizes = {"Pedestrian": (1.8, 0.6, 0.8), "Person_sitting": (1.8, 0.6, 0.8), "DontCare": (-1.0, -1.0, -1.0)}
    return KittiObjects(
        types=tuple(row[0] for row in rows),
        truncation=np.array([row[3].get("truncation", 0.0) for row in rows]),
        occlusion=np.array([row[3].get("occlusion", 0) for row in rows], np.int64),
        alpha=np.zeros(count),
        image_boxes=np.stack([left, 100 + 0 * left, left + 60, 100 + height], axis=1).reshape(-1, 4),
        sizes=np.array([sizes.get(row[0], (1.5, 1.6, 4.0)) for row in rows]).reshape(-1, 3),
        locations=np.array([[row[1], 1.7 - row[3].get("up", 0.0), 20.0] for row in rows]).reshape(-1, 3),
        rotation_y=np.zeros(count),
        scores=np.array([row[2] for row in rows], np.float64),
    )


NAN = float("nan")


def evaluate(labels, detections, kind="exact", name="car", shown=None):
    frame = KittiFrame(labels, detections, detections if shown is None else shown)
    return evaluate_kitti([frame], kind, [name])


def test_one_scene_three_ways():
    labels = objects(("Car", 0, NAN), ("Car", 10, NAN), ("Car", 20, NAN), ("Car", 30, NAN))
    # By score: hit, false alarm, hit, false alarm. Recall 1/4 at precision 1, then 2/4 at precision 2/3.
    detections = objects(("Car", 0.1, 0.9), ("Car", 50, 0.8), ("Car", 10, 0.7), ("Car", 60, 0.6))
    exact = evaluate(labels, detections)
    for measure in ("3d@0.7", "3d@0.5", "bev@0.7", "bev@0.5"):
        for level in ("easy", "moderate", "hard"):
            assert exact.ap["car"][measure][level] == pytest.approx(100 * (0.25 * 1 + 0.25 * 2 / 3))
    assert exact.found["car"] == {"easy": (2, 4), "moderate": (2, 4), "hard": (2, 4)}
    # The kit: thresholds 0.9 and 0.7, precisions 1 and 2/3 at its positions 0 and 1, and 0 at the other 39.
    assert evaluate(labels, detections, "r40").ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 * (2 / 3) / 40)
    assert evaluate(labels, detections, "r11").ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 * 1 / 11)


def test_perfect_detections_of_few_and_many_objects():
    def perfect(count):
        labels = objects(*(("Car", 10 * i, NAN) for i in range(count)))
        detections = objects(*(("Car", 10 * i, 1 - i / 1000) for i in range(count)))
        return [evaluate(labels, detections, kind).ap["car"]["3d@0.7"]["easy"] for kind in ("exact", "r40", "r11")]

    # Five thresholds for 41 positions: 0 to 4, so four of the 40 of r40, and 0 and 4 of r11.
    assert perfect(5) == pytest.approx([100, 100 * 4 / 40, 100 * 2 / 11])
    assert perfect(80) == pytest.approx([100, 100, 100])


def test_half_of_forty_objects():
    labels = objects(*(("Car", 10 * i, NAN) for i in range(40)))
    detections = objects(*(("Car", 10 * i, 1 - i / 1000) for i in range(20)))
    assert evaluate(labels, detections).ap["car"]["3d@0.7"]["easy"] == pytest.approx(50)
    # Twenty thresholds, the first at position 0, which r40 leaves out; r11 has 0, 4, 8, 12 and 16.
    assert evaluate(labels, detections, "r40").ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 * 19 / 40)
    assert evaluate(labels, detections, "r11").ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 * 5 / 11)


@pytest.mark.parametrize("kind", ["exact", "r40"])
def test_difficulties(kind):
    labels = objects(
        ("Car", 0, NAN),
        ("Car", 10, NAN, {"occlusion": 1}),
        ("Car", 20, NAN, {"height_px": 30.0}),
        ("Car", 30, NAN, {"truncation": 0.4}),
        ("Car", 40, NAN, {"occlusion": 3}),
        ("Car", 50, NAN, {"height_px": 25.0}),
    )
    detections = objects(*(("Car", 10 * i, 0.9) for i in range(6)))
    result = evaluate(labels, detections, kind)
    # 25 pixels are not more than 25, and occlusion 3 is unknown: those two never count, and are no false alarms.
    assert result.found["car"] == {"easy": (1, 1), "moderate": (3, 3), "hard": (4, 4)}
    if kind == "exact":
        assert result.ap["car"]["3d@0.7"] == pytest.approx({"easy": 100, "moderate": 100, "hard": 100})
    else:  # 1, 3 and 4 thresholds of precision 1
        assert result.ap["car"]["3d@0.7"] == pytest.approx({"easy": 0, "moderate": 5, "hard": 7.5})


def test_neighbors_are_ignored_and_other_classes_are_not_there():
    labels = objects(("Car", 0, NAN), ("Van", 10, NAN), ("Truck", 20, NAN))
    detections = objects(("Car", 0, 0.7), ("Car", 10, 0.9), ("Car", 20, 0.8))
    # The van is ignored, the truck is a false alarm of higher score: one hit at precision 1/2.
    result = evaluate(labels, detections)
    assert result.ap["car"]["bev@0.7"]["easy"] == pytest.approx(50)
    assert result.found["car"]["easy"] == (1, 1)
    sitting = evaluate(objects(("Person_sitting", 0, NAN)), objects(("Pedestrian", 0, 0.9)), name="pedestrian")
    assert np.isnan(sitting.ap["pedestrian"]["3d@0.5"]["hard"])
    assert sitting.found["pedestrian"]["hard"] == (0, 0)


def test_low_detections_are_no_false_alarms():
    labels = objects(("Car", 0, NAN))
    detections = objects(("Car", 0, 0.5), ("Car", 30, 0.9, {"height_px": 30.0}))
    result = evaluate(labels, detections)
    # 30 pixels are too low for easy only; elsewhere it is a false alarm before the hit.
    assert result.ap["car"]["3d@0.7"] == pytest.approx({"easy": 100, "moderate": 50, "hard": 50})


def test_areas_without_labels():
    labels = objects(("Car", 0, NAN), ("Car", 10, NAN), ("DontCare", -1000, NAN, {"left": 500.0}))
    inside, beside = {"left": 505.0}, {"left": 530.0}  # 55 and 30 of the 60 pixels lie in the area
    first, second = ("Car", 0, 0.9), ("Car", 10, 0.5)
    assert evaluate(labels, objects(first, second, ("Car", 40, 0.7, inside))).ap["car"]["3d@0.7"]["easy"] == 100
    # One hit at precision 1, the other at 2/3.
    half = evaluate(labels, objects(first, second, ("Car", 40, 0.7, beside)))
    assert half.ap["car"]["3d@0.7"]["easy"] == pytest.approx(50 + 50 * 2 / 3)
    # The kit counts it in 3D: precision 2/3 at position 1.
    kit = evaluate(labels, objects(first, second, ("Car", 40, 0.7, inside)), "r40")
    assert kit.ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 * (2 / 3) / 40)


def test_height_matters_in_3d_only():
    labels = objects(("Car", 0, NAN))
    # Half as high again: IoU (1.5 - 0.4) / (1.5 + 0.4) = 0.58 in 3D, 1 from above.
    result = evaluate(labels, objects(("Car", 0, 0.9, {"up": 0.4})))
    measured = {measure: values["easy"] for measure, values in result.ap["car"].items()}
    assert measured == pytest.approx({"3d@0.7": 0, "3d@0.5": 100, "bev@0.7": 100, "bev@0.5": 100})


def test_found_objects_are_those_of_the_shown_boxes():
    labels = objects(("Pedestrian", 0, NAN), ("Pedestrian", 10, NAN))
    detections = objects(("Pedestrian", 0, 0.9), ("Pedestrian", 10, 0.1))
    result = evaluate(labels, detections, name="pedestrian", shown=detections.select(detections.scores > 0.5))
    assert result.ap["pedestrian"]["3d@0.5"]["easy"] == 100
    assert result.found["pedestrian"]["easy"] == (1, 2)


def test_kit_prefers_overlap_at_each_threshold():
    # Two boxes on one car: the better one has the lower score. Its hit has score 0.9 (the highest that fits); at that
    # threshold the better box is not there yet: precision 1 with one threshold, at position 0.
    labels = objects(("Car", 0, NAN))
    detections = objects(("Car", 0.3, 0.9), ("Car", 0, 0.8))
    assert evaluate(labels, detections, "r11").ap["car"]["3d@0.7"]["easy"] == pytest.approx(100 / 11)
    assert evaluate(labels, detections).ap["car"]["3d@0.7"]["easy"] == 100


@pytest.mark.parametrize("kind", ["exact", "r40", "r11"])
def test_nothing_and_no_frames(kind):
    nothing = objects()
    assert np.isnan(evaluate(nothing, objects(("Car", 0, 0.9)), kind).ap["car"]["3d@0.7"]["easy"])
    assert evaluate(objects(("Car", 0, NAN)), nothing, kind).ap["car"]["3d@0.7"]["easy"] == 0
    empty = evaluate_kitti([], kind)
    assert (empty.num_frames, empty.found["cyclist"]["hard"]) == (0, (0, 0))
