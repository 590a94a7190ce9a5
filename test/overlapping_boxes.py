"""Maps and boxes of which many overlap, and what `postprocess` leaves of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE
from tiny import tiny_config, tiny_proposal_config, tiny_voxel_config

from dsvt_ros.config import ModelConfig, PostprocessConfig
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.postprocess import class_groups, decode, suppress
from dsvt_ros.structures import Boxes3D, CenterMaps, DeviceBoxes, HeadMaps, ProposalMaps

CONFIG = PostprocessConfig(
    score_threshold=0.3, max_candidates=70, iou_rectifier=(0.68, 0.71, 0.65), nms_iou=(0.3, 0.2, 0.1)
)
COLUMNS = {"center": 0, "center_z": 2, "dim": 3, "rot": 6, "iou": 8, "vel": 9}
"""Of the branches, where there are all; `vel` comes last, for not all models have it."""

OPTIONS = (
    {"nms_classes": "group"},
    {"iou_rectifier": ()},
    {"iou_rectifier": (0.0, 1.0, 0.5)},
    {"max_boxes": (3,)},
    {"max_boxes": (1, 200, 4)},
    {"center_range": (-2, -3, -1, 4, 3, 0.5)},
    {"nms_iou": (1.0,)},
    {"nms_iou": (0.0,)},
    {"score_threshold": 0.0},
    {"score_threshold": 0.999},
    {"score_threshold": 1.0},
    {"max_candidates": 1},
)


def replaced(**options) -> PostprocessConfig:
    return dataclasses.replace(CONFIG, **options)


# ---------------------------------------------------------------------------------------------------------------- maps


def center_maps(
    model: ModelConfig, seed: int = 0, clouds: int = 1, mean: float = -1.0, spread: float = 1.5
) -> CenterMaps:
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


def maps_with_velocities() -> tuple[CenterMaps, ModelConfig]:
    """Of two clouds and two groups, one of which has no peak in the second cloud."""
    model = tiny_voxel_config()
    maps = center_maps(model, clouds=2)
    maps.heatmap[1, 0] = -8
    return maps, model


def maps_without_boxes() -> tuple[CenterMaps, ModelConfig]:
    """None above the threshold of `CONFIG`."""
    return center_maps(tiny_config(), mean=-9.0), tiny_config()


def proposal_maps() -> tuple[ProposalMaps, ModelConfig]:
    """Of two clouds, with a model of 70 proposals."""
    model = proposal_model(70)
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
    return maps, model


def proposal_model(count: int) -> ModelConfig:
    model = tiny_proposal_config()
    return dataclasses.replace(model, head=dataclasses.replace(model.head, num_proposals=count))


# --------------------------------------------------------------------------------------------------------------- boxes


def numbered(boxes, scores=None, labels=None, box_size: int = 7) -> DeviceBoxes:
    """Boxes by descending score, unless `scores` says otherwise, whose z is their number."""
    count = len(boxes)
    scores = torch.linspace(0.9, 0.1, count) if scores is None else torch.tensor(scores)
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else torch.tensor(labels)
    boxes = torch.nn.functional.pad(torch.tensor(boxes, dtype=torch.float32), (0, box_size - 7))
    boxes[:, 2] = torch.arange(count)
    return DeviceBoxes(*(x.to(DEVICE) for x in (boxes, scores, labels, torch.ones(count, dtype=torch.bool))))


def chain(count: int) -> list[list[float]]:
    """Boxes in a row, each overlapping the next: their IoU is 1 / 7."""
    return [[3.0 * i, 0, 0, 4, 2, 1.5, 0] for i in range(count)]


IDENTICAL = [[1.0, 2.0, 0, 4, 2, 1.5, 0.3]] * 40


# ---------------------------------------------------------------------------------------------------- what is expected


def assert_same_boxes(rows, maps: HeadMaps, model: ModelConfig, config: PostprocessConfig) -> Boxes3D:
    """Rows of every cloud hold the boxes that `postprocess` finds in the maps; gives the first cloud's."""
    results = [
        assert_same_as_suppressed(own, decode(maps, model, config, cloud), model, config)
        for cloud, own in enumerate(rows)
    ]
    return results[0]


def assert_same_as_suppressed(
    rows: np.ndarray, candidates: DeviceBoxes, model: ModelConfig, config: PostprocessConfig
) -> Boxes3D:
    """Rows of a cloud hold what is left of the candidates; gives these boxes."""
    found, left = boxes_from_rows(rows, model, config), suppress(candidates, model, config)
    boxes, scores, labels = (part[left.keep].cpu().numpy() for part in (left.boxes, left.scores, left.labels))
    assert found.labels.tolist() == labels.tolist()
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.class_names == model.class_names
    np.testing.assert_allclose(found.scores, scores, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found.boxes, boxes, rtol=2e-6, atol=4e-6)
    return found


class SuppressionCases:
    """Tests of whoever decodes maps and suppresses boxes, which `check` compares with `postprocess`."""

    def check(self, maps: HeadMaps, model: ModelConfig, config: PostprocessConfig) -> Boxes3D:
        """Gives the first cloud's boxes, after a comparison of all."""
        raise NotImplementedError

    @pytest.mark.parametrize(("geometry", "seed"), [("exact", 0), ("exact", 1), ("dsvt_release", 2)])
    def test_random_maps(self, geometry, seed):
        found = self.check(center_maps(tiny_config(), seed), tiny_config(), replaced(nms_geometry=geometry))
        assert 5 < len(found) < 60

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_options(self, options):
        self.check(center_maps(tiny_config()), tiny_config(), replaced(**options))

    @pytest.mark.parametrize("classes", ["own", "group"])
    def test_groups_velocities_and_clouds(self, classes):
        found = self.check(*maps_with_velocities(), replaced(nms_classes=classes, max_candidates=40))
        assert found.boxes.shape[1] == 9

    def test_no_box_above_the_threshold(self):
        assert len(self.check(*maps_without_boxes(), CONFIG)) == 0

    @pytest.mark.parametrize("geometry", ["exact", "dsvt_release"])
    def test_proposals(self, geometry):
        """The published quirk is not theirs."""
        config = replaced(score_threshold=0.1, nms_geometry=geometry, max_boxes=(9, 30, 5))
        assert 5 < len(self.check(*proposal_maps(), config)) < 45
