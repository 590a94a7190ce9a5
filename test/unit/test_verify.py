"""What counts as the same box, and what ``dsvt verify`` says and returns."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_points, write_tiny_model

from dsvt_ros.comparison import BoxDifference, FoundBoxes, TensorDifference, boxes_from_maps
from dsvt_ros.config import PostprocessConfig, PreprocessConfig
from dsvt_ros.export.folder import ExportOptions, export_folder
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import CenterMaps
from dsvt_ros.tools import cli, verify
from dsvt_ros.tools.verification import clouds_from


def test_tensor_difference_over_two_clouds():
    difference = TensorDifference()
    difference.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.5]))
    difference.add(torch.tensor([4.0]), torch.tensor([4.1]))
    difference.add(torch.zeros(0), torch.zeros(0))
    assert difference.max_error == pytest.approx(0.5)
    assert difference.mean_error == pytest.approx(0.6 / 4)
    expected = (1 + 4 + 10.5) / math.sqrt(14 * (1 + 4 + 12.25))
    assert difference.cosine == pytest.approx(expected)


def test_not_a_number_is_the_largest_error():
    difference = TensorDifference()
    difference.add(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0]))
    assert difference.max_error == math.inf
    assert difference.cosine == -1.0


def found(rows, settled=True):
    """Boxes of (x, yaw, score, label), 4 x 2 x 1.5 m."""
    boxes = torch.tensor([[x, 0, 0, 4, 2, 1.5, yaw] for x, yaw, _, _ in rows]).reshape(-1, 7)
    scores, labels = torch.tensor([row[2] for row in rows]), torch.tensor([row[3] for row in rows])
    return FoundBoxes(boxes, scores, labels.long(), torch.full((len(rows),), settled))


@pytest.mark.parametrize(
    ("change", "matched"),
    [
        ((0.019, 0.0, 0.0, 0), 1),
        ((0.021, 0.0, 0.0, 0), 0),
        ((0.0, 0.0, 0.009, 0), 1),
        ((0.0, 0.0, 0.011, 0), 0),
        ((0.0, 0.0, 0.0, 1), 0),
        ((0.0, 3.0, 0.0, 0), 1),
    ],
)
def test_what_matches(change, matched):
    difference = BoxDifference()
    other = tuple(a + b for a, b in zip((5.0, 0.0, 0.5, 0), change, strict=True))
    difference.add(found([other]), found([(5.0, 0.0, 0.5, 0)]), center_m=0.02, score=0.01)
    assert (difference.expected, difference.expected_matched, difference.found_matched) == (1, matched, matched)
    assert difference.matched == matched


def test_both_directions_count():
    difference = BoxDifference()
    many, one = [(0.0, 0.0, 0.5, 0), (9.0, 0.0, 0.5, 0), (20.0, 0.0, 0.5, 0)], [(0.0, 0.1, 0.5, 0)]
    difference.add(found(many), found(one), 0.02, 0.01)
    assert (difference.expected_matched, difference.expected) == (1, 1)
    assert (difference.found_matched, difference.found) == (1, 3)
    assert difference.matched == pytest.approx(1 / 3)
    assert difference.yaw_rad.largest == pytest.approx(0.1)


def test_yaw_differs_around_the_circle():
    difference = BoxDifference()
    difference.add(found([(0.0, math.pi - 0.01, 0.5, 0)]), found([(0.0, -math.pi + 0.01, 0.5, 0)]), 0.02, 0.01)
    assert difference.yaw_rad.largest == pytest.approx(0.02, abs=1e-5)


def test_unsettled_boxes_need_no_match_but_are_one():
    difference = BoxDifference()
    difference.add(found([(0.0, 0.0, 0.5, 0)]), found([(0.0, 0.0, 0.5, 0), (9.0, 0.0, 0.5, 0)], False), 0.02, 0.01)
    assert (difference.expected, difference.found, difference.found_matched) == (0, 1, 1)
    assert difference.matched == 1


def test_largest_and_mean_over_clouds():
    difference = BoxDifference()
    for shift in (0.004, 0.016):
        difference.add(found([(5.0 + shift, 0.0, 0.5, 0)]), found([(5.0, 0.0, 0.5, 0)]), 0.02, 0.01)
    assert difference.center_m.largest == pytest.approx(0.016, abs=1e-6)
    assert difference.center_m.mean == pytest.approx(0.010, abs=1e-6)
    assert difference.score.mean == 0


def test_no_boxes_at_all():
    difference = BoxDifference()
    difference.add(found([]), found([]), 0.02, 0.01)
    assert difference.matched == 1


def maps_with_peaks(scores):
    """One class, a peak a row."""
    logit = torch.full((1, 3, 16, 16), -9.0)
    for row, score in enumerate(scores):
        logit[0, 0, row, 0] = math.log(score / (1 - score))
    zeros = torch.zeros
    return CenterMaps(
        logit,
        zeros(1, 2, 16, 16),
        zeros(1, 1, 16, 16),
        zeros(1, 3, 16, 16),
        zeros(1, 2, 16, 16),
        None,
        zeros(1, 1, 16, 16),
    )


def test_boxes_near_the_threshold_are_not_settled():
    config = PostprocessConfig(score_threshold=0.3, iou_rectifier=(0.5,))
    boxes = boxes_from_maps(maps_with_peaks([0.9, 0.309, 0.311, 0.299]), tiny_config(), config, 0.01)
    rows = ((boxes.boxes[:, 1] + 5.12) / 0.64).round().int().tolist()
    assert dict(zip(rows, boxes.settled.tolist(), strict=True)) == {0: True, 1: False, 2: True}


def test_boxes_near_the_cut_of_candidates_are_not_settled():
    config = PostprocessConfig(score_threshold=0.1, max_candidates=3)
    boxes = boxes_from_maps(maps_with_peaks([0.9, 0.505, 0.5, 0.495]), tiny_config(), config, 0.01)
    assert boxes.settled.tolist() == [True, False, False]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = open_model(write_tiny_model(tmp_path_factory.mktemp("verify") / "model"))
    output = tmp_path_factory.mktemp("verify") / "exported"
    export_folder(source, source.weights, output, ExportOptions(voxels=300))
    return output


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("clouds") / f"{number}.npy" for number in range(3)]
    for number, path in enumerate(paths):
        np.save(path, tiny_points((200, 800, 0)[number], seed=number))
    return [str(path) for path in paths]


def test_command_compares_and_writes(folder, clouds, tmp_path, capsys):
    output = tmp_path / "result.json"
    command = ["verify", str(folder), "--cloud", *clouds, "--columns", "x,y,z,intensity", "--output", str(output)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "onnxruntime, fp32, against torch fp32 on 2 clouds" in said, "the third is empty"
    assert "within the limits" in said
    content = json.loads(output.read_text())
    assert content["reference"] == {"backend": "torch", "precision": "fp32", "device": content["reference"]["device"]}
    (result,) = content["results"]
    assert set(result["tensors"]) == {"features", "heatmap", "center", "center_z", "dim", "rot", "iou"}
    assert all(0 <= tensor["max_error"] < 1e-4 for tensor in result["tensors"].values())
    assert result["boxes"]["expected"] > 0
    assert result["boxes"]["matched"] >= 0.99
    assert result["dropped_voxels"] > 0, "the second cloud exceeds the capacity"


def test_the_published_arrangement_on_simulated_clouds(folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    command = ["verify", str(folder), "--cloud", "simulated:3000", "--max-frames", "2", "--backends", "reference"]
    assert cli.main([*command, "--output", str(output)]) == 0
    assert "reference, fp32, against torch fp32 on 2 clouds" in capsys.readouterr().out
    (result,) = json.loads(output.read_text())["results"]
    assert result["tensors"]["features"]["magnitude"] > 0
    errors = [tensor["max_error"] for tensor in result["tensors"].values()]
    assert 0 < max(errors) < 1e-4, "norms of their own round otherwise"


def test_the_published_arrangement_in_both_precisions(folder, clouds, tmp_path, monkeypatch):
    """Only the check keeps autocast from CPUs."""
    monkeypatch.setitem(verify.NAMED_ONLY, "reference-fp16", lambda device: None)
    output = tmp_path / "result.json"
    command = ["verify", str(folder), "--cloud", clouds[0], "--columns", "x,y,z,intensity", "--output", str(output)]
    assert cli.main([*command, "--backends", "reference,reference-fp16"]) == 0
    single, half = json.loads(output.read_text())["results"]
    assert [(result["backend"], result["precision"]) for result in (single, half)] == [
        ("reference", "fp32"), ("reference-fp16", "fp16"),
    ]  # fmt: skip
    assert half["tensors"]["features"]["max_error"] > 10 * single["tensors"]["features"]["max_error"]


def test_simulated_clouds_have_the_axes_of_the_options():
    options = argparse.Namespace(cloud=["simulated:500"], columns=None, max_frames=1)
    (plain,), (turned,) = (
        clouds_from(options, tiny_config(), PreprocessConfig(cloud_axes=axes)) for axes in ("model", "x_right")
    )
    np.testing.assert_allclose(turned[:, 0], -plain[:, 1], atol=1e-4)


def test_command_fails_beyond_a_limit(folder, clouds, capsys):
    command = ["verify", str(folder), "--cloud", clouds[0], "--columns", "x,y,z,intensity"]
    assert cli.main([*command, "--max-error", "1e-12"]) == 1
    assert "exceeded: features: error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cloud", "nowhere.npy"], "nowhere.npy"),
        (["--cloud", "CLOUD", "--output", "nowhere/x.json"], "--output nowhere/x.json: there is no folder nowhere"),
        (["--cloud", "CLOUD", "--max-error", "-1"], "--max-error must not be negative"),
        (["--cloud", "CLOUD", "--set", "postprocess.score=1"], "did you mean postprocess.score_threshold"),
        (["--cloud", "EMPTY", "EMPTY"], "2.npy: no clouds with points in the model's range"),
        (["--cloud", "CLOUD", "--max-frames", "0"], "--max-frames must be at least 1, got 0"),
        (["--cloud", "simulated:none"], "--cloud simulated: expected a positive number"),
        (["--cloud", "CLOUD", "--backends", "torch,nope"], "no nope; expected onnxruntime, tensorrt, triton, torch, "),
        (["--cloud", "CLOUD", "--device", "cpu", "--backends", "reference-fp16"], "reference-fp16 needs a CUDA device"),
    ],
)
def test_command_refuses(folder, clouds, arguments, message, capsys):
    arguments = [{"CLOUD": clouds[0], "EMPTY": clouds[2]}.get(text, text) for text in arguments]
    assert cli.main(["verify", str(folder), "--columns", "x,y,z,intensity", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_was_not_exported(clouds, tmp_path, capsys):
    write_tiny_model(tmp_path)
    assert cli.main(["verify", str(tmp_path), "--cloud", clouds[0]]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
