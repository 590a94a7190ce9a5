"""Stages with pooling, head groups with velocities, and proposals: every backend gives what torch does."""

import numpy as np
import pytest
import torch
from fakes.machine import assert_alike, assert_same
from tiny import TINY_CONFIGS, tiny_network, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.backends.onnxruntime import OnnxRuntimeNetworks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.comparison import common_proposals
from dsvt_ros.config import CenterHeadConfig, ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import ExportOptions, export_networks, manifest_for
from dsvt_ros.export.networks import named_maps
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import ProposalMaps
from dsvt_ros.voxelization import voxelize

pytest_plugins = ("fakes.fixtures",)

KINDS = ["tiny_voxel", "tiny_proposals"]


def points_for(model: ModelConfig, count=500, seed=0):
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low, high, (count, 3))
    return np.column_stack([xyz, rng.uniform(0, 1, count)]).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def scene(request):
    """A network with its inputs, and what torch makes of them."""
    network = tiny_network(0, request.param)
    model = network.config
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(points_for(model)), model)
        features = network.vfe(voxels)
        partition = partition_sets(voxels.coords, model)
        networks = TorchNetworks(network)
        output = networks.sparse(features, partition)
        maps = networks.dense(scatter_bev(output, partition.coords, model.grid_size, 1))
    return network, features, partition, output, maps


def test_folded_networks_are_the_network(scene):
    network, _, _, _, maps = scene
    with torch.inference_mode():
        expected = network(voxelize(torch.as_tensor(points_for(network.config)), network.config))
    for (name, ours), (_, theirs) in zip(named_maps(maps), named_maps(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("options", "atol"),
    [
        (ExportOptions(), 1e-4),
        (ExportOptions(voxels=640), 1e-4),
        (ExportOptions(precision="fp16", layer_norm="decomposed"), 3e-2),
    ],
    ids=["open", "padded", "fp16"],
)
def test_exported_networks_give_what_torch_does(scene, tiny_exports, options, atol):
    network, features, partition, output, maps = scene
    exported, files = tiny_exports(network, options)
    manifest = manifest_for(network.config, options, exported, files, "")
    networks = OnnxRuntimeNetworks(network.config, manifest, files, torch.device("cpu"))
    with torch.inference_mode():
        found = networks.sparse(features, partition)
        np.testing.assert_allclose(found.numpy(), output.numpy(), rtol=0, atol=atol)
        bev = scatter_bev(output, partition.coords, network.config.grid_size, 1, channels_last=False)
        ours, theirs = common_proposals(networks.dense(bev), maps)
    if isinstance(maps, ProposalMaps):
        assert ours.label.shape[1] >= 0.9 * maps.label.shape[1], "near-ties apart, the same cells are proposals"
    for (name, found), (_, expected) in zip(named_maps(ours), named_maps(theirs), strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(("release", "precision"), [("8.5.3", "fp16"), ("10.16.1", "fp32")])
def test_engines_give_the_boxes_of_torch(scene, machine, tmp_path, release, precision):
    machine.release(release)
    folder = write_tiny_model(tmp_path / "model", name=scene[0].config.name)
    overrides = {"postprocess.score_threshold": 0.05}
    engine = {
        "engine.cache_dir": str(tmp_path / "cache"),
        "engine.profile.voxels": [640],
        "engine.precision": precision,
        "engine.check_outputs": True,
    }
    detector = Detector.load(folder, backend="tensorrt", device="cpu", overrides=overrides | engine)
    points = points_for(detector.model)
    expected = Detector.load(folder, backend="torch", device="cpu", overrides=overrides).detect(points)
    assert expected.boxes.shape[1] == 9
    found = detector.detect(points)
    {"fp32": assert_same, "fp16": assert_alike}[precision](found, expected)


def test_engines_of_a_range(scene, machine, tmp_path):
    """Pooled stages have ranges of their own."""
    folder = write_tiny_model(tmp_path / "model", name=scene[0].config.name)
    overrides = {
        "engine.cache_dir": str(tmp_path / "cache"),
        "engine.profile.voxels": [2, 400, 640],
        "engine.profile.dynamic": True,
        "engine.precision": "fp32",
    }
    detector = Detector.load(folder, backend="tensorrt", device="cpu", overrides=overrides)
    torch_detector = Detector.load(folder, backend="torch", device="cpu")
    for count in (1, 2, 30, 500):
        points = points_for(detector.model, count)
        found, expected = detector.detect(points), torch_detector.detect(points)
        if count == 500:
            assert_alike(found, expected)
        # Far from the few points all cells are alike: which of them come out is left to rounding.
        assert abs(found.scores.max() - expected.scores.max()) < 1e-4


def test_the_published_interface_is_for_one_stage_of_two_blocks(scene):
    network = scene[0]
    options = ExportOptions(interface="dsvt_release", opset=14, layer_norm="decomposed")
    theirs = {"tiny_voxel": "3 stages of 2, 1, 1", "tiny_proposals": "1 stages of 1"}[network.config.name]
    with pytest.raises(EngineError, match=f"for one stage with two blocks or more; {network.config.name} has {theirs}"):
        export_networks(network, options)


# ---------------------------------------------------------------------------------------------- groups and batches


def test_groups_are_heads_of_their_own():
    """A head of two groups says what two heads of one group each would say, in the order of the groups."""
    network = tiny_network(0, "tiny_voxel")
    head, config = network.dense_head, network.config.head
    assert isinstance(config, CenterHeadConfig)
    bev = torch.randn(2, 16, 16, 16)
    maps = head(bev)
    for group, (names, separate) in enumerate(zip(config.groups, head.heads_list, strict=True)):
        branches = separate(head.shared_conv(bev))
        first = sum(len(names) for names in config.groups[:group])
        assert torch.equal(maps.heatmap[:, first : first + len(names)], branches["hm"])
        for name, width in (("center", 2), ("center_z", 1), ("dim", 3), ("rot", 2), ("vel", 2), ("iou", 1)):
            assert torch.equal(getattr(maps, name)[:, group * width : (group + 1) * width], branches[name])


@pytest.mark.parametrize("name", list(TINY_CONFIGS))
def test_clouds_of_a_batch_do_not_see_each_other(name):
    network = tiny_network(0, name)
    model = network.config
    clouds = [torch.as_tensor(points_for(model, count, seed)) for seed, count in enumerate((300, 200))]
    index = torch.cat([torch.full((len(cloud),), i) for i, cloud in enumerate(clouds)])
    with torch.inference_mode():
        together = network(voxelize(torch.cat(clouds), model, index))
        for i, cloud in enumerate(clouds):
            alone = network(voxelize(cloud, model))
            cut = type(together)(
                **{key: value if value is None else value[i : i + 1] for key, value in vars(together).items()}
            )
            for (key, ours), (_, theirs) in zip(
                *(named_maps(maps) for maps in common_proposals(cut, alone)), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=key)
