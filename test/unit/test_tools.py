"""The commands as a user types them, and what they say to wrong input."""

import json

import numpy as np
import pytest
import torch

from dsvt_ros.tools import cli


@pytest.fixture
def cloud(tmp_path):
    rng = np.random.default_rng(0)
    points = rng.uniform([-40, -40, -0.1, 0], [40, 40, 2, 1], (3000, 4)).astype(np.float32)
    path = tmp_path / "cloud.npy"
    np.save(path, points)
    return path


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_and_version(capsys):
    assert run(capsys, "--help")[0] == 0
    assert run(capsys, "--version")[1].startswith("dsvt_ros 0.")
    status, _, err = run(capsys)
    assert status == 2
    status, _, err = run(capsys, "detekt")
    assert status == 2
    assert "no command 'detekt'" in err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"dsvt {command}" in capsys.readouterr().out


def test_detect_writes_json_and_picture(capsys, cloud, tmp_path):
    output, picture = tmp_path / "boxes.json", tmp_path / "boxes.png"
    threshold = "postprocess.score_threshold=0.05"
    status, out, _ = run(
        capsys, "detect", cloud, "--device", "cpu", "--set", threshold, "--output", output, "--picture", picture
    )
    assert status == 0
    assert "3000 points" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(output.read_text())
    assert content["schema_version"] == 1
    assert (content["model"], content["backend"], content["device"]) == ("demo", "torch", "cpu")
    (frame,) = content["frames"]
    assert frame["num_points"] == 3000
    assert 0 < frame["num_voxels"] <= 3000
    assert set(frame["timing_ms"]) >= {"voxelize", "sparse", "dense", "nms"}
    for found in frame["detections"]:
        assert set(found) == {"class", "score", "center", "size", "yaw", "velocity"}
        assert found["class"] in ("car", "pedestrian", "cyclist")
        assert found["velocity"] is None


def test_detect_reads_named_columns(capsys, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "cloud.bin"
    rng.uniform(-20, 20, (500, 5)).astype(np.float32).tofile(path)
    status, out, _ = run(capsys, "detect", path, "--columns", "x,y,z,intensity,ring", "--device", "cpu")
    assert status == 0
    assert "500 points" in out


def test_detect_stops_after_so_many_clouds(capsys, cloud):
    status, out, _ = run(capsys, "detect", cloud, cloud, cloud, "--max-frames", 2, "--device", "cpu")
    assert status == 0
    assert out.count("3000 points") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.npy"], "does not exist; expected a .npy, .bin, .pcd"),
        (["{cloud}", "--model", "nope"], "no model nope: expected one of demo"),
        (["{cloud}", "--model", "waymo_pillar"], "comes without weights"),
        (["{cloud}", "--weights", "{cloud}"], "is no checkpoint; expected a .safetensors"),
        (["{cloud}", "--set", "postprocess.score=1"], "did you mean postprocess.score_threshold"),
        (["{cloud}", "--set", "postprocess.score_threshold"], "expected KEY=VALUE"),
        (["{cloud}", "--device", "tpu"], "device must be"),
        (["{text}"], "text.npy"),
        (["{cloud}", "--max-frames", "0"], "--max-frames must be at least 1, got 0"),
        (["{cloud}", "--max-frames", "-1"], "--max-frames must be at least 1, got -1"),
        (["{cloud}", "--output", "nowhere/boxes.json"], "--output nowhere/boxes.json: there is no folder nowhere"),
        (["{cloud}", "--picture", "nowhere/boxes.png"], "--picture nowhere/boxes.png: there is no folder nowhere"),
    ],
)
def test_detect_answers_mistakes_in_one_line(monkeypatch, capsys, cloud, tmp_path, arguments, message):
    monkeypatch.setattr("dsvt_ros.Detector.detect", lambda *_: pytest.fail("detected all the same"))
    text = tmp_path / "text.npy"
    text.write_text("these are no points")
    filled = [argument.format(cloud=cloud, text=text) for argument in arguments]
    status, _, err = run(capsys, "detect", *filled)
    assert status == 1
    assert message in err
    assert err.startswith("dsvt detect: ")
    assert err.count("\n") == 1


def test_benchmark_writes_json(capsys, cloud, tmp_path):
    output = tmp_path / "benchmark.json"
    status, out, _ = run(capsys, "benchmark", "--cloud", cloud, "--device", "cpu", "--runs", 2, "--output", output)
    assert status == 0
    assert "total p50" in out
    content = json.loads(output.read_text())
    (result,) = content["results"]
    assert set(result["stage_ms"]) == {
        "preprocess", "voxelize", "encode", "partition", "sparse", "scatter", "dense", "decode", "nms",
    }  # fmt: skip
    assert {stage: times["p50"] for stage, times in result["stage_quantiles_ms"].items()} == result["stage_ms"]
    for times in (result["total_ms"], *result["stage_quantiles_ms"].values()):
        assert times["p50"] <= times["p95"] <= times["p99"]
    assert "scaling" not in content
    assert content["cloud"]["num_points"] == [3000]
    assert content["conversion_ms"]["p50"] > 0


def test_evaluate_counts_objects(capsys, tmp_path):
    output = tmp_path / "evaluation.json"
    status, out, _ = run(
        capsys, "evaluate", "--data", "simulated:test", "--scenes", 2, "--device", "cpu", "--output", output
    )
    assert status == 0
    assert "2 scenes" in out
    content = json.loads(output.read_text())
    assert content["num_frames"] == 2
    assert (content["backend"], content["precision"], content["hardware"]["device"]) == ("torch", "fp32", "cpu")
    assert content["versions"]["torch"] == torch.__version__
    for name, count in content["num_objects"].items():
        for histogram in content["histograms"].values():
            assert sum(histogram["counts"][name]) == count
    status, _, err = run(capsys, "evaluate", "--data", "kitty:/data")
    assert status == 1
    assert "expected simulated:SPLIT" in err
