"""What ``dsvt build`` says and writes; TensorRT itself is replaced, where there is any."""

import hashlib
import io
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import tiny_config, tiny_points, write_tiny_model

from dsvt_ros.backends.tensorrt import load
from dsvt_ros.backends.tensorrt.cache import EngineSpec, write_sidecar
from dsvt_ros.backends.tensorrt.load import PlannedEngine
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import ExportOptions, export_folder
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools import cli, progress
from dsvt_ros.voxelization import voxelize

REPORT = {"build_s": 74.2, "layers": {"Myelin": {"fp16": 1}, "Reformat": {"fp16": 2, "fp32": 1}}}
WRITE_ENGINE = load.write_engine
IDENTITY = {
    "model_sha256": "m" * 64,
    "weights_sha256": "w" * 64,
    "tensorrt": "10.13.3",
    "gpu": "NVIDIA Test",
    "compute_capability": "9.0",
}


def run(capsys, *arguments):
    status = cli.main(["build", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("build") / "model")


# ------------------------------------------------------------------------------------------------ building


def planned(name, *rooms):
    """An engine to be; `rooms` are least, usual and largest number of voxels."""
    shapes = tuple((room, 16) for room in rooms) if rooms else ((1, 16, 32, 32),) * 3
    spec = EngineSpec(
        **IDENTITY,
        model="tiny",
        network=name,
        onnx_sha256="o" * 64,
        precision="fp16",
        profile={"voxel_features" if rooms else "bev": shapes},
        workspace_mib=0,
        optimization_level=3,
        tactic_sources=(),
    )
    return PlannedEngine(spec, b"onnx", ())


def written(spec, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("partial")
    partial.write_bytes(bytes(3 << 20))
    write_sidecar(partial, path, spec, REPORT)
    partial.replace(path)


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """Stands for TensorRT: engines of three MiB. Gives what was asked for."""
    asked = []

    def plan(source):
        asked.append(source)
        profile = source.config.profile
        rooms = [profile.voxels] if profile.dynamic else [(size,) * 3 for size in profile.voxels or (192,)]
        yield from (planned("sparse", *room) for room in rooms)
        yield planned("dense")

    def write(source, engine, target, progress):
        progress(f"building the {engine.spec.network} network: choosing kernels, 3 s", 0.5)
        written(engine.spec, target)
        return REPORT

    def cache(source, engine, progress):
        path = load.engine_folder(source.config) / engine.spec.file_name
        if path.is_file():
            return str(path)
        write(source, engine, path, progress)
        return f"{path}, built now"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "require_gpu", lambda device: None)
    monkeypatch.setattr(load, "planned_engines", plan)
    monkeypatch.setattr(load, "write_engine", write)
    monkeypatch.setattr(load, "cache_engine", cache)
    return asked


def test_engines_of_the_cache(backend, source, capsys, tmp_path):
    status, out, err = run(capsys, source)
    assert status == 0
    names = sorted(path.name for path in (tmp_path / "cache" / "dsvt_ros" / "tensorrt").glob("*.engine"))
    assert [name.rsplit("-", 1)[0] for name in names] == ["tiny-dense", "tiny-sparse"]
    for name in names:
        assert name in out
    for text in ("192", "fp16", "74", "3.0", "Myelin: 1 fp16", "Reformat: 2 fp16, 1 fp32"):
        assert text in out
    assert f"used by: dsvt detect CLOUD --model {source} --backend tensorrt\n" in out
    assert "built before" not in out
    assert err.startswith("preparing the networks of tiny\n")
    (given,) = backend
    assert given.weights == source / "weights.safetensors"
    assert not given.network.training

    assert run(capsys, source)[1].count("built before: tiny-sparse-") == 1


def test_several_engines_of_fixed_size(backend, source, capsys):
    options = ["--set", "engine.precision=fp16", "--set", "preprocess.min_range=1"]
    status, out, _ = run(capsys, source, "--profile", "voxels=100,200", *options)
    assert status == 0
    assert (backend[0].config.profile.voxels, backend[0].config.profile.dynamic) == ((100, 200), False)
    expected = "--backend tensorrt --set engine.precision=fp16 --set engine.profile.voxels=100,200\n"
    assert out.endswith(expected)


def test_one_engine_for_a_range(backend, source, capsys, tmp_path):
    weights = tmp_path / "other.safetensors"
    weights.write_bytes((source / "weights.safetensors").read_bytes())
    status, out, _ = run(capsys, source / "model.yaml", "--weights", weights, "--profile", "voxels=3/100/200")
    assert status == 0
    assert backend[0].weights == weights
    assert backend[0].config.profile.dynamic
    assert "3/100/200" in out
    expected = "engine.profile.voxels=3,100,200 --set engine.profile.dynamic=true\n"
    assert out.endswith(f"--backend tensorrt --weights {weights} --set {expected}")


def test_engines_in_a_folder(backend, source, capsys, tmp_path):
    output = tmp_path / "with space"
    status, out, _ = run(capsys, source, "--output", output)
    assert status == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "dense.engine", "dense.engine.json", "sparse.engine", "sparse.engine.json",
    ]  # fmt: skip
    words = shlex.split(out.splitlines()[-1])
    assert words[-4:] == [
        "--set", f"engine.sparse_path={output}/sparse.engine", "--set", f"engine.dense_path={output}/dense.engine",
    ]  # fmt: skip


