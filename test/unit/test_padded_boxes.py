"""Boxes of fixed capacity and their suppression against `postprocess`."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import tiny_config, tiny_proposal_config, tiny_voxel_config

from dsvt_ros.config import PostprocessConfig
from dsvt_ros.fused.structures import PeakMaps
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.padded.boxes import PaddedBoxFinder
from dsvt_ros.postprocess import class_groups, decode, suppress
from dsvt_ros.structures import CenterMaps, DeviceBoxes, ProposalMaps

COLUMNS = {"center": 0, "center_z": 2, "dim": 3, "rot": 6, "iou": 8, "vel": 9}
CONFIG = PostprocessConfig(
    score_threshold=0.3, max_candidates=70, iou_rectifier=(0.68, 0.71, 0.65), nms_iou=(0.3, 0.2, 0.1)
)


class MapsHead:
    """Stands for the branches at peaks: reads maps."""

    def __init__(self, maps, groups):
        self._branches = [getattr(maps, name) for name in COLUMNS if getattr(maps, name) is not None]
        self.columns = {name: COLUMNS[name] for name in COLUMNS if getattr(maps, name) is not None}
        self._groups = groups

    def at_peaks(self, shared, index):
        parts = []
        for branch in self._branches:
            values = branch.unflatten(1, (self._groups, -1)).flatten(3)
            cell = (index.long() % values.shape[3])[:, :, None]
            parts.append(values.gather(3, cell.expand(-1, -1, values.shape[2], -1)).transpose(2, 3))
        return torch.cat(parts, 3)


def center_maps(model, seed=0, clouds=1, mean=-1.0, spread=1.5):
    """Maps of boxes of some 3 by 2 m, which overlap much on the tiny model's 10 by 10 m."""
    torch.manual_seed(seed)
    width, height = model.map_size
    groups = len(class_groups(model))

    def draw(channels, mean=0.0, spread=1.0):
        return torch.randn(clouds, channels, height, width, device=DEVICE) * spread + mean

    # No two alike, for the order in which torch finds equal ones is its own affair.
    shape = (len(model.class_names), height, width)
    logits = torch.linspace(mean - 2 * spread, mean + 2 * spread, math.prod(shape)).half().float()
    heatmap = torch.stack([logits[torch.randperm(len(logits))].view(shape) for _ in range(clouds)]).to(DEVICE)
    size = draw(groups * 3, 0.7, 0.4)
    vel = draw(groups * 2) if model.box_size == 9 else None
    return CenterMaps(heatmap, draw(groups * 2), draw(groups), size, draw(groups * 2), vel, draw(groups, 0, 0.5))


def downloaded(found):
    keep = found.keep
    return [values[keep].cpu().numpy() for values in (found.boxes, found.scores, found.labels)]


def boxes_of(finder, found, clouds):
    """Rows of a frame's output as in host memory."""
    rows = finder.suppress(found, clouds).cpu().numpy()
    assert rows.shape[::2] == (clouds, finder.columns)
    return finder.settle(rows)


