"""Bags whose sensor moves, on the command line."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from moving import SECOND, Drive, Exact, seen_from, write_odometry
from safetensors.torch import save_file
from tiny import tiny_config

from dsvt_ros.config import PointFeature
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.tools import cli

pytest.importorskip("rosbags", reason="bags need rosbags")

from dsvt_ros.io.bags import BagWriter

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 10
MOUNTING = (0.3, 0.0, 0.5, 0.0, 0.0, 0.2)
NUM_CLOUDS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of three sweeps."""
    folder = tmp_path_factory.mktemp("model")
    tiny = tiny_config()
    config = dataclasses.replace(tiny, features=(*tiny.features, PointFeature("time")), sweeps=3)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": plain}))
    state = {k: v for k, v in DSVT(config).state_dict().items() if v.is_floating_point()}
    save_file(state, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """A drive past a hundred points; clouds also have a time of each point, which is no age."""
    path = tmp_path_factory.mktemp("bag") / "drive"
    drive = Drive((4e5, 5e6, 30.0), velocity=(5.0, 0.0, 0.0), start_ns=START)
    motion = Exact(drive, MOUNTING)
    world = drive.origin + np.random.default_rng(0).uniform((-3, -3, 0), (3, 3, 2), (100, 3))
    with BagWriter(path) as writer:
        write_odometry(writer, drive, START, SECOND // 50)
        for k in range(NUM_CLOUDS):
            stamp_ns = START + k * PERIOD
            rest = np.full((len(world), 2), (0.5, 77.0), np.float32)
            points = np.concatenate([seen_from(world, motion.pose_at(stamp_ns, "lidar")), rest], axis=1)
            writer.write_points("/points", points, ("x", "y", "z", "intensity", "time"), stamp_ns, "lidar")
    return path


def detect(capsys, tmp_path, *arguments):
    output = tmp_path / "boxes.json"
    words = ["detect", *arguments, "--device", "cpu", "--backend", "torch", "--output", output]
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    frames = json.loads(output.read_text())["frames"] if status == 0 else []
    return frames, captured.out, captured.err


def mounted():
    return "--set", f"preprocess.mounting={list(MOUNTING)}"


def test_sweeps_of_a_bag_are_merged(capsys, tmp_path, bag, model):
    frames, out, _ = detect(capsys, tmp_path, bag, "--model", model, "--odometry-topic", "/odom", *mounted())
    assert [frame["num_sweeps"] for frame in frames] == [1, 2, 3, 3]
    assert [frame["num_points"] for frame in frames] == [100, 200, 300, 300]
    # Standing points fall onto themselves: hardly any voxel is new.
    assert frames[3]["num_voxels"] < 1.1 * frames[0]["num_voxels"]
    assert "300 points of 3 sweeps" in out


def test_fewer_sweeps_may_be_taken(capsys, tmp_path, bag, model):
    frames, _, _ = detect(
        capsys, tmp_path, bag, "--model", model, "--odometry-topic", "/odom", *mounted(), "--set", "preprocess.sweeps=2"
    )
    assert [frame["num_sweeps"] for frame in frames] == [1, 2, 2, 2]


def test_sensor_that_is_said_to_stand(capsys, tmp_path, bag, model):
    frames, _, _ = detect(capsys, tmp_path, bag, "--model", model, "--stationary")
    assert frames[3]["num_sweeps"] == 3
    assert frames[3]["num_voxels"] > 1.5 * frames[0]["num_voxels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nobody says how the sensor moved; name the vehicle's odometry with --odometry-topic, or say --stat"),
        (("--odometry-topic", "odom"), "no static transform says where 'lidar' sits on it; give its pose in prepro"),
    ],
)
def test_without_motion_clouds_are_alone_and_that_is_said_once(capsys, tmp_path, bag, model, arguments, message):
    frames, out, _ = detect(capsys, tmp_path, bag, "--model", model, *arguments)
    assert [frame["num_sweeps"] for frame in frames] == [1] * NUM_CLOUDS
    assert out.count(message) == 1


def test_wrong_odometry_topic_is_one_sentence(capsys, tmp_path, bag, model):
    _, _, err = detect(capsys, tmp_path, bag, "--model", model, "--odometry-topic", "/points")
    assert "/points is a sensor_msgs/msg/PointCloud2, not a nav_msgs/msg/Odometry" in err


def test_single_sweep_model_needs_no_motion(capsys, tmp_path, bag):
    frames, out, _ = detect(capsys, tmp_path, bag)
    assert [frame["num_points"] for frame in frames] == [100] * NUM_CLOUDS
    assert "odometry" not in out


def test_motion_compensation_without_usable_times_is_told(capsys, tmp_path, bag):
    option = "preprocess.motion_compensation=true"
    _, out, _ = detect(capsys, tmp_path, bag, "--odometry-topic", "/odom", "--set", option)
    assert "not compensated for motion: field 'time' (float32) holds numbers like 77" in out


def test_file_of_merged_sweeps_is_taken_as_it_is(capsys, tmp_path, model):
    points = np.random.default_rng(0).uniform(-4, 4, (50, 5)).astype(np.float32)
    np.save(tmp_path / "merged.npy", points)
    frames, _, _ = detect(capsys, tmp_path, tmp_path / "merged.npy", "--model", model)
    assert frames[0]["num_points"] == 50


def test_plan_counts_the_voxels_of_merged_sweeps(capsys, bag, model):
    arguments = ["build", str(model), "--plan", str(bag), "--device", "cpu"]
    assert cli.main([*arguments, "--stationary"]) == 0
    merged = capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert merged != capsys.readouterr().out


@pytest.mark.parametrize("option", [("--odometry-topic", "/odom"), ("--stationary",)])
def test_motion_that_nothing_asks_for_is_refused(capsys, tmp_path, bag, option):
    """A model of one sweep, and a file, which has no stamps: the option would be of no effect."""
    np.save(tmp_path / "cloud.npy", np.ones((3, 4), np.float32))
    for cloud in (bag, tmp_path / "cloud.npy"):
        assert cli.main(["detect", str(cloud), *option, "--device", "cpu"]) != 0
        assert f"{option[0]} is for bags, and for models of several sweeps" in capsys.readouterr().err
