"""The process that builds one engine: ``python -m dsvt_ros.backends.tensorrt.child REQUEST.json PARENT_PID``.

It prints a JSON object a line: ``{"stage": ..., "fraction": ...}`` while it works, ``{"error": ...}`` or
``{"report": ...}`` at the end. It imports no torch, which would take memory that the builder needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvt_ros.backends.tensorrt.api import logger, trt, usable_gpu
from dsvt_ros.errors import EngineError

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal that a process gets when its parent dies."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildRequest:
    """What the child is asked for.

    Attributes:
        onnx: The network.
        engine: Where to write the engine.
        timing_cache: Measurements of earlier builds; read where it exists, and written.
        profile: Minimum, optimum and maximum shape of each input.
        half: Whether the network holds float16.
        single_precision: Its layers that compute in float32 nevertheless.
        workspace_bytes: GPU memory that the engine's layers may use.
        optimization_level: 0 to 5.
        tactic_sources: Names; empty for TensorRT's choice.
    """

    onnx: str
    engine: str
    timing_cache: str
    profile: dict[str, tuple[Shape, Shape, Shape]]
    half: bool
    single_precision: tuple[str, ...]
    workspace_bytes: int
    optimization_level: int
    tactic_sources: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Build for the process that waits; the exit status is 0 if the engine is complete."""
    request = BuildRequest(**json.loads(Path(argv[0]).read_text()))
    _end_with(int(argv[1]))
    try:
        report = build(request)
    except EngineError as error:
        say(error=str(error))
        return 1
    say(report=report)
    return 0


def say(**content: Any) -> None:
    """Tell the parent."""
    print(json.dumps(content), flush=True)


def build(request: BuildRequest) -> dict[str, Any]:
    """Build an engine and write it.

    Returns:
        Build time, the precision of its layers, and which layers it lacks that should be kept in float32.

    Raises:
        EngineError: TensorRT cannot read or build the network.
    """
    started = time.monotonic()
    say(stage="reading the network")
    with usable_gpu():
        builder: trt.Builder = trt.Builder(logger())
    network: trt.INetworkDefinition = builder.create_network(_network_flags())
    parser: trt.OnnxParser = trt.OnnxParser(network, logger())
    if not parser.parse(Path(request.onnx).read_bytes()):
        error: trt.ParserError = parser.get_error(0)
        raise EngineError(
            f"TensorRT {trt.__version__} cannot read {Path(request.onnx).name}: {error.desc()} (node {error.node()})"
        )
    config: trt.IBuilderConfig = builder.create_builder_config()
    _set_shapes(builder, network, config, request)
    unknown = _set_types(network, config, request)
    _set_effort(config, request)

    cache_path = Path(request.timing_cache)
    earlier = cache_path.read_bytes() if cache_path.is_file() else b""
    cache: trt.ITimingCache | None = config.create_timing_cache(earlier)
    if cache is None:  # damaged; it is written anew
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor()
    say(stage="choosing kernels")
    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build {Path(request.onnx).name}: {logger().last_words()}")
    Path(request.engine).write_bytes(plan)
    seconds = time.monotonic() - started
    _keep(cache, cache_path)
    say(stage="inspecting the engine")
    return {"build_s": round(seconds, 1), "layers": _layers(bytes(plan)), "unknown_layers": unknown}


def _network_flags() -> int:
    """Tensors with a batch axis, of the types in the file where TensorRT knows how to keep to them."""
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    elif hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    return flags


def _set_shapes(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, request: BuildRequest
) -> None:
    """Give every input its shape, or, where that is a range, an optimization profile."""
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    ranges = False
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        if tensor.name not in request.profile:
            raise EngineError(f"{Path(request.onnx).name} has an input {tensor.name}, which is none of ours")
        minimum, optimum, maximum = (tuple(shape) for shape in request.profile[tensor.name])
        if minimum == maximum:
            tensor.shape = maximum  # fixed for the whole engine, which makes it faster than a profile does
        else:
            ranges = True
            profile.set_shape(tensor.name, minimum, optimum, maximum)
    if ranges:
        config.add_optimization_profile(profile)


