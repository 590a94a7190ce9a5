"""``dsvt evaluate --data nuscenes:DIR``: everything up to the development kit, and the real kit where it installs."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_nuscenes import CAR_VELOCITY, make_nuscenes
from safetensors.torch import save_file

from dsvt_ros.config import EngineConfig
from dsvt_ros.export.cache import cache_folder
from dsvt_ros.io.nuscenes import open_nuscenes
from dsvt_ros.io.nuscenes_results import DETECTION_NAMES, read_results, records_from_boxes, write_results
from dsvt_ros.io.stored_poses import move_boxes
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools import cli
from dsvt_ros.tools.nuscenes_devkit import open_devkit
from dsvt_ros.tools.processes import ChildError

NAMES = {"vehicle.car": "car", "human.pedestrian.adult": "pedestrian"}

# Answers as the kit does, and notes what it was asked.
FAKE_KIT = """#!{python}
import json, os, pathlib, sys
arguments = sys.argv[1:]
if arguments[0] == "-c":
    print(json.dumps({{"mini_val": ["scene-0103", "scene-0916"], "mini_train": ["scene-0061"]}}))
    sys.exit(0)
options = dict(zip(arguments[3::2], arguments[4::2]))
note = {{"arguments": arguments, "backend": os.environ["MPLBACKEND"], "results": json.load(open(arguments[2]))}}
pathlib.Path({note!r}).write_text(json.dumps(note))
if pathlib.Path({note!r} + ".fail").exists():
    sys.exit("AssertionError: Samples in split do not match")
