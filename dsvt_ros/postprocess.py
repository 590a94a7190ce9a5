"""Head maps to boxes: peaks, decoding, score rectification and non-maximum suppression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsvt_ros.box_geometry import bev_iou_pairs, circles_meet
from dsvt_ros.config import CENTER_BRANCHES, CenterHeadConfig, ModelConfig, PostprocessConfig
from dsvt_ros.constants import constant
from dsvt_ros.structures import CenterMaps, DeviceBoxes, HeadMaps, ProposalMaps


def decode(maps: HeadMaps, model: ModelConfig, config: PostprocessConfig, cloud: int = 0) -> DeviceBoxes:
    """Turn what the head says about one cloud into boxes.

    The threshold applies to the heatmap's score, before rectification.

    Args:
        maps: Raw maps of B clouds.
        model: Gives range, voxel size and classes.
        config: Threshold, number of candidates, rectifier and limits of the centre.
        cloud: Which of the B clouds.

    Returns:
        Candidates by descending heatmap score: `max_candidates` for each group of CenterHead, or all proposals.
    """
    found = _peaks(maps, model, config, cloud) if isinstance(maps, CenterMaps) else _proposals(maps, model, cloud)
    return judged(*found, model, config)


def judged(
    boxes: Tensor, score: Tensor, label: Tensor, iou: Tensor | None, model: ModelConfig, config: PostprocessConfig
) -> DeviceBoxes:
    """Candidates with the scores that they compete with, those within the limits marked as kept.

    Args:
        boxes: (M, box_size) boxes.
        score: (M,) heatmap scores.
        label: (M,) int64 classes.
        iou: (M,) predicted IoU; None where the head predicts none.
        model: Gives the classes.
        config: Threshold, rectifier and limits of the centre.
    """
    keep = score > config.score_threshold
    if config.center_range:
        low, high = constant(config.center_range[:3], boxes), constant(config.center_range[3:], boxes)
        keep &= ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(1)
    if config.iou_rectifier and iou is not None:
        weight = per_class(config.iou_rectifier, model, score)[label]
        score = score ** (1 - weight) * ((iou + 1) / 2).clamp(0, 1) ** weight
    return DeviceBoxes(boxes, score, label, keep)


# Boxes, heatmap scores, labels and, where the head predicts it, the IoU.
_Candidates = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _peaks(maps: CenterMaps, model: ModelConfig, config: PostprocessConfig, cloud: int) -> _Candidates:
    """The highest peaks of CenterHead's heatmaps (OpenPCDet ``decode_bbox_from_heatmap``)."""
    groups = class_groups(model)
    heatmap = maps.heatmap[cloud].float().sigmoid()
    _, rows, columns = heatmap.shape
    parts: list[list[Tensor]] = []
    for group, scores in enumerate(torch.split(heatmap, [len(classes) for classes in groups])):
        score, index = torch.topk(scores.flatten(), min(config.max_candidates, scores.numel()))
        cell = index % (rows * columns)
        row, column = cell // columns, cell % columns

        values = {
            name: branch[cloud].chunk(len(groups))[group][:, row, column].T.float()
            for name in CENTER_BRANCHES
            if (branch := getattr(maps, name)) is not None
        }
        label = constant(groups[group], index)[index // (rows * columns)]
        part = [boxes_at_cells(row, column, values, model), score, label]
        parts.append(part if maps.iou is None else [*part, values["iou"][:, 0]])
    boxes, score, label, *iou = (torch.cat(values) for values in zip(*parts, strict=True))
    return boxes, score, label, iou[0] if iou else None


def boxes_at_cells(row: Tensor, column: Tensor, values: Mapping[str, Tensor], model: ModelConfig) -> Tensor:
    """Boxes of CenterHead.

    A centre lies at ``(column + offset) * cell + minimum``; the cell's centre is not added.

    Args:
        row: (M,) rows of cells.
        column: (M,) columns.
        values: (M, n) float32, what each branch says there.
        model: Gives range, voxel size and whether there are velocities.

    Returns:
        (M, box_size) boxes.
    """
    corner, step = _corner_and_step(model, values["center"])
    position = torch.stack([column, row], dim=1) + values["center"]
    rotation = values["rot"]
    columns_of_box = [position * step + corner, values["center_z"], values["dim"].exp()]
    columns_of_box.append(torch.atan2(rotation[:, 1], rotation[:, 0])[:, None])
    if "vel" in values:
        columns_of_box.append(values["vel"])
    return torch.cat(columns_of_box, dim=1)


def _proposals(maps: ProposalMaps, model: ModelConfig, cloud: int) -> _Candidates:
    """The proposals of TransFusionHead (upstream ``get_bboxes``), by descending score."""
    label, cell = maps.label[cloud].long(), maps.cell[cloud].long()
    score = maps.heatmap[cloud].float().gather(0, label[None])[0].sigmoid() * maps.peak[cloud].float()
    order = torch.argsort(score, descending=True, stable=True)
    label, cell, score = label[order], cell[order], score[order]

    def values(branch: Tensor) -> Tensor:
        return branch[cloud].float().T[order]

    _, rows = model.map_size
    position = torch.stack([cell // rows, cell % rows], dim=1) + 0.5 + values(maps.center)
    corner, step = _corner_and_step(model, score)
    size, rotation = values(maps.dim).exp(), values(maps.rot)
    columns_of_box = [
        position * step + corner,
        values(maps.height) - size[:, 2:] / 2,
        size,
        torch.atan2(rotation[:, 0], rotation[:, 1])[:, None],
    ]
    if maps.vel is not None:
        columns_of_box.append(values(maps.vel))
    return torch.cat(columns_of_box, dim=1), score, label, None if maps.iou is None else values(maps.iou)[:, 0]


def _corner_and_step(model: ModelConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Corner and cell size of the head's maps in x and y, m."""
    step = constant(model.voxel_size[:2], like) * model.output_stride
    return constant(model.point_cloud_range[:2], like), step


def class_groups(model: ModelConfig) -> list[list[int]]:
    """Labels of the classes that share a set of CenterHead's branches; one group for other heads."""
    names = model.class_names
    groups = model.head.groups if isinstance(model.head, CenterHeadConfig) else ()
    return [[names.index(name) for name in group] for group in groups or (names,)]


def suppress(candidates: DeviceBoxes, model: ModelConfig, config: PostprocessConfig) -> DeviceBoxes:
    """Drop every box that overlaps a better box of its class (greedy NMS on the BEV IoU), or of its group.

    Returns:
        The candidates ordered by class, then by descending score, with fewer of them kept.
    """
    by_score = torch.argsort(candidates.scores, descending=True, stable=True)
    by_class = torch.argsort(candidates.labels[by_score], stable=True)
    order = by_score[by_class]
    boxes, scores = candidates.boxes[order], candidates.scores[order]
    labels, keep = candidates.labels[order], candidates.keep[order]

    rows = keep.nonzero().squeeze(1)
    turned = boxes[rows, :7].clone()
    turned[:, 6] += turn_rad(model, config)
    limit = per_class(config.nms_iou, model, scores)[labels[rows]]
    rank = by_class[rows]
    rivals = labels[rows] if config.nms_classes == "own" else _group_of_class(model, labels)[labels[rows]]
    better = rank[:, None] < rank[None]
    same = rivals[:, None] == rivals[None]
    suppresses = better & same & circles_meet(turned, turned)
    i, j = suppresses.nonzero(as_tuple=True)
    suppresses[i, j] = bev_iou_pairs(turned[i], turned[j]) > limit[j]
    keep = keep.clone()
    keep[rows] = _greedy(suppresses)
    if config.max_boxes:
        keep &= _rank(labels, keep) < per_class(config.max_boxes, model, scores)[labels]
    return DeviceBoxes(boxes, scores, labels, keep)


def turn_rad(model: ModelConfig, config: PostprocessConfig) -> float:
    """By how much boxes are turned while their overlaps are computed.

    The kernel that CenterHead was published with rotates by pi/2 - yaw the other way round: every box stands across its
    heading. TransFusionHead was published with another one, which is exact.
    """
    released = config.nms_geometry == "dsvt_release" and isinstance(model.head, CenterHeadConfig)
    return math.pi / 2 if released else 0.0


def no_boxes(model: ModelConfig, like: Tensor) -> DeviceBoxes:
    """An answer without boxes, on the device of `like`."""
    empty = like.new_zeros(0)
    return DeviceBoxes(like.new_zeros(0, model.box_size), empty, empty.long(), empty.bool())


def _rank(labels: Tensor, keep: Tensor) -> Tensor:
    """(M,) how many kept boxes of the same class come before each box; boxes are ordered by class."""
    before = torch.cumsum(keep, 0) - keep.long()
    first = torch.searchsorted(labels, labels)
    return before - before[first]


def _group_of_class(model: ModelConfig, like: Tensor) -> Tensor:
    """(classes,) number of each class's group."""
    group_of = {label: number for number, group in enumerate(class_groups(model)) for label in group}
    return constant([group_of[label] for label in range(len(model.class_names))], like)


def _greedy(suppresses: Tensor) -> Tensor:
    """(M,) boxes that survive, where `suppresses[i, j]` says that box i, if it survives, removes the later box j.

    A box survives if no survivor removes it. Repeating that from "all survive" settles box after box, at the latest
    after M rounds; chains of overlaps are short, so a few suffice.
    """
    alive = survivors = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    while True:
        # Asking whether all are settled makes the host wait for a GPU; a few rounds too many take less time.
        for _ in range(4):
            alive, survivors = survivors, ~(suppresses & survivors[:, None]).any(0)
        if torch.equal(survivors, alive):
            return alive


def per_class(values: Sequence[float], model: ModelConfig, like: Tensor) -> Tensor:
    """(classes,) tensor of a per-class option, where one value may stand for all."""
    return constant(values, like).expand(len(model.class_names))
