"""``dsvt evaluate --data kitti:DIR`` on a small folder of made-up frames."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dsvt_ros.io.kitti import objects_from_boxes, read_calibration, read_objects, write_objects
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools import cli

FRAMES = ("000000", "000001", "000002")
CALIBRATION = """P2: 721.5377 0 609.5593 44.857 0 721.5377 172.854 0.2164 0 0 1 0.00275
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27
"""


@pytest.fixture
def data(tmp_path):
    """Three frames with two cars and a pedestrian each, and noise for a cloud."""
    root = tmp_path / "kitti"
    rng = np.random.default_rng(0)
    for folder in ("velodyne", "label_2", "calib"):
        (root / "training" / folder).mkdir(parents=True)
    for frame in FRAMES:
        part = root / "training"
        points = rng.uniform([-30, -20, -1.8, 0], [30, 20, 0.2, 1], (2000, 4)).astype(np.float32)
        points.tofile(part / "velodyne" / f"{frame}.bin")
        (part / "calib" / f"{frame}.txt").write_text(CALIBRATION)
        boxes = np.array(
            [[12, 3, -0.9, 4, 1.7, 1.6, 0.2], [20, -5, -0.9, 4, 1.7, 1.6, 2.0], [9, 0, -0.8, 0.7, 0.6, 1.8, 0]]
        )
        calibration = read_calibration(part / "calib" / f"{frame}.txt")
        types = ["Car", "Car", "Pedestrian"]
        labels = objects_from_boxes(boxes, np.full(3, np.nan), types, calibration, (1242, 375))
        write_objects(part / "label_2" / f"{frame}.txt", labels)
    return root


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "random.safetensors"
    save_file(DSVT(open_model("demo").model).state_dict(), path)
    return path


def run(capsys, *arguments):
    status = cli.main(["evaluate", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_labels_as_detections_are_perfect(capsys, data, tmp_path):
    output = tmp_path / "result.json"
    labels = data / "training" / "label_2"
    arguments = ("--data", f"kitti:{data}", "--detections", labels, "--output", output)
    status, out, _ = run(capsys, *arguments, "--ap", "exact")
    assert status == 0
    assert "6 of 6" in out
    content = json.loads(output.read_text())
    assert (content["schema_version"], content["ap_kind"], content["num_frames"]) == (1, "exact", 3)
    assert content["num_objects"] == {"car": 6, "pedestrian": 3, "cyclist": 0}
    assert content["found"]["pedestrian"] == {"easy": [3, 3], "moderate": [3, 3], "hard": [3, 3]}
    assert set(content["ap"]["car"]) == {"3d@0.7", "3d@0.5", "bev@0.7", "bev@0.5"}
    assert set(content["ap"]["cyclist"]) == {"3d@0.5", "3d@0.25", "bev@0.5", "bev@0.25"}
    for name, value in (("car", 100), ("pedestrian", 100), ("cyclist", None)):
        for measure in content["ap"][name].values():
            assert measure == {"easy": value, "moderate": value, "hard": value}
    # Six thresholds of 41.
    status, out, _ = run(capsys, *arguments)
    assert json.loads(output.read_text())["ap"]["car"]["3d@0.7"]["easy"] == pytest.approx(100 * 5 / 40)
    assert "r40 reads low" in out


def test_model_and_its_saved_detections_agree(capsys, data, weights, tmp_path):
    saved, direct, again = tmp_path / "saved", tmp_path / "direct.json", tmp_path / "again.json"
    shared = ("--data", f"kitti:{data}", "--ap", "exact")
    model = ("--weights", weights, "--device", "cpu", "--set", "postprocess.score_threshold=0.0")
    status, _, _ = run(capsys, *shared, *model, "--save-detections", saved, "--output", direct)
    assert status == 0
    detections = [read_objects(saved / f"{frame}.txt") for frame in FRAMES]
    assert sum(len(found) for found in detections) > 0
    for found in detections:
        assert set(found.types) <= {"Car", "Pedestrian", "Cyclist"}
        assert (found.image_boxes[:, 2:] > found.image_boxes[:, :2]).all()
        assert np.isfinite(found.scores).all()
    status, _, _ = run(capsys, *shared, "--detections", saved, "--output", again)
    assert status == 0
    direct, again = json.loads(direct.read_text()), json.loads(again.read_text())
    assert direct["model"] == "demo"
    assert (direct["backend"], direct["precision"], direct["hardware"]["device"]) == ("torch", "fp32", "cpu")
    assert direct["versions"]["torch"] == torch.__version__
    assert not {"backend", "hardware", "versions"} & set(again), "nothing was run"
    assert direct["ap"] == again["ap"]
    assert direct["num_objects"] == again["num_objects"]


def test_split(capsys, data, tmp_path):
    split, output = tmp_path / "val.txt", tmp_path / "result.json"
    split.write_text("000002\n000000\n")
    arguments = ("--data", f"kitti:{data}", "--detections", data / "training" / "label_2", "--frames", split)
    assert run(capsys, *arguments, "--output", output)[0] == 0
    assert json.loads(output.read_text())["num_frames"] == 2
    split.write_text("000009\n")
    status, _, err = run(capsys, *arguments)
    assert (status, "has no frame 000009" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "kitti:/nowhere"], "/nowhere is no folder"),
        (["--data", "kitti:"], "expected simulated:SPLIT with SPLIT one of"),
        (["--data", "kitti:{data}", "--scenes", "3"], "--scenes is for --data simulated"),
        (["--data", "simulated:test", "--ap", "r40"], "--ap is for --data kitti"),
        (["--data", "kitti:{data}", "--output", "nowhere/a"], "--output nowhere/a: there is no folder nowhere"),
        (["--data", "kitti:{data}", "--detections", "{data}"], "000000.txt cannot be read"),
        (["--data", "kitti:{data}", "--detections", "a", "--save-detections", "b"], "leave out --detections"),
    ],
)
def test_mistakes_are_explained(capsys, data, arguments, message):
    status, _, err = run(capsys, *(argument.replace("{data}", str(data)) for argument in arguments))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
