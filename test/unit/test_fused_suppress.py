"""Boxes of peaks and their suppression against `postprocess`."""

import math

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from maps_at_peaks import maps_at
from overlapping_boxes import (
    COLUMNS,
    CONFIG,
    IDENTICAL,
    SuppressionCases,
    assert_same_as_suppressed,
    assert_same_boxes,
    center_maps,
    chain,
    numbered,
    replaced,
)
from tiny import tiny_config

from dsvt_ros.config import PostprocessConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.fused.peaks import PeakFinder, Peaks, least_logit
from dsvt_ros.fused.suppress import Suppressor
from dsvt_ros.postprocess import class_groups, decode
from dsvt_ros.structures import CenterMaps

_interpreter = interpreted("nms", "peaks")
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore:divide by zero")]


def peaks_of(maps, model, config):
    """The peaks of maps of float32, and what the branches say there."""
    sizes = [len(group) for group in class_groups(model)]
    peaks = PeakFinder(sizes, config.max_candidates, DEVICE)(maps.heatmap.half(), least_logit(config.score_threshold))
    values = maps_at(maps, [name for name in COLUMNS if getattr(maps, name) is not None], peaks.index)
    values[peaks.index < 0] = math.nan  # nobody may read them
    return peaks, values.contiguous()


def check(maps, model, config):
    """Gives the first cloud's boxes."""
    suppressor = Suppressor(model, config, DEVICE)
    if isinstance(maps, CenterMaps):
        rows = suppressor.from_peaks(*peaks_of(maps, model, config), COLUMNS)
    else:
        rows = suppressor.from_boxes([decode(maps, model, config, cloud) for cloud in range(len(maps.label))])
    return assert_same_boxes(rows.cpu().numpy(), maps, model, config)


class TestSuppression(SuppressionCases):
    check = staticmethod(check)


def test_repeated_runs_give_the_same_bytes():
    model = tiny_config()
    peaks, values = peaks_of(center_maps(model), model, CONFIG)
    suppressor = Suppressor(model, CONFIG, DEVICE)
    rows, again = (suppressor.from_peaks(peaks, values, COLUMNS) for _ in range(2))
    assert torch.equal(rows.view(torch.int32), again.view(torch.int32))


def test_equal_logits_and_identical_boxes():
    """Of each class, the first of equal scores stays."""
    model = tiny_config()
    maps = center_maps(model, mean=-9.0, spread=0.0)
    maps.heatmap[0, :, 3:7, 4:8] = 1.0
    for branch in (maps.center, maps.center_z, maps.dim, maps.rot, maps.iou):
        branch.zero_()
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    maps.center.copy_(8 - torch.stack([x, y]).to(DEVICE))
    found = check(maps, model, CONFIG)
    assert found.labels.tolist() == [0, 1, 2]
    assert len(check(maps, model, replaced(nms_classes="group"))) == 1


def test_peaks_at_the_border():
    model = tiny_config()
    maps = center_maps(model, mean=-9.0, spread=0.0)
    for row, column in ((0, 0), (0, 15), (15, 0), (15, 15), (7, 0), (0, 7)):
        maps.heatmap[0, 1, row, column] = 2.0 + row / 16 + column / 64
    assert len(check(maps, model, CONFIG)) >= 4


def test_angles():
    """All quadrants, the axes and no direction at all; and more boxes than are compared at once."""
    model = tiny_config()
    maps = center_maps(model)
    maps.heatmap[0, 0, 0] += 6
    directions = torch.tensor([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (-1, -0.0), (1, -0.0), (-3, 1e-5), (1e-30, 1)])
    maps.rot[0, :, 0, :9] = directions.T.to(DEVICE)
    maps.dim.fill_(-3.0)
    found = check(maps, model, replaced(max_candidates=300, nms_iou=(1.0,), score_threshold=0.0))
    assert len(found) == 300


# ------------------------------------------------------------------------------------------------------ decoded boxes


def survivors(boxes, scores=None, labels=None, config=CONFIG):
    """Numbers of the boxes that are left."""
    found = numbered(boxes, scores, labels)
    (rows,) = Suppressor(tiny_config(), config, DEVICE).from_boxes([found]).cpu().numpy()
    return [int(z) for z in assert_same_as_suppressed(rows, found, tiny_config(), config).boxes[:, 2]]


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100])
def test_a_chain_of_overlaps(count):
    """Every second box survives, whatever the length."""
    assert survivors(chain(count), config=replaced(nms_iou=(0.1,))) == list(range(0, count, 2))


def test_identical_boxes_of_equal_score():
    scores, labels = [0.5] * 40, [i % 2 for i in range(40)]
    assert survivors(IDENTICAL, scores) == [0]
    assert survivors(IDENTICAL, scores, labels) == [0, 1]
    assert survivors(IDENTICAL, scores, labels, replaced(nms_classes="group")) == [0]


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
