"""ONNX Runtime runs what was exported, finds or makes its files, and refuses wrong ones."""

import dataclasses
import json
import logging
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from tiny import tiny_config, tiny_points, write_tiny_model

import dsvt_ros.export.cache as export_cache
from dsvt_ros import Detector
from dsvt_ros.backends.onnxruntime import OnnxRuntimeNetworks
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.export.cache import read_networks
from dsvt_ros.export.folder import ExportOptions, export_folder
from dsvt_ros.export.manifest import read_manifest
from dsvt_ros.model.folder import open_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """A model folder with networks for 256 voxels."""
    output = tmp_path_factory.mktemp("tiny") / "exported"
    folder = open_model(source)
    export_folder(folder, folder.weights, output, ExportOptions(voxels=256))
    return output


@pytest.fixture(scope="module", autouse=True)
def export_once():
    """The same network is exported only once here."""
    done = {}

    def export(network, options, real=export_cache.export_networks):
        key = float(sum(parameter.sum() for parameter in network.parameters())), options
        if key not in done:
            done[key] = real(network, options)
        return done[key]

    with mock.patch.object(export_cache, "export_networks", export):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsvt_ros"


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def assert_same(found, expected, atol=1e-4):
    assert len(found) == len(expected) > 0
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=atol)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=atol)


def test_exported_folder_gives_the_boxes_of_torch(exported, cache):
    points = tiny_points(150)
    detector = Detector.load(exported, backend="onnxruntime", device="cpu")
    assert (detector.backend, detector.precision) == ("onnxruntime", "fp32")
    assert str(exported) in detector.backend_reason
    found = detector.detect(points)
    assert detector.num_dropped_voxels == 0
    assert_same(found, Detector.load(exported, backend="torch", device="cpu").detect(points))
    assert not cache.exists()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_next_to_nothing(exported, cache, count):
    detector = Detector.load(exported, backend="onnxruntime", device="cpu")
    points = np.array([[1, 1, 0.5, 0.5], [-3, 2, 0.5, 0.5]], np.float32)[:count]
    found = detector.detect(points)
    expected = Detector.load(exported, backend="torch", device="cpu").detect(points)
    # Far from the points all cells are alike, so the order of boxes is not defined.
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), rtol=0, atol=1e-4)
    assert (count == 0) == (len(found) == 0)


def test_same_cloud_same_bytes(exported, cache):
    detector = Detector.load(exported, backend="onnxruntime", device="cpu")
    first, second = detector.detect(tiny_points()), detector.detect(tiny_points())
    assert first.boxes.tobytes() == second.boxes.tobytes()


def test_beyond_capacity_the_farthest_voxels_go(exported, cache, caplog):
    """The boxes are those of the cloud without the points that lie farthest."""
    points = tiny_points(1500)
    detector = Detector.load(exported, backend="onnxruntime", device="cpu")
    found = detector.detect(points)
    assert detector.num_voxels > 256
    assert detector.num_dropped_voxels == detector.num_voxels - 256
    assert [r for r in caplog.records if "the farthest are dropped" in r.getMessage()]
    cell = np.floor((points[:, :2] + 5.12) / 0.32)
    center = (cell + 0.5) * 0.32 - 5.12
    distance = np.linalg.norm(center, axis=1)
    cells, index = np.unique(cell, axis=0, return_inverse=True)
    order = np.argsort([distance[index == i][0] for i in range(len(cells))], kind="stable")
    near = points[np.isin(index, order[:256])]
    torch_detector = Detector.load(exported, backend="torch", device="cpu")
    # Cells at the limit are equally far, so the two choices may differ in a few.
    expected = torch_detector.detect(near)
    assert abs(len(found) - len(expected)) <= 3
    detector.detect(points[:50])
    assert detector.num_dropped_voxels == 0


def test_networks_refuse_more_than_they_hold(exported):
    manifest = read_manifest(exported)
    networks = OnnxRuntimeNetworks(tiny_config(), manifest, read_networks(exported, manifest), torch.device("cpu"))
    with pytest.raises(EngineError, match=r"257 voxels, but the exported network has room for 256"):
        networks.sparse(torch.zeros(257, 16), None)
    with pytest.raises(EngineError, match=r"cannot run dense\.onnx"):
        networks.dense(torch.zeros(1, 16, 8, 8))
    assert networks.sparse(torch.zeros(0, 16), None).shape == (0, 16)


def test_without_exported_files_the_cache_has_them(source, cache, caplog):
    caplog.set_level(logging.INFO)
    points = tiny_points()
    detector = Detector.load(source, backend="onnxruntime", device="cpu")
    (entry,) = (cache / "onnx").iterdir()
    assert str(entry) in detector.backend_reason
    assert sorted(path.name for path in entry.iterdir()) == ["dense.onnx", "manifest.json", "sparse.onnx"]
    expected = Detector.load(source, backend="torch", device="cpu").detect(points)
    assert_same(detector.detect(points), expected)

    written = (entry / "sparse.onnx").stat().st_mtime_ns
    Detector.load(source, backend="onnxruntime", device="cpu")
    assert (entry / "sparse.onnx").stat().st_mtime_ns == written, "exported once"

    (entry / "sparse.onnx").write_bytes(b"damaged")
    again = Detector.load(source, backend="onnxruntime", device="cpu")
    assert [r for r in caplog.records if "is not the file that manifest.json describes" in r.getMessage()]
    assert_same(again.detect(points), expected)
    assert [path.name for path in (cache / "onnx").iterdir()] == [entry.name], "nothing is left behind"


