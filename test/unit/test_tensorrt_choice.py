"""``auto`` on a CUDA device takes TensorRT where its engines are ready, and builds none."""

import functools
import json
import sys

import pytest
import torch
from fakes.machine import VOXELS, engine_of

from dsvt_ros.backends import choice
from dsvt_ros.backends.choice import open_networks
from dsvt_ros.backends.tensorrt import load
from dsvt_ros.config import EngineConfig, ProfileConfig
from dsvt_ros.export.folder import ExportOptions
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model

pytest_plugins = ("fakes.fixtures",)


@pytest.fixture
def auto(machine, tiny_model, cache_dir):
    """What ``auto`` takes for the tiny model on a GPU, and why; engines run on the CPU all the same."""
    machine.monkeypatch.setattr(load, "Engine", on_cpu(load.Engine))

    def choose(model=tiny_model, voxels=VOXELS, dynamic=False, **options):
        folder = open_model(model)
        network = DSVT(folder.model).eval().requires_grad_(False)
        load_weights(network, read_weights(folder.weights), "weights")
        profile = ProfileConfig(tuple(voxels), dynamic)
        config = EngineConfig(**{"cache_dir": str(cache_dir), "precision": "fp32", "profile": profile, **options})
        before = machine.builds()
        networks, reason = open_networks("auto", network, folder, folder.weights, torch.device("cuda"), config)
        assert machine.builds() == before, "auto never builds"
        assert reason.startswith("chosen by auto")
        return networks.name, reason

    return choose


def on_cpu(engine):
    @functools.wraps(engine)
    def make(plan, file, device, **options):
        return engine(plan, file, torch.device("cpu"), **options)

    return make


def test_without_tensorrt(auto, machine):
    machine.monkeypatch.setitem(sys.modules, "tensorrt", None)
    backend, reason = auto()
    assert backend == "torch"
    assert "needs TensorRT 8.5 or later" in reason


def test_without_tensorrt_but_with_paths(auto, machine, built):
    """The same configuration serves machines with and without it."""
    machine.monkeypatch.setitem(sys.modules, "tensorrt", None)
    paths = {f"{name}_path": str(engine_of(built, name)) for name in ("sparse", "dense")}
    assert auto(**paths)[0] == "torch"


def test_without_engines(auto, tiny_model):
    backend, reason = auto()
    assert backend == "torch"
    assert f"has no engines for this model and GPU yet; they take minutes to build: dsvt build {tiny_model}" in reason


@pytest.mark.parametrize(
    ("options", "failed", "expected"),
    [
        ({}, {}, "torch"),
        ({}, {"torch": "no room"}, "tensorrt"),
        ({"precision": "fp32"}, {}, "tensorrt"),
        ({"sparse_path": "sparse.engine", "dense_path": "dense.engine"}, {}, "tensorrt"),
        ({"sparse_path": "sparse.engine"}, {}, "torch"),
    ],
    ids=["whole frames in torch", "that fail", "in single precision", "engines by path", "one engine by path"],
)
def test_engines_and_frames_in_torch(monkeypatch, tiny_model, options, failed, expected):
    """Where Triton is not, and all engines are."""
    monkeypatch.setattr(load, "engines_ready", lambda _source: True)
    folder = open_model(tiny_model)
    failed = {"triton": "no Triton here", **failed}
    arguments = (DSVT(folder.model), folder, folder.weights, torch.device("cuda"), EngineConfig(**options))
    backend, reason = choice._choose(*arguments, failed)
    assert backend == expected
    assert reason.startswith("chosen by auto: ")


def test_with_engines(auto, built):
    backend, reason = auto()
    assert backend == "tensorrt"
    assert str(engine_of(built, "sparse")) in reason


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_with_one_engine(auto, built, network):
    engine = engine_of(built, network)
    engine.rename(built / "elsewhere.engine")
    assert auto()[0] == "torch"
    (built / "elsewhere.engine.json").write_text(engine.with_suffix(".engine.json").read_text())
    assert auto(**{f"{network}_path": str(built / "elsewhere.engine")})[0] == "tensorrt"


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"voxels": [256]},
        {"voxels": [256, 512]},
        {"voxels": []},
        {"voxels": [256, 384, 512], "dynamic": True},
        {"optimization_level": 5},
        {"workspace_mib": 100},
        {"tactic_sources": ("jit_convolutions",)},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_engines_for_another_configuration(auto, built, options):
    """Loading with these options would build for minutes."""
    assert auto(**options)[0] == "torch"


def test_several_engines(auto, open_tiny, built):
    open_tiny(**{"profile.voxels": [256, 512]})
    assert auto(voxels=[256, 512])[0] == auto(voxels=[256])[0] == "tensorrt"
    assert auto(voxels=[128, 256])[0] == "torch"


def test_one_engine_for_a_range(auto, open_tiny, built):
    open_tiny(**{"profile.voxels": [64, 128, 256], "profile.dynamic": True})
    assert auto(voxels=[64, 128, 256], dynamic=True)[0] == "tensorrt"
    assert auto(voxels=[64, 128, 400], dynamic=True)[0] == "torch"
    assert auto(voxels=[64, 128, 256])[0] == "torch"


def test_another_gpu_release_or_model(auto, machine, built, tmp_path, tiny_model):
    machine.gpu("Another GPU")
    assert auto()[0] == "torch"
    machine.gpu()
    machine.release("11.4.0")
    assert auto()[0] == "torch"
    machine.release("10.16.1")
    assert auto()[0] == "tensorrt"
    for path in (built / "tensorrt").glob("*.json"):
        content = json.loads(path.read_text())
        content["spec"]["weights_sha256"] = "0" * 64
        path.write_text(json.dumps(content))
    assert auto()[0] == "torch"


def test_damaged_sidecars(auto, built):
    """They describe nothing, so there is nothing for the model yet."""
    for path, text in zip(sorted((built / "tensorrt").glob("*.json")), ["{", '{"spec": 1}'], strict=True):
        path.write_text(text)
    assert auto()[0] == "torch"


def test_a_folder_that_says_how_much_room_there_is(auto, open_tiny, cache_dir, export_folder):
    """Without sizes of the user's, those of the folder's own networks count."""
    folder = export_folder(ExportOptions(voxels=256))
    assert auto(model=folder, voxels=[])[0] == "torch"
    open_tiny(model=folder, **{"profile.voxels": []})
    assert auto(model=folder, voxels=[])[0] == "tensorrt"


def test_a_damaged_manifest(auto, built, export_folder):
    folder = export_folder(ExportOptions())
    (folder / "manifest.json").write_text("{")
    backend, reason = auto(model=folder, voxels=[])
    assert backend == "torch"
    assert "is no manifest of dsvt_ros" in reason
