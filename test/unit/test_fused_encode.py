"""Features of voxels by kernels against the pillar encoder in torch."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import randomize, tiny_config, tiny_voxel_config

from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import EncoderConfig, PointFeature, PreprocessConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused import encode
from dsvt_ros.fused.encode import FusedEncoder
from dsvt_ros.fused.voxelize import Voxelizer
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import fold_batch_norms
from dsvt_ros.voxelization import voxelize

_interpreter = interpreted("voxelization", "pillar_encoder")
pytestmark = needs_triton

EXACT = PreprocessConfig(scale_features=False)
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


def encoder_of(model, seed=0):
    torch.manual_seed(seed)
    encoder = randomize(DSVT(model)).vfe.to(DEVICE)
    fold_batch_norms(encoder)
    return encoder


def cloud(model, count, seed=0, dense=0):
    """Points all over the range, and some in a few voxels near its centre."""
    rng = np.random.default_rng(seed)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    xyz = rng.uniform(low, high, (count, 3))
    xyz[:dense, :2] = (low + high)[:2] / 2 + rng.uniform(-0.3, 0.3, (dense, 2))
    rest = rng.uniform(0, 1, (count, len(model.features) - 3))
    return torch.as_tensor(np.column_stack([xyz, rest]).astype(np.float32), device=DEVICE)


class Stages:
    """Both stages, with room for more points than come."""

    def __init__(self, model, points, voxels):
        self.model, self.room = model, voxels
        self.encoder = encoder_of(model)
        self.voxelize = Voxelizer(model, DEVICE, points, voxels)
        self.encode = FusedEncoder(self.encoder, model, voxels)
        self.rows = torch.full((points, len(model.features)), torch.nan, device=DEVICE)

    def run(self, points):
        self.rows[: len(points)] = points
        ends = torch.tensor([len(points)], dtype=torch.int32, device=DEVICE)
        voxels = self.voxelize(self.rows, ends, torch.eye(4, device=DEVICE)[None, :3].contiguous(), EXACT)
        features = self.encode(voxels)
        assert features.shape == (self.room, self.model.encoder.channels[-1])
        assert features.dtype == torch.float16
        return features[: voxels.grid.num_voxels.item()]

    def expected(self, points):
        with torch.inference_mode():
            return self.encoder(keep_nearest(voxelize(points, self.model), self.model, self.room))

    def assert_close(self, points):
        found, expected = self.run(points), self.expected(points)
        assert found.shape == expected.shape
        if len(found):
            errors = found.float() - expected
            assert (errors.norm() / expected.norm()).item() < 1e-3
            assert (errors.norm(dim=1) / expected.norm(dim=1).clamp(min=1e-2)).max().item() < 4e-3
        return found


@pytest.mark.parametrize(
    ("channels", "columns"),
    [((192, 192), 5), ((128, 128), 5), ((64, 64), 4), ((16, 16), 4), ((48, 96), 3), ((40, 16), 6)],
    ids=["waymo", "nuscenes", "demo", "tiny", "odd", "more columns"],
)
def test_same_as_torch(channels, columns):
    model = model_of(channels, columns)
    Stages(model, 300, 260).assert_close(cloud(model, 250, dense=150))


@pytest.mark.parametrize("config", [tiny_config, tiny_voxel_config], ids=["pillars", "voxels"])
def test_far_from_the_origin(config):
    """Coordinates of 70 m, of which float16 knows no more than 3 cm."""
    model = model_of((64, 64), config=config, shift_m=70.0)
    Stages(model, 400, 400).assert_close(cloud(model, 400, dense=200))


@pytest.mark.parametrize("resident", [False, True])
def test_weights_in_registers_or_shared_memory(monkeypatch, resident):
    monkeypatch.setattr(encode, "_multiplies_from_shared_memory", lambda device: resident)
    model = model_of((48, 96))
    Stages(model, 300, 260).assert_close(cloud(model, 250, dense=150))


def test_unscaled_intensities():
    model = model_of((64, 64))
    points = cloud(model, 250, dense=150)
    points[:, 3] = (255 * points[:, 3]).round()
    Stages(model, 300, 260).assert_close(points)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_one_voxel(count):
    """Of one segment, and of several."""
    model = model_of((16, 16))
    points = cloud(model, count)
    points[:, :2] = points[:, :2].remainder(0.3) + 0.01
    Stages(model, 100, 4).assert_close(points)


def test_more_voxels_than_room():
    model = model_of((16, 16))
    Stages(model, 400, 100).assert_close(cloud(model, 400, dense=200))


@pytest.mark.parametrize("length", range(1, 10))
def test_voxels_of_equal_length(length):
    """All segments in one list, in more than one program."""
    model = model_of((16, 16))
    points = cloud(model, 80).repeat_interleave(length, dim=0)
    points[:, 3] = torch.linspace(0, 1, len(points))
    Stages(model, 800, 80).assert_close(points)


def test_calls_leave_nothing_behind():
    """The same bytes again, also for points in another order, whatever came in between."""
    model = model_of((16, 16))
    stages = Stages(model, 300, 200)
    clouds = [
        cloud(model, count, seed, dense) for seed, (count, dense) in enumerate([(300, 200), (100, 0), (250, 250)])
    ]
    first = [stages.assert_close(points) for points in clouds]
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
        stages.assert_close(changed)
    stages.assert_close(points)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("channels", [(16,), (16, 16, 16), (16, 24), (16, 320)])
def test_sizes_that_the_kernels_do_not_take(channels):
    model = model_of(channels)
    with pytest.raises(EngineError, match=f"two layers.*this model has {', '.join(map(str, channels))}: use torch"):
        FusedEncoder(encoder_of(model), model, 10)


def test_weights_beyond_float16():
    model = model_of((16, 16))
    encoder = copy.deepcopy(encoder_of(model))
    encoder.pfn_layers[1].linear.weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"up to 1e\+05 are beyond the range of float16"):
        FusedEncoder(encoder, model, 10)
