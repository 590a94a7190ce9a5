"""Whole frames on a GPU without a wait of the host: points in host memory to rows of boxes in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.backends.frames import FindGround, FirstStages, FrameNetworks, on_device
from dsvt_ros.capacity import room_for_voxels
from dsvt_ros.config import DetectorConfig, ModelConfig
from dsvt_ros.cuda_graph import FrameGraph, RunStage, run_stage
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.fused.inputs import FrameInputs, InputCloud
from dsvt_ros.fused.staging import TURNS
from dsvt_ros.fused.structures import FusedVoxels
from dsvt_ros.padded.structures import SortedVoxels

MIN_POINTS = 16_384
"""Room for points is this or a power of two times it, so that clouds of all sizes need few graphs."""
COUNTS = 3


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
        pool: Memory of captured graphs; None on the CPU, where stages run as they are.
        decoder: Reads clouds on the device; None where the host does.
    """

    def __init__(self, networks: FrameNetworks, model: ModelConfig, config: DetectorConfig) -> None:
        """Make ready for any clouds.

        Args:
            networks: Runs in the frames, on its device.
            model: That of the networks.
            config: Run-time options; change them through `configure`.

        Raises:
            EngineError: A frame cannot be compiled, captured or run here, or not with these options.
        """
        self.model, self.networks = model, networks
        self.device = networks.device
        self.decoder = networks.decoder()
        self._frames: dict[tuple[int, int], _Frame] = {}
        self._under_way: deque[Callable[[], FrameResult]] = deque()
        self.pool: Any = None
        try:
            self.configure(config)
        except ConfigError as error:
            raise EngineError(f"backend {networks.name}: {error}; {networks.otherwise}") from error
        if self.device.type == "cuda":
            try:
                self([torch.zeros(1, len(model.features))], [np.eye(4)])
            except Exception as error:  # of CUDA, Triton or its compilers, which have no type in common
                text = f"a whole frame of backend {networks.name} fails here; {networks.otherwise}: {error}"
                raise EngineError(text) from error

    def configure(self, config: DetectorConfig) -> None:
        """Take other run-time options, after all frames under way have ended; graphs are captured anew.

        Raises:
            ConfigError: The stages do not take them; the old ones stay.
        """
        box_finder = self.networks.box_finder(config.postprocess)
        self._end()
        self.box_finder, self._config = box_finder, config
        self._frames.clear()
        if self.device.type == "cuda":
            with on_device(self.device):
                torch.cuda.empty_cache()

    def _end(self, until: Callable[[], FrameResult] | None = None) -> None:
        """End frames under way, the oldest first: up to this one, or all.

        No frame ends before an older one. Outputs on the host are used in turns, as many as frames may be under way:
        once a younger one had ended, the next to begin would overwrite what nobody has read yet.
        """
        while self._under_way:
            finish = self._under_way.popleft()
            finish()
            if finish is until:
                break

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

        When this returns, nothing needs clouds in host memory any more, and the next frame may begin. `TURNS` may be
        under way; one more waits for the first of them.

        Args:
            clouds: Of each of B clouds the (N, C) float32 points, columns as `model.features`, in the sensor's frame.
            poses: (4, 4) model's frame from sensor's of each cloud.
            seeks_ground: Of each cloud, whether the z of its pose is to be found from the ground, if options allow for
                it (`PreprocessConfig.finds_ground`); by default of none.
            timed: Whether to time stages, which then run one by one.

        Returns:
            Waits for the frame to end, and gives what it found. Frames that began before it end first; what
            they found is kept until they are asked.

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
                if not self._frames and self.device.type == "cuda":
                    # Into a pool whose graphs are all gone, none can be captured any more.
                    self.pool = torch.cuda.graph_pool_handle()
                frame = self._frames[room, len(clouds)] = _Frame(self, room, len(clouds))
            if len(self._under_way) == TURNS:
                self._end(self._under_way[0])  # whose memory this one takes
            overlaps = bool(self._under_way)
            try:
                finish = cache(frame.begin(clouds, poses, seeks_ground, timed=timed, overlaps=overlaps))
            except Exception:
                self._end()  # whose memory comes next is not known any more
                raise

        self._under_way.append(finish)

        def end() -> FrameResult:
            if finish in self._under_way:
                self._end(finish)
            return finish()

        return end

    def detect(
        self, stage: RunStage, *, first: FirstStages, inputs: FrameInputs, find_ground: FindGround | None
    ) -> Tensor:
        """The stages of a frame; what `_pack` makes of its results."""
        config = self._config.preprocess
        if find_ground is not None:
            stage("ground", find_ground, inputs.points, inputs.ends, inputs.seeks_ground, inputs.poses, config)
        voxels = stage("voxelize", first.voxelize, inputs.points, inputs.ends, inputs.poses, config)
        features = stage("encode", first.encode, voxels)
        stages = stage("partition", first.partition, voxels.grid)
        features = stage("sparse", self.networks.backbone_3d, features, stages)
        maps = stage("dense", self.networks.dense_network, features, stages[-1].grid)
        found = stage("decode", self.box_finder.find, maps)
        rows = stage("nms", self.box_finder.suppress, found, inputs.clouds)
        return stage("pack", _pack, rows, voxels, inputs.poses)


