"""The tiny model and its engines on a machine that seems to have a GPU and TensorRT; a pytest plugin.

Networks are exported once, and the engines that most tests start from are built once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import os
import shutil
from unittest import mock

import pytest
from tiny import tiny_points, write_tiny_model

import dsvt_ros.export.cache as export_cache
import dsvt_ros.export.folder as folders
from dsvt_ros import Detector
from dsvt_ros.backends.tensorrt import child, load
from dsvt_ros.capacity import capacity_for
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import export_networks
from dsvt_ros.model.folder import open_model
from fakes.exports import with_capacity, with_decomposed_norms
from fakes.machine import RELEASE, VOXELS, Machine, pretended_machine


@pytest.fixture(scope="session")
def tiny_exports():
    """Exports a network of the tiny model, each variant once."""
    done, real = {}, export_networks

    def export(network, options, progress=lambda _: None):
        if options.voxels is not None:
            capacity = capacity_for(network.config, options.voxels)
            return with_capacity(*export(network, dataclasses.replace(options, voxels=None)), capacity)
        if options.layer_norm == "decomposed":
            return with_decomposed_norms(*export(network, dataclasses.replace(options, layer_norm="fused")))
        state = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
        key = hashlib.sha256(state).hexdigest(), options
        if key not in done:
            logging.disable(logging.DEBUG)  # pytest would keep thousands of records of the exporter's
            try:
                done[key] = real(network, options)
            finally:
                logging.disable(logging.NOTSET)
        return done[key]

    return export


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def build_here(request, environment, what, progress):
    """What `run_child` does, without the time that a process needs to start."""
    progress(f"building {what}", None)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return child.build(request)
    except EngineError as error:
        raise EngineError(f"cannot build {what}: {error}") from None


@pytest.fixture
def machine(monkeypatch, tmp_path, tiny_exports):
    for name in [name for name in os.environ if name.startswith("FAKE_TENSORRT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FAKE_TENSORRT_LOG", str(tmp_path / "tensorrt.log"))
    monkeypatch.setenv("FAKE_TENSORRT_VERSION", RELEASE)
    monkeypatch.setattr(export_cache, "export_networks", tiny_exports)
    monkeypatch.setattr(load, "run_child", build_here)
    with pretended_machine():
        yield Machine(monkeypatch, tmp_path / "tensorrt.log")


@pytest.fixture
def open_tiny(machine, tiny_model, cache_dir):
    """Loads the tiny model with engines in fp32 for 512 voxels, or as told."""

    def load_detector(weights=None, model=tiny_model, progress=None, **engine):
        options = {"cache_dir": str(cache_dir), "precision": "fp32", "profile.voxels": VOXELS, **engine}
        return Detector.load(
            model,
            weights,
            backend="tensorrt",
            device="cpu",
            overrides={f"engine.{name}": value for name, value in options.items()},
            **({"progress": progress} if progress else {}),
        )

    return load_detector


@pytest.fixture
def cache_dir(tmp_path):
    """A cache folder, to be."""
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def built_once(tiny_model, tiny_exports, tmp_path_factory):
    """A cache folder with engines in fp32 for 512 voxels; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    with (
        pretended_machine(),
        mock.patch.dict(os.environ, FAKE_TENSORRT_VERSION=RELEASE),
        mock.patch.object(export_cache, "export_networks", tiny_exports),
    ):
        overrides = {"engine.cache_dir": str(folder), "engine.precision": "fp32", "engine.profile.voxels": VOXELS}
        Detector.load(tiny_model, backend="tensorrt", device="cpu", overrides=overrides)
    return folder


@pytest.fixture
def built(built_once, cache_dir):
    """A cache folder with those engines."""
    return shutil.copytree(built_once, cache_dir)


@pytest.fixture
def exported(built_once, cache_dir):
    """A cache folder with the exported networks alone."""
    shutil.copytree(built_once / "onnx", cache_dir / "onnx")
    return cache_dir


@pytest.fixture
def export_folder(tmp_path, tiny_model, tiny_exports, monkeypatch):
    """Exports the tiny model to a folder."""

    def export(options):
        folder = open_model(tiny_model)
        folders.export_folder(folder, folder.weights, tmp_path / "exported", options)
        return tmp_path / "exported"

    monkeypatch.setattr(folders, "export_networks", tiny_exports)
    return export


@pytest.fixture(scope="session")
def torch_boxes(tiny_model):
    """What torch finds in clouds of so many points."""
    detector = Detector.load(tiny_model, backend="torch", device="cpu")
    done = {}

    def boxes(count):
        if count not in done:
            done[count] = detector.detect(tiny_points(count))
        return done[count]

    return boxes
