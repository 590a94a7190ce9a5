"""The overlaps of a group at once against those pair by pair."""

import math

import pytest
import torch
from fused_fixtures import DEVICE

from dsvt_ros.box_geometry import bev_iou_pairs
from dsvt_ros.padded.overlaps import bev_iou_with_later


def assert_same(boxes):
    """Of (G, K, 7) boxes; gives the largest overlap."""
    boxes = boxes.to(DEVICE)
    first, second = torch.triu_indices(boxes.shape[1], boxes.shape[1], 1, device=DEVICE)
    found = bev_iou_with_later(boxes)[:, first, second]
    expected = torch.stack([bev_iou_pairs(group[first], group[second]) for group in boxes])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    return expected.max().item()


@pytest.mark.parametrize("origin", [0.0, 70.0])
def test_random_boxes(origin):
    torch.manual_seed(0)
    place = torch.rand(3, 60, 3) * torch.tensor([12.0, 12.0, 1.0]) + torch.tensor([origin, -origin, 0])
    boxes = torch.cat([place, torch.rand(3, 60, 3) * 4 + 0.5, torch.rand(3, 60, 1) * 7 - 3.5], 2)
    assert assert_same(boxes) > 0.5


@pytest.mark.parametrize("yaw", [0.0, 0.7, math.pi / 2, -math.pi])
def test_edges_on_a_line(yaw):
    """The same box again, one that it touches, one within it, and one a metre along."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    boxes = [[0, 0, 0, 4, 2, 1, yaw], [0, 0, 0, 4, 2, 1, yaw], [4 * cos, 4 * sin, 0, 4, 2, 1, yaw]]
    boxes += [[0, 0, 0, 2, 1, 1, yaw], [cos, sin, 0, 4, 2, 1, yaw], [0, 0, 0, 4, 2, 1, yaw + math.pi]]
    assert_same(torch.tensor([boxes]))
    iou = bev_iou_with_later(torch.tensor([boxes], device=DEVICE))[0, 0]
    torch.testing.assert_close(iou[1:].cpu(), torch.tensor([1, 0, 0.25, 0.6, 1]), rtol=0, atol=1e-3)


def test_boxes_without_extent():
    boxes = torch.tensor([[[0, 0, 0, 0, 0, 0, 0.0], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 2, 1, 1, 0]]])
    assert assert_same(boxes) < 1e-3


def test_one_box():
    assert bev_iou_with_later(torch.ones(2, 1, 9, device=DEVICE)).shape == (2, 1, 1)
