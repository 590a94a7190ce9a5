"""The tables and sweeps of a made-up nuScenes folder."""

import json
import math
import shutil

import numpy as np
import pytest
from made_up_nuscenes import (
    CAR_VELOCITY,
    CAR_YAW,
    LANDMARK,
    MOUNT,
    PERSON_CENTER,
    SCENES,
    START_US,
    STEP_US,
    TILT,
    car_center,
    in_sensor,
    make_nuscenes,
    make_sweep_json,
)

from dsvt_ros.errors import DataError
from dsvt_ros.io.nuscenes import open_nuscenes, read_sweep


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_nuscenes(tmp_path_factory.mktemp("data") / "nuscenes", samples=3)


@pytest.fixture
def damaged(root, tmp_path):
    """A copy whose tables may be changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    return copy


def test_samples_of_scenes_in_order(root):
    folder = open_nuscenes(root)
    assert (folder.version, folder.scenes) == ("v1.0-mini", SCENES)
    samples = folder.samples(["scene-0916"])
    assert [sample.token for sample in samples] == ["scene-0916-0", "scene-0916-1", "scene-0916-2"]
    assert [sample.lidar_token for sample in samples] == [f"scene-0916-lidar-{k}" for k in (0, 4, 8)]
    assert {sample.scene for sample in samples} == {"scene-0916"}


def test_sweeps_go_back_in_time(root):
    folder = open_nuscenes(root)
    first, second, _ = folder.samples([SCENES[0]])
    sweeps = folder.sweeps(second, 3)
    assert [sweep.stamp_ns for sweep in sweeps] == [(START_US + k * STEP_US) * 1000 for k in (4, 3, 2)]
    assert [sweep.path.parts[-3] for sweep in sweeps] == ["samples", "sweeps", "sweeps"]
    assert len(folder.sweeps(second, 10)) == 5
    assert len(folder.sweeps(first, 10)) == 1


def test_a_standing_thing_stays_where_it_is(root):
    folder = open_nuscenes(root)
    sample = folder.samples([SCENES[0]])[1]
    for scan in folder.scans(sample, 5):
        (point,) = scan.scan.points[scan.scan.points[:, 3] == 77][:, :3].astype(np.float64)
        seen = scan.T_fixed_sensor[:3, :3] @ point + scan.T_fixed_sensor[:3, 3]
        np.testing.assert_allclose(seen, LANDMARK, atol=1e-4)


def test_the_level_frame_undoes_the_tilt(root):
    folder = open_nuscenes(root)
    (sweep,) = folder.sweeps(folder.samples(SCENES)[0])
    forward_and_down = np.array([0, math.cos(TILT), math.sin(TILT), 0])
    np.testing.assert_allclose(sweep.T_level_sensor @ forward_and_down, [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(sweep.T_level_sensor[:3, 3], [0, 0, MOUNT[2]], atol=1e-12)


def test_only_earlier_sweeps_lose_the_vehicle_itself(root):
    folder = open_nuscenes(root)
    newest, *earlier = folder.scans(folder.samples(SCENES)[1], 3)
    assert len(newest.scan.points) == 451
    assert newest.scan.columns == ("x", "y", "z", "intensity", "ring")
    assert (newest.scan.stamp_ns, newest.scan.frame_id) == ((START_US + 4 * STEP_US) * 1000, "LIDAR_TOP")
    for posed in earlier:
        assert 0 < len(posed.scan.points) <= 401
        assert (np.abs(posed.scan.points[:, :2]).max(axis=1) >= 1).all()


def test_objects_have_our_order_of_sizes_and_a_velocity(root):
    folder = open_nuscenes(root)
    for k, sample in enumerate(folder.samples(SCENES[:1])):
        objects = folder.objects(sample)
        assert objects.categories == ("vehicle.car", "human.pedestrian.adult")
        assert objects.num_points.tolist() == [9, 9]
        center = car_center(START_US + 4 * k * STEP_US)
        np.testing.assert_allclose(objects.boxes[0], [*center, 4.5, 1.8, 1.6, CAR_YAW, *CAR_VELOCITY], atol=1e-9)
        np.testing.assert_allclose(objects.boxes[1], [*PERSON_CENTER, 0.7, 0.6, 1.75, 1.2, 0, 0], atol=1e-9)


def test_velocity_is_unknown_without_neighbours_and_over_long_gaps(damaged):
    samples = json.loads((damaged / "v1.0-mini" / "sample.json").read_text())
    by_token = {row["token"]: row for row in samples}
    by_token["scene-0103-2"]["timestamp"] += 2_000_000  # 3 s between its neighbours: just known
    by_token["scene-0916-2"]["timestamp"] += 2_100_000
    (damaged / "v1.0-mini" / "sample.json").write_text(json.dumps(samples))
    folder = open_nuscenes(damaged)
    known = [np.isfinite(folder.objects(sample).boxes[0, 7:]).all() for sample in folder.samples(SCENES)]
    assert known == [True, True, False, True, False, False]

    alone = make_nuscenes(damaged / "alone", samples=1)
    folder = open_nuscenes(alone)
    assert np.isnan(folder.objects(folder.samples(SCENES)[0]).boxes[:, 7:]).all()


def test_what_is_no_folder(tmp_path, root):
    with pytest.raises(DataError, match=r"nowhere is no folder; expected one with samples, sweeps"):
        open_nuscenes(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no v1.0-\*/sample_data.json"):
        open_nuscenes(tmp_path)
    with pytest.raises(DataError, match=r"has no version v1.0-trainval, only v1.0-mini"):
        open_nuscenes(root, "v1.0-trainval")


def test_several_versions(damaged):
    shutil.copytree(damaged / "v1.0-mini", damaged / "v1.0-trainval")
    with pytest.raises(DataError, match=r"versions v1.0-mini, v1.0-trainval: choose one with --version"):
        open_nuscenes(damaged)
    assert open_nuscenes(damaged, "v1.0-trainval").version == "v1.0-trainval"


def sweeps_of_first(root):
    folder = open_nuscenes(root)
    return folder.sweeps(folder.samples(SCENES)[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "ego_pose.json cannot be read: No such file"),
        ("[", "ego_pose.json is no JSON"),
        ("{}", "ego_pose.json is no nuScenes table: expected a list"),
        ('[{"token": "a", "translation": [0, 0, 0]}]', "ego_pose.json is no nuScenes table: a record has no rotation"),
        ("[]", r"ego_pose.json has no scene-0103-pose-0: are the tables of one download"),
    ],
)
def test_damaged_tables(damaged, content, message):
    path = damaged / "v1.0-mini" / "ego_pose.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        sweeps_of_first(damaged)


def test_a_sweep_file_that_is_missing(damaged):
    folder = open_nuscenes(damaged)
    sample = folder.samples(SCENES)[0]
    path = folder.sweeps(sample)[0].path
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} cannot be read: No such file"):
        folder.scans(sample)


def test_one_sweep(tmp_path):
    path = make_sweep_json(tmp_path)
    sweep = read_sweep(path)
    (posed,) = sweep.scans
    assert (posed.scan.stamp_ns, len(posed.scan.points)) == (START_US * 1000, 451)
    assert (sweep.axes, sweep.class_names) == ("x_right", ("car", "pedestrian", "truck", "ignore"))
    assert sweep.num_points.tolist() == [20, 3, 9, 4]
    np.testing.assert_allclose(sweep.boxes[0], [3, 10, -1, 4, 1.8, 1.6, 0.5])
    np.testing.assert_allclose(sweep.T_level_sensor[:3, 3], [0, 0, MOUNT[2]])
    seen = np.linalg.inv(posed.T_fixed_sensor) @ [*LANDMARK, 1]
    np.testing.assert_allclose(seen[:3], in_sensor(LANDMARK, START_US), atol=1e-9)


def test_what_describes_no_sweep(tmp_path):
    path = make_sweep_json(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("lidar_file", "timestamp", "instances")}))
    with pytest.raises(DataError, match=r"describes no nuScenes sweep: it has no lidar2ego and no ego2global"):
        read_sweep(path)
    path.write_text(json.dumps(content | {"instances": [{"name": "car", "box": [1, 2, 3], "num_lidar_pts": 1}]}))
    with pytest.raises(DataError, match=r"sweep.json describes no nuScenes sweep: ValueError"):
        read_sweep(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="describes no nuScenes sweep"):
        read_sweep(path)
    path.write_text(json.dumps(content | {"lidar_file": "other.bin"}))
    with pytest.raises(DataError, match=r"other.bin cannot be read: No such file"):
        read_sweep(path)
