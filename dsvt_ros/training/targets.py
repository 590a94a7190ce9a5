"""What the head should say: heatmaps with a peak a box, and the regression values at the peaks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig

# Objects with fewer points are neither taught nor punished: nobody could tell them from noise.
MIN_POINTS = 3
# Reach of a peak in cells: CenterPoint's least radius, and a share of the object's size.
MIN_RADIUS, MAX_RADIUS, RADIUS_SHARE = 2, 5, 0.66


@dataclass(frozen=True)
class Targets:
    """Targets of B scans with M taught boxes in all.

    Attributes:
        heatmap: (B, classes, H, W), 1 at a centre's cell and a Gaussian around it.
        weight: (B, classes, H, W), 0 where an object with too few points may lie.
        cell: (M,) int64, flat cell ``(scan * H + row) * W + column`` of each box's centre.
        box: (M, 7) true boxes.
        regression: (M, 8) center (2), center_z, dim (3), rot (2), as in `CenterMaps`.
    """

    heatmap: Tensor
    weight: Tensor
    cell: Tensor
    box: Tensor
    regression: Tensor


def make_targets(
    boxes: Tensor, labels: Tensor, num_points: Tensor, scan: Tensor, batch_size: int, model: ModelConfig
) -> Targets:
    """Targets for the boxes of B scans.

    Args:
        boxes: (M, 7) true boxes in the model's frame; centres outside the range are left out.
        labels: (M,) int64 classes.
        num_points: (M,) returns on each object.
        scan: (M,) int64 index of each box's scan.
        batch_size: B.
        model: Gives range, voxel size and stride.
    """
    nx, ny, _ = model.grid_size
    columns, rows = nx // model.output_stride, ny // model.output_stride
    step = boxes.new_tensor(model.voxel_size[:2]) * model.output_stride
    position = (boxes[:, :2] - boxes.new_tensor(model.point_cloud_range[:2])) / step
    inside = ((position >= 0) & (position < position.new_tensor([columns, rows]))).all(1)
    boxes, labels, num_points, scan, position = (
        values[inside] for values in (boxes, labels, num_points, scan, position)
    )

    reach = torch.arange(-MAX_RADIUS, MAX_RADIUS + 1, device=boxes.device)
    dy, dx = (d.reshape(1, -1) for d in torch.meshgrid(reach, reach, indexing="ij"))
    corner = position.floor().long()
    column, row = corner[:, :1] + dx, corner[:, 1:] + dy
    radius = (RADIUS_SHARE * torch.sqrt(boxes[:, 3] * boxes[:, 4]) / step[0]).round().clamp(MIN_RADIUS, MAX_RADIUS)
    sigma = (2 * radius[:, None] + 1) / 6
    peak = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    near = (dx.abs() <= radius[:, None]) & (dy.abs() <= radius[:, None])
    near &= (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    channel = scan * len(model.class_names) + labels
    index = (channel[:, None] * rows + row) * columns + column

    taught = num_points >= MIN_POINTS
    shape = (batch_size, len(model.class_names), rows, columns)
    heatmap = boxes.new_zeros(shape).view(-1)
    drawn = near & taught[:, None]
    heatmap = heatmap.scatter_reduce(0, index[drawn], peak[drawn], "amax")
    weight = boxes.new_ones(shape).view(-1)
    weight[index[near & ~taught[:, None]]] = 0
    weight = torch.where(heatmap > 0, torch.ones_like(weight), weight)

    offset = position - corner
    yaw = boxes[:, 6:7]
    regression = torch.cat([offset, boxes[:, 2:3], boxes[:, 3:6].log(), torch.cos(yaw), torch.sin(yaw)], dim=1)
    cell = (scan * rows + corner[:, 1]) * columns + corner[:, 0]
    return Targets(heatmap.view(shape), weight.view(shape), cell[taught], boxes[taught], regression[taught])
