"""Head maps to boxes: peaks, decoding, score rectification and non-maximum suppression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvt_ros.box_geometry import iou_matrix
from dsvt_ros.config import ModelConfig, PostprocessConfig
from dsvt_ros.model.center_head import HeadMaps
from dsvt_ros.structures import DeviceBoxes


def decode(maps: HeadMaps, model: ModelConfig, config: PostprocessConfig, cloud: int = 0) -> DeviceBoxes:
    """Turn the highest peaks of one cloud's heatmaps into boxes (OpenPCDet ``decode_bbox_from_heatmap``).

    A centre lies at ``(column + offset) * cell + minimum``; the cell's centre is not added. The threshold applies to
    the heatmap's score, before rectification.

    Args:
        maps: Raw maps of B clouds.
        model: Gives range, voxel size and classes.
        config: Threshold, number of candidates, rectifier and limits of the centre.
        cloud: Which of the B clouds.

    Returns:
        `max_candidates` boxes by descending heatmap score.
    """
    heatmap = maps.heatmap[cloud].float().sigmoid()
    _, rows, columns = heatmap.shape
    count = min(config.max_candidates, heatmap.numel())
    score, index = torch.topk(heatmap.reshape(-1), count)
    label = index // (rows * columns)
    cell = index % (rows * columns)

    def at_peaks(values: Tensor) -> Tensor:
        return values[cloud].float().flatten(1)[:, cell].T

    step = score.new_tensor(model.voxel_size[:2]) * model.output_stride
    corner = torch.stack([cell % columns, cell // columns], dim=1)
    center = (corner + at_peaks(maps.center)) * step + score.new_tensor(model.point_cloud_range[:2])
    rotation = at_peaks(maps.rot)
    yaw = torch.atan2(rotation[:, 1], rotation[:, 0])
    boxes = torch.cat([center, at_peaks(maps.center_z), at_peaks(maps.dim).exp(), yaw[:, None]], dim=1)

    keep = score > config.score_threshold
    if config.center_range:
        limits = score.new_tensor(config.center_range)
        keep &= ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(1)
    if config.iou_rectifier and maps.iou is not None:
        weight = _per_class(config.iou_rectifier, model, score)[label]
        iou = ((at_peaks(maps.iou)[:, 0] + 1) / 2).clamp(0, 1)
        score = score ** (1 - weight) * iou**weight
    return DeviceBoxes(boxes, score, label, keep)


def suppress(candidates: DeviceBoxes, model: ModelConfig, config: PostprocessConfig) -> DeviceBoxes:
    """Drop every box that overlaps a better box of its class (greedy NMS on the BEV IoU).

    Returns:
        The candidates ordered by class, then by descending score, with fewer of them kept.
    """
    order = torch.argsort(candidates.scores, descending=True, stable=True)
    order = order[torch.argsort(candidates.labels[order], stable=True)]
    boxes, scores = candidates.boxes[order], candidates.scores[order]
    labels, keep = candidates.labels[order], candidates.keep[order]

    rows = keep.nonzero().squeeze(1)
    turned = boxes[rows].clone()
    if config.nms_geometry == "dsvt_release":
        # The published kernel rotates by pi/2 - yaw the other way round: every box stands across its heading.
        turned[:, 6] += math.pi / 2
    limit = _per_class(config.nms_iou, model, scores)[labels[rows]]
    better = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
    same_class = labels[rows, None] == labels[None, rows]
    suppresses = better & same_class & (iou_matrix(turned, turned, bev=True) > limit)
    keep = keep.clone()
    keep[rows] = _greedy(suppresses)
    return DeviceBoxes(boxes, scores, labels, keep)


def no_boxes(like: Tensor) -> DeviceBoxes:
    """An answer without boxes, on the device of `like`."""
    empty = like.new_zeros(0)
    return DeviceBoxes(like.new_zeros(0, 7), empty, empty.long(), empty.bool())


def _greedy(suppresses: Tensor) -> Tensor:
    """(M,) boxes that survive, where `suppresses[i, j]` says that box i, if it survives, removes the later box j.

    A box survives if no survivor removes it. Repeating that from "all survive" settles box after box, at the latest
    after M rounds; chains of overlaps are short, so a few suffice.
    """
    alive = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    while True:
        survivors = ~(suppresses & alive[:, None]).any(0)
        if torch.equal(survivors, alive):
            return alive
        alive = survivors


def _per_class(values: tuple[float, ...], model: ModelConfig, like: Tensor) -> Tensor:
    """(classes,) tensor of a per-class option, where one value may stand for all."""
    return like.new_tensor(values).expand(len(model.class_names))