names = {names!r}
summary = {{
    "mean_ap": 0.25, "nd_score": 0.5,
    "tp_errors": {{name: 0.5 for name in {errors!r}}},
    "mean_dist_aps": {{name: 0.25 for name in names}},
    "label_aps": {{name: {{"0.5": 0.1, "2.0": 0.4}} for name in names}},
    "label_tp_errors": {{name: {{error: float("nan") for error in {errors!r}}} for name in names}},
}}
pathlib.Path(options["--output_dir"], "metrics_summary.json").write_text(json.dumps(summary))
"""
ERRORS = ["trans_err", "scale_err", "orient_err", "vel_err", "attr_err"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_nuscenes(tmp_path_factory.mktemp("data") / "nuscenes")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(DSVT(open_model("demo").model).state_dict(), path)
    return path


@pytest.fixture
def kit(tmp_path):
    path, note = tmp_path / "python", tmp_path / "note.json"
    path.write_text(FAKE_KIT.format(python=sys.executable, note=str(note), names=DETECTION_NAMES[:2], errors=ERRORS))
    path.chmod(0o755)
    return path, note


def run(capsys, *arguments):
    status = cli.main(["evaluate", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def model_options(weights):
    return ("--weights", weights, "--device", "cpu", "--backend", "torch", "--set", "postprocess.score_threshold=0.0")


def perfect_results(root):
    """Every annotation as a detection in the frame of its cloud, written as ours are."""
    folder = open_nuscenes(root)
    records = {}
    for sample in folder.samples(folder.scenes):
        objects, (sweep,) = folder.objects(sample), folder.sweeps(sample)
        found = Boxes3D(
            move_boxes(objects.boxes, np.linalg.inv(sweep.T_global_sensor)).astype(np.float32),
            np.full(len(objects.boxes), 0.9, np.float32),
            np.arange(len(objects.boxes)),
            tuple(NAMES[category] for category in objects.categories),
        )
        records[sample.token] = records_from_boxes(sample.token, found, sweep.T_global_sensor)
    return records


def test_the_kit_gets_all_samples_and_its_figures_come_back(capsys, root, weights, kit, tmp_path):
    python, note = kit
    saved, output = tmp_path / "results.json", tmp_path / "evaluation.json"
    arguments = ("--data", f"nuscenes:{root}", "--devkit-python", python, "--save-detections", saved)
    status, out, err = run(capsys, *arguments, "--output", output, *model_options(weights))
    assert (status, err) == (0, "")
    assert "mAP 25.00, NDS 50.00" in out

    told = json.loads(note.read_text())
    assert told["arguments"][:3] == ["-m", "nuscenes.eval.detection.evaluate", str(saved)]
    for pair in (["--dataroot", str(root)], ["--version", "v1.0-mini"], ["--eval_set", "mini_val"]):
        at = told["arguments"].index(pair[0])
        assert told["arguments"][at : at + 2] == pair
    assert told["backend"] == "Agg"
    results = told["results"]["results"]
    assert set(results) == {"scene-0103-0", "scene-0103-1", "scene-0916-0", "scene-0916-1"}
    assert read_results(saved) == results
    boxes = [box for found in results.values() for box in found]
    assert boxes
    # Near the vehicle: they are in the global frame.
    assert all(np.hypot(box["translation"][0] - 1000, box["translation"][1] - 600) < 90 for box in boxes)
    assert {box["detection_name"] for box in boxes} <= {"car", "pedestrian", "bicycle"}

    content = json.loads(output.read_text())
    ran = {key: content.pop(key) for key in ("backend", "precision", "hardware", "versions")}
    assert (ran["backend"], ran["precision"], ran["hardware"]["device"]) == ("torch", "fp32", "cpu")
    assert content == {
        "schema_version": 1,
        "data": f"nuscenes:{root}",
        "model": "demo",
        "version": "v1.0-mini",
        "split": "mini_val",
        "num_frames": 4,
        "map": 25.0,
        "nds": 50.0,
        "tp_errors": dict.fromkeys(ERRORS, 0.5),
        "ap": {name: {"mean": 25.0, "center@0.5": 10.0, "center@2": 40.0} for name in DETECTION_NAMES[:2]},
        "tp_errors_of_class": {name: dict.fromkeys(ERRORS) for name in DETECTION_NAMES[:2]},
    }


def test_saved_detections_are_scored_without_a_model(capsys, root, kit, tmp_path):
    python, note = kit
    path = tmp_path / "results.json"
    records = perfect_results(root)
    write_results(path, records)
    arguments = ("--data", f"nuscenes:{root}", "--devkit-python", python, "--detections", path)
    assert run(capsys, *arguments)[0] == 0
    assert json.loads(note.read_text())["results"]["results"] == records


def test_a_kit_that_fails_is_quoted(capsys, root, kit, tmp_path):
    python, note = kit
    Path(f"{note}.fail").touch()
    path = tmp_path / "results.json"
    write_results(path, perfect_results(root))
    status, _, err = run(capsys, "--data", f"nuscenes:{root}", "--devkit-python", python, "--detections", path)
    assert status == 1
    assert "nuscenes-devkit could not score: exit code 1; it said last:" in err
    assert "AssertionError: Samples in split do not match" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--version", "v1.0-trainval"], "has no version v1.0-trainval, only v1.0-mini"),
        (["--split", "train"], "nuScenes has no split train; expected one of mini_val, mini_train"),
        (["--split", "mini_train"], "v1.0-mini has no scene of the split mini_train"),
        (["--detections", "a", "--save-detections", "b"], "leave out --detections"),
        (["--save-detections", "nowhere/a.json"], "--save-detections nowhere/a.json: there is no folder nowhere"),
        (["--output", "nowhere/b.json"], "--output nowhere/b.json: there is no folder nowhere"),
        (["--detections", "nothing.json"], "nothing.json cannot be read"),
        (["--scenes", "3"], "--scenes is for --data simulated:..., got --data nuscenes"),
        (["--devkit-python", "/nowhere/python"], "/nowhere/python cannot be run: No such file"),
    ],
)
def test_mistakes_are_explained(capsys, root, kit, arguments, message):
    status, _, err = run(capsys, "--data", f"nuscenes:{root}", "--devkit-python", kit[0], *arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_without_any_box_the_kit_is_not_asked(capsys, root, kit, tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {token: [] for token in perfect_results(root)})
    status, _, err = run(capsys, "--data", f"nuscenes:{root}", "--devkit-python", kit[0], "--detections", path)
    assert (status, "no box in any sample" in err) == (1, True)
    assert not kit[1].exists()


def test_an_unusual_version_needs_a_split(capsys, tmp_path, kit):
    root = make_nuscenes(tmp_path / "nuscenes", version="v1.0-test")
    status, _, err = run(capsys, "--data", f"nuscenes:{root}", "--devkit-python", kit[0])
    assert (status, "name the split of v1.0-test with --split" in err) == (1, True)


# -------------------------------------------------------------------------------------------------- environment


def test_the_environment_is_made_once(tmp_path, monkeypatch):
    """With a stand-in for ``python -m venv`` that makes a stand-in for the environment's Python."""
    calls = tmp_path / "calls"
    inner = f'#!/bin/sh\necho "$@" >> {calls}\necho "{{}}"\n'
    outer = tmp_path / "outer"
    outer.write_text(
        f'#!/bin/sh\necho venv >> {calls}\nmkdir -p "$3/bin"\ncat > "$3/bin/python" <<"END"\n{inner}END\n'
        'chmod +x "$3/bin/python"\n'
    )
    outer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(outer))
    told = []
    for _ in range(2):
        devkit = open_devkit(None, tmp_path / "cache", lambda text, fraction: told.append(text))
    assert devkit.isolated
    assert devkit.python.is_relative_to(tmp_path / "cache")
    assert len(told) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [devkit.python.parts[-3]]
    assert calls.read_text().splitlines() == ["venv", "-I -m pip install --quiet nuscenes-devkit>=1.2,<1.3"]


