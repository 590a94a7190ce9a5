"""Clouds for commands that measure or compare: from files, simulated, and of other sizes."""

import dataclasses

import numpy as np
import pytest
from tiny import tiny_config, tiny_points

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import ConfigError, DataError
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools.given_clouds import (
    FIRST_SCENE,
    NUM_SIMULATED,
    SIMULATED_POINTS,
    given_clouds,
    num_pillars,
    point_counts,
    resized,
    simulated_scan,
)


def test_simulated_turn_is_like_a_real_one():
    model = open_model("waymo_pillar").model
    cloud = next(given_clouds(["simulated"], model.feature_names, model, PreprocessConfig()))
    assert cloud.shape == (SIMULATED_POINTS, 5)
    assert 10_000 <= num_pillars(cloud, model) <= 15_000
    assert 60 < np.abs(cloud[:, :2]).max() <= 75.1
    assert not cloud[:, 4].any()  # the simulator knows no elongation
    assert len(np.unique(cloud[:, 3])) > 20


def test_simulated_turns_repeat_and_differ():
    model = open_model("demo").model
    once, again, other = (simulated_scan(5_000, scene, model).points for scene in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert len(once) == len(other) == 5_000
    assert not np.array_equal(once, other)


def test_simulated_turns_lie_in_the_models_frame():
    waymo, nuscenes = open_model("waymo_pillar").model, open_model("nuscenes_pillar").model
    here = simulated_scan(5_000, FIRST_SCENE, waymo).points
    there = simulated_scan(5_000, FIRST_SCENE, nuscenes, "x_right").points
    np.testing.assert_allclose(there[:, 0], -here[:, 1], atol=1e-4)
    np.testing.assert_allclose(there[:, 1], here[:, 0], atol=1e-4)
    np.testing.assert_allclose(there[:, 2], here[:, 2] + nuscenes.ground_z, atol=1e-4)
    assert num_pillars(there, nuscenes) == pytest.approx(num_pillars(here, waymo), rel=0.02)


def test_fewer_points_are_some_of_them():
    cloud = tiny_points(600)
    fewer = resized(cloud, 100, seed=3)
    assert len(fewer) == len(np.unique(fewer, axis=0)) == 100
    assert {tuple(row) for row in fewer} < {tuple(row) for row in cloud}
    np.testing.assert_array_equal(fewer, resized(cloud, 100, seed=3))
    assert not np.array_equal(fewer, resized(cloud, 100, seed=4))


@pytest.mark.parametrize("num_points", [600, 601, 1500])
def test_more_points_are_copies_nearby(num_points):
    cloud = tiny_points(600)
    before = cloud.copy()
    larger = resized(cloud, num_points, seed=3)
    np.testing.assert_array_equal(cloud, before)
    assert larger.shape == (num_points, 4)
    assert larger.dtype == np.float32
    np.testing.assert_array_equal(larger[:600], cloud)
    distance = np.abs(larger - cloud[np.arange(num_points) % 600])
    assert (distance[600:, :3].max(1) > 0).all()
    assert distance.max(initial=0) < 0.25
    assert not distance[:, 3].any()


@pytest.mark.parametrize("text", ["0", "many", "100,-1", "100,,200", ""])
def test_wrong_numbers_of_points(text):
    with pytest.raises(ConfigError, match="--points: expected a positive number of points"):
        point_counts("--points", text)


@pytest.mark.parametrize("text", ["3000,4000", "0", "many"])
def test_a_simulated_turn_has_one_number_of_points(text):
    model = open_model("demo").model
    with pytest.raises(ConfigError, match=f"--cloud simulated: expected a positive number of points.*got '{text}'"):
        next(given_clouds([f"simulated:{text}"], model.feature_names, model, PreprocessConfig()))


def test_numbers_of_points():
    assert point_counts("--points", "60000,300") == [60000, 300]


def test_one_source_after_the_other(tmp_path):
    points = tiny_points(600)
    np.save(tmp_path / "cloud.npy", points)
    model = open_model("waymo_pillar").model
    sources = [str(tmp_path / "cloud.npy"), "simulated:3000"]
    clouds = list(given_clouds(sources, ("x", "y", "z", "intensity"), model, PreprocessConfig()))
    np.testing.assert_array_equal(clouds[0][:, :4], points)
    assert [len(cloud) for cloud in clouds[1:]] == [3000] * NUM_SIMULATED
    for number in (0, NUM_SIMULATED - 1):
        expected = simulated_scan(3000, FIRST_SCENE + number, model).points
        np.testing.assert_array_equal(clouds[1 + number][:, :4], expected)


def test_columns_that_a_file_lacks_are_filled(tmp_path):
    np.save(tmp_path / "cloud.npy", tiny_points()[:, :3])
    model = tiny_config()
    *xyz, intensity = model.features
    model = dataclasses.replace(model, features=(*xyz, dataclasses.replace(intensity, fill=0.25)))
    (cloud,) = given_clouds([str(tmp_path / "cloud.npy")], ("x", "y", "z"), model, PreprocessConfig())
    np.testing.assert_array_equal(cloud[:, :3], tiny_points()[:, :3])
    assert (cloud[:, 3] == 0.25).all()


def test_simulated_axes_are_those_that_clouds_come_in():
    model = open_model("nuscenes_pillar").model
    model_axes, other = (
        next(given_clouds(["simulated:3000"], model.feature_names, model, PreprocessConfig(cloud_axes=axes)))
        for axes in ("model", "x_forward")
    )
    assert model.axes == "x_right"
    np.testing.assert_allclose(model_axes[:, 0], -other[:, 1], atol=1e-4)


def test_no_clouds():
    model = open_model("demo").model
    with pytest.raises(DataError, match="no clouds in there"):
        list(given_clouds([], model.feature_names, model, PreprocessConfig()))
