"""The dense network from pillar features to what the head says, by whichever convolutions are faster here."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsvt_ros.config import ModelConfig
from dsvt_ros.cuda_graph import FrameGraph, timing_event
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.bev import FusedBevBackbone
from dsvt_ros.fused.heatmaps import FusedHeatmaps
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.proposals import attend_around, heads_of_a_program
from dsvt_ros.fused.structures import Grid, Maps, PeakMaps
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.transfusion_head import TransFusionHead
from dsvt_ros.padded.dense import LibraryConvolutions, proposals_from

_LOG = logging.getLogger(__name__)

TRIALS = 20
"""Runs of which the median decides."""

Dense = Callable[[Tensor, Grid], Maps]


class KernelConvolutions:
    """The convolutions in kernels of our own."""

    def __init__(self, backbone: BevBackbone, head: PeakHead | TransFusionHead, model: ModelConfig) -> None:
        """Take over weights; `EngineError` if the kernels do not take their sizes."""
        self._backbone, self._head, self._model = FusedBevBackbone(backbone), head, model
        self._heatmaps: FusedHeatmaps | None = None
        if isinstance(head, PeakHead):
            shared = head.shared_conv[0]
            assert isinstance(shared, nn.Conv2d)
            convolutions = (shared, head.heatmap_hidden, head.heatmap)
            self._heatmaps = FusedHeatmaps(*convolutions, self._backbone.sources, len(model.class_names))

    def __call__(self, features: Tensor, grid: Grid) -> Maps:
        """(V, D) features of the pillars in `grid` to what the head says."""
        rows = self._backbone(features, grid)
        if self._heatmaps is not None:
            logits, shared = self._heatmaps(rows)
            return PeakMaps(logits, shared)
        return proposals_from(self._head(self._backbone.image(rows)), self._model)


def open_dense(backbone: BevBackbone, head: nn.Module, model: ModelConfig, like: Grid, channels: int) -> Dense:
    """The faster of both, measured with features of no meaning in all the pillars that `like` has room for.

    Args:
        backbone: Batch norms folded; becomes float16.
        head: PeakHead or TransFusionHead, likewise.
        model: Gives the classes.
        like: Room for pillars.
        channels: Of a pillar's feature.
    """
    assert isinstance(head, (PeakHead, TransFusionHead))
    if isinstance(head, TransFusionHead) and heads_of_a_program(head.config.channels, head.config.num_heads):
        head.decoder.attend_around = attend_around
    own: Dense | None = None
    try:
        own = KernelConvolutions(backbone, head, model)
    except EngineError as error:
        _LOG.info("convolutions of cuDNN: %s", error)
    library = LibraryConvolutions(backbone, head, model)
    device = like.cell_of_voxel.device
    if own is None:
        return library
    if device.type != "cuda":
        return own
    count = len(like.cell_of_voxel)
    cells = torch.randperm(len(like.voxel_of_cell), device=device)[:count].sort().values.int()
    voxel_of_cell = torch.full_like(like.voxel_of_cell, -1)
    voxel_of_cell[cells.long()] = torch.arange(count, dtype=torch.int32, device=device)
    grid = Grid(like.size, voxel_of_cell, cells, torch.full_like(like.num_voxels, count))
    features = torch.randn(count, channels, device=device, dtype=torch.float16)
    times = {"own kernels": _time(own, features, grid), "cuDNN": _time(library, features, grid)}
    _LOG.info("dense network: %s", ", ".join(f"{ms:.2f} ms with {name}" for name, ms in times.items()))
    return own if times["own kernels"] <= times["cuDNN"] else library


def _time(dense: Dense, features: Tensor, grid: Grid) -> float:
    """Median milliseconds."""

    def frame(run: object) -> Tensor:
        maps = dense(features, grid)
        return maps.logits if isinstance(maps, PeakMaps) else maps.heatmap

    graph = FrameGraph(frame, torch.cuda.graph_pool_handle())
    times: list[float] = []
    for _ in range(TRIALS):
        before, after = timing_event(), timing_event()
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(float(before.elapsed_time(after)))
    return sorted(times)[TRIALS // 2]
