"""Losses of CenterHead (CenterPoint section 4; focal loss of CornerNet section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvt_ros.box_geometry import iou_3d_pairs
from dsvt_ros.config import ModelConfig
from dsvt_ros.structures import CenterMaps
from dsvt_ros.training.targets import Targets

# As in the published Waymo configurations (LOC_WEIGHT).
REGRESSION_WEIGHT = 2.0


@dataclass(frozen=True)
class Losses:
    """Scalars; `total` is what is minimised."""

    heatmap: Tensor
    regression: Tensor
    iou: Tensor
    total: Tensor


def compute_losses(maps: CenterMaps, targets: Targets, model: ModelConfig) -> Losses:
    """Losses of a batch, each averaged over the taught boxes."""
    count = max(len(targets.cell), 1)
    heatmap = focal_loss(maps.heatmap.float(), targets.heatmap, targets.weight) / count

    parts = [maps.center, maps.center_z, maps.dim, maps.rot]
    flat = torch.cat(parts, dim=1).float().permute(0, 2, 3, 1).flatten(0, 2)
    predicted = flat[targets.cell]
    regression = F.l1_loss(predicted, targets.regression, reduction="sum") / count

    iou = heatmap.new_zeros(())
    if maps.iou is not None:
        boxes = _boxes(predicted.detach(), targets, maps, model)
        target = 2 * iou_3d_pairs(boxes, targets.box) - 1
        said = maps.iou.float().flatten()[targets.cell]
        iou = F.smooth_l1_loss(said, target, reduction="sum", beta=0.1) / count
    return Losses(heatmap, regression, iou, heatmap + REGRESSION_WEIGHT * regression + iou)


def focal_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Penalty-reduced focal loss with alpha 2 and beta 4, summed over all cells."""
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    p = log_p.exp()
    positive = (target == 1).to(logits.dtype)
    loss = positive * (1 - p) ** 2 * log_p + (1 - positive) * (1 - target) ** 4 * p**2 * log_q
    return -(loss * weight).sum()


def _boxes(predicted: Tensor, targets: Targets, maps: CenterMaps, model: ModelConfig) -> Tensor:
    """(M, 7) boxes decoded from the (M, 8) regression at the targets' cells."""
    _, _, rows, columns = maps.heatmap.shape
    cell = targets.cell % (rows * columns)
    corner = torch.stack([cell % columns, cell // columns], dim=1)
    step = predicted.new_tensor(model.voxel_size[:2]) * model.output_stride
    center = (corner + predicted[:, :2]) * step + predicted.new_tensor(model.point_cloud_range[:2])
    yaw = torch.atan2(predicted[:, 7:8], predicted[:, 6:7])
    # Early in training a size can be anything; a box of 50 m is wrong enough.
    size = predicted[:, 3:6].clamp(-4, 4).exp()
    return torch.cat([center, predicted[:, 2:3], size, yaw], dim=1)
