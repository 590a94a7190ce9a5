"""From a cloud as received to the points that the network sees: sensor pose, missing returns, scaling."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.structures import Boxes3D


def is_return(points: Tensor, config: PreprocessConfig) -> Tensor:
    """(N,) bool: which of (N, C) points in the sensor's frame are returns: finite, and no nearer than `min_range`."""
    xyz = points[:, :3]
    return torch.isfinite(xyz).all(1) & ((xyz * xyz).sum(1) >= config.min_range**2)


def drop_missing(points: Tensor, model: ModelConfig, config: PreprocessConfig) -> Tensor:
    """Drop points that are no returns: NaN or infinite coordinates (REP 117), or nearer than `min_range`.

    Other columns that are not finite take the fill value of their feature.

    Args:
        points: (N, C) float32 in the sensor's frame.
        model: Gives the fill values.
        config: Gives `min_range`.

    Returns:
        (M, C) with M <= N.
    """
    points = points[is_return(points, config)]
    fill = points.new_tensor([feature.fill for feature in model.features])
    return torch.where(torch.isfinite(points), points, fill)


def scale_features(points: Tensor, model: ModelConfig, config: PreprocessConfig) -> Tensor:
    """Bring the columns after x, y, z to the values that the network was trained on."""
    if not config.scale_features:
        return points
    columns = []
    for i, feature in enumerate(model.features):
        column = points[:, i]
        if feature.name == "intensity" and config.intensity_scale != 1.0:
            column = column * config.intensity_scale
        columns.append(torch.tanh(column) if feature.scale == "tanh" else column)
    return torch.stack(columns, dim=1)


def transform(points: Tensor, T_target_source: Tensor) -> Tensor:  # noqa: N803
    """Move (N, C) points into another frame by a (4, 4) transform; the columns after x, y, z stay."""
    xyz = points[:, :3] @ T_target_source[:3, :3].T + T_target_source[:3, 3]
    return torch.cat([xyz, points[:, 3:]], dim=1)


def ground_height(points: Tensor) -> Tensor:
    """Estimate the height of the ground around the sensor, m, as a 0-dimensional tensor.

    Around a vehicle the ground returns most points, all within a thin layer, while walls and objects spread over
    their height: the fullest layer of 0.1 m within 25 m is the ground. Points are weighted by their distance, since
    the density of returns falls with it. 0 for an empty neighbourhood.
    """
    bins, thickness_m, lowest_m = 80, 0.1, -5.0
    distance = torch.linalg.vector_norm(points[:, :2], dim=1)
    weight = torch.where((distance > 2.0) & (distance < 25.0), distance, torch.zeros_like(distance))
    layer = ((points[:, 2] - lowest_m) / thickness_m).floor().long()
    weight = torch.where((layer >= 0) & (layer < bins), weight, torch.zeros_like(weight))
    layer = layer.clamp(0, bins - 1)
    total = weight.new_zeros(bins).index_add(0, layer, weight)
    height = weight.new_zeros(bins).index_add(0, layer, weight * points[:, 2])
    # Two neighbouring layers, since the ground may straddle a boundary.
    best = torch.argmax(total[:-1] + total[1:])
    nearby = torch.stack([total[best] + total[best + 1], height[best] + height[best + 1]])
    return torch.where(nearby[0] > 0, nearby[1] / nearby[0].clamp_min(1e-6), nearby[0])


def boxes_to_source(boxes: Boxes3D, T_model_source: NDArray[np.float64]) -> Boxes3D:  # noqa: N803
    """Bring boxes of the model's frame back into the frame that the cloud came in.

    The heading is rotated as a vector; a box stays upright in the frame that it is given in, so a tilted sensor's
    boxes lean by that tilt.
    """
    T_source_model = np.linalg.inv(T_model_source)
    rotation = T_source_model[:3, :3]
    moved = boxes.boxes.astype(np.float64)
    heading = np.stack([np.cos(moved[:, 6]), np.sin(moved[:, 6]), np.zeros(len(moved))])
    heading = rotation @ heading
    moved[:, :3] = moved[:, :3] @ rotation.T + T_source_model[:3, 3]
    moved[:, 6] = np.arctan2(heading[1], heading[0])
    if moved.shape[1] == 9:
        velocity = np.concatenate([moved[:, 7:9], np.zeros((len(moved), 1))], axis=1)
        moved[:, 7:9] = (velocity @ rotation.T)[:, :2]
    return Boxes3D(moved.astype(np.float32), boxes.scores, boxes.labels, boxes.class_names)
