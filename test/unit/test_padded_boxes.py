"""Boxes of fixed capacity and their suppression against `postprocess`."""

import numpy as np
import pytest
from fused_fixtures import DEVICE
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
    proposal_model,
    replaced,
)
from tiny import tiny_config

from dsvt_ros.fused.structures import PeakMaps
from dsvt_ros.padded.boxes import PaddedBoxFinder
from dsvt_ros.structures import CenterMaps


class MapsHead:
    """Stands for the branches at peaks: reads maps."""

    def __init__(self, maps):
        self._maps = maps
        self.columns = {name: COLUMNS[name] for name in COLUMNS if getattr(maps, name) is not None}

    def at_peaks(self, shared, index):
        return maps_at(self._maps, self.columns, index)


def rows_of(finder, found, clouds):
    """Rows of a frame's output as in host memory."""
    rows = finder.suppress(found, clouds).cpu().numpy()
    assert rows.shape[::2] == (clouds, finder.columns)
    return finder.settle(rows)


def check(maps, model, config):
    """Gives the first cloud's boxes."""
    if isinstance(maps, CenterMaps):
        finder = PaddedBoxFinder(model, config, MapsHead(maps), DEVICE)
        clouds, given = len(maps.heatmap), PeakMaps(maps.heatmap.half(), maps.heatmap)
    else:
        finder, clouds, given = PaddedBoxFinder(model, config, None, DEVICE), len(maps.label), maps
    return assert_same_boxes(rows_of(finder, finder.find(given), clouds), maps, model, config)


class TestSuppression(SuppressionCases):
    check = staticmethod(check)

    def test_more_candidates_than_kernels_take(self):
        check(center_maps(tiny_config()), tiny_config(), replaced(max_candidates=4096))


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
    model = proposal_model(len(boxes))
    found = numbered(boxes, labels=labels, box_size=model.box_size)
    (rows,) = rows_of(PaddedBoxFinder(model, config, None, DEVICE), found, 1)
    return sorted(int(z) for z in assert_same_as_suppressed(rows, found, model, config).boxes[:, 2])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100])
def test_a_chain_of_overlaps(count):
    """Every second box survives, whatever the length."""
    assert survivors(chain(count), config=replaced(nms_iou=(0.1,))) == list(range(0, count, 2))


def test_identical_boxes():
    labels = [i % 2 for i in range(40)]
    assert survivors(IDENTICAL) == [0]
    assert survivors(IDENTICAL, labels) == [0, 1]
    assert survivors(IDENTICAL, labels, replaced(nms_classes="group")) == [0]
