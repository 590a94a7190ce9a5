import math

import numpy as np
import pytest
import torch

from dsvt_ros.ground import ground_height


@pytest.mark.parametrize("height", [-2.1, -1.73, -0.6, 0.0])
def test_ground_height(height):
    rng = np.random.default_rng(0)
    radius, angle = rng.uniform(3, 40, 3000), rng.uniform(-3, 3, 3000)
    ground = np.stack([radius * np.cos(angle), radius * np.sin(angle), height + 0.02 * rng.standard_normal(3000)], 1)
    wall = np.stack([np.full(3000, 8.0), rng.uniform(-20, 20, 3000), rng.uniform(height, height + 6, 3000)], 1)
    points = torch.as_tensor(np.concatenate([ground, wall]).astype(np.float32))
    assert ground_height(points).item() == pytest.approx(height, abs=0.06)


def scan_of_ground(height, *, elevations_deg=tuple(range(-15, 0, 2)), slope_deg=(0.0, 0.0), opening_deg=360.0):
    """(N, 4) returns of a lidar at the origin from a plane; by default of the 8 lower beams of a 16-beam sensor."""
    rng = np.random.default_rng(0)
    azimuth = np.radians(np.linspace(-opening_deg / 2, opening_deg / 2, round(5 * opening_deg), endpoint=False))
    azimuth, elevation = (grid.ravel() for grid in np.meshgrid(azimuth, np.radians(elevations_deg)))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    sinking = rays[2] - np.tan(np.radians(slope_deg)) @ rays[:2]
    distance = height / np.where(sinking < 0, sinking, np.nan)
    points = (rays * (distance + 0.02 * rng.standard_normal(len(distance)))).T[distance < 80]
    return torch.as_tensor(np.column_stack([points, np.zeros(len(points))]), dtype=torch.float32)


def scatter(low, high, count):
    """(count, 4) points anywhere in a box."""
    rng = np.random.default_rng(1)
    return torch.as_tensor(np.column_stack([rng.uniform(low, high, (count, 3)), np.zeros(count)]), dtype=torch.float32)


@pytest.mark.parametrize("height", [-0.3, -0.6, -1.0, -1.84, -3.5])
@pytest.mark.parametrize("slope_deg", [(0, 0), (2, 0), (0, -3), (4, 4), (-2.5, 1.5)])
def test_ground_below_a_sparse_sensor_may_slope(height, slope_deg):
    assert ground_height(scan_of_ground(height, slope_deg=slope_deg)).item() == pytest.approx(height, abs=0.15)


def test_ground_is_not_the_fullest_layer():
    """Hedges and cars return most points, and at a height that they have in common."""
    ground = scan_of_ground(-0.33)
    tops = torch.cat([scatter((-20, side, 1.65), (20, side + 2, 1.75), 30_000) for side in (-8, 6)])
    sides = torch.cat([scatter((-20, side, 0.2), (20, side + 0.2, 1.7), 10_000) for side in (-6, 6)])
    cloud = torch.cat([tops, ground[ground[:, 1].abs() < 6], sides])
    assert ground_height(cloud).item() == pytest.approx(-0.33, abs=0.05)


def test_ground_between_near_walls():
    ground = scan_of_ground(-0.6)
    walls = torch.cat([scatter((-20, side, -0.6), (20, side + 0.05, 3), 20_000) for side in (-1.5, 1.5)])
    cloud = torch.cat([walls, ground[ground[:, 1].abs() < 1.5]])
    assert ground_height(cloud).item() == pytest.approx(-0.6, abs=0.05)


def test_ground_beside_the_platform():
    roof = scatter((-4, -1.25, -0.4), (4, 1.25, -0.36), 30_000)
    assert ground_height(torch.cat([scan_of_ground(-1.8), roof])).item() == pytest.approx(-1.8, abs=0.05)


@pytest.mark.parametrize("depth", [(0.0, 2.0), (1.0, 1.0)])
def test_ground_above_reflections(depth):
    cloud = scan_of_ground(-1.8, elevations_deg=np.arange(-24, -2, 0.5))
    rng = np.random.default_rng(2)
    is_reflection = torch.as_tensor(rng.random(len(cloud)) < 0.05)
    cloud[is_reflection, 2] -= torch.as_tensor(rng.uniform(*depth, int(is_reflection.sum())), dtype=torch.float32)
    assert ground_height(cloud).item() == pytest.approx(-1.8, abs=0.05)


@pytest.mark.parametrize("slope_deg", [0, 1.5])
def test_ground_in_a_narrow_view(slope_deg):
    cloud = scan_of_ground(-1.73, slope_deg=(slope_deg, 0), opening_deg=80.0)
    assert ground_height(cloud).item() == pytest.approx(-1.73, abs=0.15)


def test_ground_does_not_depend_on_the_order_of_points():
    cloud = torch.cat([scan_of_ground(-1.8, slope_deg=(1, 2)), scatter((-20, -20, -2), (20, 20, 2), 20_000)])
    shuffled = cloud[torch.randperm(len(cloud), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(ground_height(shuffled), ground_height(cloud))


def test_ground_where_there_is_hardly_anything():
    assert ground_height(torch.zeros(0, 4)).item() == 0
    assert ground_height(torch.tensor([[1.0, 0, -1.5, 0]])).item() == 0  # too near
    assert ground_height(torch.tensor([[10.0, 0, 3.5, 0], [10.0, 0, -5.5, 0]])).item() == 0  # too high, too low
    assert ground_height(torch.full((3, 4), math.nan)).item() == 0
    one = torch.tensor([[10.5, 0, -1.5, 0], [math.inf, 0, -1, 0], [10, math.nan, 0, 0], [9, 0, -math.inf, 0]])
    assert ground_height(one).item() == -1.5
