"""Engines named by path: the right ones are taken as they are, and of others the user learns what they are."""

import dataclasses
import json
import shutil
from unittest import mock

import pytest
import tiny
import torch
from fakes.machine import assert_same, engine_of
from tiny import tiny_config, tiny_points, write_tiny_model

from dsvt_ros.backends import no_progress
from dsvt_ros.backends.tensorrt import cache as engine_cache
from dsvt_ros.backends.tensorrt.load import Source, planned_engines, write_engine
from dsvt_ros.config import EngineConfig, ProfileConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.checkpoint import load_weights, read_weights, weights_sha256
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model

pytest_plugins = ("fakes.fixtures",)


@pytest.fixture
def engines(built_once, tmp_path):
    """Both engines with their sidecars, under names of the user's."""
    folder = tmp_path / "engines"
    folder.mkdir()
    for network in ("sparse", "dense"):
        source = engine_of(built_once, network)
        shutil.copy(source, folder / f"{network}.engine")
        shutil.copy(f"{source}.json", folder / f"{network}.engine.json")
    return folder


@pytest.fixture
def take(open_tiny, engines):
    """Loads the tiny model with these engines; nothing may be built or exported for that."""

    def load(**options):
        paths = {f"{network}_path": str(engines / f"{network}.engine") for network in ("sparse", "dense")}
        return open_tiny(**{**paths, **options})

    return load


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("other") / "weights", seed=1) / "weights.safetensors"


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory):
    """A model with more channels."""
    config = tiny_config()
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, channels=(16, 24)),
        backbone_3d=dataclasses.replace(config.backbone_3d, channels=24),
    )
    with mock.patch.dict(tiny.TINY_CONFIGS, {"tiny": lambda: config}):
        return write_tiny_model(tmp_path_factory.mktemp("other") / "wider")


def without_sidecars(engines):
    for path in engines.glob("*.json"):
        path.unlink()


def edit(path, **entries):
    """Change entries of a sidecar's spec."""
    content = json.loads(path.read_text())
    content["spec"] |= entries
    path.write_text(json.dumps(content))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_the_right_engines(machine, take, engines, cache_dir, torch_boxes):
    before = {path.name: path.read_bytes() for path in engines.iterdir()}
    detector = take()
    assert str(engines / "sparse.engine") in detector.backend_reason
    assert_same(detector.detect(tiny_points(400)), torch_boxes(400))
    assert not machine.builds()
    assert not cache_dir.exists(), "nothing is exported either"
    assert {path.name: path.read_bytes() for path in engines.iterdir()} == before


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_one_by_path_and_one_from_the_cache(machine, take, engines, built, torch_boxes, network):
    detector = take(**{f"{network}_path": ""})
    assert str(engine_of(built, network)) in detector.backend_reason
    assert_same(detector.detect(tiny_points(400)), torch_boxes(400))
    assert not machine.builds()


def test_paths_in_the_home_folder(machine, take, engines):
    machine.monkeypatch.setenv("HOME", str(engines.parent))
    assert take(sparse_path="~/engines/sparse.engine").backend == "tensorrt"


# ------------------------------------------------------------------------------------------------- with their sidecars

SPARSE = r"sparse\.engine"

