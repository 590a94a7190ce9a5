"""What the head says to boxes, and which of them overlap a better one, on tensors of fixed capacity."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import CENTER_BRANCHES, CenterHeadConfig, ModelConfig, PostprocessConfig
from dsvt_ros.constants import constant
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.structures import Maps, PeakMaps
from dsvt_ros.fused.suppress import EXTRA_COLUMNS
from dsvt_ros.padded.overlaps import bev_iou_with_later
from dsvt_ros.postprocess import boxes_at_cells, class_groups, decode, judged, per_class, turn_rad
from dsvt_ros.structures import DeviceBoxes

BITS = 16
"""Boxes whose overlaps a float32 tells as a whole number."""


class PaddedBoxFinder:
    """What `postprocess.decode` and `suppress` do, in two parts.

    The device finds out who overlaps whom. Who is left is settled on the host, box after box, from as many bits.

    Attributes:
        columns: Of a row of `suppress`.
    """

    def __init__(
        self, model: ModelConfig, config: PostprocessConfig, head: PeakHead | None, device: torch.device
    ) -> None:
        """Make ready.

        Args:
            model: Gives range, voxel size and classes.
            config: Fixed; for other options make a new one.
            head: CenterHead's branches; None for TransFusionHead.
            device: Where the maps are.
        """
        self._model, self._config, self._head = model, config, head
        self._groups = class_groups(model)
        most, num_classes = max(map(len, self._groups)), len(model.class_names)
        channels: list[int] = []
        labels: list[int] = []
        for group in self._groups:
            missing = most - len(group)
            channels += [*range(len(labels), len(labels) + len(group)), *[num_classes] * missing]
            labels += group
        self._channels = torch.tensor(channels, device=device)
        self._labels = torch.tensor([*labels, 0], device=device).index_select(0, self._channels)
        if isinstance(model.head, CenterHeadConfig):
            width, height = model.map_size
            self._candidates = min(config.max_candidates, most * width * height)
        else:
            self._candidates = model.head.num_proposals
        self._words = -(-self._candidates // BITS)
        self.columns = model.box_size + EXTRA_COLUMNS + self._words

    def find(self, maps: Maps) -> DeviceBoxes:
        """Candidates of B clouds, cloud after cloud, group after group of CenterHead, as many of each group."""
        if isinstance(maps, PeakMaps):
            return self._at_peaks(maps)
        clouds = [decode(maps, self._model, self._config, cloud) for cloud in range(len(maps.label))]
        boxes, scores, labels, keep = zip(
            *((found.boxes, found.scores, found.labels, found.keep) for found in clouds), strict=True
        )
        return DeviceBoxes(torch.cat(boxes), torch.cat(scores), torch.cat(labels), torch.cat(keep))

    def suppress(self, found: DeviceBoxes, clouds: int) -> Tensor:
        """(B, M, columns) float32 rows of what was found in B clouds, for `settle`."""
        box_size, count = self._model.box_size, self._candidates
        # By descending score in each group, those that are not kept at the end.
        score = torch.where(found.keep, found.scores, -1).view(-1, count)
        order = torch.argsort(score, dim=1, descending=True, stable=True)
        order = order + torch.arange(len(order), device=order.device)[:, None] * count
        columns = [found.boxes, found.scores[:, None], found.labels[:, None].float(), found.keep[:, None].float()]
        rows = torch.cat(columns, 1).index_select(0, order.flatten()).view(-1, count, box_size + EXTRA_COLUMNS)

        boxes, labels = rows[..., :box_size].clone(), rows[..., box_size + 1]
        boxes[..., 6] += turn_rad(self._model, self._config)
        limits = per_class(self._config.nms_iou, self._model, rows).index_select(0, labels.flatten().long())
        overlaps = (bev_iou_with_later(boxes) > limits.view(-1, 1, count)).triu_(1)
        if self._config.nms_classes == "own":
            overlaps &= labels[:, :, None] == labels[:, None]
        bits = F.pad(overlaps, (0, self._words * BITS - count)).view(-1, count, self._words, BITS)
        words = bits.float() @ constant([2.0**bit for bit in range(BITS)], rows)
        return torch.cat([rows, words], 2).view(clouds, -1, self.columns)

    def settle(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, M, columns) rows on the host to new (B, M, box_size + 3), see `fused.suppress.boxes_from_rows`."""
        width = self.columns - self._words
        settled = np.array(rows[..., :width])
        groups = settled.reshape(-1, self._candidates, width)
        for group, said in zip(groups, rows.reshape(-1, self._candidates, self.columns), strict=True):
            group[:, -1] = _survivors(group[:, -1] > 0, said[:, width:])
        return settled

    def _at_peaks(self, maps: PeakMaps) -> DeviceBoxes:
        """The highest peaks of each group."""
        assert self._head is not None
        clouds, _, rows, columns = maps.logits.shape
        groups = len(self._groups)
        # All groups with as many classes: those that a group lacks are read from a channel where nothing is found.
        logits = F.pad(maps.logits, (0, 0, 0, 0, 0, 1), value=-torch.inf).index_select(1, self._channels)
        logit, index = torch.topk(logits.reshape(clouds, groups, -1), self._candidates)
        said = self._head.at_peaks(maps.shared, index.int()).flatten(0, 2)
        names = list(self._head.columns)
        sizes = [CENTER_BRANCHES[name] for name in names]
        values = dict(zip(names, torch.split(said, sizes, dim=1), strict=True))
        cell = index.flatten() % (rows * columns)
        boxes = boxes_at_cells(cell // columns, cell % columns, values, self._model)
        first = torch.arange(groups, device=index.device)[:, None] * (len(self._labels) // groups)
        label = self._labels.index_select(0, (first + index // (rows * columns)).flatten())
        iou = values["iou"][:, 0] if "iou" in values else None
        return judged(boxes, logit.flatten().float().sigmoid(), label, iou, self._model, self._config)


def _survivors(kept: NDArray[np.bool_], words: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(K,) boxes that are left of the kept ones, where (K, words) say which later boxes each of them overlaps."""
    data, size = words.astype("<u2").tobytes(), 2 * words.shape[1]
    # Few overlap others; a product finds them in a fifth of the time of `any`.
    rivals = np.flatnonzero(kept * (words @ np.ones(words.shape[1], np.float32))).tolist()
    beaten = 0
    for row in rivals:
        if not beaten >> row & 1:
            beaten |= int.from_bytes(data[row * size : (row + 1) * size], "little")
    bits = np.frombuffer(beaten.to_bytes(size, "little"), np.uint8)
    return kept > np.unpackbits(bits, count=len(kept), bitorder="little")
