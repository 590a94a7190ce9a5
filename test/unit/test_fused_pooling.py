"""Attention pooling by kernels against torch."""

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.pooling import FusedPooling
from dsvt_ros.model.set_attention import AttentionPooling
from dsvt_ros.structures import Pooling

_interpreter = interpreted("set_attention", "multiply", "pooling")
pytestmark = needs_triton

SIZES = {  # channels, of a block, slots
    "waymo_voxel": (192, 64, 4),
    "waymo_voxel's last": (192, 64, 2),
    "four blocks": (256, 64, 4),
    "odd": (96, 32, 3),
    "small": (48, 16, 5),
    "one slot": (16, 16, 1),
}


def pooling_of(channels, slots):
    """Weights such that every part of the computation shows in the result."""
    torch.manual_seed(0)
    pooling = AttentionPooling(channels, slots)
    with torch.no_grad():
        pooling.self_attn.in_proj_weight.mul_(2)
        for vector in (pooling.pos_embedding, pooling.self_attn.in_proj_bias, pooling.self_attn.out_proj.bias):
            vector.normal_(0, 0.5)
        pooling.norm.weight.uniform_(0.5, 1.5)
        pooling.norm.bias.normal_(0, 0.5)
    return pooling.to(DEVICE).requires_grad_(False)


def slots_of(filled):
    """(M, P) bool to (M, P) int32: voxels count through the filled slots; and how many there are."""
    numbers = torch.cumsum(filled.flatten(), 0, dtype=torch.int32).view(filled.shape) - 1
    return torch.where(filled, numbers, -1).to(DEVICE), int(filled.sum())


def scattered(rows, slots):
    """At least one slot of each row is filled."""
    generator = torch.Generator().manual_seed(rows)
    filled = torch.rand(rows, slots, generator=generator) < 0.3
    filled[torch.arange(rows), torch.randint(slots, (rows,), generator=generator)] = True
    return filled


def features_of(count, channels):
    torch.manual_seed(1)
    return torch.randn(count, channels, device=DEVICE).half()


def number(count):
    return torch.tensor([count], dtype=torch.int32, device=DEVICE)


def expected_of(pooling, features, pooled):
    with torch.inference_mode():
        return pooling(features.float(), Pooling(pooled.clamp_min(0).long(), pooled < 0))


def assert_close(found, expected):
    """The error as a share of the features' size; float16 rounds off up to 5e-4 of each intermediate value."""
    assert found.dtype == torch.float16
    assert ((found.float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item() < 3e-3


def assert_equals_torch(pooling, chunk, filled):
    pooled, count = slots_of(filled)
    features = features_of(count, pooling.pos_embedding.shape[1])
    found = FusedPooling(pooling, chunk)(features, number(count), pooled, number(len(pooled)))
    assert found.shape == (len(pooled), features.shape[1])
    assert_close(found, expected_of(pooling, features, pooled))


@pytest.mark.parametrize(("channels", "chunk", "slots"), SIZES.values(), ids=SIZES)
def test_sizes_of_models(channels, chunk, slots):
    assert_equals_torch(pooling_of(channels, slots), chunk, scattered(70, slots))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_numbers_of_pooled_voxels(rows):
    assert_equals_torch(pooling_of(48, 4), 16, scattered(rows, 4))


@pytest.mark.parametrize("slot", [0, 1, 3, slice(None)], ids=["first", "second", "last", "all"])
def test_filled_slots(slot):
    filled = torch.zeros(20, 4, dtype=torch.bool)
    filled[:, slot] = True
    assert_equals_torch(pooling_of(48, 4), 16, filled)


def test_voxels_far_apart():
    """Nothing hinges on the voxels of a row being neighbours."""
    pooling = pooling_of(48, 4)
    pooled, count = slots_of(scattered(40, 4))
    shuffled = torch.cat([torch.randperm(count), torch.tensor([-1])]).int().to(DEVICE)[pooled.long()]
    features = features_of(count, 48)
    found = FusedPooling(pooling, 16)(features, number(count), shuffled, number(40))
    assert_close(found, expected_of(pooling, features, shuffled))


def test_sharp_softmax():
    """Scores of hundreds, whose powers are beyond any float."""
    pooling = pooling_of(48, 4)
    pooling.self_attn.in_proj_weight[:96] *= 20
    pooled, count = slots_of(scattered(40, 4))
    # Whole numbers, so that scores of different slots are far from each other.
    features = features_of(count, 48).round()
    found = FusedPooling(pooling, 16)(features, number(count), pooled, number(40))
    expected = expected_of(pooling, features, pooled)
    assert torch.isfinite(found).all()
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
def test_more_room_than_voxels(rows, monkeypatch):
    """The same bytes, whatever lies behind them, and there nothing is written."""
    pooling = pooling_of(48, 4)
    pooled, count = slots_of(scattered(rows, 4))
    features = features_of(count, 48)
    fused = FusedPooling(pooling, 16)
    filled = features.new_full((count + 200, 48), torch.nan)
    filled[:count] = features
    room = pooled.new_full((rows + 140, 4), 2**30)
    room[:rows] = pooled
    poisoned = []

    def poison(like):
        poisoned.append(torch.full_like(like, torch.nan))
        return poisoned[-1]

    monkeypatch.setattr(torch, "empty_like", poison)
    found = fused(filled, number(count), room, number(rows))
    assert any(found is one for one in poisoned)
    assert found[rows:].isnan().all()
    if rows:
        assert torch.equal(found[:rows], fused(features, number(count), pooled, number(rows)))


def test_repeated_runs_give_the_same_bytes():
    pooled, count = slots_of(scattered(100, 4))
    features, fused = features_of(count, 48), FusedPooling(pooling_of(48, 4), 16)
    first, second = (fused(features, number(count), pooled, number(100)) for _ in range(2))
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_more_slots_than_the_kernels_take():
    with pytest.raises(EngineError, match=r"pools up to 16 voxels into one; this model has 17: use torch or tensorrt"):
        FusedPooling(pooling_of(16, 17), 16)


@pytest.mark.parametrize("weight", ["in_proj_weight", "out_proj.weight"])
def test_weights_beyond_float16(weight):
    pooling = pooling_of(16, 2)
    pooling.self_attn.get_parameter(weight)[0, 0] = 1e6
    with pytest.raises(EngineError, match=r"beyond the range of float16 \(65504\): use torch"):
        FusedPooling(pooling, 16)