WRONG = {
    "missing": (lambda f: (f / "sparse.engine").unlink(), rf"cannot read \S+{SPARSE}: No such file"),
    "folder": (
        lambda f: ((f / "sparse.engine").unlink(), (f / "sparse.engine").mkdir()),
        rf"cannot read \S+{SPARSE}: Is a directory",
    ),
    "empty": (lambda f: (f / "sparse.engine").write_bytes(b""), rf"{SPARSE} has 0 bytes, \d+ were written"),
    "truncated": (
        lambda f: (f / "sparse.engine").write_bytes((f / "sparse.engine").read_bytes()[:5000]),
        rf"{SPARSE} has 5000 bytes, \d+ were written: it is truncated or damaged",
    ),
    "flipped": (lambda f: flip(f / "sparse.engine", -1), rf"{SPARSE} is damaged: its SHA-256 is not the one in"),
    "another file": (
        lambda f: shutil.copy(f / "dense.engine", f / "sparse.engine"),
        rf"{SPARSE} has \d+ bytes, \d+ were written",
    ),
    "swapped": (
        lambda f: [shutil.copy(f / f"dense.engine{end}", f / f"sparse.engine{end}") for end in ("", ".json")],
        rf"{SPARSE} was built for network dense, wanted sparse",
    ),
    "gpu": (
        lambda f: edit(f / "sparse.engine.json", gpu="Another GPU"),
        rf"{SPARSE} was built for GPU Another GPU, wanted Fake GPU",
    ),
    "compute capability": (
        lambda f: edit(f / "sparse.engine.json", compute_capability="7.2"),
        rf"{SPARSE} was built for compute capability 7\.2, wanted 9\.0",
    ),
    "release": (
        lambda f: edit(f / "sparse.engine.json", tensorrt="8.6.1"),
        rf"{SPARSE} was built for TensorRT 8\.6\.1, wanted 10\.16\.1",
    ),
    "no json": (lambda f: (f / "sparse.engine.json").write_text("{"), rf"{SPARSE}\.json does not describe an engine"),
    "another json": (lambda f: (f / "sparse.engine.json").write_text("[1]"), r"\.json does not describe an engine"),
    "no spec": (
        lambda f: (f / "sparse.engine.json").write_text('{"schema_version": 1}'),
        r"\.json does not describe an engine \(KeyError\('spec'\)\)",
    ),
    "later version": (
        lambda f: (f / "sparse.engine.json").write_text(
            '{"schema_version": 9, "spec": {}, "engine_sha256": "", "size_bytes": 0}'
        ),
        r"\.json has schema_version 9, expected 1",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files(machine, take, engines, kind):
    damage, message = WRONG[kind]
    damage(engines)
    with pytest.raises(EngineError, match=message):
        take()
    assert not machine.builds(), "what the user names is never replaced"


def test_other_weights(take, other_weights):
    with pytest.raises(EngineError, match=rf"{SPARSE} was built for weights \w{{12}}\.\.\., wanted \w{{12}}\.\.\."):
        take(weights=other_weights)


def test_another_model(take, wider_model):
    with pytest.raises(EngineError, match=rf"{SPARSE} was built for model description \w{{12}}\.\.\., wanted"):
        take(model=wider_model)


def test_another_gpu_or_release_here(machine, take):
    machine.gpu("New GPU")
    with pytest.raises(EngineError, match="built for GPU Fake GPU, wanted New GPU"):
        take()
    machine.release("11.4.0")
    with pytest.raises(EngineError, match=r"built for TensorRT 10\.16\.1, wanted 11\.4\.0"):
        take()


# ---------------------------------------------------------------------------------------------------- without sidecars


def test_engines_of_unknown_origin_are_compared_with_torch(machine, take, engines, torch_boxes, caplog):
    without_sidecars(engines)
    detector = take()
    (record,) = [r for r in caplog.records if "comparing with torch" in r.getMessage()]
    assert "sparse and dense" in record.getMessage()
    assert [event["network"] for event in machine.events("run")] == ["sparse", "dense"]
    assert_same(detector.detect(tiny_points(400)), torch_boxes(400))


def test_only_those_of_unknown_origin_are_compared(machine, take, engines, caplog):
    (engines / "dense.engine.json").unlink()
    take()
    assert [event["network"] for event in machine.events("run")] == ["dense"]
    assert [r for r in caplog.records if "what dense was built from" in r.getMessage()]


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_unknown_engines_of_other_weights(take, engines, other_weights, network):
    """Each of the two is found out; the other one comes with a sidecar that says what is wanted."""
    for path in engines.glob("*.json"):
        edit(path, weights_sha256=weights_sha256(other_weights))
    (engines / f"{network}.engine.json").unlink()
    with pytest.raises(EngineError, match=rf"the {network} engine gives other results than these weights do in torch"):
        take(weights=other_weights)


def test_unknown_engine_of_the_other_network(take, engines):
    without_sidecars(engines)
    with pytest.raises(EngineError, match=r"dense\.engine takes bev, .* the engine of another network"):
        take(sparse_path=str(engines / "dense.engine"))


def test_unknown_engine_of_another_model(take, engines, wider_model):
    without_sidecars(engines)
    with pytest.raises(
        EngineError,
        match=r"takes voxel_features as float32 of shape \(512, 16\), expected float32 of shape "
        r"\('num_voxels_stage_0', 24\): it is the engine of another model",
    ):
        take(model=wider_model)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "Magic tag does not match"),
        (lambda content: b"no engine at all", "Magic tag does not match"),
        (lambda content: content[:5000], "Engine is corrupted"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "Engine is corrupted"),
    ],
    ids=["empty", "garbage", "truncated", "flipped"],
)
def test_unknown_files_that_tensorrt_refuses(take, engines, damage, reason):
    without_sidecars(engines)
    (engines / "sparse.engine").write_bytes(damage((engines / "sparse.engine").read_bytes()))
    with pytest.raises(EngineError, match=rf"TensorRT 10\.16\.1 refuses \S+{SPARSE}: .*{reason}"):
        take()


