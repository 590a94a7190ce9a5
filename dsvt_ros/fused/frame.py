"""Whole frames on a GPU without a wait of the host: points in host memory to rows of boxes in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.backends.triton import TritonNetworks, on_device
from dsvt_ros.capacity import room_for_voxels
from dsvt_ros.config import CenterHeadConfig, DetectorConfig, ModelConfig
from dsvt_ros.cuda_graph import FrameGraph, RunStage, run_stage
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.dense import Maps, PeakMaps
from dsvt_ros.fused.encode import FusedEncoder
from dsvt_ros.fused.ground import GroundFinder
from dsvt_ros.fused.inputs import FrameInputs, InputCloud
from dsvt_ros.fused.partition import FusedPartition
from dsvt_ros.fused.peaks import PeakFinder, Peaks, least_logit
from dsvt_ros.fused.structures import FusedVoxels
from dsvt_ros.fused.suppress import EXTRA_COLUMNS, Suppressor
from dsvt_ros.fused.voxelize import Voxelizer
from dsvt_ros.postprocess import class_groups, decode
from dsvt_ros.structures import DeviceBoxes, ProposalMaps

MIN_POINTS = 16_384
"""Room for points is this or a power of two times it, so that clouds of all sizes need few graphs."""
COUNTS = 3
MAX_UNDER_WAY = 2
"""Frames; there is memory on the host for so many."""


@dataclass(frozen=True)
class FrameResult:
    """What a frame gives, in host memory.

    Attributes:
        rows: (B, M, box_size + 3) float32, see `fused.suppress.boxes_from_rows`.
        poses: B times the (4, 4) transform to the model's frame, with the height of the ground where it was sought.
        num_points: Points inside the model's range.
        num_voxels: Occupied voxels, the dropped ones too.
        num_dropped_voxels: Of these, the farthest ones, for which there was no room.
        stage_ms: Milliseconds of each stage on the device, if asked for.
    """

    rows: NDArray[np.float32]
    poses: list[NDArray[np.float64]]
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
        decoder: Reads clouds on the device.
    """

    def __init__(self, networks: TritonNetworks, model: ModelConfig, config: DetectorConfig) -> None:
        """Make ready for any clouds.

        Args:
            networks: Runs on the device where its encoder is.
            model: That of the networks.
            config: Run-time options; change them through `configure`.

        Raises:
            EngineError: A frame cannot be compiled, captured or run here, or not with these options.
        """
        self.model, self.networks = model, networks
        self.device = next(networks.encoder.parameters()).device
        self.decoder = CloudDecoder(self.device, len(model.features))
        self._frames: dict[tuple[int, int], _Frame] = {}
        self._under_way: deque[Callable[[], FrameResult]] = deque()
        self.pool: Any = None
        if self.device.type == "cuda":
            with on_device(self.device):
                self.pool = torch.cuda.graph_pool_handle()
        try:
            self.configure(config)
        except ConfigError as error:
            raise EngineError(f"backend triton: {error}; use torch or tensorrt") from error
        if self.pool is not None:
            try:
                self([torch.zeros(1, len(model.features))], [np.eye(4)])
            except Exception as error:  # of CUDA, Triton or its compilers, which have no type in common
                raise EngineError(f"a frame in Triton's kernels fails here; use torch or tensorrt: {error}") from error

    def configure(self, config: DetectorConfig) -> None:
        """Take other run-time options; kernels are captured anew.

        Raises:
            ConfigError: The kernels do not take them; the old ones stay.
        """
        self._suppressor = Suppressor(self.model, config.postprocess, self.device)
        self._config = config
        while self._under_way:
            self._under_way.popleft()()
        self._frames.clear()
        self._finder: PeakFinder | None = None
        if isinstance(self.model.head, CenterHeadConfig):
            sizes = [len(group) for group in class_groups(self.model)]
            self._finder = PeakFinder(sizes, config.postprocess.max_candidates, self.device)

    @property
    def finds_ground(self) -> bool:
        """Whether frames can put clouds onto the ground."""
        return self._config.preprocess.finds_ground

    def room_for_voxels(self, points: int, clouds: int = 1) -> int:
        """Voxels that frames of up to so many points have room for."""
        return min(points, clouds * room_for_voxels(self.model, self._config.engine))

    def __call__(
        self,
        clouds: Sequence[InputCloud],
        poses: Sequence[NDArray[np.float64]],
        *,
        seeks_ground: Sequence[bool] | None = None,
        timed: bool = False,
    ) -> FrameResult:
        """Run a frame; see `begin`."""
        return self.begin(clouds, poses, seeks_ground=seeks_ground, timed=timed)()

    def begin(
        self,
        clouds: Sequence[InputCloud],
        poses: Sequence[NDArray[np.float64]],
        *,
        seeks_ground: Sequence[bool] | None = None,
        timed: bool = False,
    ) -> Callable[[], FrameResult]:
        """Begin a frame, on the current stream.

        When this returns, nothing needs clouds in host memory any more, and the next frame may begin. Two may be under
        way; a third one waits for the first.

        Args:
            clouds: Of each of B clouds the (N, C) float32 points, columns as `model.features`, in the sensor's frame.
            poses: (4, 4) model's frame from sensor's of each cloud.
            seeks_ground: Of each cloud, whether the z of its pose is to be found from the ground, if options allow for
                it (`PreprocessConfig.finds_ground`); by default of none.
            timed: Whether to time stages, which then run one by one.

        Returns:
            Waits for the frame to end, and gives what it found.

        Raises:
            ConfigError: The ground is to be found, and the options do not allow for it.
        """
        seeks_ground = [False] * len(clouds) if seeks_ground is None else seeks_ground
        if any(seeks_ground) and not self.finds_ground:
            raise ConfigError("the ground is found with preprocess.find_ground and without preprocess.sensor_pose only")
        count = sum(len(cloud) for cloud in clouds)
        room = MIN_POINTS
        while room < count:
            room *= 2
        with torch.inference_mode(), on_device(self.device):
            frame = self._frames.get((room, len(clouds)))
            if frame is None:
                frame = self._frames[room, len(clouds)] = _Frame(self, room, len(clouds))
            if len(self._under_way) == MAX_UNDER_WAY:
                self._under_way.popleft()()  # what it has on the host is used again
            end = cache(frame.begin(clouds, poses, seeks_ground, timed=timed))
        self._under_way.append(end)
        return end

    def _peaks(self, maps: PeakMaps) -> tuple[Peaks, Tensor]:
        assert self._finder is not None
        assert self.networks.peak_head is not None
        peaks = self._finder(maps.logits, least_logit(self._config.postprocess.score_threshold))
        return peaks, self.networks.peak_head.at_peaks(maps.shared, peaks.index)

    def _suppress_peaks(self, peaks: Peaks, values: Tensor) -> Tensor:
        assert self.networks.peak_head is not None
        return self._suppressor.from_peaks(peaks, values, self.networks.peak_head.columns)

    def _decode(self, maps: ProposalMaps, clouds: int) -> list[DeviceBoxes]:
        return [decode(maps, self.model, self._config.postprocess, cloud) for cloud in range(clouds)]

    def detect(
        self,
        stage: RunStage,
        *,
        voxelizer: Voxelizer,
        encoder: FusedEncoder,
        partition: FusedPartition,
        inputs: FrameInputs,
        ground: GroundFinder | None,
    ) -> Tensor:
        """The stages of a frame; what `_pack` makes of its results."""
        config = self._config
        if ground is not None:
            stage("ground", ground, inputs.points, inputs.ends, inputs.seeks_ground, inputs.poses, config.preprocess)
        voxels = stage("voxelize", voxelizer, inputs.points, inputs.ends, inputs.poses, config.preprocess)
        features = stage("encode", encoder, voxels)
        stages = stage("partition", partition, voxels.grid)
        features = stage("sparse", self.networks.backbone_3d, features, stages)
        maps: Maps = stage("dense", self.networks.dense_network, features, stages[-1].grid)
        if isinstance(maps, PeakMaps):
            peaks, values = stage("decode", self._peaks, maps)
            rows = stage("nms", self._suppress_peaks, peaks, values)
        else:
            found = stage("decode", self._decode, maps, inputs.clouds)
            rows = stage("nms", self._suppressor.from_boxes, found)
        return stage("pack", _pack, rows, voxels, inputs.poses)


