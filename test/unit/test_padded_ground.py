"""The ground in clouds of a fixed capacity, in operations of PyTorch."""

import dataclasses

import pytest
import torch

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.ground import ground_height
from dsvt_ros.model.folder import open_model
from dsvt_ros.padded.ground import PaddedGroundFinder

MODEL = open_model("demo").model
CONFIG = PreprocessConfig(min_range=1.0)
CPU = torch.device("cpu")


def ground_at(height, count, seed=0):
    """Returns of a plane, a tenth of them on things that stand on it."""
    torch.manual_seed(seed)
    points = torch.rand(count, 4) * 40 - 20
    points[:, 2] = height + 0.01 * torch.randn(count)
    points[::10, 2] += 1.0
    return points


def find(clouds, seeks, room):
    finder = PaddedGroundFinder(MODEL, CPU, room, len(clouds))
    points = torch.full((room, 4), 7.0)  # what lies behind the clouds is no ground
    whole = torch.cat(clouds)
    points[: len(whole)] = whole
    ends = torch.tensor([len(cloud) for cloud in clouds]).cumsum(0).int()
    poses = torch.eye(3, 4).repeat(len(clouds), 1, 1)
    poses[:, 2, 3] = 0.5
    finder(points, ends, torch.tensor(seeks, dtype=torch.int32), poses, CONFIG)
    return poses


def test_each_cloud_stands_on_its_own_ground():
    clouds = [ground_at(-1.7, 3000), ground_at(-0.4, 2000, seed=1)]
    poses = find(clouds, [1, 1], 8192)
    expected = [MODEL.ground_z - float(ground_height(cloud)) for cloud in clouds]
    assert poses[:, 2, 3].tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] - expected[1] == pytest.approx(1.3, abs=0.05)
    poses[:, 2, 3] = 0
    assert torch.equal(poses, torch.eye(3, 4).repeat(2, 1, 1))


def test_who_does_not_ask_keeps_the_height():
    poses = find([ground_at(-1.7, 3000), ground_at(-0.4, 2000)], [0, 1], 8192)
    assert poses[0, 2, 3] == 0.5
    assert poses[1, 2, 3] != 0.5


def test_missing_returns_are_no_ground():
    """Many drivers report them at the origin, or as NaN."""
    cloud = ground_at(-1.7, 3000)
    missing = torch.zeros(4000, 4)
    missing[::2] = torch.nan
    alone, among = find([cloud], [1], 8192), find([torch.cat([missing, cloud])], [1], 8192)
    assert torch.equal(alone, among)


def test_no_points():
    poses = find([torch.zeros(0, 4)], [1], 64)
    assert poses[0, 2, 3] == pytest.approx(MODEL.ground_z)


def test_model_says_where_the_ground_is():
    other = dataclasses.replace(MODEL, ground_z=MODEL.ground_z + 2)
    cloud = ground_at(-1.7, 3000)
    finder = PaddedGroundFinder(other, CPU, len(cloud))
    poses = torch.eye(3, 4)[None].clone()
    finder(cloud, torch.tensor([len(cloud)], dtype=torch.int32), torch.tensor([1]), poses, CONFIG)
    assert float(poses[0, 2, 3]) == pytest.approx(find([cloud], [1], 4096)[0, 2, 3].item() + 2, abs=1e-5)
