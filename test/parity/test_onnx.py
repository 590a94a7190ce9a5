"""The exported networks of the published architecture against torch, in ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dsvt_ros.backends.onnxruntime import OnnxRuntimeNetworks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.export.folder import ExportOptions, export_networks, manifest_for
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize


@pytest.fixture(scope="module")
def network(waymo_weights):
    """The published model over a quarter of its area."""
    model = dataclasses.replace(
        open_model("waymo_pillar").model, point_cloud_range=(-38.4, -38.4, -2.0, 38.4, 38.4, 4.0)
    )
    network = DSVT(model)
    load_weights(network, waymo_weights, "recipe")
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stages(network, waymo_points):
    """Inputs and outputs of both networks in torch, for a small part of the cloud."""
    model, networks = network.config, TorchNetworks(network)
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(waymo_points[::4]), model)
        features = network.vfe(voxels)
        partition = partition_sets(voxels.coords, model)
        output = networks.sparse(features, partition)
        maps = networks.dense(scatter_bev(output, voxels.coords, model.grid_size, 1))
    return voxels, features, partition, output, maps


def exported(network, **options):
    """Both networks in ONNX Runtime."""
    options = ExportOptions(voxels=2048, **options)
    networks, files = export_networks(network, options)
    manifest = manifest_for(network.config, options, networks, files, "")
    return OnnxRuntimeNetworks(network.config, manifest, files, torch.device("cpu"))


@pytest.fixture(scope="module")
def fp32(network, stages):
    """Their outputs, each network fed by the one before."""
    voxels, features, partition, _, _ = stages
    networks = exported(network)
    with torch.inference_mode():
        output = networks.sparse(features, partition)
        bev = scatter_bev(output, voxels.coords, network.config.grid_size, 1, channels_last=False)
        return output, networks.dense(bev)


def test_sparse_network(fp32, stages):
    np.testing.assert_allclose(fp32[0].numpy(), stages[3].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["heatmap", "center", "center_z", "dim", "rot", "iou"])
def test_dense_network(fp32, stages, name):
    np.testing.assert_allclose(getattr(fp32[1], name).numpy(), getattr(stages[4], name).numpy(), rtol=0, atol=1e-4)


def test_half_precision_of_the_sparse_network(network, stages):
    """A rounding of every activation to 11 bits, but no more: the output's standard deviation is about 1."""
    _, features, partition, expected, _ = stages
    networks = exported(network, precision="fp16", layer_norm="decomposed")
    error = (networks.sparse(features, partition) - expected).abs()
    assert float(error.max()) < 0.03
    assert float(error.mean()) < 2e-3
