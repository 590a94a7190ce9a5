"""Running engines: one execution context each, fixed tensors, a stream of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dsvt_ros.backends.tensorrt.api import GpuError, logger, trt, type_name, usable_gpu
from dsvt_ros.capacity import write_padded
from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import (
    TensorSpec,
    maps_from_tensors,
    partition_from_tensors,
    sparse_inputs,
    tensors_for,
)
from dsvt_ros.structures import HeadMaps, SetPartition


class Engine:
    """A loaded engine with room for its inputs and outputs.

    All memory is allocated here, for the largest shapes. A run reads and writes these tensors and nothing else.

    Attributes:
        file: Where it comes from, for messages.
        inputs: What it takes: largest shapes.
        outputs: What it gives: largest shapes.
        smallest: Smallest shape of each input; the largest again unless the engine has a range.
    """

    def __init__(self, plan: bytes, file: str, device: torch.device, *, check_outputs: bool = False) -> None:
        """Load.

        Args:
            plan: The engine's bytes.
            file: Where they come from.
            device: The GPU.
            check_outputs: Poison the outputs before each run and look for what is left of it.

        Raises:
            GpuError: The GPU cannot be used, or has too little memory.
            EngineError: TensorRT refuses the engine.
        """
        self.file = file
        self._logger = logger()
        self._check = check_outputs
        self._device = device
        with _on(device):
            with usable_gpu():
                runtime: trt.Runtime = trt.Runtime(self._logger)
            engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineError(f"TensorRT {trt.__version__} refuses {file}: {self._logger.last_words()}")
            self._engine: trt.ICudaEngine = engine
            context: trt.IExecutionContext | None = engine.create_execution_context()
            if context is None:
                raise GpuError(f"{file} does not fit into the GPU's memory: {self._logger.last_words()}")
            self._context: trt.IExecutionContext = context
            self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = [self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
        self.smallest: dict[str, tuple[int, ...]] = {}
        self.inputs = tuple(self._input(name) for name, flag in zip(names, is_input, strict=True) if flag)
        self.outputs = tuple(self._output(name) for name, flag in zip(names, is_input, strict=True) if not flag)
        self._buffers = tensors_for((*self.inputs, *self.outputs), device)
        for name, values in self._buffers.items():
            if not self._context.set_tensor_address(name, values.data_ptr()):
                raise EngineError(f"{file} takes no address for {name}: {self._logger.last_words()}")

    def tensors(self, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
        """The inputs to fill before `run`, by name.

        Args:
            shapes: Shapes of this run where they are smaller than the largest; those of an engine with a range.

        Raises:
            EngineError: The engine does not take such a shape.
        """
        for name, shape in (shapes or {}).items():
            if not self._context.set_input_shape(name, tuple(shape)):
                raise EngineError(
                    f"{self.file} does not take {name} of shape {tuple(shape)}: {self._logger.last_words()}"
                )
        return {spec.name: self._view(spec.name) for spec in self.inputs}

    def run(self) -> dict[str, Tensor]:
        """Run on the inputs as they are.

        Returns:
            The outputs by name; they hold until the next run.

        Raises:
            EngineError: TensorRT fails, or (with `check_outputs`) left a part of an output unwritten.
        """
        outputs = {spec.name: self._view(spec.name) for spec in self.outputs}
        if self._check:
            for values in outputs.values():
                values.fill_(_poison(values))
        if self._stream is None:
            done = self._context.execute_async_v3(0)
        else:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with _on(self._device):
                done = self._context.execute_async_v3(self._stream.cuda_stream)
            current.wait_stream(self._stream)
        if not done:
            raise EngineError(f"{self.file} failed: {self._logger.last_words()}")
        if self._check:
            for name, values in outputs.items():
                bad = int((values.isnan() if values.is_floating_point() else values == _poison(values)).sum())
                if bad:
                    raise EngineError(f"{self.file}: {bad} of {values.numel()} values of {name} are NaN or not written")
        return outputs

    def times_ms(self, runs: int) -> list[float]:
        """Milliseconds of the engine alone, on the inputs as they are; CUDA only.

        Raises:
            EngineError: Running fails.
        """
        new = torch.cuda.Event
        events = [(new(enable_timing=True), new(enable_timing=True)) for _ in range(runs)]  # type: ignore[no-untyped-call]
        for begin, end in events:
            begin.record()
            self.run()
            end.record()
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) for begin, end in events]

    def _view(self, name: str) -> Tensor:
        """The part of a tensor's memory that this run uses, which starts where the memory does."""
        shape = tuple(self._context.get_tensor_shape(name))
        buffer = self._buffers[name]
        if shape == tuple(buffer.shape):
            return buffer
        count = 1
        for extent in shape:
            count *= extent
        return buffer.view(-1)[:count].view(shape)

    def _input(self, name: str) -> TensorSpec:
        shape = tuple(self._engine.get_tensor_shape(name))
        self.smallest[name] = shape
        if -1 in shape:
            minimum, _, maximum = self._engine.get_tensor_profile_shape(name, 0)
            self.smallest[name], shape = tuple(minimum), tuple(maximum)
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"{self.file} does not take its own shape {shape} of {name}")
        return TensorSpec(name, type_name(self._engine.get_tensor_dtype(name)), shape)

    def _output(self, name: str) -> TensorSpec:
        """To be asked after all inputs have got their largest shapes."""
        shape = tuple(self._context.get_tensor_shape(name))
        return TensorSpec(name, type_name(self._engine.get_tensor_dtype(name)), shape)