def test_an_environment_that_fails_leaves_nothing(tmp_path, monkeypatch):
    outer = tmp_path / "outer"
    outer.write_text("#!/bin/sh\necho 'ensurepip is not available' >&2\nexit 3\n")
    outer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(outer))
    with pytest.raises(ChildError, match=r"--devkit-python\): exit code 3; it said last:\n  ensurepip is not"):
        open_devkit(None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------------------------------------- the real kit


@pytest.fixture(scope="module")
def real_kit():
    """The kit's environment in the user's cache; it is large and serves later runs too."""
    if os.environ.get("DSVT_WITHOUT_DEVKIT"):
        pytest.skip("DSVT_WITHOUT_DEVKIT is set")
    try:
        devkit = open_devkit(None, cache_folder(EngineConfig()))
        devkit.scenes("mini_val")
    except ChildError as error:
        pytest.skip(f"nuscenes-devkit cannot be installed: {error}")
    return devkit


def test_annotations_as_detections_are_perfect_for_the_kit(real_kit, root, tmp_path):
    """What our reader, frames and writer make of the annotations is what the kit reads itself."""
    path = tmp_path / "results.json"
    write_results(path, perfect_results(root))
    summary = real_kit.evaluate(root, "v1.0-mini", "mini_val", path)
    for name in ("car", "pedestrian"):
        assert summary["mean_dist_aps"][name] == pytest.approx(1.0)
        errors = summary["label_tp_errors"][name]
        assert max(errors["trans_err"], errors["scale_err"]) < 1e-5
        # Our boxes and velocities lie flat in the frame of the cloud, which is tilted.
        assert max(errors["orient_err"], errors["vel_err"]) < 5e-3
        assert errors["attr_err"] == 0
    assert summary["mean_ap"] == pytest.approx(0.2)


def test_the_kit_notices_a_mistake_of_each_kind(real_kit, root, tmp_path):
    """Were a frame, a size or a velocity wrong, the test above would fail."""
    records = perfect_results(root)
    for token, found in records.items():
        for record in found:
            if record["detection_name"] == "car":
                record["size"] = [record["size"][1], record["size"][0], record["size"][2]]
                record["velocity"] = record["velocity"][::-1]
                record["rotation"] = [record["rotation"][3], 0.0, 0.0, -record["rotation"][0]]
                record["translation"][0] += 0.7 if token.endswith("0") else -0.7
    path = tmp_path / "results.json"
    write_results(path, records)
    errors = real_kit.evaluate(root, "v1.0-mini", "mini_val", path)["label_tp_errors"]["car"]
    assert errors["trans_err"] == pytest.approx(0.7, abs=1e-3)
    assert errors["orient_err"] == pytest.approx(np.pi, abs=1e-3)
    assert errors["vel_err"] == pytest.approx(np.hypot(*(CAR_VELOCITY - CAR_VELOCITY[::-1])), abs=1e-3)
    assert errors["scale_err"] > 0.5


def test_a_detector_is_scored_by_the_kit(capsys, real_kit, root, weights, tmp_path):
    output = tmp_path / "evaluation.json"
    arguments = ("--data", f"nuscenes:{root}", "--devkit-python", real_kit.python, "--output", output)
    status, out, err = run(capsys, *arguments, *model_options(weights))
    assert (status, err) == (0, "")
    assert "construction_vehicle" in out
    content = json.loads(output.read_text())
    assert set(content["ap"]) == set(DETECTION_NAMES)
    assert set(content["ap"]["car"]) == {"mean", "center@0.5", "center@1", "center@2", "center@4"}
    assert content["tp_errors_of_class"]["traffic_cone"]["vel_err"] is None
    assert 0 <= content["map"] <= 100
