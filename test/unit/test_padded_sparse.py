"""Set attention on stages of fixed capacity against that on stages of any size."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from ragged_sets import grid_from_coords
from tiny import randomize, tiny_config, tiny_network

from dsvt_ros.config import EncoderConfig, StageConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.padded.attention import SlotAttention, set_attention
from dsvt_ros.padded.partition import PaddedPartition
from dsvt_ros.padded.sparse import PaddedBackbone3d
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize


def network_of(channels, heads, set_size, ffn_channels, num_blocks=2):
    small = tiny_config()
    stage = StageConfig(num_blocks, set_size, windows=((10, 10, 1), (12, 12, 1)), offsets=((0, 0, 0), (3, 3, 0)))
    backbone = dataclasses.replace(
        small.backbone_3d, channels=channels, num_heads=heads, ffn_channels=ffn_channels, stages=(stage,)
    )
    config = dataclasses.replace(small, encoder=EncoderConfig(channels=(channels, channels)), backbone_3d=backbone)
    torch.manual_seed(0)
    return with_biases(randomize(DSVT(config)).to(DEVICE))


def with_biases(network):
    """Those of projections and norms, which begin as zeros and ones."""
    for name, parameter in network.backbone_3d.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return network


def coords_of(network, count):
    low, high = np.array(network.config.point_cloud_range).reshape(2, 3)
    points = np.random.default_rng(0).uniform([*low, 0], [*high, 1], (count, 4)).astype(np.float32)
    return voxelize(torch.as_tensor(points, device=DEVICE), network.config).coords


def run(network, coords, features, room):
    """Features of the last stage, with room for so many voxels in the first one."""
    stages = PaddedPartition(network.config, DEVICE, room)(grid_from_coords(coords, network.config.grid_size, 1, room))
    backbone = PaddedBackbone3d(folded_copy(network.backbone_3d), network.config.backbone_3d, DEVICE)
    memory = torch.zeros(room, features.shape[1], dtype=torch.float16, device=DEVICE)
    memory[: len(features)] = features
    with torch.inference_mode():
        found = backbone(memory, stages)
    assert found.dtype == torch.float16
    return found[: int(stages[-1].grid.num_voxels)]


def assert_close(network, coords, room=0):
    """The error as a share of the features' size; float16 rounds off up to 5e-4 of each intermediate value."""
    torch.manual_seed(0)
    features = torch.randn(len(coords), network.config.backbone_3d.channels, device=DEVICE)
    found = run(network, coords, features, max(room, len(coords)))
    with torch.inference_mode():
        expected = network.backbone_3d(features, partition_sets(coords, network.config))
    assert found.shape == expected.shape
    assert ((found.float() - expected).norm() / expected.norm()).item() < 3e-3


@pytest.mark.parametrize(
    ("channels", "heads", "set_size", "ffn_channels"),
    [(192, 8, 36, 384), (128, 8, 90, 256), (48, 3, 5, 80), (80, 5, 130, 24), (36, 3, 1, 20)],
    ids=["waymo_pillar", "nuscenes_pillar", "odd", "large sets", "single voxels"],
)
def test_sizes(channels, heads, set_size, ffn_channels):
    network = network_of(channels, heads, set_size, ffn_channels)
    assert_close(network, coords_of(network, 200))


@pytest.mark.parametrize("num_blocks", [1, 3, 4])
def test_blocks(num_blocks):
    network = network_of(32, 2, 6, 32, num_blocks)
    assert_close(network, coords_of(network, 90), room=100)


@pytest.mark.parametrize("room", [0, 400])
@pytest.mark.parametrize("name", ["tiny", "tiny_voxel"])
def test_stages(name, room):
    network = with_biases(tiny_network(0, name).to(DEVICE))
    assert_close(network, coords_of(network, 150), room)


@pytest.mark.parametrize("count", [1, 0])
def test_hardly_any_voxels(count):
    network = tiny_network(0, "tiny_voxel").to(DEVICE)
    coords = coords_of(network, 1)[:count]
    features = torch.ones(count, 16, device=DEVICE)
    found = run(network, coords, features, 50)
    assert found.shape == (count, 16)
    assert torch.isfinite(found).all()


def test_repeated_runs_give_the_same_bytes():
    network = tiny_network(0, "tiny_voxel").to(DEVICE)
    coords = coords_of(network, 150)
    features = torch.randn(len(coords), 16, device=DEVICE)
    first = run(network, coords, features, 200)
    assert torch.equal(run(network, coords, features, 200), first)


# ------------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("width", [8, 24, 16, 12])
@pytest.mark.parametrize("slots", [False, True], ids=["here", "in slots"])
def test_attention(width, slots):
    """Sets of every size, the last ones empty, and rows that are in none."""
    start = [0, 1, 3, 9, 15, 16, 16, 16]
    torch.manual_seed(0)
    qkv = torch.randn(20, 3, 2, width, device=DEVICE).half()
    attention = SlotAttention(6) if slots else set_attention(DEVICE, 6, 2, width)
    with torch.inference_mode():
        sets = attention.prepare(torch.tensor(start, dtype=torch.int32, device=DEVICE), 20)
        found = attention.attend(qkv, sets)
    assert found.shape == (20, 2 * width)
    for begin, end in pairwise(start[:6]):
        query, key, value = qkv[begin:end].float().permute(1, 2, 0, 3)
        expected = torch.softmax(query @ key.transpose(1, 2) / width**0.5, 2) @ value
        expected = expected.transpose(0, 1).reshape(end - begin, -1)
        torch.testing.assert_close(found[begin:end].float(), expected, rtol=0, atol=4e-3)


def test_builds_of_torch_without_ragged_attention(monkeypatch):
    def lacking(*_args):
        raise RuntimeError("not in this build")

    monkeypatch.setattr("dsvt_ros.padded.attention.RaggedAttention.attend", lacking)
    assert isinstance(set_attention(DEVICE, 6, 2, 16), SlotAttention)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layer", ["linear1", "linear2", "self_attn.out_proj"])
def test_weights_beyond_float16(layer):
    network = tiny_network().to(DEVICE)
    network.backbone_3d.get_submodule(f"stage_0.0.encoder_list.0.win_attn.{layer}").weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16"):
        PaddedBackbone3d(folded_copy(network.backbone_3d), network.config.backbone_3d, DEVICE)