def test_several_engines_in_a_folder(backend, source, capsys, tmp_path):
    status, out, _ = run(capsys, source, "--output", tmp_path / "o", "--profile", "voxels=100,200")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "o").glob("*.engine")) == [
        "dense.engine", "sparse_100.engine", "sparse_200.engine",
    ]  # fmt: skip
    assert f"engine.sparse_path={tmp_path}/o/sparse_200.engine" in out
    assert "engine.sparse_path names one engine, here the largest" in out


def test_a_cache_that_keeps_nothing(backend, source, capsys, monkeypatch):
    monkeypatch.setattr(load, "cache_engine", lambda *_: "this process")
    status, _, err = run(capsys, source)
    assert status == 1
    assert "cannot be written, so the engine was not kept: give --output DIR" in err


@pytest.fixture(scope="module")
def released(source, tmp_path_factory):
    folder, output = open_model(source), tmp_path_factory.mktemp("released")
    options = ExportOptions(interface="dsvt_release", opset=14, layer_norm="decomposed")
    export_folder(folder, folder.weights, output, options)
    return output


def test_the_published_interface(backend, released, capsys, tmp_path, monkeypatch):
    engines = []

    def write(source, engine, target, progress):
        engines.append(engine)
        written(engine.spec, target)

    monkeypatch.setattr(load, "write_engine", write)
    monkeypatch.setattr(load, "_identity", lambda *_: IDENTITY)
    status, out, _ = run(capsys, released, "--output", tmp_path / "o", "--profile", "voxels=10/100/200")
    assert status == 0
    (engine,) = engines
    assert (tmp_path / "o" / "dsvt.engine").is_file()
    assert (engine.spec.network, engine.spec.precision) == ("dsvt", "fp32")
    assert engine.spec.onnx_sha256 == hashlib.sha256((released / "dsvt.onnx").read_bytes()).hexdigest()
    assert engine.spec.profile["src"] == ((10, 16), (100, 16), (200, 16))
    assert engine.spec.profile["pos_embed_tensor"][2] == (2, 2, 200, 16)
    assert engine.spec.profile["set_voxel_inds_tensor_shift_0"][0] == (2, 2, 6)
    assert "10/100/200" in out
    assert "dsvt detect" not in out


@pytest.mark.parametrize("arguments", [[], ["--output", "o"], ["--profile", "voxels=10/100/200"]])
def test_the_published_interface_needs_a_place_and_a_range(backend, released, capsys, arguments):
    status, _, err = run(capsys, released, *arguments)
    assert status == 1
    assert "give --output DIR and --profile voxels=MIN/OPT/MAX" in err


def test_the_published_interface_of_other_weights(backend, released, capsys, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=3) / "weights.safetensors"
    status, _, err = run(
        capsys, released, "--weights", other, "--output", tmp_path / "o", "--profile", "voxels=10/100/200"
    )
    assert status == 1
    assert "was exported with other weights than" in err
    assert not (tmp_path / "o").exists()