class _Frame:
    """Frames of up to so many points: kernels' tables, inputs and output, and on a GPU the captured launches."""

    def __init__(self, frames: FusedFrames, points: int, clouds: int) -> None:
        model, device = frames.model, frames.device
        room = frames.room_for_voxels(points, clouds)
        self._inputs = FrameInputs(points, clouds, len(model.features), device, frames.decoder)
        ground = GroundFinder(model, device, points, clouds) if frames.finds_ground else None
        self._detect = partial(
            frames.detect,
            voxelizer=Voxelizer(model, device, points, room, clouds),
            encoder=FusedEncoder(frames.networks.encoder, model, room),
            partition=FusedPartition(model, device, room, clouds),
            inputs=self._inputs,
            ground=ground,
        )
        self._columns = model.box_size + EXTRA_COLUMNS
        self._graph: FrameGraph | None = None
        if frames.pool is not None:
            self._graph = FrameGraph(self._detect, frames.pool)
            self._outputs = [torch.empty(self._graph.output.shape, pin_memory=True) for _ in range(MAX_UNDER_WAY)]

    def begin(
        self,
        clouds: Sequence[InputCloud],
        poses: Sequence[NDArray[np.float64]],
        seeks_ground: Sequence[bool],
        *,
        timed: bool,
    ) -> Callable[[], FrameResult]:
        """See `FusedFrames.begin`."""
        self._inputs.upload(clouds, poses, seeks_ground)
        poses = [pose.copy() for pose in poses]
        graph = self._graph
        if graph is None:
            values = self._detect(run_stage).numpy()
            return lambda: self._result(values, poses, seeks_ground, {})
        stage_ms: dict[str, float] = {}
        if timed:
            stage_ms = graph.replay_stages()
        else:
            graph.replay()
        self._outputs.reverse()
        output = self._outputs[0].copy_(graph.output, non_blocking=True)
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record()

        def finish() -> FrameResult:
            ended.synchronize()
            return self._result(output.numpy(), poses, seeks_ground, stage_ms)

        return finish

    def _result(
        self,
        values: NDArray[np.float32],
        poses: list[NDArray[np.float64]],
        seeks_ground: Sequence[bool],
        stage_ms: dict[str, float],
    ) -> FrameResult:
        """What a frame found, from what `_pack` made; `poses` get their heights."""
        count = len(poses)
        last_voxel, height = values[-2 * count :].reshape(2, count)
        num_points, num_voxels, num_dropped = map(int, values[-2 * count - COUNTS :][:COUNTS])
        rows = values[: -2 * count - COUNTS].reshape(count, -1, self._columns).copy()
        # Without voxels, the dense network sees objects in its own biases.
        rows[last_voxel < 0, :, -1] = 0
        for number, seeks in enumerate(seeks_ground):
            if seeks:
                poses[number][2, 3] = height[number]
        return FrameResult(rows, poses, num_points, num_voxels + num_dropped, num_dropped, stage_ms)


def _pack(rows: Tensor, voxels: FusedVoxels, poses: Tensor) -> Tensor:
    """The rows, `COUNTS` counts, then of each cloud the last voxel and the height of its pose, in one tensor.

    float32 holds whole numbers up to 2**24.
    """
    last_voxel = voxels.grid.num_voxels - 1
    if len(rows) > 1:
        last_voxel = voxels.grid.voxel_of_cell.view(len(rows), -1).amax(1)
    counts = torch.cat([voxels.num_points, voxels.grid.num_voxels, voxels.num_dropped, last_voxel])
    return torch.cat([rows.flatten(), counts.float(), poses[:, 2, 3]])
