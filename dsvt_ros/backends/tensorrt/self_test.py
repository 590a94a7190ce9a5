"""A comparison with torch for engines of which nobody says what they were built from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dsvt_ros.backends import Networks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.comparison import common_proposals
from dsvt_ros.errors import EngineError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.set_partition import partition_sets

NUM_VOXELS = 300
MIN_COSINE = 0.99
"""Half precision reaches 0.9999; other weights of the same model give about 0."""


def check_against_torch(networks: Networks, network: DSVT, device: torch.device, names: Sequence[str]) -> None:
    """Run networks and torch on the same random input.

    Args:
        networks: The networks in question.
        network: The model with its weights.
        device: Where to run.
        names: Which ones to check: ``sparse``, ``dense``.

    Raises:
        EngineError: The results differ by more than half precision explains.
    """
    model = network.config
    generator = torch.Generator().manual_seed(0)
    nx, ny, nz = model.grid_size
    count = min(NUM_VOXELS, nx * ny * nz, networks.max_voxels or NUM_VOXELS)
    cells = torch.randperm(nx * ny * nz, generator=generator)[:count].sort().values
    columns = [torch.zeros_like(cells), cells % nz, cells // nz % ny, cells // (nz * ny)]  # batch, z, y, x
    coords = torch.stack(columns, 1).int().to(device)
    features = torch.randn(count, model.backbone_3d.channels, generator=generator).to(device)
    torch_networks = TorchNetworks(network)
    with torch.inference_mode():
        if "sparse" in names:
            partition = partition_sets(coords, model)
            _compare("sparse", networks.sparse(features, partition), torch_networks.sparse(features, partition))
        if "dense" in names:
            bev = features.new_zeros(1, model.backbone_3d.channels, ny, nx)
            bev[0][:, coords[:, 2].long(), coords[:, 3].long()] = features.T
            found, expected = common_proposals(networks.dense(bev), torch_networks.dense(bev))
            _compare("dense", found.heatmap, expected.heatmap)
            _compare("dense", found.dim, expected.dim)


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    found, expected = found.float().flatten(), expected.float().flatten()
    cosine = float(F.cosine_similarity(found - found.mean(), expected - expected.mean(), dim=0))
    if not cosine >= MIN_COSINE:
        raise EngineError(
            f"the {name} engine gives other results than these weights do in torch (correlation {cosine:.3f}): it was "
            f"built from other weights or another model"
        )
