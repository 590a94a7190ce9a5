"""The published arrangement gives the results of the backend torch, and really is another one."""

import copy

import numpy as np
import pytest
import torch
from tiny import TINY_CONFIGS, tiny_network, tiny_points, write_tiny_model
from torch import nn

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.errors import EngineError, ModelError
from dsvt_ros.export.networks import named_maps
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools.published_layout import PublishedNetworks, load_reference
from dsvt_ros.voxelization import voxelize


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_same_boxes_as_torch(name, tmp_path):
    folder = write_tiny_model(tmp_path / name, name=name)
    overrides = {"postprocess.score_threshold": 0.05}
    detectors = (
        Detector.load(folder, backend="torch", device="cpu", overrides=overrides),
        load_reference("reference", str(folder), None, "cpu", overrides),
    )
    expected, found = (detector.detect(tiny_points()) for detector in detectors)
    assert (detectors[1].backend, detectors[1].precision) == ("reference", "fp32")
    assert len(expected) > 10
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=2e-4)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny_voxel"])
@pytest.mark.parametrize(("arrangement", "tolerance"), [("reference", 1e-5), ("reference-fp16", 0.02)])
def test_same_features_and_maps(name, arrangement, tolerance):
    half = arrangement == "reference-fp16"
    network = tiny_network(name=name)
    voxels = voxelize(torch.from_numpy(tiny_points()), network.config)
    reference, published = TorchNetworks(network), PublishedNetworks(network, arrangement)
    with torch.inference_mode():
        features = network.vfe(voxels)
        partition = partition_sets(voxels.coords, network.config)
        expected, found = reference.sparse(features, partition), published.sparse(features, partition)
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert half == bool((found - expected).norm() > 1e-5 * expected.norm())
        bev = scatter_bev(expected, partition.coords, network.config.grid_size, 1)
        for (_, here), (_, there) in zip(
            named_maps(published.dense(bev)), named_maps(reference.dense(bev)), strict=True
        ):
            assert here.dtype == torch.float32
            assert (here - there).norm() <= tolerance * there.norm()


def test_nothing_is_prepared(monkeypatch, tmp_path):
    """Every norm and embedding layer runs in every frame, and slots, not voxels, are projected."""
    detector = load_reference("reference", str(write_tiny_model(tmp_path / "tiny")), None, "cpu")
    calls = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 0, nn.MultiheadAttention: 0}
    for kind in calls:

        def counting(self, *arguments, kind=kind, forward=kind.forward, **options):
            calls[kind] += 1
            return forward(self, *arguments, **options)

        monkeypatch.setattr(kind, "forward", counting)
    frames = 2
    for _ in range(frames):
        detector.detect(tiny_points())
    network = tiny_network()
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        assert calls[kind] == frames * sum(isinstance(module, kind) for module in network.modules())
    assert calls[nn.MultiheadAttention] == frames * 4


def test_the_model_is_left_alone():
    network = tiny_network(name="tiny_voxel")
    before = copy.deepcopy(network)
    PublishedNetworks(network, "reference")
    assert str(network) == str(before)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before.state_dict()[key])


def test_refusals(tmp_path):
    folder = str(write_tiny_model(tmp_path / "tiny"))
    with pytest.raises(EngineError, match="reference-fp16 needs a CUDA device"):
        load_reference("reference-fp16", folder, None, "cpu")
    with pytest.raises(ModelError, match="comes without weights"):
        load_reference("reference", "waymo_pillar", None, "cpu")
