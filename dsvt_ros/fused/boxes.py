"""What the head says to boxes, and who of them is suppressed, in kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import CenterHeadConfig, ModelConfig, PostprocessConfig
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.peaks import PeakFinder, Peaks, least_logit
from dsvt_ros.fused.structures import Maps, PeakMaps
from dsvt_ros.fused.suppress import EXTRA_COLUMNS, Suppressor
from dsvt_ros.postprocess import class_groups, decode
from dsvt_ros.structures import DeviceBoxes


class FoundPeaks(NamedTuple):
    """Peaks, and what the branches say there."""

    peaks: Peaks
    values: Tensor


class FusedBoxFinder:
    """The last stages of a frame; see `backends.frames.BoxFinder`."""

    def __init__(
        self, model: ModelConfig, config: PostprocessConfig, head: PeakHead | None, device: torch.device
    ) -> None:
        """Make ready; `ConfigError` if the kernels do not take the options."""
        self._model, self._config, self._head = model, config, head
        self.columns = model.box_size + EXTRA_COLUMNS
        self._suppressor = Suppressor(model, config, device)
        self._finder: PeakFinder | None = None
        if isinstance(model.head, CenterHeadConfig):
            sizes = [len(group) for group in class_groups(model)]
            self._finder = PeakFinder(sizes, config.max_candidates, device)

    def find(self, maps: Maps) -> FoundPeaks | list[DeviceBoxes]:
        """Peaks of CenterHead, or decoded boxes of each cloud."""
        if not isinstance(maps, PeakMaps):
            return [decode(maps, self._model, self._config, cloud) for cloud in range(len(maps.label))]
        assert self._finder is not None
        assert self._head is not None
        peaks = self._finder(maps.logits, least_logit(self._config.score_threshold))
        return FoundPeaks(peaks, self._head.at_peaks(maps.shared, peaks.index))

    def suppress(self, found: FoundPeaks | list[DeviceBoxes], clouds: int) -> Tensor:
        """(B, M, columns) rows, all settled."""
        if not isinstance(found, FoundPeaks):
            return self._suppressor.from_boxes(found)
        assert self._head is not None
        return self._suppressor.from_peaks(found.peaks, found.values, self._head.columns)

    def settle(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of the rows."""
        return np.array(rows)