def test_a_cache_that_cannot_be_written(source, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    detector = Detector.load(
        source, backend="onnxruntime", device="cpu", overrides={"engine.cache_dir": str(blocked), "engine.threads": 1}
    )
    assert len(detector.detect(tiny_points())) > 0
    assert [r for r in caplog.records if "cannot keep the export" in r.getMessage()]


def test_other_weights_than_exported(copy, cache, tmp_path):
    """The folder's networks hold its own weights; for others the cache is used."""
    other = write_tiny_model(tmp_path / "other", seed=1) / "weights.safetensors"
    detector = Detector.load(copy, other, backend="onnxruntime", device="cpu")
    assert str(cache) in detector.backend_reason
    assert_same(
        detector.detect(tiny_points()), Detector.load(copy, other, backend="torch", device="cpu").detect(tiny_points())
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "sparse.onnx").unlink(), r"cannot read .*sparse\.onnx"),
        (lambda f: cut(f / "dense.onnx"), r"dense\.onnx is not the file that manifest\.json describes"),
        (lambda f: shutil.copy(f / "sparse.onnx", f / "dense.onnx"), r"dense\.onnx is not the file"),
        (lambda f: (f / "manifest.json").write_text("{"), r"is no manifest of dsvt_ros"),
        (lambda f: (f / "manifest.json").write_text('{"schema_version": 3}'), r"is no manifest of dsvt_ros"),
        (lambda f: (f / "manifest.json").write_text('{"schema_version": 9}'), r"schema_version 9, expected 3"),
    ],
    ids=["missing", "cut", "swapped", "no json", "no content", "other version"],
)
def test_damaged_folders_are_refused(copy, cache, damage, message):
    damage(copy)
    with pytest.raises(EngineError, match=message):
        Detector.load(copy, backend="onnxruntime", device="cpu")


def test_a_changed_model_is_refused(copy, cache):
    description = yaml.safe_load((copy / "model.yaml").read_text())
    description["model"]["point_cloud_range"][0] += 0.32
    description["model"]["point_cloud_range"][3] += 0.32
    (copy / "model.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(EngineError, match="has changed since the export"):
        Detector.load(copy, backend="onnxruntime", device="cpu")


def test_a_file_that_onnxruntime_cannot_read(exported):
    manifest = read_manifest(exported)
    files = {**read_networks(exported, manifest), "sparse.onnx": b"no protobuf"}
    with pytest.raises(EngineError, match=r"cannot load sparse\.onnx"):
        OnnxRuntimeNetworks(tiny_config(), manifest, files, torch.device("cpu"))


def test_a_manifest_of_another_file(exported):
    manifest = read_manifest(exported)
    sparse = manifest.networks["sparse"]
    renamed = dataclasses.replace(sparse, outputs=(dataclasses.replace(sparse.outputs[0], name="result"),))
    manifest = dataclasses.replace(manifest, networks={**manifest.networks, "sparse": renamed})
    with pytest.raises(EngineError, match="gives features; its manifest says result"):
        OnnxRuntimeNetworks(tiny_config(), manifest, read_networks(exported, manifest), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a CUDA provider")
def test_no_cuda_provider(exported):
    manifest = read_manifest(exported)
    with pytest.raises(EngineError, match="has no CUDA provider"):
        OnnxRuntimeNetworks(tiny_config(), manifest, read_networks(exported, manifest), torch.device("cuda"))


def test_missing_package(exported, cache, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="needs the package onnxruntime"):
        Detector.load(exported, backend="onnxruntime", device="cpu")


def test_auto_says_what_it_chose(source, caplog):
    caplog.set_level(logging.INFO)
    detector = Detector.load(source, device="cpu")
    assert detector.backend == "torch"
    assert "chosen by auto" in detector.backend_reason
    assert [r for r in caplog.records if r.getMessage().startswith("backend torch (fp32, cpu)")]


def test_unknown_backend(source):
    with pytest.raises(ConfigError, match="one of auto, torch, triton, onnxruntime, tensorrt; got 'trt'"):
        Detector.load(source, backend="trt", device="cpu")


def test_manifest_is_plain_json(exported):
    content = json.loads((exported / "manifest.json").read_text())
    assert content["capacity"] == {
        "stages": [{"voxels": 256, "sets": [(256 + 36 * 5) // 6, (256 + 16 * 5) // 6]}]
    }
    assert read_manifest(exported).to_json() == (exported / "manifest.json").read_text()