def _set_types(network: trt.INetworkDefinition, config: trt.IBuilderConfig, request: BuildRequest) -> list[str]:
    """Make TensorRT keep to the types of the file; returns layers that should be in float32 and do not exist."""
    config.clear_flag(trt.BuilderFlag.TF32)  # rounds products of float32 to 10 bits
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not request.half:
        return []
    # TensorRT 8 takes all types for float32 until it builds. Half precision has to be allowed, and forbidden where the
    # file has single precision.
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    if hasattr(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"):
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    single = set(request.single_precision)
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        # Constants have the types of the file from the start; left alone, those in float32 would be rounded.
        tensor: trt.ITensor = layer.get_output(0)
        constant = layer.type == trt.LayerType.CONSTANT and tensor.dtype == trt.DataType.FLOAT
        if layer.name not in single and not constant:
            continue
        if hasattr(layer, "precision") and hasattr(layer, "set_output_type"):
            layer.precision = trt.DataType.FLOAT
            for number in range(layer.num_outputs):
                layer.set_output_type(number, trt.DataType.FLOAT)
            single.discard(layer.name)
    return sorted(single)


def _set_effort(config: trt.IBuilderConfig, request: BuildRequest) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names and types for the inspector
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = request.optimization_level
    if hasattr(trt.PreviewFeature, "FASTER_DYNAMIC_SHAPES_0805"):
        config.set_preview_feature(trt.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, True)
    if request.tactic_sources:
        known = {name.lower(): int(source) for name, source in trt.TacticSource.__members__.items()}
        unknown = [name for name in request.tactic_sources if name.lower() not in known]
        if unknown:
            raise EngineError(
                f"engine.tactic_sources: TensorRT {trt.__version__} has no {', '.join(unknown)}; "
                f"it has {', '.join(sorted(known))}"
            )
        config.set_tactic_sources(sum(1 << known[name.lower()] for name in request.tactic_sources))


def _monitor() -> Any:
    """TensorRT's own progress as fractions of the whole build."""
    assert hasattr(trt, "IProgressMonitor")  # came with the property that takes it

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.open: dict[str, tuple[str, int, int]] = {}  # phase: parent, steps, steps done
            self.fraction = 0.0

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.open[phase_name] = (parent_phase, max(1, num_steps), 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.open:
                parent, steps, _ = self.open[phase_name]
                self.open[phase_name] = (parent, steps, step + 1)
                self.tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.open.pop(phase_name, None)

        def tell(self) -> None:
            """Report the share that is done, if it has grown by a hundredth."""
            done, width, parent = 0.0, 1.0, ""
            while level := [phase for phase, (above, _, _) in self.open.items() if (above or "") == parent]:
                _, steps, finished = self.open[level[0]]
                done += width * min(1.0, finished / steps)
                width, parent = width / steps, level[0]
            if done >= self.fraction + 0.01:
                self.fraction = done
                say(stage="choosing kernels", fraction=round(min(done, 1.0), 3))

    return Monitor()


def _layers(plan: bytes) -> dict[str, dict[str, int]]:
    """How many layers of each class give which precision, as the engine inspector reports it."""
    with usable_gpu():
        runtime: trt.Runtime = trt.Runtime(logger())
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot load the engine it built")
    inspector: trt.EngineInspector = engine.create_engine_inspector()
    content = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    counts: dict[str, Counter[str]] = {}
    for layer in content.get("Layers", []):
        if isinstance(layer, dict):
            formats = [output.get("Format/Datatype", "") for output in layer.get("Outputs", [])]
            counts.setdefault(str(layer.get("LayerType", "unknown")), Counter())[precision_of(formats)] += 1
    return {kind: dict(sorted(precisions.items())) for kind, precisions in sorted(counts.items())}


def precision_of(formats: list[str]) -> str:
    """The precisions in the inspector's descriptions, such as ``Row major linear FP16 format``."""
    names = {"fp16": "FP16|Half", "fp32": "FP32|Float", "bf16": "BF16|BFloat16", "int": "Int|INT|Bool|BOOL"}
    found = {
        name
        for description in formats
        for name, pattern in names.items()
        if re.search(rf"\b({pattern})\d*\b", description)
    }
    return "+".join(sorted(found)) or "unknown"


def _keep(cache: trt.ITimingCache, path: Path) -> None:
    """Save the measurements for the next build; without them it only takes longer."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content: trt.IHostMemory = cache.serialize()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _end_with(parent: int) -> None:
    """Die with the process that waits, and be the first to go when the system runs out of memory."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    with contextlib.suppress(OSError):  # in some containers it is not ours to say
        Path("/proc/self/oom_score_adj").write_text("1000")


def request_text(request: BuildRequest) -> str:
    """The JSON that `main` reads."""
    return json.dumps(dataclasses.asdict(request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
