"""The detector: a cloud in, boxes out. The whole flow is `Detector.forward`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dsvt_ros.backends import BACKENDS, Networks, Progress, no_progress
from dsvt_ros.backends.choice import open_networks
from dsvt_ros.backends.frames import FrameNetworks
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.capacity import keep_nearest
from dsvt_ros.config import DetectorConfig, ModelConfig, leaves, with_overrides
from dsvt_ros.errors import ConfigError, EngineError, ModelError, PointCloudError
from dsvt_ros.fused.frame import FusedFrames
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.ground import ground_height
from dsvt_ros.host_memory import keep_freed_memory
from dsvt_ros.io.pointcloud2 import RawCloud, raw_from_points
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import folded_copy
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.poses import axes_matrix, pose_matrix
from dsvt_ros.postprocess import decode, no_boxes, suppress
from dsvt_ros.preprocess import (
    boxes_to_source,
    drop_missing,
    scale_features,
    transform,
)
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.stage_clock import StageClock
from dsvt_ros.structures import Boxes3D, DeviceBoxes, Voxels
from dsvt_ros.voxelization import voxelize

_LOG = logging.getLogger(__name__)

# On a GPU, kernels are chosen or captured by size; on the CPU, only the first run of all is slow.
WARM_UP_POINTS = {"cpu": (1,), "cuda": (1, 10_000, 20_000, 50_000, 100_000, 200_000, 200_000)}


class Detector:
    """Finds objects in lidar clouds.

    Attributes:
        networks: What runs the two networks.
        model: The network and the data it was trained for.
        config: Run-time options; change them through `configure`.
        backend: Who runs the two networks.
        backend_reason: Why, or with which files.
        precision: ``fp32`` or ``fp16``, of the two networks.
        device: Where everything runs.
        num_points: Points inside the model's range in the last cloud.
        num_voxels: Occupied voxels in the last cloud.
        num_dropped_voxels: Of these, the farthest ones that the networks had no room for.
        T_model_source: (4, 4) transform that brought the last cloud into the model's frame.
    """

    def __init__(
        self,
        network: DSVT,
        config: DetectorConfig,
        device: torch.device,
        networks: Networks | None = None,
        backend_reason: str = "",
    ) -> None:
        """Make ready; without `networks`, torch runs `network`."""
        self.model: ModelConfig = network.config
        self.config = config
        self.device = device
        if device.type == "cpu":
            keep_freed_memory()
        self.num_points = 0
        self.num_voxels = 0
        self.num_dropped_voxels = 0
        self.T_model_source: NDArray[np.float64] = np.eye(4)
        network = network.to(device).eval().requires_grad_(False)
        self.networks: Networks = TorchNetworks(network) if networks is None else networks
        self.backend, self.precision = self.networks.name, self.networks.precision
        self.backend_reason = backend_reason
        self._set_pose()
        self._clock = StageClock(device)
        # Whole frames, in place of `forward`.
        self._frames: FusedFrames | None = None
        if isinstance(self.networks, FrameNetworks):
            self._frames = FusedFrames(self.networks, self.model, config)
        else:
            self._make_stages(network.vfe)

    def _make_stages(self, encoder: PillarEncoder) -> None:
        """The stages that `forward` goes through."""
        time = self._clock.time
        self._prepare = time("preprocess", self._to_model_frame)
        self._voxelize = time("voxelize", self._to_voxels)
        self._encode = time("encode", folded_copy(encoder))
        self._partition = time("partition", partition_sets)
        self._sparse = time("sparse", self.networks.sparse)
        self._scatter = time("scatter", partial(scatter_bev, channels_last=self.networks.channels_last))
        self._dense = time("dense", self.networks.dense)
        self._decode = time("decode", decode)
        self._suppress = time("nms", suppress)

    @classmethod
    def load(
        cls,
        model: str | Path = "demo",
        weights: str | Path | None = None,
        backend: str = "auto",
        device: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        progress: Progress = no_progress,
    ) -> Detector:
        """Load a model and make it ready to detect.

        Args:
            model: Name of an embedded model, a model folder or its ``model.yaml``.
            weights: Weights file (``.safetensors`` or a pcdet ``.pth``); None takes the model folder's own.
            backend: ``auto``, ``torch``, ``triton``, ``onnxruntime`` or ``tensorrt``.
            device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
            overrides: Dotted keys of `DetectorConfig`, such as ``{"postprocess.score_threshold": 0.3}``.
            progress: Told how long preparations go on, such as building engines; may raise to stop them.

        Raises:
            ConfigError: An option is unknown or impossible.
            ModelError: The model or its weights are missing, corrupt or do not fit each other.
            EngineError: The backend cannot run here, or its files are damaged.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        folder = open_model(model)
        config = with_overrides(folder.defaults, overrides or {})
        config.check_against(folder.model)
        source = weights or folder.weights
        if source is None:
            raise ModelError(
                f"model {folder.model.name} comes without weights: name a file with --weights "
                f"(parameter weights), a .safetensors or a pcdet .pth"
            )
        network = DSVT(folder.model)
        load_weights(network, read_weights(source), str(source))
        chosen = choose_device(device)
        network = network.to(chosen).eval().requires_grad_(False)
        open_with = partial(open_networks, backend, network, folder, Path(source), chosen, config.engine, progress)
        failed: dict[str, str] = {}  # backends whose frames do, and why
        while True:
            networks, reason = open_with(failed=failed)
            try:
                return cls(network, config, chosen, networks, reason)
            except EngineError as error:
                if networks.name in failed or backend == "triton":
                    raise
                _LOG.warning("%s", error)
                failed[networks.name] = str(error)

    def detect(
        self,
        points: ArrayLike | Tensor | RawCloud,
        T_model_sensor: NDArray[np.float64] | None = None,  # noqa: N803
    ) -> Boxes3D:
        """Detect objects in one cloud.

        Args:
            points: (N, C) columns as `model.feature_names`, in the sensor's frame; NaN rows and returns nearer than
                `preprocess.min_range` are dropped. N may be 0. Models of several sweeps take those of `merge_sweeps`,
                or a single one with age 0. Clouds as they were received come as `raw_from_msg` makes them, which may
                be read on the device.
            T_model_sensor: (4, 4) pose of the sensor in the model's frame for this cloud, such as `pose_in_model` makes
                of a vehicle's; None takes `preprocess.sensor_pose` and `preprocess.cloud_axes`.

        Returns:
            Boxes in the frame of `points`, ordered by class, then by descending score.

        Raises:
            PointCloudError: `points` are no numbers, or have another number of columns.
        """
        self._clock.restart()
        if self._frames is not None:
            return self._begin(self._frames, points, T_model_sensor)()
        pose, find_ground = self._pose_of(T_model_sensor)
        with torch.inference_mode():
            cloud = self._upload(points)
            cloud, self.T_model_source = self._prepare(cloud, pose, find_ground=find_ground)
            boxes = self._download(self.forward(cloud))
        return boxes_to_source(boxes, self.T_model_source)

    def detect_all(self, clouds: Iterable[ArrayLike | Tensor | RawCloud]) -> Iterator[Boxes3D]:
        """`detect` in one cloud after the other, for recordings.

        Where whole frames run (`FrameNetworks`), the next cloud is copied and handed to the device while it works on
        the present one: each answer comes one cloud later, and more of them a second.

        Raises:
            PointCloudError: As `detect`, after the answers to all clouds before.
        """
        frames = self._frames
        if frames is None:
            yield from map(self.detect, clouds)
            return
        begun = (self._begin(frames, cloud) for cloud in clouds)
        present = next(begun, None)
        while present is not None:
            try:
                following = next(begun, None)
            except Exception:
                yield present()
                raise
            yield present()
            present = following

    def pose_in_model(self, T_vehicle_sensor: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: N803
        """(4, 4) pose of the sensor in the model's frame from that in the vehicle's, both with axes x forward, y left.

        The model's frame and the cloud may have other axes (`ModelConfig.axes`, `preprocess.cloud_axes`).
        """
        cloud_axes = axes_matrix(self.config.preprocess.axes_of_clouds(self.model))
        pose: NDArray[np.float64] = axes_matrix(self.model.axes) @ T_vehicle_sensor @ np.linalg.inv(cloud_axes)
        return pose

    def warm_up(self) -> None:
        """Detect in made-up clouds, so that the first real one does not wait for memory and kernels.

        They come as received ones do, which have a kernel more than arrays.
        """
        low, high = self.model.point_cloud_range[:3], self.model.point_cloud_range[3:]
        rest = [feature.fill for feature in self.model.features[3:]]
        random = np.random.default_rng(0)
        for count in WARM_UP_POINTS[self.device.type]:
            points = np.column_stack([random.uniform(low, high, (count, 3)), np.tile(rest, (count, 1))])
            self.detect(raw_from_points(points.astype(np.float32), self.model.feature_names), np.eye(4))

    def forward(self, points: Tensor) -> DeviceBoxes:
        """The stages of the detector, from (N, C) points in the model's frame to boxes."""
        voxels = self._voxelize(points)
        if len(voxels) == 0:  # the dense network would see objects in its own biases
            return no_boxes(self.model, points)
        features = self._encode(voxels)
        partition = self._partition(voxels.coords, self.model)
        features = self._sparse(features, partition)
        bev = self._scatter(features, partition.coords, self.model.grid_size, voxels.batch_size)
        maps = self._dense(bev)
        candidates = self._decode(maps, self.model, self.config.postprocess)
        return self._suppress(candidates, self.model, self.config.postprocess)

    def configure(self, overrides: Mapping[str, Any]) -> None:
        """Change run-time options between two clouds.

        Raises:
            ConfigError: A key is unknown, a value impossible, or the option is fixed once the detector is loaded.
        """
        config = with_overrides(self.config, overrides)
        config.check_against(self.model)
        fixed = {key for key, field, _ in leaves(config) if not field.metadata.get("live")}
        for key in overrides:
            if key in fixed:
                raise ConfigError(f"{key} cannot change while the detector runs; load it anew")
        if self._frames is not None:
            self._frames.configure(config)
        self.config = config
        self._set_pose()

    @property
    def timing_ms(self) -> dict[str, float]:
        """Milliseconds of each stage that the last cloud went through; on CUDA only within `timed_stages`."""
        return dict(self._clock.timing_ms)

    @contextmanager
    def timed_stages(self) -> Iterator[None]:
        """Time the stages of every cloud meanwhile; on CUDA each stage then waits for the device."""
        enabled, self._clock.enabled = self._clock.enabled, True
        try:
            yield
        finally:
            self._clock.enabled = enabled

    def _set_pose(self) -> None:
        preprocess = self.config.preprocess
        turned = preprocess.cloud_axes not in ("model", self.model.axes)
        identity = not preprocess.sensor_pose and not turned
        self._pose = None if identity else self.pose_in_model(pose_matrix(preprocess.sensor_pose))

    def _begin(
        self,
        frames: FusedFrames,
        points: ArrayLike | Tensor | RawCloud,
        T_model_sensor: NDArray[np.float64] | None = None,  # noqa: N803
    ) -> Callable[[], Boxes3D]:
        """Begin to `detect` in one frame; what this returns waits for it to end."""
        pose, find_ground = self._pose_of(T_model_sensor)
        pose = np.eye(4) if pose is None else pose
        end = frames.begin([self._checked(points)], [pose], seeks_ground=[find_ground], timed=self._clock.enabled)
        options = self.config.postprocess

        def finish() -> Boxes3D:
            result = end()
            (self.T_model_source,) = result.poses
            self._clock.timing_ms = result.stage_ms
            self.num_points, self.num_voxels = result.num_points, result.num_voxels
            self._note_dropped(result.num_dropped_voxels)
            return boxes_to_source(boxes_from_rows(result.rows[0], self.model, options), self.T_model_source)

        return finish

    def _pose_of(self, T_model_sensor: NDArray[np.float64] | None) -> tuple[NDArray[np.float64] | None, bool]:  # noqa: N803
        """Pose of the sensor, None for the identity, and whether its height is to be found in the cloud."""
        if T_model_sensor is not None:
            return np.asarray(T_model_sensor, np.float64), False
        return self._pose, self.config.preprocess.finds_ground

    def _upload(self, points: ArrayLike | Tensor | RawCloud) -> Tensor:
        cloud = self._checked(points)
        if isinstance(cloud, RawCloud):
            cloud = torch.as_tensor(cloud.points())
        return cloud.to(self.device, torch.float32)

    def _checked(self, points: ArrayLike | Tensor | RawCloud) -> Tensor | RawCloud:
        columns = self.model.feature_names
        cloud = points if isinstance(points, (Tensor, RawCloud)) else _tensor_of(points)
        if len(cloud.shape) != 2 or cloud.shape[1] != len(columns):
            raise PointCloudError(
                f"model {self.model.name} takes {len(columns)} columns ({', '.join(columns)}), "
                f"got an array of shape {tuple(cloud.shape)}"
            )
        return cloud

    def _to_model_frame(
        self, cloud: Tensor, pose: NDArray[np.float64] | None, *, find_ground: bool
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Drop missing returns and move the rest; also gives the transform that was applied."""
        cloud = drop_missing(cloud, self.model, self.config.preprocess)
        applied = np.eye(4) if pose is None else pose.copy()
        if find_ground:
            applied[2, 3] = self.model.ground_z - float(ground_height(cloud))
        if pose is not None or find_ground:
            cloud = transform(cloud, torch.as_tensor(applied, dtype=cloud.dtype, device=cloud.device))
        return scale_features(cloud, self.model, self.config.preprocess), applied

    def _to_voxels(self, points: Tensor) -> Voxels:
        voxels = voxelize(points, self.model)
        self.num_points, self.num_voxels = len(voxels.points), len(voxels)
        room = self.networks.max_voxels
        dropped = 0 if room is None else max(len(voxels) - room, 0)
        self._note_dropped(dropped)
        return keep_nearest(voxels, self.model, len(voxels) - dropped)

    def _note_dropped(self, count: int) -> None:
        if count and not self.num_dropped_voxels:  # once, until a cloud fits again
            _LOG.warning(
                "%d voxels, room for %d: the farthest are dropped (engine.profile.voxels, or dsvt export --voxels)",
                self.num_voxels,
                self.num_voxels - count,
            )
        self.num_dropped_voxels = count

    def _download(self, found: DeviceBoxes) -> Boxes3D:
        keep = found.keep
        return Boxes3D(
            boxes=found.boxes[keep].cpu().numpy(),
            scores=found.scores[keep].cpu().numpy(),
            labels=found.labels[keep].cpu().numpy(),
            class_names=self.model.class_names,
        )


def _tensor_of(points: ArrayLike) -> Tensor:
    """A float32 tensor, which shares memory with an array where torch can."""
    try:
        array = np.asarray(points, np.float32)
    except (TypeError, ValueError) as error:
        raise PointCloudError(f"points must be an array of numbers: {error}") from error
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)


def choose_device(device: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for; `ConfigError` if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch finds no CUDA device; use device cpu or auto")
    return chosen
