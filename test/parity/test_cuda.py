"""The CUDA path against the CPU path, which test_published_models.py holds against the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsvt_ros import Detector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def detectors(waymo_checkpoint):
    overrides = {"preprocess.scale_features": False, "engine.precision": "fp32"}
    return [
        Detector.load("waymo_pillar", waymo_checkpoint, backend="torch", device=device, overrides=overrides)
        for device in ("cpu", "cuda")
    ]


def test_same_boxes(detectors, waymo_points):
    expected, found = (detector.detect(waymo_points) for detector in detectors)
    assert len(found) == len(expected)
    distance = np.linalg.norm(found.boxes[:, None, :3] - expected.boxes[None, :, :3], axis=-1)
    distance[found.labels[:, None] != expected.labels[None]] = np.inf
    nearest = distance.argmin(0)
    assert distance.min(0).max() < 0.01
    np.testing.assert_allclose(found.scores[nearest], expected.scores, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_points", [0, 1])
def test_hardly_any_points(detectors, num_points):
    detectors[1].detect(np.full((num_points, 5), 5, np.float32))


def test_answers_from_any_device(detectors, waymo_points):
    on_gpu = torch.as_tensor(waymo_points, device="cuda")
    assert len(detectors[1].detect(on_gpu)) == len(detectors[1].detect(waymo_points))