class _Frame:
    """Frames of up to so many points: stages, inputs and output, and on a GPU the captured launches."""

    def __init__(self, frames: FusedFrames, points: int, clouds: int) -> None:
        model, device = frames.model, frames.device
        room = frames.room_for_voxels(points, clouds)
        self._inputs = FrameInputs(points, clouds, len(model.features), device, frames.decoder)
        networks = frames.networks
        self._detect = partial(
            frames.detect,
            first=networks.first_stages(points, room, clouds),
            inputs=self._inputs,
            find_ground=networks.ground_finder(points, clouds) if frames.finds_ground else None,
        )
        self._box_finder = frames.box_finder
        self._graph: FrameGraph | None = None
        if frames.pool is not None:
            self._graph = FrameGraph(self._detect, frames.pool)
            shape = self._graph.output.shape
            self._outputs = cycle([torch.empty(shape, pin_memory=True) for _ in range(TURNS)])

    def begin(
        self,
        clouds: Sequence[InputCloud],
        poses: Sequence[NDArray[np.float64]],
        seeks_ground: Sequence[bool],
        *,
        timed: bool,
        overlaps: bool,
    ) -> Callable[[], FrameResult]:
        """See `FusedFrames.begin`; `overlaps`: while another frame is under way."""
        self._inputs.upload(clouds, poses, seeks_ground, overlaps=overlaps)
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
        output = next(self._outputs).copy_(graph.output, non_blocking=True)
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
        end = len(values) - COUNTS - 2 * count
        rows = self._box_finder.settle(values[:end].reshape(count, -1, self._box_finder.columns))
        num_points, num_voxels, num_dropped, *of_clouds = values[end:].tolist()
        for number, seeks in enumerate(seeks_ground):
            last_voxel, height = of_clouds[number::count]
            if last_voxel < 0:  # none: the dense network sees objects in its own biases
                rows[number, :, -1] = 0
            if seeks:
                poses[number][2, 3] = height
        return FrameResult(rows, poses, int(num_points), int(num_voxels + num_dropped), int(num_dropped), stage_ms)


def _pack(rows: Tensor, voxels: FusedVoxels | SortedVoxels, poses: Tensor) -> Tensor:
    """The rows, `COUNTS` counts, then of each cloud the last voxel and the height of its pose, in one tensor.

    float32 holds whole numbers up to 2**24.
    """
    last_voxel = voxels.grid.num_voxels - 1
    if len(rows) > 1:
        last_voxel = voxels.grid.voxel_of_cell.view(len(rows), -1).amax(1)
    counts = torch.cat([voxels.num_points, voxels.grid.num_voxels, voxels.num_dropped, last_voxel])
    return torch.cat([rows.flatten(), counts.float(), poses[:, 2, 3]])
