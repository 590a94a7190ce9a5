"""The height of the ground found by kernels against the torch code, to the last bit but for one sum."""

import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from test_ground import scan_of_ground, scatter
from tiny import tiny_config

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.fused import ground as fused_ground
from dsvt_ros.fused.ground import GroundFinder
from dsvt_ros.ground import ground_height
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import drop_missing

_interpreter = interpreted("ground")
pytestmark = needs_triton

ROOM = 30_000


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Interpreted ones take their time."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused_ground, "POINT_ROWS", 8192)
        monkeypatch.setattr(fused_ground, "CELL_ROWS", 1024)


@pytest.fixture(scope="module")
def find():
    """(B, 3, 4) poses as they come back, for some of the clouds lifted to the ground."""
    model, finders = tiny_config(), {}

    def find(*clouds, seeks=None, min_range=0.1, poses=None):
        count = len(clouds)
        if count not in finders:
            finders[count] = GroundFinder(model, DEVICE, ROOM, count)
        assert sum(map(len, clouds)) < ROOM
        # What lies behind the last point is not read.
        points = torch.cat([*clouds, torch.full((ROOM, 4), -1.5)])[:ROOM].to(DEVICE)
        ends = torch.tensor([len(cloud) for cloud in clouds]).cumsum(0).int().to(DEVICE)
        seeks = torch.tensor([1] * count if seeks is None else seeks, dtype=torch.int32, device=DEVICE)
        poses = [np.eye(4)] * count if poses is None else poses
        poses = torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32).to(DEVICE).contiguous()
        finders[count](points, ends, seeks, poses, PreprocessConfig(min_range=min_range))
        return poses.cpu()

    return find


def height_of(poses, number=0):
    return tiny_config().ground_z - poses[number, 2, 3].item()


def assert_same(found, cloud, number=0):
    assert height_of(found, number) == pytest.approx(ground_height(cloud).item(), abs=1e-6)


def noise(count, seed, low=(-25, -25, -6), high=(25, 25, 4)):
    rng = np.random.default_rng(seed)
    return torch.as_tensor(np.column_stack([rng.uniform(low, high, (count, 3)), np.zeros(count)]), dtype=torch.float32)


def borders(count):
    """Points on the borders of rings, sectors and layers, and the nearest numbers beside them."""
    rng = np.random.default_rng(3)
    angle = np.radians(3.0 * rng.integers(0, 120, count))
    radius = rng.integers(2, 21, count)
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.1 * rng.integers(-51, 32, count)], 1)
    xyz[::5, 1] = 0.0
    xyz[1::5, 0] = -0.0
    xyz[2::5, 1] = xyz[2::5, 0]
    xyz = xyz.astype(np.float32)
    near = np.stack([np.nextafter(xyz, -np.inf), xyz, np.nextafter(xyz, np.inf)])
    rows = np.take_along_axis(near, rng.integers(0, 3, (1, count, 3)), 0)[0]
    return torch.as_tensor(np.pad(rows, ((0, 0), (0, 1))))


def ties():
    """One return a cell at one height: planes of equal tilt have equal scores."""
    angle, radius = np.meshgrid(np.radians(np.arange(1.5, 360, 3)), np.arange(2.5, 20))
    xyz = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full_like(angle, -0.85)], -1).reshape(-1, 3)
    return torch.as_tensor(np.pad(xyz[::7], ((0, 0), (0, 1))), dtype=torch.float32)


CLOUDS = {
    "level": lambda: scan_of_ground(-1.84),
    "slope": lambda: scan_of_ground(-0.6, slope_deg=(-2.5, 1.5)),
    "steep": lambda: scan_of_ground(-3.5, slope_deg=(4, 4)),
    "one side": lambda: scan_of_ground(-1.73, slope_deg=(1.5, 0), opening_deg=80.0),
    "walls": lambda: torch.cat([scan_of_ground(-0.6), *(scatter((-9, y, -1), (9, y, 3), 4000) for y in (-1.5, 2))]),
    "noise": lambda: noise(20_000, 0),
    "little noise": lambda: noise(40, 1),
    "one cell": lambda: noise(3000, 2, (10, 0.05, -2), (10.5, 0.1, -1)),
    "borders": lambda: borders(8000),
    "few borders": lambda: borders(100),
    "ties": ties,
}


@pytest.mark.parametrize("name", CLOUDS)
def test_same_as_torch(find, name):
    cloud = CLOUDS[name]()
    assert_same(find(cloud), cloud)


def test_where_there_is_hardly_anything(find):
    nan, inf = math.nan, math.inf
    clouds = [
        torch.zeros(0, 4),
        torch.tensor([[1.0, 0, -1.5, 0]]),  # too near
        torch.tensor([[10.0, 0, 3.5, 0], [10.0, 0, -5.5, 0]]),  # too high, too low
        torch.full((3, 4), nan),
        torch.tensor([[10.5, 0, -1.5, 0], [inf, 0, -1, 0], [10, nan, 0, 0], [9, 0, -inf, 0], [3e38, -3e38, 0, 0]]),
    ]
    found = find(*clouds)
    assert [height_of(found, number) for number in range(5)] == [0, 0, 0, 0, -1.5]


def test_near_returns_count_for_nothing(find):
    model, config = tiny_config(), PreprocessConfig(min_range=9.0)
    cloud = torch.cat([scan_of_ground(-1.8), noise(9000, 4, (-6, -6, -3), (6, 6, -2.9))])
    expected = ground_height(drop_missing(cloud, model, config))
    assert abs(expected - ground_height(cloud)) > 0.5
    assert height_of(find(cloud, min_range=9.0)) == pytest.approx(expected.item(), abs=1e-6)


def test_points_in_any_order_give_the_same_bytes(find):
    cloud = torch.cat([scan_of_ground(-1.8, slope_deg=(1, 2)), noise(9000, 5)])
    first = find(cloud)
    find(noise(20_000, 6))
    shuffled = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(0))]
    for same in (cloud, shuffled):
        assert find(same).numpy().tobytes() == first.numpy().tobytes()


def test_only_the_height_of_a_pose_changes(find):
    """And nothing of the poses of clouds that seek no ground."""
    poses = [pose_matrix((0.4, -0.2, 9.0, 0, 0, 0.7)), pose_matrix((1, 2, 3, 0.1, 0.2, 0.3)), np.eye(4), np.eye(4)]
    clouds = [scan_of_ground(-1.0)[::2], scan_of_ground(-0.6)[::3], torch.zeros(0, 4), noise(3000, 7)]
    found = find(*clouds, seeks=[1, 0, 1, 1], poses=poses)
    expected = torch.as_tensor(np.stack(poses)[:, :3], dtype=torch.float32)
    for number, cloud in enumerate(clouds):
        if number != 1:
            assert_same(found, cloud, number)
            expected[number, 2, 3] = found[number, 2, 3]
    assert torch.equal(found, expected)