def test_unknown_engine_of_another_release(machine, take, engines):
    without_sidecars(engines)
    machine.release("8.6.1")
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 refuses .*Serialized Engine Version: 10\.16\.1"):
        take()


def test_unknown_engine_for_another_gpu(machine, take, engines):
    """One that TensorRT only warns about runs, and is compared all the same."""
    without_sidecars(engines)
    machine.gpu("Another GPU")
    assert take().backend == "tensorrt"
    machine.gpu(compute="8.7")
    with pytest.raises(EngineError, match=r"incompatible device, expecting compute 8\.7 got compute 9\.0"):
        take()


# ------------------------------------------------------------------------------------------------- writing engine files


@pytest.fixture
def planned(machine, tiny_model, exported):
    """The source of the tiny model's engines, and both of them, planned."""
    folder = open_model(tiny_model)
    network = DSVT(folder.model).eval().requires_grad_(False)
    load_weights(network, read_weights(folder.weights), "weights")
    config = EngineConfig(cache_dir=str(exported), precision="fp32", profile=ProfileConfig(voxels=(512,)))
    source = Source(network, folder, folder.weights, torch.device("cpu"), config)
    return source, {engine.spec.network: engine for engine in planned_engines(source)}


def test_written_engines_are_taken(machine, planned, open_tiny, tmp_path, torch_boxes):
    source, engines = planned
    folder = tmp_path / "for" / "robot"
    for network, engine in engines.items():
        report = write_engine(source, engine, folder / f"{network}.engine", no_progress)
        assert report["build_s"] >= 0
    assert sorted(path.name for path in folder.iterdir()) == [
        *("dense.engine", "dense.engine.json", "sparse.engine", "sparse.engine.json")
    ]
    machine.log.unlink()
    paths = {f"{network}_path": str(folder / f"{network}.engine") for network in engines}
    assert_same(open_tiny(**paths).detect(tiny_points(400)), torch_boxes(400))
    assert not machine.events("build")


def test_a_build_that_fails_keeps_the_former_engine(machine, planned, engines):
    source, plans = planned
    before = {path.name: path.read_bytes() for path in engines.iterdir()}
    machine.breaks("build")
    with pytest.raises(EngineError, match="cannot build the dense network of tiny"):
        write_engine(source, plans["dense"], engines / "dense.engine", no_progress)
    assert {path.name: path.read_bytes() for path in engines.iterdir()} == before


def test_a_place_that_cannot_be_written(planned, tmp_path):
    source, plans = planned
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot write \S+dense\.engine: "):
        write_engine(source, plans["dense"], tmp_path / "file" / "dense.engine", no_progress)
    (tmp_path / "taken.engine").mkdir()
    with pytest.raises(EngineError, match=r"cannot write \S+taken\.engine: it is a folder"):
        write_engine(source, plans["dense"], tmp_path / "taken.engine", no_progress)
    assert sorted(path.name for path in tmp_path.iterdir() if "engine" in path.name) == ["taken.engine"]


def test_differences_are_named_in_the_users_words(tmp_path):
    wanted = {"model_sha256": "a" * 64, "precision": "fp16"}
    with pytest.raises(EngineError, match=r"was built for model description bbbbbbbbbbbb\.\.\., wanted aaaaaaaaaaaa"):
        engine_cache.check_spec(tmp_path, {"model_sha256": "b" * 64}, wanted)
    with pytest.raises(EngineError, match="was built for precision None, wanted fp16"):
        engine_cache.check_spec(tmp_path, {"model_sha256": "a" * 64}, wanted)
