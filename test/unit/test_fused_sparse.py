"""Set attention by kernels against torch."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import randomize, tiny_config, tiny_network

from dsvt_ros.backends.frames import fused_stages
from dsvt_ros.config import EncoderConfig, StageConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.launch import ROWS, descriptor
from dsvt_ros.fused.sparse import FusedBackbone3d
from dsvt_ros.fused.structures import FusedStage, Grid, ShiftSets
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize

KERNELS = "dsvt_ros.kernels.set_attention"

_interpreter = interpreted("set_attention", "multiply", "pooling")
pytestmark = needs_triton


def network_of(channels, heads, set_size, ffn_channels, window=6):
    """One block over 32 by 32 pillars."""
    small = tiny_config()
    stage = StageConfig(1, set_size, windows=((window, window, 1), (10, 10, 1)), offsets=((0, 0, 0), (3, 3, 0)))
    backbone = dataclasses.replace(
        small.backbone_3d, channels=channels, num_heads=heads, ffn_channels=ffn_channels, stages=(stage,)
    )
    config = dataclasses.replace(small, encoder=EncoderConfig(channels=(channels, channels)), backbone_3d=backbone)
    torch.manual_seed(0)
    return randomize(DSVT(config)).to(DEVICE)


def fused(network):
    backbone = FusedBackbone3d(folded_copy(network.backbone_3d), network.config.backbone_3d, DEVICE)

    def run(features, stages):
        with torch.inference_mode():
            return backbone(features.half(), stages)

    return run


def pillars(cells):
    """Coordinates of pillars at (x, y), in the order of voxelization."""
    rows = sorted(set(cells))
    return torch.tensor([(0, 0, y, x) for x, y in rows], dtype=torch.int32, device=DEVICE)


def scattered(count, seed=0):
    cells = np.random.default_rng(seed).choice(32 * 32, count, replace=False)
    return pillars([(int(cell) // 32, int(cell) % 32) for cell in cells])


def block(width, height):
    return [(x, y) for x in range(width) for y in range(height)]


def inputs(network, coords):
    """Features and the partition."""
    torch.manual_seed(0)
    features = torch.randn(len(coords), network.config.backbone_3d.channels, device=DEVICE)
    return features, partition_sets(coords, network.config)


def assert_close_to_torch(network, coords, limit=2e-3):
    """The error as a share of the features' size; float16 rounds off up to 5e-4 of each intermediate value."""
    features, partition = inputs(network, coords)
    found = fused(network)(features, fused_stages(partition))
    with torch.inference_mode():
        expected = network.backbone_3d(features, partition)
    assert found.dtype == torch.float16
    assert found.shape == expected.shape
    assert ((found.float() - expected).norm() / expected.norm()).item() < limit


# -------------------------------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("channels", "heads", "set_size", "ffn_channels"),
    [
        pytest.param(192, 8, 36, 384, id="waymo_pillar"),
        pytest.param(192, 8, 48, 384, id="waymo_voxel"),
        pytest.param(128, 8, 90, 256, id="nuscenes_pillar"),
        pytest.param(64, 4, 36, 128, id="demo"),
        pytest.param(48, 3, 5, 80, id="odd"),
        pytest.param(64, 1, 36, 80, id="heads beyond registers"),
        pytest.param(32, 2, 100, 80, id="sets beyond registers"),
    ],
)
def test_sizes_of_models(channels, heads, set_size, ffn_channels):
    """Windows with hardly a voxel, and one with several sets."""
    network = network_of(channels, heads, set_size, ffn_channels, window=10)
    assert_close_to_torch(network, pillars([*block(10, 10), (11, 11), (29, 3), (30, 30), (31, 30)]))


@pytest.mark.parametrize(
    "coords",
    [
        pytest.param(lambda: pillars([(7, 7)]), id="one voxel"),
        pytest.param(lambda: pillars(block(6, 6)), id="full sets"),
        pytest.param(lambda: pillars([*block(6, 6), (20, 20)]), id="full ones and one voxel"),
        pytest.param(lambda: pillars(block(1, 7)), id="sets of three and four"),
        pytest.param(lambda: scattered(130), id="more than one program's rows"),
    ],
)
def test_partitions(coords):
    assert_close_to_torch(network_of(16, 2, 6, 32), coords())


def voxels_of(network, count):
    low, high = np.array(network.config.point_cloud_range).reshape(2, 3)
    points = np.random.default_rng(0).uniform([*low, 0], [*high, 1], (count, 4)).astype(np.float32)
    return voxelize(torch.as_tensor(points, device=DEVICE), network.config).coords


@pytest.mark.parametrize("name", ["tiny", "tiny_voxel"])
def test_stages_and_blocks(name):
    """Several stages, and the pooling between them."""
    network = tiny_network(0, name).to(DEVICE)
    assert_close_to_torch(network, voxels_of(network, 30))


# ------------------------------------------------------------------------------------------ capacities beyond the count


def in_room(values, room, rest):
    """Integers with as much room along the last axis, filled with something else."""
    filled = values.new_full((*values.shape[:-1], room), rest)
    filled[..., : values.shape[-1]] = values
    return filled


