"""The backend triton on a GPU against torch in single precision, for the published models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import NAMES, load_reference

from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.comparison import common_proposals
from dsvt_ros.export.networks import named_maps
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", NAMES)
def test_published_models(name, monkeypatch):
    from dsvt_ros.backends.triton import TritonNetworks

    # TF32 would round the reference's convolutions to 10 bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reference = load_reference(name)
    network = DSVT(open_model(name).model)
    load_weights(network, reference.weights, "recipe")
    network = network.to("cuda").eval().requires_grad_(False)
    networks, exact = TritonNetworks(network), TorchNetworks(network)
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(reference.points, device="cuda"), network.config)
        features, partition = network.vfe(voxels), partition_sets(voxels.coords, network.config)
        found, expected = networks.sparse(features, partition), exact.sparse(features, partition)
        assert ((found.float() - expected).norm() / expected.norm()).item() < 2e-3
        assert torch.equal(networks.sparse(features, partition), found), "repeated runs give the same bytes"
        ours, theirs = (
            part.dense(scatter_bev(output, partition.coords, network.config.grid_size, 1))
            for part, output in ((networks, found), (exact, expected))
        )
    pairs = zip(*(named_maps(maps) for maps in common_proposals(ours, theirs)), strict=True)
    for (key, values), (_, right) in pairs:
        np.testing.assert_allclose(values.float().cpu(), right.float().cpu(), rtol=0, atol=0.05, err_msg=key)
