"""Networks that run as parts of whole frames; `fused.frame` has the rest of a frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.config import ModelConfig, PostprocessConfig, PreprocessConfig
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.structures import FusedStage, Grid, Maps, PeakMaps, ShiftSets
from dsvt_ros.model.center_head import maps_from_branches
from dsvt_ros.postprocess import class_groups
from dsvt_ros.structures import HeadMaps, SetPartition, VoxelSets

FindGround = Callable[[Tensor, Tensor, Tensor, Tensor, PreprocessConfig], None]


class FirstStages(NamedTuple):
    """The stages that are made for so many points, voxels and clouds; what they hand on stays among them.

    Attributes:
        voxelize: Of points, ends and poses, see `fused.voxelize.Voxelizer`; what it gives holds `grid`, `num_points`
            and `num_dropped`.
        encode: To (V, D) float16 features.
        partition: Windows and sets of all stages.
    """

    voxelize: Callable[[Tensor, Tensor, Tensor, PreprocessConfig], Any]
    encode: Callable[[Any], Tensor]
    partition: Callable[[Grid], tuple[FusedStage, ...]]


class BoxFinder(Protocol):
    """The last stages, for fixed options.

    Attributes:
        columns: Of a row of `suppress`.
    """

    columns: int

    def find(self, maps: Maps) -> Any:
        """Candidates in the maps of B clouds."""
        ...

    def suppress(self, found: Any, clouds: int) -> Tensor:
        """(B, M, columns) float32 rows of the candidates of B clouds, on the device."""
        ...

    def settle(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same on the host to new (B, M, box_size + 3), see `fused.suppress.boxes_from_rows`."""
        ...


class FrameNetworks(ABC):
    """Both networks of a model, and the stages around them that suit them.

    A detector runs them as parts of `FusedFrames`. `sparse` and `dense`, which verification calls, run the same on
    partitions and maps as other backends have them.

    Attributes:
        name: The backend.
        device: Where everything is.
        backbone_3d: Set attention, on (V, D) float16 features.
        dense_network: From features of pillars to what the head says.
        peak_head: CenterHead's branches at peaks; None with another head.
        otherwise: What to do where frames fail.
    """

    name: str
    otherwise: str
    precision = "fp16"
    max_voxels: int | None = None
    channels_last = True
    device: torch.device
    backbone_3d: Callable[[Tensor, tuple[FusedStage, ...]], Tensor]
    dense_network: Callable[[Tensor, Grid], Maps]
    peak_head: PeakHead | None
    _model: ModelConfig

    @abstractmethod
    def first_stages(self, points: int, voxels: int, clouds: int) -> FirstStages:
        """Those with room for so many points and voxels of so many clouds."""

    @abstractmethod
    def ground_finder(self, points: int, clouds: int) -> FindGround:
        """What lifts poses by the height of the ground; its arguments are those of `fused.ground.GroundFinder`."""

    def decoder(self) -> CloudDecoder | None:
        """Reads clouds on the device; without one the host reads them."""
        return None

    @abstractmethod
    def box_finder(self, config: PostprocessConfig) -> BoxFinder:
        """The last stages; `ConfigError` if they do not take the options."""

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) float16 of the last stage."""
        with on_device(self.device):
            return self.backbone_3d(features.half(), fused_stages(partition))

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to what the head says, in float32.

        Every cell is taken for a pillar, and every pillar for a peak.
        """
        clouds, _, rows, columns = bev.shape
        cells = torch.arange(clouds * columns * rows, dtype=torch.int32, device=bev.device)
        features = bev.half().permute(0, 3, 2, 1).reshape(len(cells), -1)
        with on_device(self.device):
            maps = self.dense_network(features, Grid((columns, rows, 1), cells, cells, cells.new_tensor([len(cells)])))
            if not isinstance(maps, PeakMaps):
                return maps
            assert self.peak_head is not None
            groups = len(class_groups(self._model))
            shape = maps.logits.shape[-2:]
            index = torch.arange(shape.numel(), dtype=torch.int32, device=bev.device)
            values = self.peak_head.at_peaks(maps.shared, index.expand(clouds, groups, -1).contiguous())
        # (B, G, cells, columns) to one map a branch, group after group.
        first = [*self.peak_head.columns.values(), values.shape[-1]]
        branches = {
            name: values[..., begin:end].transpose(2, 3).reshape(clouds, -1, *shape)
            for name, (begin, end) in zip(self.peak_head.columns, pairwise(first), strict=True)
        }
        return maps_from_branches({"hm": maps.logits.float(), **branches})


def on_device(device: torch.device) -> torch.cuda.device:
    """Graphs and Triton launch on the current device, whatever their arguments are on."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def fused_stages(partition: SetPartition) -> tuple[FusedStage, ...]:
    """A partition as stages of frames have it."""
    stages = []
    for stage in partition.stages:
        count = stage.cells[0].new_tensor([len(stage.cells[0])], dtype=torch.int32)
        grid = Grid((0, 0, 0), count, count, count)  # of which set attention wants the number of voxels alone
        sets = tuple(None if sets is None else _ragged(sets) for sets in stage.sets)
        cells = stage.cells[0].int(), stage.cells[1].int()
        pooled = None
        if stage.pooling is not None:
            pooled = torch.where(stage.pooling.mask, -1, stage.pooling.indices).int()
        stages.append(FusedStage(grid, cells, (sets[0], sets[1]), pooled))
    return tuple(stages)


def _ragged(sets: VoxelSets) -> ShiftSets:
    real = ~sets.mask
    count = real[0].sum(1, dtype=torch.int32)
    start = torch.zeros(len(count) + 1, dtype=torch.int32, device=count.device)
    start[1:] = torch.cumsum(count, 0)
    order = torch.stack([indices[kept] for indices, kept in zip(sets.indices, real, strict=True)]).int()
    return ShiftSets(order, torch.argsort(order).int(), start, start.new_tensor([len(count)]))
