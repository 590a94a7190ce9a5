"""Engines of the real TensorRT against torch, on the GPU; needs CUDA, TensorRT and the packages that export ONNX.

``DSVT_TACTIC_SOURCES`` restricts where TensorRT 8 takes its kernels from, such as
``cublas,cublas_lt,edge_mask_convolutions,jit_convolutions`` where there is no cuDNN.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from tiny import tiny_points, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.comparison import BoxDifference, boxes_from_maps
from dsvt_ros.errors import EngineError
from dsvt_ros.tools.verify import Recorder

tensorrt = pytest.importorskip("tensorrt")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    sources = [name for name in os.environ.get("DSVT_TACTIC_SOURCES", "").split(",") if name]
    return {
        "engine.cache_dir": str(tmp_path_factory.mktemp("cache")),
        "engine.tactic_sources": sources,
        "engine.check_outputs": True,
        "engine.profile.voxels": [128, 512],
    }


def load(model, options, backend, **more):
    return Detector.load(model, backend=backend, device="cuda", overrides={**options, **more})


def recorded(detector):
    """Keep what the networks give; the stages hold on to their bound methods."""
    recorder = Recorder(detector.networks, detector.networks.max_voxels)
    detector._sparse, detector._dense = recorder.sparse, recorder.dense
    return recorder


@pytest.mark.parametrize(("precision", "atol"), [("fp16", 0.05), ("fp32", 1e-3)])
def test_same_tensors_and_boxes(model, options, precision, atol):
    reference = load(model, options, "torch", **{"engine.precision": "fp32"})
    detector = load(model, options, "tensorrt", **{"engine.precision": precision})
    assert (detector.backend, detector.precision) == ("tensorrt", precision)
    expected, found = recorded(reference), recorded(detector)
    difference = BoxDifference()
    for count in (40, 300, 1500):  # the smaller engine, the larger one, and a cloud beyond it
        points = tiny_points(count, seed=count)
        reference.networks.max_voxels = detector.networks.max_voxels
        reference.detect(points)
        detector.detect(points)
        for (name, ours), (_, theirs) in zip(found.tensors(), expected.tensors(), strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=atol * float(theirs.abs().max()), msg=name)
        ours, theirs = (
            boxes_from_maps(recorder.maps, detector.model, detector.config.postprocess, 0.01)
            for recorder in (found, expected)
        )
        difference.add(ours, theirs, center_m=0.02, score=0.01)
    assert difference.expected > 10
    assert difference.matched >= 0.99


def test_second_start_builds_nothing(model, options):
    load(model, options, "tensorrt")
    stages = []
    again = Detector.load(
        model, backend="tensorrt", device="cuda", overrides=options, progress=lambda text, share: stages.append(text)
    )
    assert not stages
    assert again.backend_reason.startswith("asked for; engines")


def test_empty_and_single_point(model, options):
    detector = load(model, options, "tensorrt")
    assert len(detector.detect(np.zeros((0, 4), np.float32))) == 0
    detector.detect(np.full((1, 4), 1.0, np.float32))


def test_sidecar_tells_the_precision_of_the_layers(model, options, tmp_path):
    detector = load(model, {**options, "engine.cache_dir": str(tmp_path)}, "tensorrt")
    sidecars = [json.loads(path.read_text()) for path in (tmp_path / "tensorrt").glob("*.engine.json")]
    assert len(sidecars) == 3
    for content in sidecars:
        assert content["spec"]["tensorrt"] == tensorrt.__version__
        assert content["spec"]["gpu"] == torch.cuda.get_device_name()
        assert any("fp16" in precisions for precisions in content["layers"].values())
        assert not content["unknown_layers"]
    assert detector.backend == "tensorrt"


def test_engine_of_other_weights_is_refused(model, options, tmp_path):
    cache = tmp_path / "cache"
    load(model, {**options, "engine.cache_dir": str(cache)}, "tensorrt")
    dense = next((cache / "tensorrt").glob("*-dense-*.engine"))
    sparse = max((cache / "tensorrt").glob("*-sparse-*.engine"), key=lambda path: path.stat().st_size)
    other = write_tiny_model(tmp_path / "other", seed=5)
    paths = {"engine.dense_path": str(dense), "engine.sparse_path": str(sparse)}
    with pytest.raises(EngineError, match="was built for weights"):
        load(other, {**options, **paths}, "tensorrt")
    for path in (dense, sparse):
        path.with_name(f"{path.name}.json").unlink()
    assert load(model, {**options, **paths}, "tensorrt").backend == "tensorrt"  # compared with torch, and the same
    with pytest.raises(EngineError, match="other weights"):
        load(other, {**options, **paths}, "tensorrt")
