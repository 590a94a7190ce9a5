import dataclasses
import math

import numpy as np
import pytest
import torch

from dsvt_ros.box_geometry import iou_matrix
from dsvt_ros.config import PostprocessConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.postprocess import decode, suppress
from dsvt_ros.structures import CenterMaps, DeviceBoxes


@pytest.fixture(scope="module")
def model():
    return open_model("demo").model


def empty_maps(size=160):
    def zeros(channels):
        return torch.zeros(1, channels, size, size)

    return CenterMaps(zeros(3) - 20, zeros(2), zeros(1), zeros(3), zeros(2), None, zeros(1))


def test_decode_one_peak_by_hand(model):
    maps = empty_maps()
    row, column = 100, 30
    maps.heatmap[0, 1, row, column] = math.log(0.8 / 0.2)
    maps.center[0, :, row, column] = torch.tensor([0.25, 0.5])
    maps.center_z[0, 0, row, column] = 0.9
    maps.dim[0, :, row, column] = torch.log(torch.tensor([0.8, 0.7, 1.75]))
    maps.rot[0, :, row, column] = torch.tensor([math.cos(2.0), math.sin(2.0)])
    maps.iou[0, 0, row, column] = 0.0
    found = decode(maps, model, PostprocessConfig(score_threshold=0.5, iou_rectifier=(0.3, 0.5, 0.3)))
    assert int(found.keep.sum()) == 1
    # A cell is 0.64 m: x = (30 + 0.25) * 0.64 - 51.2. IoU 0 stands for (0 + 1) / 2.
    expected = [30.25 * 0.64 - 51.2, 100.5 * 0.64 - 51.2, 0.9, 0.8, 0.7, 1.75, 2.0]
    np.testing.assert_allclose(found.boxes[0], expected, atol=1e-5)
    assert found.labels[0] == 1
    assert found.scores[0].item() == pytest.approx(0.8**0.5 * 0.5**0.5)


def test_threshold_is_on_the_unrectified_score(model):
    maps = empty_maps()
    maps.heatmap[0, 0, 5, 5] = math.log(0.4 / 0.6)
    maps.iou[0, 0, 5, 5] = -1.0
    config = PostprocessConfig(score_threshold=0.3, iou_rectifier=(0.5,))
    found = decode(maps, model, config)
    assert found.keep.tolist().count(True) == 1
    assert found.scores[0] == 0


def test_center_range(model):
    maps = empty_maps()
    maps.heatmap[0, 0, 80, 10] = 3.0
    maps.heatmap[0, 0, 80, 90] = 3.0
    config = PostprocessConfig(center_range=(0, -60, -5, 60, 60, 5))
    found = decode(maps, model, config)
    assert (found.boxes[found.keep, 0] > 0).tolist() == [True]


def random_candidates(seed, count=200):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform([-10, -10, 0, 3, 1.5, 1, -3], [10, 10, 1, 5, 2, 2, 3], (count, 7))
    return DeviceBoxes(
        torch.as_tensor(boxes, dtype=torch.float32),
        torch.as_tensor(rng.permutation(count) / count, dtype=torch.float32),
        torch.as_tensor(rng.integers(0, 3, count)),
        torch.as_tensor(rng.random(count) < 0.9),
    )


@pytest.mark.parametrize("geometry", ["exact", "dsvt_release"])
@pytest.mark.parametrize("seed", range(5))
def test_suppress_is_greedy(model, seed, geometry):
    candidates = random_candidates(seed)
    config = PostprocessConfig(nms_iou=(0.1, 0.3, 0.5), nms_geometry=geometry)
    result = suppress(candidates, model, config)

    turned = candidates.boxes.clone()
    if geometry == "dsvt_release":
        turned[:, 6] += math.pi / 2
    overlap = iou_matrix(turned, turned, bev=True)
    expected = []
    for label, limit in enumerate(config.nms_iou):
        kept = []
        for i in torch.argsort(candidates.scores, descending=True).tolist():
            if candidates.keep[i] and candidates.labels[i] == label and all(overlap[j, i] <= limit for j in kept):
                kept.append(i)
        expected += [(label, round(candidates.scores[i].item(), 6)) for i in kept]
    ours = [
        (int(label), round(score.item(), 6))
        for label, score in zip(result.labels[result.keep], result.scores[result.keep], strict=True)
    ]
    assert ours == expected


def test_geometries_differ_as_the_release_does(model):
    """4 x 2 m boxes, 1 m apart lengthwise: IoU 0.6, but 0.333 where each box is turned by 90 degrees."""
    boxes = torch.tensor([[0, 0, 0, 4, 2, 1.5, 0], [1, 0, 0, 4, 2, 1.5, 0]], dtype=torch.float32)
    pair = DeviceBoxes(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), torch.tensor([True, True]))
    config = PostprocessConfig(nms_iou=(0.5,))
    assert int(suppress(pair, model, config).keep.sum()) == 1
    released = dataclasses.replace(config, nms_geometry="dsvt_release")
    assert int(suppress(pair, model, released).keep.sum()) == 2


@pytest.mark.parametrize("count", [1, 2, 5, 6, 30])
def test_a_chain_of_overlaps(model, count):
    """Boxes in a row, each overlapping the next: every second one survives, whatever the length."""
    boxes = torch.tensor([[3.0 * i, 0, 0, 4, 2, 1.5, 0] for i in range(count)])
    candidates = DeviceBoxes(
        boxes, torch.linspace(0.9, 0.1, count), torch.zeros(count, dtype=torch.int64), torch.ones(count).bool()
    )
    assert suppress(candidates, model, PostprocessConfig(nms_iou=(0.1,))).keep.tolist() == [
        i % 2 == 0 for i in range(count)
    ]


def test_nothing_to_suppress(model):
    none = random_candidates(0, 0)
    assert len(suppress(none, model, PostprocessConfig()).boxes) == 0
