"""Candidates to boxes: decoding, score rectification and non-maximum suppression, in one tensor for the download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import CenterHeadConfig, ModelConfig, PostprocessConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.peaks import Peaks
from dsvt_ros.postprocess import class_groups, turn_rad
from dsvt_ros.structures import Boxes3D, DeviceBoxes

MAX_CANDIDATES = 1024
"""Of a group: who suppresses whom of them has to fit into one program's registers."""
SLOTS = 16
"""Boxes that a program ranks."""
RIVALS = 256
"""Boxes that it compares them with at once."""
LATER = 16
"""Boxes whose overlap with one word of better ones a program computes."""
EXTRA_COLUMNS = 3
"""Of a row behind its box: score, label, whether it is kept."""


class Suppressor:
    """What `postprocess.decode` and `suppress` do, in three kernels whose sizes do not depend on the data.

    The options of `config` are fixed; for others make a new one.
    """

    def __init__(self, model: ModelConfig, config: PostprocessConfig, device: torch.device) -> None:
        """Make ready.

        Raises:
            ConfigError: More candidates than `MAX_CANDIDATES`.
        """
        candidates = config.max_candidates if isinstance(model.head, CenterHeadConfig) else model.head.num_proposals
        if candidates > MAX_CANDIDATES:
            raise ConfigError(f"at most {MAX_CANDIDATES} candidates a group can be suppressed here, not {candidates}")
        groups = class_groups(model)
        first = [sum(map(len, groups[:group])) for group in range(len(groups))]
        corner_x, corner_y = model.point_cloud_range[:2]
        cell = torch.tensor(model.voxel_size[:2]) * model.output_stride
        limits = config.center_range or (0.0,) * 6
        self._model, self._config = model, config
        self._turn = turn_rad(model, config)
        self._first_class = torch.tensor(first, dtype=torch.int32, device=device)
        self._labels = torch.tensor([label for group in groups for label in group], dtype=torch.int32, device=device)
        self._weights = _per_class(config.iou_rectifier or (0.0,), model).to(device)
        self._limits = _per_class(config.nms_iou, model).to(device)
        self._place = torch.tensor([corner_x, corner_y, *cell.tolist(), *limits], device=device)

    def from_peaks(self, peaks: Peaks, values: Tensor, columns: Mapping[str, int]) -> Tensor:
        """Boxes of CenterHead.

        Args:
            peaks: Of B clouds and G groups.
            values: (B, G, K, n) what the other branches say at each peak; anything in rows without one.
            columns: First column of each branch in `values`, see `PeakHead`.

        Returns:
            (B, G K, box_size + 3) float32 rows, see `boxes_from_rows`.
        """
        from dsvt_ros.kernels import nms as kernels

        model, config = self._model, self._config
        clouds, groups, count = peaks.index.shape
        width, height = model.map_size
        rows = values.new_empty(clouds, groups * count, model.box_size + EXTRA_COLUMNS)
        kernels.decode[-(-count // SLOTS), clouds * groups](
            peaks.index, peaks.logit, values, self._first_class, self._labels, self._weights, self._place, rows,
            groups, width * height, width, config.score_threshold,
            K=count,
            NUM_VALUES=values.shape[3],
            COLUMNS=rows.shape[2],
            CENTER=columns["center"],
            CENTER_Z=columns["center_z"],
            DIM=columns["dim"],
            ROT=columns["rot"],
            VEL=columns.get("vel", -1),
            IOU=columns.get("iou", -1) if config.iou_rectifier else -1,
            LIMITED=bool(config.center_range),
            SLOTS=SLOTS,
            RIVALS=RIVALS,
        )  # fmt: skip
        return self._suppress(rows, clouds * groups)

    def from_boxes(self, clouds: Sequence[DeviceBoxes]) -> Tensor:
        """Boxes of a head without groups that are decoded already, as many in each cloud.

        Returns:
            (B, K, box_size + 3) float32 rows, see `boxes_from_rows`.
        """
        from dsvt_ros.kernels import nms as kernels

        boxes, scores = torch.stack([found.boxes for found in clouds]), torch.stack([found.scores for found in clouds])
        labels, keep = torch.stack([found.labels for found in clouds]), torch.stack([found.keep for found in clouds])
        count = scores.shape[1]
        rows = boxes.new_empty(len(clouds), count, boxes.shape[2] + EXTRA_COLUMNS)
        kernels.sort_rows[-(-count // SLOTS), len(clouds)](
            boxes, scores, labels, keep, rows, K=count, COLUMNS=rows.shape[2], SLOTS=SLOTS, RIVALS=RIVALS
        )
        return self._suppress(rows, len(clouds))

    def _suppress(self, rows: Tensor, num_groups: int) -> Tensor:
        """Mark, in place, which rows of each of the groups of all clouds are kept."""
        from dsvt_ros.kernels import nms as kernels

        count, columns = rows.shape[0] * rows.shape[1] // num_groups, rows.shape[2]
        padded = max(kernels.BITS.value, power_of_two(count))
        num_words = padded // kernels.BITS.value
        words = rows.new_empty(num_groups, num_words, padded, dtype=torch.int32)
        kernels.overlaps[-(-count // kernels.BITS.value), -(-count // LATER), num_groups](
            rows, self._limits, words, self._turn,
            K=count, PADDED=padded, COLUMNS=columns, SAME_LABEL=self._config.nms_classes == "own", LATER=LATER,
        )  # fmt: skip
        kernels.settle[(num_groups,)](
            rows, words, K=count, PADDED=padded, COLUMNS=columns, num_warps=16 if padded > 256 else 4
        )
        return rows


def boxes_from_rows(rows: NDArray[np.float32], model: ModelConfig, config: PostprocessConfig) -> Boxes3D:
    """The boxes of one cloud, ordered by class, then by descending score, at most `config.max_boxes` of each class.

    Args:
        rows: (M, box_size + 3) on the host: boxes, score, label, 1 where it is kept; those of a class by descending
            score.
        model: Gives the classes.
        config: Gives the limit.
    """
    # NumPy's `compress` and `take` need a quarter of the time of indexing, and its sort of so short integers half.
    rows = rows.compress(rows[:, -1] > 0, axis=0)
    rows = rows.take(rows[:, -2].astype(np.int16).argsort(kind="stable"), axis=0)
    labels = rows[:, -2].astype(np.int64)
    if config.max_boxes:
        limit = np.broadcast_to(np.asarray(config.max_boxes), len(model.class_names))
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
        within = rank < limit[labels]
        rows, labels = rows[within], labels[within]
    boxes, scores = rows[:, : model.box_size].copy(), rows[:, model.box_size].copy()
    return Boxes3D(boxes, scores, labels, model.class_names)


def _per_class(values: Sequence[float], model: ModelConfig) -> Tensor:
    """(classes,) of a per-class option, where one value may stand for all."""
    return torch.tensor(values, dtype=torch.float32).expand(len(model.class_names)).contiguous()