def assert_same_boxes(maps, model, config):
    """Of every cloud; gives the first one's."""
    results = []
    if isinstance(maps, CenterMaps):
        finder = PaddedBoxFinder(model, config, MapsHead(maps, len(class_groups(model))), DEVICE)
        clouds, given = len(maps.heatmap), PeakMaps(maps.heatmap.half(), maps.heatmap)
    else:
        finder, clouds, given = PaddedBoxFinder(model, config, None, DEVICE), len(maps.label), maps
    for cloud, rows in enumerate(boxes_of(finder, finder.find(given), clouds)):
        found = boxes_from_rows(rows, model, config)
        boxes, scores, labels = downloaded(suppress(decode(maps, model, config, cloud), model, config))
        assert found.labels.tolist() == labels.tolist()
        np.testing.assert_allclose(found.scores, scores, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(found.boxes, boxes, rtol=2e-6, atol=4e-6)
        results.append(found)
    return results[0]


def replaced(**options):
    return dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize(("geometry", "seed"), [("exact", 0), ("exact", 1), ("dsvt_release", 2)])
def test_random_maps(geometry, seed):
    found = assert_same_boxes(center_maps(tiny_config(), seed), tiny_config(), replaced(nms_geometry=geometry))
    assert 5 < len(found) < 60


@pytest.mark.parametrize(
    "options",
    [
        {"nms_classes": "group"},
        {"iou_rectifier": ()},
        {"max_boxes": (1, 200, 4)},
        {"center_range": (-2, -3, -1, 4, 3, 0.5)},
        {"nms_iou": (1.0,)},
        {"nms_iou": (0.0,)},
        {"score_threshold": 0.0},
        {"score_threshold": 1.0},
        {"max_candidates": 1},
        {"max_candidates": 4096},
    ],
    ids=str,
)
def test_options(options):
    assert_same_boxes(center_maps(tiny_config()), tiny_config(), replaced(**options))


@pytest.mark.parametrize("classes", ["own", "group"])
def test_groups_velocities_and_clouds(classes):
    model = tiny_voxel_config()
    maps = center_maps(model, clouds=2)
    maps.heatmap[1, 0] = -8  # a group without peaks
    found = assert_same_boxes(maps, model, replaced(nms_classes=classes, max_candidates=40))
    assert found.boxes.shape[1] == 9


def test_no_box_above_the_threshold():
    assert len(assert_same_boxes(center_maps(tiny_config(), mean=-9.0), tiny_config(), CONFIG)) == 0


@pytest.mark.parametrize("geometry", ["exact", "dsvt_release"])
def test_proposals(geometry):
    """The published quirk is not theirs."""
    model = tiny_proposal_config()
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, num_proposals=70))
    torch.manual_seed(0)
    width, height = model.map_size

    def draw(channels, mean=0.0, spread=1.0):
        return torch.randn(2, channels, 70, device=DEVICE) * spread + mean

    maps = ProposalMaps(
        label=torch.randint(0, 3, (2, 70), device=DEVICE),
        cell=torch.randint(0, width * height, (2, 70), device=DEVICE),
        peak=torch.rand(2, 70, device=DEVICE),
        heatmap=draw(3), center=draw(2), height=draw(1), dim=draw(3, 1.0, 0.3), rot=draw(2), vel=draw(2), iou=draw(1),
    )  # fmt: skip
    config = replaced(score_threshold=0.1, nms_geometry=geometry, max_boxes=(9, 30, 5))
    assert 5 < len(assert_same_boxes(maps, model, config)) < 45


@pytest.mark.parametrize("count", [1, 3])
def test_settled_rows_share_no_memory(count):
    """The next frame writes where rows come from."""
    finder = PaddedBoxFinder(tiny_config(), replaced(max_candidates=count), None, DEVICE)
    rows = np.ones((1, count, finder.columns), np.float32)
    assert not np.shares_memory(finder.settle(rows), rows)
    assert (rows == 1).all()


# ------------------------------------------------------------------------------------------------------ decoded boxes


def survivors(boxes, labels=None, config=CONFIG):
    """Numbers of the boxes that are left of some by descending score."""
    count, model = len(boxes), tiny_proposal_config()
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, num_proposals=count))
    boxes = torch.nn.functional.pad(torch.tensor(boxes, dtype=torch.float32), (0, model.box_size - 7))
    boxes[:, 2] = torch.arange(count)  # the number
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else torch.tensor(labels)
    keep = torch.ones(count, dtype=torch.bool)
    found = DeviceBoxes(*(x.to(DEVICE) for x in (boxes, torch.linspace(0.9, 0.1, count), labels, keep)))
    (rows,) = boxes_of(PaddedBoxFinder(model, config, None, DEVICE), found, 1)
    return sorted(int(z) for z in boxes_from_rows(rows, model, config).boxes[:, 2])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100])
def test_a_chain_of_overlaps(count):
    """Boxes in a row, each overlapping the next: every second one survives, whatever the length."""
    config = replaced(nms_iou=(0.1,))
    assert survivors([[3.0 * i, 0, 0, 4, 2, 1.5, 0] for i in range(count)], config=config) == list(range(0, count, 2))


def test_identical_boxes():
    boxes, labels = [[1.0, 2.0, 0, 4, 2, 1.5, 0.3]] * 40, [i % 2 for i in range(40)]
    assert survivors(boxes) == [0]
    assert survivors(boxes, labels) == [0, 1]
    assert survivors(boxes, labels, replaced(nms_classes="group")) == [0]
