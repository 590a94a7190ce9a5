"""From a cloud as received to the points that the network sees: sensor pose, missing returns, scaling."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.constants import constant
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


def ground_height(points: Tensor) -> Tensor:
    """Estimate the height of the ground at the origin of a cloud, m.

    From 2 to 20 m around the origin the plane is sought, level or sloping by up to 4 degrees along x and y, on which
    most cells of 1 m and 3 degrees have their lowest returns, give or take 0.1 m. A tenth of a cell's returns may lie
    below it: reflections do. Cells count alike, so nearby walls, hedges and vehicles weigh no more than the bare ground
    around them, however many returns they give; and a slope does not smear the ground over several heights.

    Meant for ground between 5 m below the origin and 3 m above it. Level ground is found within some centimetres;
    slopes, kerbs, bumps, and clouds that show one side only cost up to 0.2 m. Without ground in sight it is the
    height of whatever resembles it most, and nothing tells.

    Args:
        points: (N, C) in a frame whose z axis is up to a few degrees. Rows that are not finite count for nothing.

    Returns:
        0-dimensional, on the device of the points, without waiting for it; 0 where no point is near. The same points
        give the same height in any order.
    """
    low, x, y = _low_returns(points)
    tilts_deg = torch.arange(-_MAX_TILT_DEG, _MAX_TILT_DEG + 1, dtype=low.dtype, device=low.device)
    tilts_deg = torch.cartesian_prod(tilts_deg, tilts_deg)
    slopes = torch.tan(torch.deg2rad(tilts_deg))
    heights = low - slopes[:, :1] * x - slopes[:, 1:] * y  # at the origin, of planes through the cells
    layers, is_inside = _layers(heights)
    first = torch.arange(len(slopes), device=low.device)[:, None] * _NUM_LAYERS
    votes = low.new_zeros(len(slopes) * _NUM_LAYERS)
    votes = votes.index_add(0, (first + layers).flatten(), is_inside.to(low.dtype).flatten()).view(-1, _NUM_LAYERS)
    # Two neighbouring layers, since the ground may straddle a boundary; of planes as good the most level one.
    votes = (votes[:, :-1] + votes[:, 1:]) * (1 - 0.01 * tilts_deg.abs().sum(1, keepdim=True))
    best = votes.argmax()
    boundary = (best % (_NUM_LAYERS - 1) + 1) * _LAYER_M + _LOWEST_M
    # Indexing by `best` itself would wait for the device.
    heights = heights.index_select(0, (best // (_NUM_LAYERS - 1)).view(1))
    is_ground = (heights - boundary).abs() <= _LAYER_M
    return torch.where(is_ground, heights, 0.0).sum() / is_ground.sum().clamp_min(1)


_NEAR_M, _RING_M, _NUM_RINGS, _NUM_SECTORS = 2.0, 1.0, 18, 120
_LOWEST_M, _LAYER_M, _NUM_LAYERS = -5.0, 0.1, 80
_MAX_TILT_DEG = 4


def _layers(heights: Tensor) -> tuple[Tensor, Tensor]:
    """The horizontal layer that each height is in, and whether it is in one; the layer is 0 or the last if not."""
    layers = ((heights - _LOWEST_M) / _LAYER_M).floor()
    is_inside = (layers >= 0) & (layers < _NUM_LAYERS)
    return layers.nan_to_num().clamp(0, _NUM_LAYERS - 1).long(), is_inside


def _low_returns(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low returns around the origin: (cells,) heights, +inf in empty cells, and x and y of the cells' centres."""
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    rings = ((torch.hypot(x, y) - _NEAR_M) / _RING_M).floor()
    layers, is_inside = _layers(z)
    is_inside &= (rings >= 0) & (rings < _NUM_RINGS)
    sector_rad = 2 * math.pi / _NUM_SECTORS
    sectors = ((torch.atan2(y, x) + math.pi) / sector_rad).nan_to_num().clamp(0, _NUM_SECTORS - 1).long()
    cells = rings.nan_to_num().clamp(0, _NUM_RINGS - 1).long() * _NUM_SECTORS + sectors

    # Whole numbers and minima come out the same in whatever order a GPU takes the points.
    num_cells = _NUM_RINGS * _NUM_SECTORS
    counts = torch.zeros(num_cells * _NUM_LAYERS, dtype=torch.int32, device=z.device)
    counts = counts.index_add(0, cells * _NUM_LAYERS + layers, is_inside.int()).view(num_cells, _NUM_LAYERS)
    counts = counts.cumsum(1)
    lowest_layer = (10 * counts <= counts[:, -1:]).sum(1)
    is_inside &= layers >= lowest_layer[cells]
    heights = torch.where(is_inside, z, math.inf)
    low = z.new_full((num_cells,), math.inf).scatter_reduce(0, cells, heights, "amin")

    rings = torch.arange(_NUM_RINGS, device=z.device).repeat_interleave(_NUM_SECTORS)
    sectors = torch.arange(_NUM_SECTORS, device=z.device).repeat(_NUM_RINGS)
    distances, angles = _NEAR_M + (rings + 0.5) * _RING_M, (sectors + 0.5) * sector_rad - math.pi
    return low, distances * torch.cos(angles), distances * torch.sin(angles)


def boxes_to_source(boxes: Boxes3D, T_model_source: NDArray[np.float64]) -> Boxes3D:  # noqa: N803
    """Bring boxes of the model's frame back into the frame that the cloud came in.

    The heading is rotated as a vector; a box stays upright in the frame that it is given in, so a tilted sensor's
    boxes lean by that tilt.
    """
    if np.array_equal(T_model_source, np.eye(4)):
        return boxes
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
