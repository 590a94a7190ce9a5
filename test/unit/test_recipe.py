import dataclasses
import math

import pytest
import torch

from dsvt_ros.config import DetectorConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.training.recipe import TrainConfig, augment, train
from dsvt_ros.training.simulator import Scan


def scan_of_boxes():
    """Two scans with one box each, and the points at the boxes' corners and centres."""
    boxes = torch.tensor([[12.0, 3.0, 0.8, 4.0, 2.0, 1.6, 0.5], [-8.0, 20.0, 0.9, 0.8, 0.6, 1.8, -1.0]])
    unit = torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, -0.5], [-0.5, 0.5, -0.5]])
    points = []
    for box in boxes:
        local = unit * box[3:6]
        cos, sin = torch.cos(box[6]), torch.sin(box[6])
        x, y = local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos
        points.append(torch.stack([x, y, local[:, 2]], 1) + box[:3])
    index = torch.arange(2).repeat_interleave(len(unit))
    return Scan(
        points=torch.cat([torch.cat(points), torch.rand(8, 1)], 1),
        batch_index=index,
        boxes=boxes,
        labels=torch.tensor([0, 1]),
        box_batch_index=torch.arange(2),
        num_points=torch.tensor([4, 4]),
        occlusion=torch.zeros(2),
        object_index=index,
        batch_size=2,
    )


@pytest.mark.parametrize("seed", range(8))
def test_points_stay_on_their_boxes(seed):
    """Whatever is turned, mirrored or scaled: corners stay corners of the moved box, and lost points are counted."""
    before = scan_of_boxes()
    after = augment(before, 0.2, torch.Generator().manual_seed(seed))
    assert after.num_points.tolist() == [int((after.object_index == i).sum()) for i in range(2)]
    for point, owner in zip(after.points, after.object_index, strict=True):
        box = after.boxes[owner]
        offset = point[:3] - box[:3]
        cos, sin = torch.cos(box[6]), torch.sin(box[6])
        local = torch.stack([offset[0] * cos + offset[1] * sin, offset[1] * cos - offset[0] * sin, offset[2]])
        share = (local / box[3:6]).abs()
        assert torch.allclose(share, torch.zeros(3), atol=1e-4) or torch.allclose(
            share, torch.full((3,), 0.5), atol=1e-4
        )


def test_augmentation_leaves_its_input_alone():
    before = scan_of_boxes()
    copies = before.points.clone(), before.boxes.clone()
    augment(before, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(before.points, copies[0])
    assert torch.equal(before.boxes, copies[1])


def test_augmentation_has_every_effect():
    before = scan_of_boxes()
    boxes = torch.stack([augment(before, 0.2, torch.Generator().manual_seed(seed)).boxes[0] for seed in range(64)])
    scale = boxes[:, 3] / before.boxes[0, 3]
    assert scale.min() < 0.92
    assert scale.max() > 1.02
    turn = torch.remainder(boxes[:, 6] - before.boxes[0, 6] + math.pi, 2 * math.pi) - math.pi
    assert turn.min() < -0.5
    assert turn.max() > 0.5
    assert boxes[:, 2].std() > 0.1


def test_training_learns_and_repeats(tmp_path):
    """Two steps on the CPU: the files appear, load, and a second run gives the same weights."""
    model = dataclasses.replace(open_model("demo").model, point_cloud_range=(-25.6, -25.6, -2.0, 25.6, 25.6, 4.0))
    config = TrainConfig(steps=2, batch_size=1, repeats=2, workers=0, validate_every=2, validation_scenes=1)
    lines = []
    device = torch.device("cpu")
    first = train(model, DetectorConfig(), config, tmp_path / "a", device, lines.append)
    assert any(line.startswith("validation") for line in lines)
    assert (tmp_path / "a" / "log.json").is_file()
    second = train(model, DetectorConfig(), config, tmp_path / "b", device, lines.append)
    assert first.read_bytes() == second.read_bytes()
    other = dataclasses.replace(config, seed=1)
    third = train(model, DetectorConfig(), other, tmp_path / "c", device, lines.append)
    assert first.read_bytes() != third.read_bytes()