def test_interrupted(backend, source, capsys, tmp_path, monkeypatch):
    """The backend's own `write_engine`, of which Ctrl-C leaves nothing."""
    began = []

    def interrupted(request, environment, what, progress):
        began.append(sorted(path.name for path in (tmp_path / "o").iterdir()))
        Path(request.engine).write_bytes(b"half")
        progress(f"building {what}: choosing kernels, 3 s", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "write_engine", WRITE_ENGINE)
    monkeypatch.setattr(load, "run_child", interrupted)
    monkeypatch.setattr(load, "child_environment", lambda index: {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    status, _, err = run(capsys, source, "--output", tmp_path / "o")
    assert status == 130
    assert err.endswith("dsvt build: interrupted\n")
    assert len(began) == 1
    assert list((tmp_path / "o").iterdir()) == []


def test_without_tensorrt(source, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    status, out, err = run(capsys, source)
    assert (status, out) == (1, "")
    assert err.startswith("dsvt build: backend tensorrt needs TensorRT 8.5 or later (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no model nope: expected one of demo"),
        (["{source}", "--profile", "voxel=3"], "--profile takes voxels=N,N,... or voxels=MIN/OPT/MAX, got 'voxel=3'"),
        (["{source}", "--profile", "voxels=3,,4"], "--profile takes voxels=N,N,..."),
        (["{source}", "--profile", "voxels=1/2,3"], "--profile takes voxels=N,N,..."),
        (["{source}", "--profile", "voxels=3/4"], "engine.profile.dynamic needs three numbers of voxels"),
        (["{source}", "--profile", "voxels=4,3"], "engine.profile.voxels must increase, got 4, 3"),
        (["{source}", "--profile", "voxels=0"], "engine.profile.voxels[0] must be at least 1"),
        (["{source}", "--set", "engine.precison=fp16"], "did you mean engine.precision"),
        (["{source}", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["{source}", "--max-frames", "3"], "--max-frames goes with --plan"),
        (["{source}", "--columns", "x,y,z"], "--columns goes with --plan"),
        (["{source}", "--output", "o", "--plan", "a.npy"], "--output goes without --plan"),
        (["{source}", "--profile", "voxels=3", "--plan", "a.npy"], "--profile goes without --plan"),
        (["{source}", "--plan", "nowhere.npy"], "nowhere.npy does not exist"),
        (["{source}", "--plan", "{cloud}", "--max-frames", "0"], "--max-frames must be at least 1, got 0"),
        (["{source}", "--plan", "{far}"], "none of 1 clouds has points in the range of model tiny"),
    ],
)
def test_mistakes_are_answered_in_one_line(source, capsys, tmp_path, arguments, message):
    cloud, far = tmp_path / "cloud.npy", tmp_path / "far.npy"
    np.save(cloud, tiny_points())
    np.save(far, tiny_points() + np.float32(100))
    status, _, err = run(capsys, *(text.format(source=source, cloud=cloud, far=far) for text in arguments))
    assert status == 1
    assert message in err
    assert err.startswith("dsvt build: ")
    assert err.count("\n") == 1


def test_a_model_without_weights(capsys, monkeypatch):
    monkeypatch.setattr(load, "require_gpu", lambda device: None)
    status, _, err = run(capsys, "waymo_pillar")
    assert status == 1
    assert "waymo_pillar comes without weights: name a file with --weights" in err


def test_an_error_of_the_backend(backend, source, capsys, monkeypatch):
    def fail(*_):
        raise EngineError("no memory")

    monkeypatch.setattr(load, "cache_engine", fail)
    status, out, err = run(capsys, source)
    assert (status, out) == (1, "")
    assert err.endswith("dsvt build: no memory\n")


# ------------------------------------------------------------------------------------------------ planning


def counts_of(points):
    """Voxels and sets by the stages themselves."""
    model = tiny_config()
    voxels = voxelize(torch.as_tensor(points), model)
    (stage,) = partition_sets(voxels.coords, model).stages
    return [len(voxels), *(sets.indices.shape[1] for sets in stage.sets)]


def numbers(line):
    return [int(word) for word in line.replace("│", " ").split() if word.isdecimal()]


def test_plan_of_files(source, capsys, tmp_path, monkeypatch):
    """Missing returns are no voxels, as for the detector."""
    monkeypatch.setattr(load, "require_gpu", None)
    clouds = [tiny_points(count, seed=count) for count in (100, 300, 600)]
    paths = []
    for cloud in clouds:
        missing = np.array([[np.nan, 0, 0, 0], [0, 0, 0, 0]], np.float32)
        paths.append(tmp_path / f"{len(cloud)}.npy")
        np.save(paths[-1], np.concatenate([missing, cloud]))
    status, out, err = run(capsys, source, "--plan", *paths, "--device", "cpu")
    assert (status, err) == (0, "")
    assert "3 clouds" in out
    expected = np.array([counts_of(cloud) for cloud in clouds])
    lines = [line for line in out.splitlines() if "voxels  " in line or "sets, shift" in line]
    for column, line in enumerate(lines[:3]):
        low, middle, high = expected[:, column]
        assert numbers(line)[-4:] == [low, middle, high, high]
    default, proposed = (next(line for line in out.splitlines() if f"│ {name}" in line) for name in ("default", "prop"))
    cut = sum(row[0] > 192 for row in expected)
    assert "192" in default
    assert f"{cut / 3:.1%}" in default
    assert "1024" in proposed, "the whole grid"
    assert f"dsvt build {source} --profile voxels=1024\n" in out
    assert "  engine.profile.voxels: [1024]\n" in out
    assert f"dsvt build {source} --profile voxels=1/1023/1024\n" in out
    assert out.endswith("  engine.profile.voxels: [1, 1023, 1024]\n  engine.profile.dynamic: true\n")


def test_plan_of_a_bag(capsys, tmp_path):
    """With a model that has no weights, from a sensor above the ground, and an empty cloud."""
    pytest.importorskip("rosbags", reason="bags need rosbags")
    from dsvt_ros.io.bags import BagWriter

    rng = np.random.default_rng(0)
    with BagWriter(tmp_path / "drive") as writer:
        for number, count in enumerate((2000, 30000, 0, 5)):
            points = rng.uniform([-70, -70, -1.9, 0], [70, 70, 2, 1], (count, 4)).astype(np.float32)
            writer.write_points("/points", points, ("x", "y", "z", "intensity"), 10**18 + number, "lidar")
    command = ["waymo_pillar", "--plan", tmp_path / "drive", "--topic", "/points"]
    status, out, _ = run(capsys, *command, "--max-frames", 3, "--set", "preprocess.sensor_pose=0,0,1.8,0,0,0")
    assert status == 0
    assert "3 clouds, 1 without points in the model's range" in out
    (build_line, _, dynamic_line, _, _) = [line for line in out.splitlines() if line.startswith("  ")]
    sizes = [int(size) for size in build_line.rpartition("=")[2].split(",")]
    assert len(sizes) == 2
    assert 1900 < sizes[0] <= 2048
    assert dynamic_line.startswith("  dsvt build waymo_pillar --profile voxels=1024/")
    assert run(capsys, *command)[1].count("4 clouds, 1 without") == 1


def test_plan_repeats_what_engines_depend_on(source, capsys, tmp_path):
    np.save(tmp_path / "a.npy", tiny_points())
    weights = source / "weights.safetensors"
    options = ["--set", "preprocess.min_range=0.5", "--set", "engine.precision=fp32", "--weights", weights]
    _, out, _ = run(capsys, source, "--plan", tmp_path / "a.npy", *options)
    assert f"--profile voxels=1024 --weights {weights} --set engine.precision=fp32\n" in out


# ------------------------------------------------------------------------------------------------ progress


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    console, now = Console(file=io.StringIO()), iter([100.0, 101.0, 114.9, 115.0, 116.0, 131.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.terminal_progress(console) as show:
        for second in range(6):
            show(f"building [x], {second}", None if second < 3 else 0.25)
    assert console.file.getvalue() == "building [x], 0\nbuilding [x], 3, 25%\nbuilding [x], 5, 25%\n"


def test_a_terminal_gets_a_moving_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with progress.terminal_progress(console) as show:
        show("building [x], 1 s", None)
        show("building [x], 2 s", 0.5)
        show("building [x], 3 s", None)
    said = console.file.getvalue()
    assert "building [x], 1 s" in said
    assert "━" not in said.split("building")[-1], "no bar once the share is unknown"
    assert said.endswith("\x1b[2K"), "nothing is left of it"


def test_a_terminal_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with progress.terminal_progress(console) as show:
        show("building", 0.5)
    assert "━" * 15 in console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_when_nothing_takes_long(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with progress.terminal_progress(console):
        pass
    assert console.file.getvalue() == ""


def test_other_commands_show_what_takes_long(source, capsys, tmp_path, monkeypatch):
    from dsvt_ros.backends import choice

    def slow(backend, network, folder, weights, device, config, progress, **_options):
        progress("building an engine", None)
        return choice.TorchNetworks(network), "asked for"

    monkeypatch.setattr("dsvt_ros.detector.open_networks", slow)
    np.save(tmp_path / "a.npy", tiny_points())
    assert cli.main(["detect", str(tmp_path / "a.npy"), "--model", str(source), "--device", "cpu"]) == 0
    assert capsys.readouterr().err == "building an engine\n"
