"""Features of voxels of fixed capacity against the pillar encoder."""

import dataclasses

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import randomize, tiny_config, tiny_voxel_config

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import EncoderConfig, PointFeature, PreprocessConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.padded.encode import PaddedEncoder
from dsvt_ros.padded.voxelize import PaddedVoxelizer
from dsvt_ros.voxelization import voxelize

COLUMNS = (PointFeature("intensity"), PointFeature("elongation"), PointFeature("time"))


def model_of(channels, columns=4, config=tiny_config, shift_m=0.0):
    """A range that begins far from the origin if shifted."""
    small = config()
    moved = tuple(value + (shift_m if axis % 3 < 2 else 0.0) for axis, value in enumerate(small.point_cloud_range))
    return dataclasses.replace(
        small,
        point_cloud_range=moved,
        features=(*small.features[:3], *COLUMNS[: columns - 3]),
        encoder=EncoderConfig(channels=channels),
        backbone_3d=dataclasses.replace(small.backbone_3d, channels=channels[-1]),
    )


def encoder_of(model):
    torch.manual_seed(0)
    return folded_copy(randomize(DSVT(model)).vfe.to(DEVICE))


def cloud(model, count, dense=0):
    """Points all over the range, and some in a few voxels near its centre."""
    rng = np.random.default_rng(count)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low, high, (count, 3))
    xyz[:dense, :2] = (low + high)[:2] / 2 + rng.uniform(-0.3, 0.3, (dense, 2))
    rest = rng.uniform(0, 1, (count, len(model.features) - 3))
    return torch.as_tensor(np.column_stack([xyz, rest]).astype(np.float32), device=DEVICE)


def assert_close(model, points, room=400, rows=500):
    """To what the encoder gives for the nearest voxels; nothing behind them."""
    encoder = encoder_of(model)
    memory = torch.full((rows, len(model.features)), torch.nan, device=DEVICE)
    memory[: len(points)] = points
    ends = torch.tensor([len(points)], dtype=torch.int32, device=DEVICE)
    moves = torch.eye(4, device=DEVICE)[None, :3]
    config = PreprocessConfig(scale_features=False)
    encode = PaddedEncoder(encoder, model)
    with torch.inference_mode():
        found = encode(PaddedVoxelizer(model, DEVICE, rows, room)(memory, ends, moves, config))
        expected = encoder(keep_nearest(voxelize(points, model), model, room))
    assert (found.shape, found.dtype) == ((room, model.encoder.channels[-1]), torch.float16)
    assert (found[len(expected) :] == 0).all()
    if len(expected):
        errors = found[: len(expected)].float() - expected
        assert (errors.norm() / expected.norm()).item() < 1e-3
        assert (errors.norm(dim=1) / expected.norm(dim=1).clamp(min=1e-2)).max().item() < 4e-3


@pytest.mark.parametrize(
    ("channels", "columns"),
    [((192, 192), 5), ((128, 128), 5), ((48, 96), 3), ((40, 24), 6), ((24,), 4), ((16, 32, 24), 4)],
    ids=["waymo", "nuscenes", "three columns", "six", "one layer", "three layers"],
)
def test_same_as_torch(channels, columns):
    model = model_of(channels, columns)
    assert_close(model, cloud(model, 250, dense=150))


@pytest.mark.parametrize("config", [tiny_config, tiny_voxel_config], ids=["pillars", "voxels"])
def test_far_from_the_origin(config):
    """Coordinates of 70 m, of which float16 knows no more than 3 cm."""
    model = model_of((64, 64), config=config, shift_m=70.0)
    assert_close(model, cloud(model, 400, dense=200))


def test_unscaled_intensities():
    model = model_of((64, 64))
    points = cloud(model, 250, dense=150)
    points[:, 3] = (255 * points[:, 3]).round()
    assert_close(model, points)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_one_voxel(count):
    model = model_of((16, 16))
    points = cloud(model, count)
    points[:, :2] = points[:, :2].remainder(0.3) + 0.01
    assert_close(model, points, room=4)


def test_more_voxels_than_room():
    model = model_of((16, 16))
    assert_close(model, cloud(model, 400, dense=200), room=100)


def test_weights_beyond_float16():
    model = model_of((16, 16))
    encoder = encoder_of(model)
    encoder.pfn_layers[1].linear.weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16"):
        PaddedEncoder(encoder, model)