def with_room(stages, more):
    """Stages with room for so many more voxels and sets; behind those that there are lies garbage."""
    result = []
    for number, stage in enumerate(stages):
        count = len(stage.cells[0])
        sets = tuple(
            own
            and ShiftSets(
                in_room(own.order, count + more, count),
                in_room(own.position, count + more, 0),
                in_room(own.set_start, len(own.set_start) + more, 1),
                own.num_sets,
            )
            for own in stage.sets
        )
        pooled = stage.pooled
        if pooled is not None:
            room = len(stages[number + 1].cells[0]) + more
            pooled = in_room(pooled.T.contiguous(), room, 2**30).T.contiguous()
        cells = tuple(in_room(cells, count + more, 3) for cells in stage.cells)
        result.append(FusedStage(stage.grid, cells, sets, pooled))
    return tuple(result)


@pytest.mark.parametrize(("name", "more"), [("tiny", 1), ("tiny_voxel", 200)])
def test_more_room_than_voxels(name, more):
    """The same bytes, whatever lies behind them."""
    network = tiny_network(0, name).to(DEVICE)
    features, partition = inputs(network, voxels_of(network, 15))
    run, stages = fused(network), fused_stages(partition)
    expected = run(features, stages)
    filled = features.new_full((len(features) + more, features.shape[1]), torch.nan)
    filled[: len(features)] = features
    found = run(filled, with_room(stages, more))
    assert torch.equal(found[: len(expected)], expected)


def test_repeated_runs_give_the_same_bytes():
    network = network_of(16, 2, 6, 32)
    features, partition = inputs(network, scattered(40))
    run, stages = fused(network), fused_stages(partition)
    assert torch.equal(run(features, stages), run(features, stages))


def test_no_voxels():
    """Nothing is read or written."""
    network = network_of(16, 2, 6, 32)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    order, start = zero.new_full((2, 20), 2**30), zero.new_full((9,), 2**30)
    sets = ShiftSets(order, order, start, zero)
    cells = zero.new_full((20,), 2**30)
    stage = FusedStage(Grid((32, 32, 1), zero, zero, zero), (cells, cells), (sets, sets), None)
    found = fused(network)(torch.full((20, 16), torch.nan, device=DEVICE), (stage,))
    assert found.shape == (20, 16)


# ------------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("count", [0, 1, 128, 150])
def test_projections_in_the_order_of_sets(count):
    """Nothing is written behind them."""
    kernels = importlib.import_module(KERNELS)
    room, channels, cells = 160, 16, 9
    generator = torch.Generator().manual_seed(count)
    features, weights, table = (
        torch.randn(rows, columns, generator=generator).half().to(DEVICE)
        for rows, columns in ((room, channels), (channels, 3 * channels), (cells, 3 * channels))
    )
    cell, position = (torch.full((room,), 2**30, dtype=torch.int32, device=DEVICE) for _ in range(2))
    cell[:count] = torch.randint(cells, (count,), generator=generator).int()
    position[:count] = torch.randperm(count, generator=generator).int()
    qkv = features.new_full((room, 3 * channels), torch.nan)
    kernels.project[1, -(-room // ROWS)](
        descriptor(features, ROWS, channels), descriptor(weights, channels, 64), table, cell, position, qkv,
        cell.new_tensor([count]), CHANNELS=channels, CHUNK=channels, COLUMNS=64, ROWS=ROWS, STAGES=3, num_warps=4,
    )  # fmt: skip
    expected = features[:count].float() @ weights.float() + table[cell[:count].long()].float()
    torch.testing.assert_close(qkv[position[:count].long()].float(), expected, rtol=2e-3, atol=2e-3)
    assert qkv[count:].isnan().all()


def test_the_approximation_of_gelu(monkeypatch):
    import triton
    import triton.language as tl

    # Kernels look functions up among the globals.
    monkeypatch.setitem(globals(), "_gelu", importlib.import_module(KERNELS)._gelu)

    @triton.jit
    def apply(x, y, SIZE: tl.constexpr):  # noqa: N803
        at = tl.arange(0, SIZE)
        tl.store(y + at, _gelu(tl.load(x + at)))  # noqa: F821

    x = torch.cat([torch.linspace(-6, 6, 4090), torch.tensor([-6e4, -100.0, 0.0, 100.0, 6e4, 4.0])]).to(DEVICE)
    y = torch.empty_like(x)
    apply[(1,)](x, y, SIZE=4096)
    expected = torch.nn.functional.gelu(x.double())
    assert ((y - expected).abs() / x.abs().clamp(min=1)).max().item() < 2e-4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 5, 6, 160), "1 to 4 times 16, 32 or 64 channels.* has 80 and 160: use torch or tensorrt"),
        ((16, 2, 6, 24), "this model has 16 and 24"),
        ((16, 2, 130, 32), "sets of up to 128 voxels .* this model has 130 and 8"),
        ((128, 1, 6, 128), "this model has 6 and 128"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(sizes, message):
    with pytest.raises(EngineError, match=message):
        fused(network_of(*sizes))


@pytest.mark.parametrize("layer", ["linear1", "linear2", "self_attn.out_proj"])
def test_weights_beyond_float16(layer):
    network = tiny_network().to(DEVICE)
    network.backbone_3d.get_submodule(f"stage_0.0.encoder_list.0.win_attn.{layer}").weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16 \(65504\): use torch"):
        fused(network)
