"""Boxes of peaks and their suppression against `postprocess`."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from tiny import tiny_config, tiny_proposal_config, tiny_voxel_config

from dsvt_ros.config import PostprocessConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.fused.peaks import PeakFinder, Peaks, least_logit
from dsvt_ros.fused.suppress import Suppressor, boxes_from_rows
from dsvt_ros.postprocess import class_groups, decode, suppress
from dsvt_ros.structures import Boxes3D, CenterMaps, DeviceBoxes, ProposalMaps

_interpreter = interpreted("nms", "peaks")
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:divide by zero")]

COLUMNS = {"center": 0, "center_z": 2, "dim": 3, "rot": 6, "iou": 8, "vel": 9}


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


def peaks_of(maps, model, config):
    """The peaks of maps of float32, and what the branches say there."""
    groups = class_groups(model)
    sizes = [len(group) for group in groups]
    cells = maps.heatmap.shape[2] * maps.heatmap.shape[3]
    peaks = PeakFinder(sizes, config.max_candidates, DEVICE)(maps.heatmap.half(), least_logit(config.score_threshold))
    cell = (peaks.index.long().clamp_min(0) % cells)[:, :, None]
    parts = []
    for name in COLUMNS:
        if (branch := getattr(maps, name)) is not None:
            values = branch.unflatten(1, (len(groups), -1)).flatten(3)
            parts.append(values.gather(3, cell.expand(-1, -1, values.shape[2], -1)).transpose(2, 3))
    values = torch.cat(parts, 3)
    values[peaks.index < 0] = math.nan  # nobody may read them
    return peaks, values.contiguous()


def downloaded(found, model):
    keep = found.keep
    boxes, scores, labels = (values[keep].cpu().numpy() for values in (found.boxes, found.scores, found.labels))
    return Boxes3D(boxes, scores, labels, model.class_names)


def assert_alike(found, expected):
    assert found.labels.tolist() == expected.labels.tolist()
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.class_names == expected.class_names
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=2e-6, atol=4e-6)


def assert_same_boxes(maps, model, config):
    """Of every cloud; gives the first one's."""
    if isinstance(maps, CenterMaps):
        peaks, values = peaks_of(maps, model, config)
        rows = Suppressor(model, config, DEVICE).from_peaks(peaks, values, COLUMNS)
    else:
        found = [decode(maps, model, config, cloud) for cloud in range(len(maps.label))]
        rows = Suppressor(model, config, DEVICE).from_boxes(found)
    results = []
    for cloud in range(len(rows)):
        found = boxes_from_rows(rows[cloud].cpu().numpy(), model, config)
        assert_alike(found, downloaded(suppress(decode(maps, model, config, cloud), model, config), model))
        results.append(found)
    return results[0]


CONFIG = PostprocessConfig(
    score_threshold=0.3, max_candidates=70, iou_rectifier=(0.68, 0.71, 0.65), nms_iou=(0.3, 0.2, 0.1)
)


@pytest.mark.parametrize(("geometry", "seed"), [("exact", 0), ("exact", 1), ("dsvt_release", 2)])
def test_random_maps(geometry, seed):
    found = assert_same_boxes(center_maps(tiny_config(), seed), tiny_config(), replaced(nms_geometry=geometry))
    assert 5 < len(found) < 60


def test_repeated_runs_give_the_same_bytes():
    model = tiny_config()
    peaks, values = peaks_of(center_maps(model), model, CONFIG)
    suppressor = Suppressor(model, CONFIG, DEVICE)
    rows, again = (suppressor.from_peaks(peaks, values, COLUMNS) for _ in range(2))
    assert torch.equal(rows.view(torch.int32), again.view(torch.int32))


def replaced(**options):
    return dataclasses.replace(CONFIG, **options)


@pytest.mark.parametrize(
    "options",
    [
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


def test_equal_logits_and_identical_boxes():
    """Of each class, the first of equal scores stays."""
    model = tiny_config()
    maps = center_maps(model, mean=-9.0, spread=0.0)
    maps.heatmap[0, :, 3:7, 4:8] = 1.0
    for branch in (maps.center, maps.center_z, maps.dim, maps.rot, maps.iou):
        branch.zero_()
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    maps.center.copy_(8 - torch.stack([x, y]).to(DEVICE))
    found = assert_same_boxes(maps, model, CONFIG)
    assert found.labels.tolist() == [0, 1, 2]
    assert len(assert_same_boxes(maps, model, replaced(nms_classes="group"))) == 1


def test_peaks_at_the_border():
    model = tiny_config()
    maps = center_maps(model, mean=-9.0, spread=0.0)
    for row, column in ((0, 0), (0, 15), (15, 0), (15, 15), (7, 0), (0, 7)):
        maps.heatmap[0, 1, row, column] = 2.0 + row / 16 + column / 64
    assert len(assert_same_boxes(maps, model, CONFIG)) >= 4


def test_angles():
    """All quadrants, the axes and no direction at all; and more boxes than are compared at once."""
    model = tiny_config()
    maps = center_maps(model)
    maps.heatmap[0, 0, 0] += 6
    directions = torch.tensor([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (-1, -0.0), (1, -0.0), (-3, 1e-5), (1e-30, 1)])
    maps.rot[0, :, 0, :9] = directions.T.to(DEVICE)
    maps.dim.fill_(-3.0)
    found = assert_same_boxes(maps, model, replaced(max_candidates=300, nms_iou=(1.0,), score_threshold=0.0))
    assert len(found) == 300


# ------------------------------------------------------------------------------------------------------ decoded boxes


def survivors(boxes, scores=None, labels=None, config=CONFIG, model=None):
    """Numbers of the boxes that are left, ours; checked against torch."""
    count, model = len(boxes), model or tiny_config()
    scores = torch.linspace(0.9, 0.1, count) if scores is None else torch.tensor(scores)
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else torch.tensor(labels)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    boxes[:, 2] = torch.arange(count)  # the number
    found = DeviceBoxes(*(x.to(DEVICE) for x in (boxes, scores, labels, torch.ones(count, dtype=torch.bool))))
    rows = Suppressor(model, config, DEVICE).from_boxes([found])[0].cpu().numpy()
    kept = boxes_from_rows(rows, model, config)
    assert_alike(kept, downloaded(suppress(found, model, config), model))
    return [int(z) for z in kept.boxes[:, 2]]


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100])
def test_a_chain_of_overlaps(count):
    """Boxes in a row, each overlapping the next: every second one survives, whatever the length."""
    config = replaced(nms_iou=(0.1,))
    assert survivors([[3.0 * i, 0, 0, 4, 2, 1.5, 0] for i in range(count)], config=config) == list(range(0, count, 2))