def check_tensors(engine: Engine, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Compare an engine's tensors with a network's.

    Args:
        engine: The engine.
        inputs: What the network takes; extents that a text names are free, and so is the type of real numbers.
        outputs: What it gives.

    Raises:
        EngineError: They differ.
    """
    for kind, found, expected in (("takes", engine.inputs, inputs), ("gives", engine.outputs, outputs)):
        ours = {spec.name: spec for spec in expected}
        if {spec.name for spec in found} != set(ours):
            raise EngineError(
                f"{engine.file} {kind} {', '.join(spec.name for spec in found)}, which is not {', '.join(ours)}: it is "
                f"the engine of another network"
            )
        for spec in found:
            shape, type_ = ours[spec.name].shape, ours[spec.name].type
            fits = len(shape) == len(spec.shape) and all(
                isinstance(extent, str) or extent == have for extent, have in zip(shape, spec.shape, strict=True)
            )
            same_kind = spec.type == type_ or (spec.type.startswith("float") and type_.startswith("float"))
            if not fits or not same_kind:
                raise EngineError(
                    f"{engine.file} {kind} {spec.name} as {spec.type} of shape {spec.shape}, expected {type_} of "
                    f"shape {shape}: it is the engine of another model"
                )


class TensorRtNetworks:
    """Both networks of a model; the sparse one for several capacities.

    Results hold until the next call.
    """

    name = "tensorrt"
    channels_last = False

    def __init__(self, model: ModelConfig, sparse: Sequence[Engine], dense: Engine) -> None:
        self._model = model
        self._sparse = sorted(sparse, key=_room)
        self._dense = dense
        self._last = self._sparse[-1]
        self.max_voxels: int | None = _room(self._sparse[-1])
        types = {spec.type for engine in (*sparse, dense) for spec in engine.outputs}
        self.precision = "fp16" if "float16" in types else "fp32"

    def engine_times_ms(self, runs: int) -> dict[str, list[float]]:
        """Milliseconds of each engine alone on the cloud before, by network; without padding and copies.

        Raises:
            EngineError: Running fails.
        """
        return {"sparse": self._last.times_ms(runs), "dense": self._dense.times_ms(runs)}

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) of the last stage, by the smallest engine with room for them.

        Raises:
            EngineError: There are more voxels than any engine has room for, or running fails.
        """
        count = len(features)
        if count == 0:
            return features
        engine = next((engine for engine in self._sparse if _room(engine) >= count), None)
        if engine is None:
            raise EngineError(
                f"{count} voxels, but the engines have room for {self.max_voxels}: keep the nearest, or set "
                f"engine.profile.voxels"
            )
        self._last = engine
        tensors = engine.tensors(_shapes_for(engine, features, partition))
        tensors["voxel_features"][:count].copy_(features)
        tensors["voxel_features"][count:].zero_()
        write_padded(partition, partition_from_tensors(tensors, self._model.backbone_3d))
        return engine.run()["features"][: len(partition.coords)]

    def dense(self, bev: Tensor) -> HeadMaps:
        """(1, D, H, W) BEV map to what the head says.

        Raises:
            EngineError: Running fails.
        """
        self._dense.tensors()["bev"].copy_(bev)
        return maps_from_tensors(self._dense.run(), self._model)


def _poison(values: Tensor) -> float | int:
    """What no network gives: NaN, or the least integer, as labels and cells are not negative."""
    return torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).min


def _room(engine: Engine) -> int:
    return next(int(spec.shape[0]) for spec in engine.inputs if spec.name == "voxel_features")


def _shapes_for(engine: Engine, features: Tensor, partition: SetPartition) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs for one cloud: its own, padded to the smallest that an engine with a range takes."""
    ranged = [spec.name for spec in engine.inputs if engine.smallest[spec.name] != spec.shape]
    if not ranged:
        return {}
    own = sparse_inputs(features, partition)
    return {
        name: tuple(max(pair) for pair in zip(own[name].shape, engine.smallest[name], strict=True)) for name in ranged
    }


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one, as TensorRT wants it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
