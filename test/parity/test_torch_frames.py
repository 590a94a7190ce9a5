"""Whole frames in plain torch on a GPU against torch in single precision, for the published models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published_networks import LIMIT, assert_enough_alike, config_of, published_network
from reference import NAMES

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.torch_frames import TorchFrameNetworks
from dsvt_ros.comparison import boxes_from_maps, settled_as
from dsvt_ros.tools.verify import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", NAMES)
def test_published_models(name):
    """Boxes of whole frames; and the same bytes again, whatever came in between."""
    (network, points), config = published_network(name), config_of(name)
    networks = TorchFrameNetworks(network)
    exact, own = (Recorder(part, None) for part in (TorchNetworks(network), networks))
    counts = []
    for recorder in (exact, own):
        detector = Detector(network, config, DEVICE, recorder)
        detector.detect(points, np.eye(4))
        counts.append((detector.num_points, detector.num_voxels))
    expected, settled = (
        boxes_from_maps(recorder.maps, network.config, config.postprocess, LIMIT.score) for recorder in (exact, own)
    )
    detector = Detector(network, config, DEVICE, networks)
    found = detector.detect(points, np.eye(4))
    assert [(detector.num_points, detector.num_voxels)] * 2 == counts
    assert detector.num_dropped_voxels == 0
    assert_enough_alike(settled_as(found, settled, LIMIT.center_m, LIMIT.score), expected)

    detector.detect(np.ascontiguousarray(points[::3]), np.eye(4))
    again = detector.detect(points, np.eye(4))
    assert (again.boxes.tobytes(), again.scores.tobytes()) == (found.boxes.tobytes(), found.scores.tobytes())
