"""From somebody's OpenPCDet YAML and checkpoint to boxes and back, through every way in."""

import json

import numpy as np
import pytest
import torch
from pcdet_yamls import changed, custom, write
from tiny import randomize

from dsvt_ros import Detector
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pcdet.files import ORIGIN
from dsvt_ros.tools import cli


def write_checkpoint(path, model_yaml, seed=3):
    """Random weights as training leaves them behind."""
    torch.manual_seed(seed)
    network = randomize(DSVT(open_model(model_yaml).model))
    optimizer = {"param_groups": [{"lr": np.float64(1e-3)}]}
    torch.save({"epoch": 3, "model_state": network.state_dict(), "optimizer_state": optimizer}, path)
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A YAML and a checkpoint."""
    folder = tmp_path_factory.mktemp("theirs")
    model = write(folder / "small_dsvt.yaml", custom())
    return model, write_checkpoint(folder / "checkpoint_epoch_3.pth", model)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(5)
    return rng.uniform([0.2, -6, -1, 0], [12, 6, 2.5, 1], (1500, 4)).astype(np.float32)


def test_detections_survive_the_export(theirs, points, tmp_path, capsys):
    model, weights = theirs
    direct = Detector.load(model, weights, backend="torch", device="cpu").detect(points)
    assert len(direct) > 5
    assert direct.boxes.shape[1] == 9
    assert set(direct.labels) == {0, 1, 2}
    assert direct.class_names == ("van", "walker", "pole")

    output = tmp_path / "exported"
    command = ["export", "--model", str(model), "--weights", str(weights), "--output", str(output), "--voxels", "1100"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "What small_dsvt.yaml says" in said
    assert "Beware: the height of the ground" in said
    assert {path.name for path in output.iterdir()} >= {"model.yaml", "weights.safetensors", ORIGIN, "sparse.onnx"}

    for backend in ("torch", "onnxruntime"):
        again = Detector.load(output, backend=backend, device="cpu").detect(points)
        np.testing.assert_array_equal(again.labels, direct.labels)
        np.testing.assert_allclose(again.boxes, direct.boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(again.scores, direct.scores, rtol=0, atol=1e-4)


def test_commands_take_the_yaml(theirs, points, tmp_path, capsys):
    model, weights = theirs
    np.save(tmp_path / "cloud.npy", points)
    arguments = ["--model", str(model), "--weights", str(weights), "--device", "cpu", "--backend", "torch"]
    output = tmp_path / "boxes.json"
    assert cli.main(["detect", str(tmp_path / "cloud.npy"), *arguments, "--output", str(output)]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "small_dsvt.yaml: an OpenPCDet model, see dsvt export; the height of the ground" in said
    content = json.loads(output.read_text())
    assert content["model"] == "small_dsvt"
    assert {found["class"] for found in content["frames"][0]["detections"]} == {"van", "walker", "pole"}
    benchmark = ["benchmark", "--cloud", str(tmp_path / "cloud.npy"), "--runs", "1", "--backends", "torch"]
    assert cli.main([*benchmark, *arguments[:-2]]) == 0


def test_weights_of_another_model_are_recognized(theirs, tmp_path, capsys):
    _, weights = theirs
    used = "DATA_CONFIG.POINT_FEATURE_ENCODING.used_feature_list"
    other = write(tmp_path / "other.yaml", changed(custom(), used, ["x", "y", "z", "intensity", "ring"]))
    np.save(tmp_path / "cloud.npy", np.zeros((1, 5), np.float32))
    assert cli.main(["detect", str(tmp_path / "cloud.npy"), "--model", str(other), "--weights", str(weights)]) == 1
    assert "these weights were trained with 4 point features, the model has 5" in capsys.readouterr().err


def test_what_is_refused_is_one_line(tmp_path, capsys):
    bad = write(tmp_path / "bad.yaml", changed(custom(), "MODEL.BACKBONE_3D.reduction_type", "maxpool"))
    assert cli.main(["export", "--model", str(bad), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "MODEL.BACKBONE_3D.reduction_type is maxpool and must be attention" in said
