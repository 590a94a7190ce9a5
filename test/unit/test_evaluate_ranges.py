"""``dsvt evaluate`` on an Argoverse 2 log and on one sweep of nuScenes, both made up."""

import json

import numpy as np
import pytest
from made_up_argoverse2 import make_log
from made_up_nuscenes import make_sweep_json
from safetensors.torch import save_file

from dsvt_ros.io.nuscenes import read_sweep
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools import cli
from dsvt_ros.tools.evaluate_ranges import range_frame
from dsvt_ros.tools.label_classes import NUSCENES

CLASSES = ("vehicle", "pedestrian", "tree")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(DSVT(open_model("demo").model).state_dict(), path)
    return path


def run(capsys, *arguments):
    status = cli.main(["evaluate", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def model_options(weights):
    return ("--weights", weights, "--device", "cpu", "--backend", "torch")


def boxes(*rows):
    """Boxes from (x, y, score, label)."""
    table = np.array(rows, np.float64).reshape(-1, 4)
    full = np.zeros((len(table), 7), np.float32)
    full[:, :2] = table[:, :2]
    return Boxes3D(full, table[:, 2].astype(np.float32), table[:, 3].astype(np.int64), CLASSES)


def test_what_counts_in_a_sweep(tmp_path):
    sweep = read_sweep(make_sweep_json(tmp_path))
    detections, shown = boxes((3, 10, 0.9, 0), (9, 40, 0.3, 0), (-5, 20, 0.5, 1)), boxes((3, 10, 0.9, 0))
    frame = range_frame(sweep, "car", frozenset({"truck", "ignore"}), NUSCENES, detections, shown)
    assert frame.objects.tolist() == [[3, 10], [9, 40], [0, 9]]
    assert frame.counts.tolist() == [True, False, False]
    assert frame.detections.centers.tolist() == [[3, 10], [9, 40]]
    np.testing.assert_allclose(frame.detections.scores, [0.9, 0.3])
    assert frame.shown.centers.tolist() == [[3, 10]]


def test_objects_without_returns_need_not_be_found(tmp_path):
    path = make_sweep_json(tmp_path)
    content = json.loads(path.read_text())
    content["instances"][0]["num_lidar_pts"] = 0
    path.write_text(json.dumps(content))
    frame = range_frame(read_sweep(path), "car", frozenset(), NUSCENES, boxes(), boxes())
    assert frame.counts.tolist() == [False]


def test_one_sweep_of_nuscenes(capsys, weights, tmp_path):
    path, output = make_sweep_json(tmp_path), tmp_path / "result.json"
    status, out, err = run(capsys, "--data", f"nuscenes:{path}", *model_options(weights), "--output", output)
    assert (status, err) == (0, "")
    assert "15-30 m" in out
    content = json.loads(output.read_text())
    assert (content["schema_version"], content["model"], content["num_frames"]) == (1, "demo", 1)
    assert (content["backend"], content["hardware"]["device"]) == ("torch", "cpu")
    assert content["measure"] == "center@2"
    assert set(content["ranges"]) == {"car", "pedestrian", "bicycle"}
    counts = {name: [one["num_objects"] for one in ranges] for name, ranges in content["ranges"].items()}
    assert counts == {"car": [1, 0, 0, 1], "pedestrian": [0, 1, 0, 1], "bicycle": [0, 0, 0, 0]}
    ends = [(one["near_m"], one["far_m"]) for one in content["ranges"]["car"]]
    assert ends == [(0, 15), (15, 30), (30, 50), (0, 50)]
    # With low scores the threshold of the model lets nothing through.
    assert content["ranges"]["car"][0]["recall"] == 0
    assert content["ranges"]["bicycle"][-1]["ap"] is None


def test_an_argoverse_log(capsys, weights, tmp_path):
    pytest.importorskip("pyarrow")
    log, output = make_log(tmp_path / "val" / "log"), tmp_path / "result.json"
    status, _, err = run(capsys, "--data", f"av2:{log.parent}", *model_options(weights), "--output", output)
    assert (status, err) == (0, "")
    content = json.loads(output.read_text())
    assert content["num_frames"] == 2
    counts = {name: [one["num_objects"] for one in ranges] for name, ranges in content["ranges"].items()}
    assert counts == {"REGULAR_VEHICLE": [0, 2, 0, 2], "PEDESTRIAN": [0, 0, 0, 0], "BICYCLIST": [0, 0, 0, 0]}


def test_an_argoverse_log_whose_annotations_are_of_other_times(capsys, weights, tmp_path):
    pytest.importorskip("pyarrow")
    log = make_log(tmp_path / "log")
    for path in (log / "sensors" / "lidar").glob("*.feather"):
        path.rename(path.with_stem(str(int(path.stem) + 1)))
    status, _, err = run(capsys, "--data", f"av2:{log}", *model_options(weights))
    assert (status, "no sweep has the time stamp of an annotation" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "av2:/nowhere"], "/nowhere is no folder"),
        (["--data", "nuscenes:/nowhere/sweep.json"], "sweep.json cannot be read"),
        (["--data", "nuscenes:sweep.json", "--split", "val"], "--split is for --data nuscenes:DIR"),
        (["--data", "av2:/nowhere", "--split", "val"], "--split is for --data nuscenes:..., got --data av2"),
    ],
)
def test_mistakes_are_explained(capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
