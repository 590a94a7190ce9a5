"""Whole frames on a GPU without a wait of the host: points in host memory to rows of boxes in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.backends.frames import FirstStages, FrameNetworks, on_device
from dsvt_ros.capacity import room_for_voxels
from dsvt_ros.config import DetectorConfig, ModelConfig
from dsvt_ros.cuda_graph import FrameGraph, RunStage, run_stage
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.fused.structures import FusedVoxels
from dsvt_ros.padded.structures import SortedVoxels

MIN_POINTS = 16_384
"""Room for points is this or a power of two times it, so that clouds of all sizes need few graphs."""
POSE_NUMBERS = 12
HEADER = 16
"""Floats of a cloud before the points: its pose, the row after its last point, and nothing."""
PART_POINTS = 98_304
"""Points that are copied to the device at once."""
COUNTS = 3


@dataclass(frozen=True)
class FrameResult:
    """What a frame gives, in host memory.

    Attributes:
        rows: (B, M, box_size + 3) float32, see `fused.suppress.boxes_from_rows`.
        num_points: Points inside the model's range.
        num_voxels: Occupied voxels, the dropped ones too.
        num_dropped_voxels: Of these, the farthest ones, for which there was no room.
        stage_ms: Milliseconds of each stage on the device, if asked for.
    """

    rows: NDArray[np.float32]
    num_points: int
    num_voxels: int
    num_dropped_voxels: int
    stage_ms: dict[str, float] = field(default_factory=dict)


class FusedFrames:
    """Detects in frames of one or several clouds; the launches for a size are captured when it first occurs.

    Attributes:
        model: The network and the data it was trained for.
        networks: What runs in the frames.
        device: Where frames run.
        pool: Memory of captured graphs; None on the CPU, where Triton interprets the kernels.
    """

    def __init__(self, networks: FrameNetworks, model: ModelConfig, config: DetectorConfig) -> None:
        """Make ready for any clouds.

        Args:
            networks: Runs on the device where its encoder is.
            model: That of the networks.
            config: Run-time options; change them through `configure`.

        Raises:
            EngineError: A frame cannot be compiled, captured or run here, or not with these options.
        """
        self.model, self.networks = model, networks
        self.device = networks.device
        self._frames: dict[tuple[int, int], _Frame] = {}
        self.pool: Any = None
        if self.device.type == "cuda":
            with on_device(self.device):
                self.pool = torch.cuda.graph_pool_handle()
        try:
            self.configure(config)
        except ConfigError as error:
            raise EngineError(f"backend {networks.name}: {error}; {networks.otherwise}") from error
        if self.pool is not None:
            try:
                self([torch.zeros(1, len(model.features))], [np.eye(4)])
            except Exception as error:  # of CUDA, Triton or its compilers, which have no type in common
                text = f"a whole frame of backend {networks.name} fails here; {networks.otherwise}: {error}"
                raise EngineError(text) from error

    def configure(self, config: DetectorConfig) -> None:
        """Take other run-time options; kernels are captured anew.

        Raises:
            ConfigError: The kernels do not take them; the old ones stay.
        """
        self.box_finder = self.networks.box_finder(config.postprocess)
        self._config = config
        self._frames.clear()

    def room_for_voxels(self, points: int, clouds: int = 1) -> int:
        """Voxels that frames of up to so many points have room for."""
        return min(points, clouds * room_for_voxels(self.model, self._config.engine))

    def __call__(
        self,
        clouds: Sequence[NDArray[np.float32] | Tensor],
        poses: Sequence[NDArray[np.float64]],
        *,
        timed: bool = False,
    ) -> FrameResult:
        """Run a frame.

        Args:
            clouds: Of each of B clouds the (N, C) float32 points, columns as `model.features`, in the sensor's frame.
            poses: (4, 4) model's frame from sensor's of each cloud.
            timed: Whether to time stages, which then run one by one.
        """
        count = sum(len(cloud) for cloud in clouds)
        room = MIN_POINTS
        while room < count:
            room *= 2
        with torch.inference_mode(), on_device(self.device):
            frame = self._frames.get((room, len(clouds)))
            if frame is None:
                frame = self._frames[room, len(clouds)] = _Frame(self, room, len(clouds))
            return frame.run(clouds, poses, timed=timed)

    def detect(self, stage: RunStage, *, first: FirstStages, inputs: _Inputs) -> Tensor:
        """The stages of a frame; the rows of all clouds and the counts, in one tensor."""
        config = self._config
        voxels = stage("voxelize", first.voxelize, inputs.points, inputs.ends, inputs.poses, config.preprocess)
        features = stage("encode", first.encode, voxels)
        stages = stage("partition", first.partition, voxels.grid)
        features = stage("sparse", self.networks.backbone_3d, features, stages)
        maps = stage("dense", self.networks.dense_network, features, stages[-1].grid)
        found = stage("decode", self.box_finder.find, maps)
        rows = stage("nms", self.box_finder.suppress, found, inputs.clouds)
        return stage("pack", _pack, rows, voxels)


class _Inputs:
    """A frame's inputs in host and in device memory, each in one piece: poses, ends, points."""

    def __init__(self, points: int, clouds: int, columns: int, device: torch.device) -> None:
        self.clouds = clouds
        size = clouds * HEADER + points * columns
        self._host = torch.zeros(size, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, device=device)
        self._host_points, poses, ends = self._parts(self._host, points, columns)
        # Through numpy, for which small copies take a fraction of the time.
        self._host_poses, self._host_ends = poses.numpy(), ends.numpy()
        self.points, self.poses, self.ends = self._parts(self._device, points, columns)

    def upload(self, clouds: Sequence[NDArray[np.float32] | Tensor], poses: Sequence[NDArray[np.float64]]) -> None:
        """Begin to copy the clouds to the device; points that are there already stay there."""
        begin = 0
        for number, (cloud, pose) in enumerate(zip(clouds, poses, strict=True)):
            self._host_poses[number] = pose[:3]
            begin += len(cloud)
            self._host_ends[number] = begin
        sent, begin, columns = 0, 0, self.points.shape[1]
        for cloud in clouds:
            values, end = torch.as_tensor(cloud), begin + len(cloud)
            if values.device.type == "cpu":
                # While one part travels, the next one is copied to where the device can fetch it.
                for start in range(begin, end, PART_POINTS):
                    stop = min(start + PART_POINTS, end)
                    self._host_points[start:stop].copy_(values[start - begin : stop - begin])
                    sent = self._send(sent, self.clouds * HEADER + stop * columns)
            begin = end
        self._send(sent, self.clouds * HEADER)
        begin = 0
        for cloud in clouds:
            end = begin + len(cloud)
            if isinstance(cloud, Tensor) and cloud.device.type != "cpu":
                self.points[begin:end].copy_(cloud)
            begin = end

    def _send(self, begin: int, end: int) -> int:
        """Copy what lies between two places, if anything does; gives where that ends."""
        if begin < end:
            self._device[begin:end].copy_(self._host[begin:end], non_blocking=True)
        return max(begin, end)

    def _parts(self, values: Tensor, points: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        poses = values[: self.clouds * POSE_NUMBERS].view(self.clouds, 3, 4)
        ends = values.view(torch.int32)[self.clouds * POSE_NUMBERS :][: self.clouds]
        return values[self.clouds * HEADER :].view(points, columns), poses, ends


class _Frame:
    """Frames of up to so many points: kernels' tables, inputs and output, and on a GPU the captured launches."""

    def __init__(self, frames: FusedFrames, points: int, clouds: int) -> None:
        model, device = frames.model, frames.device
        room = frames.room_for_voxels(points, clouds)
        self._inputs = _Inputs(points, clouds, len(model.features), device)
        self._detect = partial(
            frames.detect, first=frames.networks.first_stages(points, room, clouds), inputs=self._inputs
        )
        self._box_finder = frames.box_finder
        self._graph: FrameGraph | None = None
        if frames.pool is not None:
            self._graph = FrameGraph(self._detect, frames.pool)
            self._output = torch.empty(self._graph.output.shape, pin_memory=True)

    def run(
        self, clouds: Sequence[NDArray[np.float32] | Tensor], poses: Sequence[NDArray[np.float64]], *, timed: bool
    ) -> FrameResult:
        """See `FusedFrames.__call__`."""
        self._inputs.upload(clouds, poses)
        stage_ms: dict[str, float] = {}
        if self._graph is None:
            values = self._detect(run_stage).numpy()
        else:
            if timed:
                stage_ms = self._graph.replay_stages()
            else:
                self._graph.replay()
            self._output.copy_(self._graph.output, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            values = self._output.numpy()
        num_points, num_voxels, num_dropped, *last_voxel = values[-COUNTS - len(clouds) :].astype(int).tolist()
        rows = values[: -COUNTS - len(clouds)].reshape(len(clouds), -1, self._box_finder.columns)
        rows = self._box_finder.settle(rows)
        # Without voxels, the dense network sees objects in its own biases.
        rows[[last < 0 for last in last_voxel], :, -1] = 0
        return FrameResult(rows, num_points, num_voxels + num_dropped, num_dropped, stage_ms)


def _pack(rows: Tensor, voxels: FusedVoxels | SortedVoxels) -> Tensor:
    """The rows, `COUNTS` counts and each cloud's last voxel, in float32, which holds whole numbers up to 2**24."""
    last_voxel = voxels.grid.num_voxels - 1
    if len(rows) > 1:
        last_voxel = voxels.grid.voxel_of_cell.view(len(rows), -1).amax(1)
    counts = torch.cat([voxels.num_points, voxels.grid.num_voxels, voxels.num_dropped, last_voxel])
    return torch.cat([rows.flatten(), counts.float()])
