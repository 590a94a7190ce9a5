"""Features of voxels of fixed capacity against the pillar encoder."""

import pytest
import torch
from encoder_cases import (
    GRIDS,
    assert_close,
    cloud,
    encoder_beyond_float16,
    encoder_of,
    expected_features,
    in_one_pillar,
    model_of,
    with_raw_intensities,
)
from fused_fixtures import DEVICE
from voxel_cases import EXACT, inputs_of

from dsvt_ros.errors import EngineError
from dsvt_ros.padded.encode import PaddedEncoder
from dsvt_ros.padded.voxelize import PaddedVoxelizer


def check(model, points, room=400, rows=500):
    """Features of the nearest voxels; nothing behind them."""
    encoder = encoder_of(model)
    voxelize, encode = PaddedVoxelizer(model, DEVICE, rows, room), PaddedEncoder(encoder, model)
    with torch.inference_mode():
        found = encode(voxelize(*inputs_of([points], rows), EXACT))
    expected = expected_features(encoder, model, points, room)
    assert found.shape == (room, model.encoder.channels[-1])
    assert_close(found[: len(expected)], expected)
    assert (found[len(expected) :] == 0).all()


@pytest.mark.parametrize(
    ("channels", "columns"),
    [((192, 192), 5), ((128, 128), 5), ((48, 96), 3), ((40, 24), 6), ((24,), 4), ((16, 32, 24), 4)],
    ids=["waymo", "nuscenes", "three columns", "six", "one layer", "three layers"],
)
def test_same_as_torch(channels, columns):
    model = model_of(channels, columns)
    check(model, cloud(model, 250, dense=150))


@GRIDS
def test_far_from_the_origin(config):
    """Coordinates of 70 m, of which float16 knows no more than 3 cm."""
    model = model_of((64, 64), config=config, shift_m=70.0)
    check(model, cloud(model, 400, dense=200))


def test_unscaled_intensities():
    model = model_of((64, 64))
    check(model, with_raw_intensities(cloud(model, 250, dense=150)))


@pytest.mark.parametrize("count", [0, 1, 100])
def test_one_voxel(count):
    model = model_of((16, 16))
    check(model, in_one_pillar(cloud(model, count)), room=4)


def test_more_voxels_than_room():
    model = model_of((16, 16))
    check(model, cloud(model, 400, dense=200), room=100)


def test_weights_beyond_float16():
    model = model_of((16, 16))
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16"):
        PaddedEncoder(encoder_beyond_float16(model), model)
