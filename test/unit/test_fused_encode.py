"""Features of voxels by kernels against the pillar encoder in torch."""

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
from fused_fixtures import DEVICE, interpreted, needs_triton
from voxel_cases import EXACT, inputs_of

from dsvt_ros.errors import EngineError
from dsvt_ros.fused import encode
from dsvt_ros.fused.encode import FusedEncoder
from dsvt_ros.fused.voxelize import Voxelizer

_interpreter = interpreted("voxelization", "pillar_encoder")
pytestmark = needs_triton


class Stages:
    """Both stages, with room for more points than come."""

    def __init__(self, model, points, voxels):
        self.model, self.rows, self.room = model, points, voxels
        self.encoder = encoder_of(model)
        self.voxelize = Voxelizer(model, DEVICE, points, voxels)
        self.encode = FusedEncoder(self.encoder, model, voxels)

    def run(self, points):
        voxels = self.voxelize(*inputs_of([points], self.rows), EXACT)
        features = self.encode(voxels)
        assert features.shape == (self.room, self.model.encoder.channels[-1])
        return features[: voxels.grid.num_voxels.item()]

    def check(self, points):
        found = self.run(points)
        assert_close(found, expected_features(self.encoder, self.model, points, self.room))
        return found


@pytest.mark.parametrize(
    ("channels", "columns"),
    [((192, 192), 5), ((128, 128), 5), ((64, 64), 4), ((16, 16), 4), ((48, 96), 3), ((40, 16), 6)],
    ids=["waymo", "nuscenes", "demo", "tiny", "odd", "more columns"],
)
def test_same_as_torch(channels, columns):
    model = model_of(channels, columns)
    Stages(model, 300, 260).check(cloud(model, 250, dense=150))


@GRIDS
def test_far_from_the_origin(config):
    """Coordinates of 70 m, of which float16 knows no more than 3 cm."""
    model = model_of((64, 64), config=config, shift_m=70.0)
    Stages(model, 400, 400).check(cloud(model, 400, dense=200))


@pytest.mark.parametrize("resident", [False, True])
def test_weights_in_registers_or_shared_memory(monkeypatch, resident):
    monkeypatch.setattr(encode, "is_hopper", lambda device: resident)
    model = model_of((48, 96))
    Stages(model, 300, 260).check(cloud(model, 250, dense=150))


def test_unscaled_intensities():
    model = model_of((64, 64))
    Stages(model, 300, 260).check(with_raw_intensities(cloud(model, 250, dense=150)))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_one_voxel(count):
    """Of one segment, and of several."""
    model = model_of((16, 16))
    Stages(model, 100, 4).check(in_one_pillar(cloud(model, count)))


def test_more_voxels_than_room():
    model = model_of((16, 16))
    Stages(model, 400, 100).check(cloud(model, 400, dense=200))


@pytest.mark.parametrize("length", range(1, 10))
def test_voxels_of_equal_length(length):
    """All segments in one list, in more than one program."""
    model = model_of((16, 16))
    points = cloud(model, 80).repeat_interleave(length, dim=0)
    points[:, 3] = torch.linspace(0, 1, len(points))
    Stages(model, 800, 80).check(points)


def test_calls_leave_nothing_behind():
    """The same bytes again, also for points in another order, whatever came in between."""
    model = model_of((16, 16))
    stages = Stages(model, 300, 200)
    clouds = [
        cloud(model, count, seed, dense) for seed, (count, dense) in enumerate([(300, 200), (100, 0), (250, 250)])
    ]
    first = [stages.check(points) for points in clouds]
    for points, expected in zip(clouds, first, strict=True):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        assert torch.equal(stages.run(points[order]), expected)


def test_one_outlier_decides():
    """The maximum over a voxel's points is that of any of them, in any slot and segment, and of this call only."""
    model = model_of((16, 16))
    stages = Stages(model, 20, 1)
    points = cloud(model, 20)
    points[:, :3] = 0.1
    for row in (0, 7, 8, 19):
        changed = points.clone()
        changed[row, 3] = 30.0
        stages.check(changed)
    stages.check(points)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("channels", [(16,), (16, 16, 16), (16, 24), (16, 320)])
def test_sizes_that_the_kernels_do_not_take(channels):
    model = model_of(channels)
    with pytest.raises(EngineError, match=f"two layers.*this model has {', '.join(map(str, channels))}: use torch"):
        FusedEncoder(encoder_of(model), model, 10)


def test_weights_beyond_float16():
    model = model_of((16, 16))
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16"):
        FusedEncoder(encoder_beyond_float16(model), model, 10)
