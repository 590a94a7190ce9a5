import math

import pytest
import torch

from dsvt_ros.config import PostprocessConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.postprocess import decode
from dsvt_ros.structures import CenterMaps
from dsvt_ros.training.losses import compute_losses, focal_loss
from dsvt_ros.training.targets import make_targets

BOXES = torch.tensor(
    [[10.3, -4.2, 0.8, 4.2, 1.8, 1.5, 0.4], [-20.1, 30.7, 0.9, 0.8, 0.7, 1.75, -2.0], [5, 5, 0.9, 1.7, 0.6, 1.7, 3.0]]
)
LABELS, POINTS = torch.tensor([0, 1, 2]), torch.tensor([50, 9, 4])


@pytest.fixture(scope="module")
def model():
    return open_model("demo").model


def perfect_maps(targets):
    """Maps that say exactly what the targets ask for."""
    batch, _, rows, columns = targets.heatmap.shape
    flat = torch.zeros(batch * rows * columns, 8)
    flat[targets.cell] = targets.regression
    maps = flat.view(batch, rows, columns, 8).permute(0, 3, 1, 2)
    heatmap = torch.where(targets.heatmap == 1, 12.0, -12.0)
    iou = torch.ones(batch, 1, rows, columns)
    return CenterMaps(heatmap, maps[:, :2], maps[:, 2:3], maps[:, 3:6], maps[:, 6:8], None, iou)


def test_targets_and_decoding_are_inverse(model):
    scan = torch.tensor([0, 1, 1])
    targets = make_targets(BOXES, LABELS, POINTS, scan, 2, model)
    maps = perfect_maps(targets)
    config = PostprocessConfig(score_threshold=0.5)
    for cloud, rows in ((0, [0]), (1, [1, 2])):
        found = decode(maps, model, config, cloud)
        boxes, labels = found.boxes[found.keep], found.labels[found.keep]
        order = torch.argsort(labels)
        torch.testing.assert_close(boxes[order], BOXES[rows], atol=1e-4, rtol=0)
        assert labels[order].tolist() == LABELS[rows].tolist()


def test_peaks_by_hand(model):
    targets = make_targets(BOXES[1:2], LABELS[1:2], POINTS[1:2], torch.zeros(1, dtype=torch.int64), 1, model)
    # Cell of 0.64 m: (-20.1 + 51.2) / 0.64 = 48.59, (30.7 + 51.2) / 0.64 = 127.97; radius 2, sigma 5 / 6.
    heatmap = targets.heatmap[0, 1]
    assert heatmap[127, 48] == 1
    assert heatmap[127, 49].item() == pytest.approx(math.exp(-1 / (2 * (5 / 6) ** 2)))
    assert heatmap[127, 51] == 0
    assert targets.heatmap.sum() == heatmap.sum()


def test_hardly_seen_objects_are_neither_taught_nor_punished(model):
    points = torch.tensor([50, 9, 2])
    targets = make_targets(BOXES, LABELS, points, torch.zeros(3, dtype=torch.int64), 1, model)
    assert len(targets.cell) == 2
    assert targets.heatmap[0, 2].sum() == 0
    assert targets.weight[0, 2].sum() < targets.weight[0, 2].numel()
    assert (targets.weight[0, :2] == 1).all()


def test_boxes_outside_the_range_are_left_out(model):
    boxes = BOXES.clone()
    boxes[:, 0] = torch.tensor([51.3, -51.3, 51.1])
    targets = make_targets(boxes, LABELS, POINTS, torch.zeros(3, dtype=torch.int64), 1, model)
    assert len(targets.cell) == 1
    assert targets.heatmap.shape == (1, 3, 160, 160)


def test_no_boxes(model):
    targets = make_targets(BOXES[:0], LABELS[:0], POINTS[:0], LABELS[:0], 2, model)
    losses = compute_losses(perfect_maps(targets), targets, model)
    assert torch.isfinite(losses.total)


def test_perfect_maps_lose_nothing(model):
    targets = make_targets(BOXES, LABELS, POINTS, torch.tensor([0, 1, 1]), 2, model)
    losses = compute_losses(perfect_maps(targets), targets, model)
    assert losses.regression.item() == pytest.approx(0, abs=1e-5)
    assert losses.iou.item() == pytest.approx(0, abs=1e-3)
    assert losses.heatmap.item() == pytest.approx(0, abs=1e-2)


def test_focal_loss_by_hand():
    logits = torch.tensor([0.0, 0.0, 0.0])
    target, weight = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    # p = 0.5: 0.25 ln 2 at the peak, 0.5^4 * 0.25 ln 2 beside it, nothing where the weight is 0.
    expected = 0.25 * math.log(2) * (1 + 0.5**4)
    assert focal_loss(logits, target, weight).item() == pytest.approx(expected)
