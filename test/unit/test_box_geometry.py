import math

import numpy as np
import pytest
import torch

from dsvt_ros.box_geometry import bev_corners, bev_intersection, bev_iou_pairs, iou_3d_pairs, iou_matrix


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, yaw=0.0):
    return torch.tensor([[x, y, z, length, width, height, yaw]], dtype=torch.float32)


def clipped_area(first, second):
    """Independent oracle: Sutherland-Hodgman clipping of one rectangle by the other, in float64."""
    polygon = [tuple(p) for p in bev_corners(first.double())[0].numpy()]
    clip = bev_corners(second.double())[0].numpy()
    for start, end in zip(clip, np.roll(clip, -1, axis=0), strict=True):

        def side(p, start=start, end=end):
            return (end[0] - start[0]) * (p[1] - start[1]) - (end[1] - start[1]) * (p[0] - start[0])

        result = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sp, sq = side(p), side(q)
            if sp >= 0:
                result.append(p)
            if sp * sq < 0:
                t = sp / (sp - sq)
                result.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
        polygon = result
    x, y = np.array(polygon).reshape(-1, 2).T
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def test_corners_counter_clockwise_from_front_left():
    corners = bev_corners(box(1, 2, yaw=math.pi / 2))[0]
    expected = [[0, 4], [0, 0], [2, 0], [2, 4]]
    np.testing.assert_allclose(corners, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "area"),
    [
        (box(), 8.0),  # the same box
        (box(x=1), 6.0),
        (box(x=4), 0.0),  # sharing an edge
        (box(x=10), 0.0),
        (box(yaw=math.pi), 8.0),  # the same outline, heading back
        (box(yaw=math.pi / 2), 4.0),
        (box(length=1, width=1), 1.0),  # inside
        (box(length=20, width=20, yaw=0.3), 8.0),  # around
    ],
)
def test_intersection_by_hand(second, area):
    assert bev_intersection(box(), second).item() == pytest.approx(area, abs=2e-3)
    assert bev_intersection(second, box()).item() == pytest.approx(area, abs=2e-3)


def test_intersection_against_clipping():
    rng = np.random.default_rng(0)
    first = rng.uniform([-2, -2, -1, 0.4, 0.4, 1, -7], [2, 2, 1, 5, 3, 2, 7], (500, 7))
    second = rng.uniform([-2, -2, -1, 0.4, 0.4, 1, -7], [2, 2, 1, 5, 3, 2, 7], (500, 7))
    shift = np.zeros(7)
    shift[:2] = 70.0  # far from the origin, as boxes are
    first, second = (torch.as_tensor(b + shift, dtype=torch.float32) for b in (first, second))
    ours = bev_intersection(first, second)
    expected = [clipped_area(a[None], b[None]) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_nearly_equal_boxes_overlap_fully():
    """Coincident edges up to rounding must count once."""
    rng = np.random.default_rng(1)
    boxes = torch.as_tensor(rng.uniform([-60, -60, 0, 0.5, 0.5, 1, -3], [60, 60, 1, 5, 3, 2, 3], (300, 7)))
    boxes = boxes.float()
    jittered = boxes + 1e-6 * torch.as_tensor(rng.standard_normal((300, 7))).float()
    np.testing.assert_allclose(bev_iou_pairs(boxes, jittered), 1.0, atol=2e-3)


def test_iou_by_hand():
    # Two 4 x 2 boxes, 1 m apart lengthwise: 6 / (8 + 8 - 6).
    assert bev_iou_pairs(box(), box(x=1)).item() == pytest.approx(0.6, abs=1e-3)
    # Turned by 90 degrees each, as the released kernel has them: 4 / 12.
    turned = math.pi / 2
    assert bev_iou_pairs(box(yaw=turned), box(x=1, yaw=turned)).item() == pytest.approx(1 / 3, abs=1e-3)
    # Half the height in common: 8 * 0.75 / (2 * 12 - 6).
    assert iou_3d_pairs(box(), box(z=0.75)).item() == pytest.approx(6 / 18, abs=1e-3)
    assert iou_3d_pairs(box(), box(z=2)).item() == 0


def test_matrix_is_every_pair():
    rng = np.random.default_rng(2)
    boxes = torch.as_tensor(rng.uniform([-6, -6, 0, 1, 1, 1, -3], [6, 6, 1, 5, 3, 2, 3], (20, 7))).float()
    matrix = iou_matrix(boxes, boxes[:7], bev=True)
    first, second = boxes.repeat_interleave(7, 0), boxes[:7].repeat(20, 1)
    np.testing.assert_allclose(matrix.reshape(-1), bev_iou_pairs(first, second), atol=1e-6)
    assert iou_matrix(boxes[:0], boxes, bev=False).shape == (0, 20)
