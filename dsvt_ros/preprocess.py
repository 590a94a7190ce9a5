"""From a cloud as received to the points that the network sees: sensor pose, missing returns, scaling."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.constants import constant
from dsvt_ros.structures import Boxes3D

_IDENTITY = np.eye(4)


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
    fill = constant([feature.fill for feature in model.features], points)
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


def boxes_to_source(boxes: Boxes3D, T_model_source: NDArray[np.float64]) -> Boxes3D:  # noqa: N803
    """Bring boxes of the model's frame back into the frame that the cloud came in.

    The heading is rotated as a vector; a box stays upright in the frame that it is given in, so a tilted sensor's
    boxes lean by that tilt.
    """
    if (T_model_source == _IDENTITY).all():
        return boxes
    T_source_model = np.linalg.inv(T_model_source)
    rotation = T_source_model[:3, :3]
    level = rotation[:2, :2]  # headings and velocities have no part along z, and that of the result is dropped
    moved = boxes.boxes.astype(np.float64)
    cos, sin = level @ [np.cos(moved[:, 6]), np.sin(moved[:, 6])]
    moved[:, :3] = moved[:, :3] @ rotation.T + T_source_model[:3, 3]
    moved[:, 6] = np.arctan2(sin, cos)
    if moved.shape[1] == 9:
        moved[:, 7:9] = moved[:, 7:9] @ level.T
    return Boxes3D(moved.astype(np.float32), boxes.scores, boxes.labels, boxes.class_names)