def test_identical_boxes_of_equal_score():
    boxes = [[1.0, 2.0, 0, 4, 2, 1.5, 0.3]] * 40
    assert survivors(boxes, scores=[0.5] * 40) == [0]
    assert survivors(boxes, scores=[0.5] * 40, labels=[i % 2 for i in range(40)]) == [0, 1]
    group = replaced(nms_classes="group")
    assert survivors(boxes, scores=[0.5] * 40, labels=[i % 2 for i in range(40)], config=group) == [0]


@pytest.mark.parametrize("yaw", [0.0, 0.7, -math.pi / 2])
def test_edges_on_a_line(yaw):
    """4 x 2 m boxes, 1 m apart lengthwise: IoU 0.6, though rounding might count the common edges twice or never."""
    boxes = [[0, 0, 0, 4, 2, 1.5, yaw], [math.cos(yaw), math.sin(yaw), 0, 4, 2, 1.5, yaw]]
    assert survivors(boxes, config=replaced(nms_iou=(0.59,))) == [0]
    assert survivors(boxes, config=replaced(nms_iou=(0.61,))) == [0, 1]


def test_boxes_without_extent():
    assert survivors([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 2, 1, 1, 0]]) == [0, 1, 2]


@pytest.mark.parametrize("yaw", [0.0, 0.4, math.pi / 2, 3.0])
def test_turned_squares_and_boxes_far_from_the_origin(yaw):
    """A square turned by 45 degrees in itself: the IoU is 1 / sqrt(2)."""
    boxes = [[70.0, -70.0, 0, 2, 2, 1.5, yaw], [70.0, -70.0, 0, 2, 2, 1.5, yaw + math.pi / 4]]
    assert survivors(boxes, config=replaced(nms_iou=(0.70,))) == [0]
    assert survivors(boxes, config=replaced(nms_iou=(0.715,))) == [0, 1]


def proposal_maps(model, clouds=2):
    torch.manual_seed(0)
    count, classes = model.head.num_proposals, len(model.class_names)
    width, height = model.map_size

    def draw(channels, mean=0.0, spread=1.0):
        return torch.randn(clouds, channels, count, device=DEVICE) * spread + mean

    return ProposalMaps(
        label=torch.randint(0, classes, (clouds, count), device=DEVICE),
        cell=torch.randint(0, width * height, (clouds, count), device=DEVICE),
        peak=torch.rand(clouds, count, device=DEVICE),
        heatmap=draw(classes), center=draw(2), height=draw(1), dim=draw(3, 1.0, 0.3), rot=draw(2), vel=draw(2),
        iou=draw(1),
    )  # fmt: skip


@pytest.mark.parametrize("geometry", ["exact", "dsvt_release"])
def test_proposals(geometry):
    """The published quirk is not theirs."""
    model = tiny_proposal_config()
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, num_proposals=70))
    config = replaced(score_threshold=0.1, nms_geometry=geometry, max_boxes=(9, 30, 5))
    assert 5 < len(assert_same_boxes(proposal_maps(model), model, config)) < 45


def test_too_many_candidates():
    with pytest.raises(ConfigError, match="at most 1024 candidates a group can be suppressed here, not 1025"):
        Suppressor(tiny_config(), PostprocessConfig(max_candidates=1025), DEVICE)


def test_peaks_beyond_the_count_are_not_read():
    """NaN there leaves no trace in the rows."""
    model, config = tiny_config(), CONFIG
    index = torch.full((1, 1, 40), -1, dtype=torch.int32, device=DEVICE)
    logit = torch.full((1, 1, 40), -math.inf, device=DEVICE)
    index[..., 0], logit[..., 0] = 300, 2.0
    values = torch.full((1, 1, 40, 9), math.nan, device=DEVICE)
    values[0, 0, 0] = 0.25
    rows = Suppressor(model, config, DEVICE).from_peaks(Peaks(index, logit), values, COLUMNS)
    assert torch.isfinite(rows).all()
    assert rows[0, :, -1].tolist() == [1.0] + [0.0] * 39
