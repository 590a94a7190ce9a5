"""``dsvt benchmark``: its options and its picture; test_tools.py has the plain command."""

import gc
import json
import sys
import weakref

import numpy as np
import pytest
import torch
from tiny import tiny_points, write_tiny_model

from dsvt_ros.errors import DataError
from dsvt_ros.tools import benchmark, cli
from dsvt_ros.tools.benchmark_picture import check_picture, draw_stages


def test_backends_and_sizes(capsys, tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    np.save(tmp_path / "cloud.npy", tiny_points())
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    command = ["benchmark", "--model", folder, "--cloud", tmp_path / "cloud.npy", "--device", "cpu", "--runs", 2]
    command += ["--backends", "auto,reference", "--points", "300,900", "--output", output, "--picture", picture]
    assert cli.main([str(word) for word in command]) == 0
    printed = capsys.readouterr().out
    assert "totals by size" in printed
    content = json.loads(output.read_text())
    cells = [cell.strip() for cell in next(line for line in printed.splitlines() if "voxelize" in line).split("│")]
    quantiles = [result["stage_quantiles_ms"]["voxelize"] for result in content["results"]]
    assert cells[1:-1] == ["voxelize", *(f"{found['p50']:.2f} ({found['p95']:.2f})" for found in quantiles)]
    assert printed.count("auto: torch") == 2
    for rows in (content["results"], content["scaling"][::2]):
        assert [(row["asked_for"], row["backend"]) for row in rows] == [("auto", "torch"), ("reference", "reference")]
    assert "device_ms" not in content["results"][0]  # a matter of GPUs
    rows = [(row["backend"], row["precision"], row["num_points"]) for row in content["scaling"]]
    assert rows == [(backend, "fp32", size) for backend in ("torch", "reference") for size in (300, 900)]
    for row in content["scaling"]:
        assert row["total_ms"]["p50"] <= row["total_ms"]["p99"]
        assert row["peak_memory_mib"] > 0
    torch_rows, reference_rows = content["scaling"][:2], content["scaling"][2:]
    assert [row["num_voxels"] for row in torch_rows] == [row["num_voxels"] for row in reference_rows]
    assert torch_rows[0]["num_voxels"] < torch_rows[1]["num_voxels"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_versions_are_those_of_what_ran(monkeypatch, tmp_path):
    """Not of what was asked for, which may be auto."""
    monkeypatch.setattr("dsvt_ros.tools.benchmark.versions", lambda backends: list(backends))
    np.save(tmp_path / "cloud.npy", tiny_points())
    output = tmp_path / "result.json"
    command = ["benchmark", "--model", write_tiny_model(tmp_path / "tiny"), "--cloud", tmp_path / "cloud.npy"]
    command += ["--device", "cpu", "--runs", 1, "--backends", "auto,reference", "--output", output]
    assert cli.main([str(word) for word in command]) == 0
    assert json.loads(output.read_text())["versions"] == ["torch", "reference"]


def test_a_detector_is_gone_before_the_next_one_is_loaded(monkeypatch, tmp_path):
    """Or its memory would count as that of the next one; the garbage collector comes when it likes."""
    load, loaded, alive = benchmark._load, [], []

    def noted(*arguments):
        alive.append(sum(earlier() is not None for earlier in loaded))
        detector = load(*arguments)
        loaded.append(weakref.ref(detector))
        return detector

    monkeypatch.setattr(benchmark, "_load", noted)
    folder = write_tiny_model(tmp_path / "tiny")
    np.save(tmp_path / "cloud.npy", tiny_points())
    command = ["benchmark", "--model", folder, "--cloud", tmp_path / "cloud.npy", "--device", "cpu", "--runs", 1]
    command += ["--backends", "torch,reference"]
    collects = gc.isenabled()
    gc.disable()
    try:
        assert cli.main([str(word) for word in command]) == 0
    finally:
        if collects:
            gc.enable()
    assert alive == [0, 0]


def test_clouds_that_are_timed(monkeypatch, tmp_path):
    """So many of those that there are, made for the options of the detector."""
    axes = []

    def given(_sources, _columns, _model, preprocess):
        axes.append(preprocess.cloud_axes)
        return (tiny_points(seed=seed) for seed in range(2 * benchmark.MAX_CLOUDS))

    monkeypatch.setattr(benchmark, "given_clouds", given)
    output = tmp_path / "result.json"
    command = ["benchmark", "--model", write_tiny_model(tmp_path / "tiny"), "--cloud", "drive.mcap"]
    command += ["--device", "cpu", "--runs", 1, "--set", "preprocess.cloud_axes=x_right", "--output", output]
    assert cli.main([str(word) for word in command]) == 0
    assert json.loads(output.read_text())["cloud"]["num_clouds"] == benchmark.MAX_CLOUDS
    assert axes == ["x_right"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "torch,nope"], "no backend 'nope'; expected auto, torch"),
        (["--backends", "reference", "--ros", "3"], "the node has no backend reference"),
        (["--points", "many"], "--points: expected a positive number"),
        (["--cloud", "simulated:none"], "--cloud simulated: expected a positive number"),
        (["--cloud", "simulated:3000,4000"], "--cloud simulated: expected a positive number of points, such as 60000"),
        (["--output", "nowhere/result.json"], "--output nowhere/result.json: there is no folder nowhere"),
        (["--picture", "nowhere/stages.png"], "--picture nowhere/stages.png: there is no folder nowhere"),
        (["--picture", "stages.txt"], "cannot write the picture stages.txt: expected a name that ends in ."),
        (["--picture", "stages"], "cannot write the picture stages: expected a name that ends in ."),
    ],
)
def test_mistakes_are_answered_in_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr("dsvt_ros.tools.benchmark._measure", lambda *_: pytest.fail("measured all the same"))
    np.save(tmp_path / "cloud.npy", tiny_points())
    cloud = [] if "--cloud" in arguments else ["--cloud", str(tmp_path / "cloud.npy")]
    assert cli.main(["benchmark", "--device", "cpu", *cloud, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_own_time(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    np.save(tmp_path / "cloud.npy", tiny_points())
    output = tmp_path / "result.json"
    command = ["benchmark", "--model", folder, "--cloud", tmp_path / "cloud.npy", "--device", "cuda", "--runs", 5]
    command += ["--backends", "torch,reference,reference-fp16", "--output", output]
    assert cli.main([str(word) for word in command]) == 0
    for result in json.loads(output.read_text())["results"]:
        assert 0 < result["device_busy_ms"] < 2 * result["total_ms"]["p99"]
        assert result["frames_per_s"] > 0.5e3 / result["total_ms"]["p99"]
        assert set(result["device_ms"]) == {"p50", "p95", "p99"}


def example(num_backends):
    stages = {"voxelize": 1.0, "sparse": 10.0, "dense": 5.0, "something new": 0.5}
    results = [
        {
            "backend": f"backend {number}",
            "precision": "fp32",
            "stage_ms": stages,
            "total_ms": {"p50": 12.0 + number},
            "peak_memory_mib": 1000,
        }
        for number in range(num_backends)
    ]
    hardware = {"cpu": "some processor", "threads": 2}
    return {"model": "tiny", "cloud": {"num_points": [100, 200]}, "hardware": hardware, "results": results}


@pytest.mark.parametrize("num_backends", [1, 6])
def test_picture(num_backends, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    draw_stages(example(num_backends), tmp_path / "stages.png")
    picture = image.imread(tmp_path / "stages.png")[..., :3]
    orange = np.abs(picture - np.array([0xE8, 0x74, 0x3B]) / 255).max(-1) < 0.02
    starts = np.diff(orange.sum(1).clip(300, 301)) > 0  # rows where a bar begins; the legend's patch is narrower
    assert starts.sum() == num_backends


def test_picture_names_backends_and_who_chose_them(monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    content = example(3)
    content["results"][0]["asked_for"] = "auto"
    content["results"][1]["asked_for"] = "backend 1"
    content["results"][2] |= {"backend": "reference-fp16", "precision": "fp16"}
    draw_stages(content, tmp_path / "stages.svg")
    text = (tmp_path / "stages.svg").read_text()
    for label in ("auto: backend 0, fp32", "backend 1, fp32", "reference-fp16"):
        assert f">{label}<" in text


def test_unwritable_picture_is_one_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="cannot write the picture"):
        draw_stages(example(1), tmp_path / "nowhere" / "stages.png")


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(DataError, match="extra plot"):
        draw_stages(example(1), tmp_path / "stages.png")
    with pytest.raises(DataError, match="extra plot"):
        check_picture(tmp_path / "stages.png")


def test_pictures_of_every_kind(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("stages.PNG", "stages.pdf"):
        check_picture(tmp_path / name)
        draw_stages(example(1), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
