import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsvt_ros.training import objects
from dsvt_ros.training.layout import SceneConfig, make_scene, rectangles_overlap
from dsvt_ros.training.lidar import (
    HDL64,
    HELD_OUT_LIDARS,
    OS1_64,
    TRAINING_LIDARS,
    VLP16,
    LidarModel,
    Sensor,
    sample_training_sensor,
)
from dsvt_ros.training.scene import Terrain, World, scene_from_world
from dsvt_ros.training.shapes import Material, PartList
from dsvt_ros.training.simulator import Conditions, SceneStream, SensedScene, cast

FLAT = Terrain(np.zeros(2), np.zeros((0, 4)), np.zeros((0, 5)), 0.0)


def boxes_overlap(boxes: np.ndarray) -> np.ndarray:
    rectangles = np.stack(
        [boxes[:, 0], boxes[:, 1], np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), boxes[:, 3] / 2, boxes[:, 4] / 2], axis=1
    ).astype(np.float64)
    return np.stack([rectangles_overlap(rectangle, rectangles) for rectangle in rectangles])


def local_points(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(box[6]), np.sin(box[6])
    delta = points[:, :3] - box[:3]
    return np.stack([delta[:, 0] * cos + delta[:, 1] * sin, delta[:, 1] * cos - delta[:, 0] * sin, delta[:, 2]], axis=1)


def sense_bodies(bodies, poses) -> SensedScene:
    scene = scene_from_world(World(FLAT, bodies, np.array(poses, dtype=float), np.zeros(len(bodies))))
    return SensedScene(scene, Sensor(replace(HDL64, num_columns=1000)))


def wall() -> PartList:
    parts = PartList()
    parts.box(Material(0.5), (0.0, 0.0, 2.0), (0.3, 12.0, 4.0))
    return parts


def test_held_out_lidars_are_not_trained_on():
    assert not {lidar.name for lidar in HELD_OUT_LIDARS} & {lidar.name for lidar in TRAINING_LIDARS}
    drawn = {SceneStream("train")[index].sensor.lidar.name for index in range(12)}
    assert drawn <= {lidar.name for lidar in TRAINING_LIDARS}
    assert SceneStream("held_out")[0].sensor.lidar in HELD_OUT_LIDARS


def test_presets_match_their_data_sheets():
    presets = {lidar.name: lidar for lidar in (*TRAINING_LIDARS, *HELD_OUT_LIDARS)}
    beams = {name: lidar.num_beams for name, lidar in presets.items()}
    assert beams == {
        "hdl64": 64, "hdl32": 32, "waymo_top": 64, "os1_64": 64, "os1_128": 128, "os1_128_fine": 128,
        "vlp16": 16, "vlp32": 32, "pandar40": 40,
    }  # fmt: skip
    for lidar in presets.values():
        assert np.all(np.diff(lidar.elevations_deg) > 0), lidar.name
    assert presets["hdl64"].elevations_deg[-1] == pytest.approx(2.0)
    assert presets["waymo_top"].elevations_deg[0] == pytest.approx(-17.6)


def test_unsorted_beams_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        LidarModel("bad", (1.0, 0.0), 100, 10.0)


def test_random_mounts_stay_in_range():
    rng = np.random.default_rng(0)
    sensors = [sample_training_sensor(rng) for _ in range(200)]
    heights = np.array([sensor.height_m for sensor in sensors])
    assert heights.min() >= 0.6
    assert heights.max() <= 2.2
    assert heights.min() < 0.9
    assert max(abs(sensor.pitch_rad) for sensor in sensors) <= np.radians(2.0)
    assert any(not sensor.is_full_turn for sensor in sensors)


def test_sector_is_centred_on_the_heading():
    sensed = SensedScene(SceneStream("test")[0].scene, Sensor(OS1_64, sector_rad=np.radians(90.0)))
    points = cast([sensed], seed=0).points
    azimuth = torch.atan2(points[:, 1], points[:, 0])
    assert float(azimuth.abs().max()) < np.radians(45.6)
    assert float(azimuth.min()) < -0.5
    assert float(azimuth.max()) > 0.5


@pytest.mark.parametrize("make", [objects.make_car, objects.make_pedestrian, objects.make_cyclist])
def test_boxes_hold_their_points_tightly(make):
    rng = np.random.default_rng(5)
    for trial in range(6):
        yaw = float(rng.uniform(-np.pi, np.pi))
        sensed = sense_bodies([make(rng)], [[7.0, 3.0, yaw]])
        scan = cast([sensed], seed=trial)
        points = scan.points[scan.object_index == 0].numpy()
        assert len(points) == int(scan.num_points[0]) > 60
        box = scan.boxes[0].numpy()
        inside = np.abs(local_points(points, box)) <= box[3:6] / 2 + 0.08
        assert inside.all(axis=1).mean() >= 0.98
        assert box[2] == pytest.approx(box[5] / 2, abs=1e-5)
        # The box is not larger than what it holds: the top is seen in full.
        assert points[:, 2].max() > box[5] - 0.25


def test_sizes_are_those_of_real_traffic():
    rng = np.random.default_rng(0)
    expected = {
        objects.make_car: ((3.3, 1.5, 1.3), (5.31, 2.06, 2.01)),
        objects.make_pedestrian: ((0.25, 0.35, 1.0), (1.3, 1.0, 2.0)),
        objects.make_cyclist: ((1.5, 0.45, 1.35), (2.1, 0.8, 2.0)),
    }
    for make, (low, high) in expected.items():
        sizes = np.array([make(rng).size for _ in range(60)])
        assert np.all(sizes > low), (make.__name__, sizes.min(axis=0))
        assert np.all(sizes < high), (make.__name__, sizes.max(axis=0))


def test_rays_pass_below_and_through_a_car():
    rng = np.random.default_rng(0)
    body = objects.make_car(rng)
    scan = cast([sense_bodies([body], [[8.0, 0.0, np.pi / 2]])], seed=0)
    points = scan.points[scan.object_index == -1].numpy()
    under = np.abs(local_points(points, scan.boxes[0].numpy())) < scan.boxes[0, 3:6].numpy() / 2
    assert under.all(axis=1).sum() > 10  # ground below the body
    through = (np.abs(points[:, 1]) < 1.5) & (points[:, 0] > 20.0)
    assert through.sum() > 10  # ground behind the windows


def test_occlusion_behind_a_wall_and_alone():
    rng = np.random.default_rng(1)
    car = objects.make_car(rng)
    hidden = cast([sense_bodies([wall().body(), car], [[8.0, 0.0, 0.0], [15.0, 0.0, 1.0]])], seed=0)
    assert hidden.occlusion.tolist() == [1.0]
    assert hidden.num_points.tolist() == [0]
    alone = cast([sense_bodies([car], [[15.0, 0.0, 1.0]])], seed=0)
    assert float(alone.occlusion[0]) < 0.02
    half_wall = PartList()
    half_wall.box(Material(0.5), (0.0, 3.0, 2.0), (0.3, 6.0, 4.0))
    half = cast([sense_bodies([half_wall.body(size=(1, 1, 1)), car], [[8.0, 0.0, 0.0], [15.0, 0.0, 1.0]])], seed=0)
    assert 0.25 < float(half.occlusion[0]) < 0.75


def test_objects_do_not_overlap():
    for seed in range(4):
        scene = make_scene(np.random.default_rng(seed))
        boxes = scene.boxes[scene.labels >= 0]
        overlap = boxes_overlap(boxes)
        assert overlap.sum() == len(boxes)  # each one only itself


def test_same_seed_same_bytes():
    config = SceneConfig(reach_m=30.0)
    samples = [replace(SceneStream("train", 7, config)[index], sensor=Sensor(VLP16)) for index in range(2)]
    again = [replace(SceneStream("train", 7, config)[index], sensor=Sensor(VLP16)) for index in range(2)]
    first = cast(samples, seed=3)
    second = cast(again, seed=3)
    assert first.points.numpy().tobytes() == second.points.numpy().tobytes()
    assert torch.equal(first.num_points, second.num_points)
    third = cast(samples, seed=4)
    assert third.points.numpy().tobytes() != first.points.numpy().tobytes()


def test_splits_and_seeds_differ():
    first_boxes = [
        SceneStream(split, seed)[0].scene.bounds.tobytes()
        for split, seed in (("train", 0), ("train", 1), ("validation", 0), ("test", 0), ("held_out", 0))
    ]
    assert len(set(first_boxes)) == 5
    with pytest.raises(ValueError, match="Unknown split"):
        SceneStream("training")
    with pytest.raises(IndexError):
        SceneStream("test")[-1]


def test_samples_are_picklable():
    sample = SceneStream("train")[3]
    again = pickle.loads(pickle.dumps(sample))
    assert np.array_equal(again.scene.planes, sample.scene.planes)
    assert again.sensor.lidar == sample.sensor.lidar


def test_batch_has_one_row_for_each_object():
    stream = SceneStream("validation")
    samples = [stream[index] for index in range(3)]
    scan = cast(samples, seed=0)
    counts = [len(sample.scene.boxes) for sample in samples]
    assert scan.batch_size == 3
    assert torch.bincount(scan.box_batch_index, minlength=3).tolist() == counts
    for rows in (scan.boxes, scan.labels, scan.num_points, scan.occlusion):
        assert len(rows) == sum(counts)
    assert scan.boxes.shape == (sum(counts), 7)
    assert scan.points.dtype == torch.float32
    assert bool((torch.diff(scan.batch_index) >= 0).all())
    assert bool(torch.isfinite(scan.points).all())
    assert 0.0 <= float(scan.points[:, 3].min()) <= float(scan.points[:, 3].max()) <= 1.0
    assert 0.0 <= float(scan.occlusion.min()) <= float(scan.occlusion.max()) <= 1.0
    # Points of an object are in the scan that lists it.
    on_object = scan.object_index >= 0
    assert torch.equal(scan.box_batch_index[scan.object_index[on_object]], scan.batch_index[on_object])


def test_scenes_have_all_classes_and_vary():
    counts = []
    for index in range(20):
        scene = make_scene(np.random.default_rng(100 + index))
        near = np.hypot(scene.boxes[:, 0], scene.boxes[:, 1]) < 51.2
        counts.append(np.bincount(scene.labels[near], minlength=3))
    mean = np.mean(counts, axis=0)
    assert 8 < mean[0] < 30
    assert 3 < mean[1] < 20
    assert 1 < mean[2] < 12
    assert np.min(counts, axis=0)[0] < 8 < np.max(counts, axis=0)[0]


def test_empty_scene_and_silent_intensity():
    scene = scene_from_world(World(FLAT))
    scan = cast([SensedScene(scene, Sensor(HDL64), Conditions(intensity="zero"))], seed=0)
    assert scan.boxes.shape == (0, 7)
    assert len(scan.occlusion) == len(scan.num_points) == 0
    assert len(scan.points) > 10_000
    assert float(scan.points[:, 3].max()) == 0.0
    assert bool((scan.object_index == -1).all())
    with pytest.raises(ValueError, match="at least one"):
        cast([], seed=0)


def test_range_noise_and_limits():
    sensor = Sensor(replace(HDL64, max_range_m=20.0, range_noise_m=0.05))
    sensed = SensedScene(scene_from_world(World(FLAT)), sensor, Conditions(min_range_m=6.0))
    points = cast([sensed], seed=0).points
    distance = (points[:, :3] - torch.tensor([0.0, 0.0, sensor.height_m])).norm(dim=1)
    assert 6.0 <= float(distance.min()) <= float(distance.max()) <= 20.0
    slant = (sensor.height_m - points[:, 2]) / distance
    error = points[:, 2] / slant
    assert float(error.std()) == pytest.approx(0.05, rel=0.1)


def test_clutter_hangs_in_the_air():
    sensed = SensedScene(scene_from_world(World(FLAT)), Sensor(HDL64), Conditions(clutter=0.01, min_range_m=0.5))
    points = cast([sensed], seed=0).points
    share = float((points[:, 2] > 0.3).float().mean())
    assert 0.003 < share < 0.03


def test_unknown_kind_of_scene_is_refused():
    with pytest.raises(ValueError, match="kinds"):
        SceneConfig(("village",), (1.0,))
