"""Whole frames in plain torch on a GPU against torch in single precision, for the published models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import NAMES, load_reference

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.torch_frames import TorchFrameNetworks
from dsvt_ros.comparison import BoxDifference, boxes_from_maps, settled_as
from dsvt_ros.config import with_overrides
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools.verification import LIMITS
from dsvt_ros.tools.verify import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
LEAST = 20
"""Boxes to compare."""
OPTIONS = {"preprocess.find_ground": False, "preprocess.scale_features": False}


@pytest.mark.parametrize("name", NAMES)
def test_published_models(name):
    """As many boxes as ``dsvt verify`` asks for; and the same bytes again, whatever came in between."""
    reference = load_reference(name)
    network = DSVT(open_model(name).model)
    load_weights(network, reference.weights, "recipe")
    network = network.to(DEVICE).eval().requires_grad_(False)
    config = with_overrides(open_model(name).defaults, OPTIONS)
    networks = TorchFrameNetworks(network)
    exact, own = (Recorder(part, None) for part in (TorchNetworks(network), networks))
    counts = []
    for recorder in (exact, own):
        detector = Detector(network, config, DEVICE, recorder)
        detector.detect(reference.points, np.eye(4))
        counts.append((detector.num_points, detector.num_voxels))
    limits, difference = LIMITS["fp16"], BoxDifference()
    expected, settled = (
        boxes_from_maps(recorder.maps, network.config, config.postprocess, limits.score) for recorder in (exact, own)
    )
    detector = Detector(network, config, DEVICE, networks)
    found = detector.detect(reference.points, np.eye(4))
    assert [(detector.num_points, detector.num_voxels)] * 2 == counts
    assert detector.num_dropped_voxels == 0
    difference.add(settled_as(found, settled, limits.center_m, limits.score), expected, limits.center_m, limits.score)
    assert difference.expected > LEAST
    assert difference.matched >= limits.min_matched, difference
    assert difference.yaw_rad.mean < 0.01

    detector.detect(np.ascontiguousarray(reference.points[::3]), np.eye(4))
    again = detector.detect(reference.points, np.eye(4))
    assert (again.boxes.tobytes(), again.scores.tobytes()) == (found.boxes.tobytes(), found.scores.tobytes())
