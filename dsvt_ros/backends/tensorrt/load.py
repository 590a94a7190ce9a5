"""From a model to its engines: given ones, cached ones, or new ones."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsvt_ros.backends import Progress
from dsvt_ros.backends.tensorrt.api import LAYER_NORMALIZATION, release_of, require_tensorrt, trt
from dsvt_ros.backends.tensorrt.build import child_environment, run_child
from dsvt_ros.backends.tensorrt.cache import EngineSpec, check_spec, load_or_build, read_engine, specs_in, write_sidecar
from dsvt_ros.backends.tensorrt.child import BuildRequest, Shape
from dsvt_ros.backends.tensorrt.runner import Engine, TensorRtNetworks, check_tensors
from dsvt_ros.backends.tensorrt.self_test import check_against_torch
from dsvt_ros.capacity import capacity_for, default_voxels
from dsvt_ros.config import EngineConfig, ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.cache import ExportedModel, cache_folder, exported_model, find_export
from dsvt_ros.export.folder import ExportOptions, model_sha256
from dsvt_ros.export.manifest import ExportedNetwork, Manifest, read_checked, read_manifest
from dsvt_ros.export.networks import Specs, dense_specs, sparse_specs
from dsvt_ros.model.checkpoint import weights_sha256
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.folder import ModelFolder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What engines are made from.

    Attributes:
        network: The model with its weights, in evaluation mode.
        folder: Where it comes from; it may hold exported networks.
        weights: The weights file.
        device: The GPU.
        config: Paths, profile and effort.
    """

    network: DSVT
    folder: ModelFolder
    weights: Path
    device: torch.device
    config: EngineConfig


@dataclass(frozen=True)
class PlannedEngine:
    """An engine to be, and the network that it is built from."""

    spec: EngineSpec
    onnx: bytes
    single_precision: tuple[str, ...]


def load_networks(source: Source, progress: Progress) -> tuple[TensorRtNetworks, str]:
    """Engines for both networks of a model, built where the cache has none.

    Args:
        source: The model.
        progress: Told how a build goes on; may raise to stop it.

    Returns:
        The networks, and where they come from.

    Raises:
        EngineError: TensorRT is missing, an engine is refused, or a build fails.
    """
    require_gpu(source.device)
    given = {"sparse": source.config.sparse_path, "dense": source.config.dense_path}
    engines: dict[str, list[Engine]] = {"sparse": [], "dense": []}
    origins, unknown = [], []
    for name, path in given.items():
        if path:
            engine, known = _given(source, name, Path(path).expanduser())
            engines[name].append(engine)
            origins.append(path)
            unknown += [] if known else [name]
    if not all(given.values()):
        for planned in planned_engines(source):
            if not given[planned.spec.network]:
                engine, origin = _obtain(source, planned, progress)
                engines[planned.spec.network].append(engine)
                origins.append(origin)
    (dense,) = engines["dense"]
    networks = TensorRtNetworks(source.folder.model, engines["sparse"], dense)
    if unknown:
        _LOG.warning("no sidecar says what %s was built from: comparing with torch", " and ".join(unknown))
        check_against_torch(networks, source.network, source.device, unknown)
    return networks, f"engines {', '.join(origins)}"


def planned_engines(source: Source) -> Iterator[PlannedEngine]:
    """The engines that a model needs here: one dense, and one sparse for each capacity; exports if need be.

    Raises:
        EngineError: The networks cannot be exported, or were exported for something else.
    """
    require_gpu(source.device)
    config = source.config
    exported = exported_model(
        source.network,
        source.folder,
        source.weights,
        _export_options(config),
        config,
        lambda manifest: _objection(manifest, config),
    )
    yield from _planned(source, exported)


def _planned(source: Source, exported: ExportedModel) -> Iterator[PlannedEngine]:
    for name, network in exported.manifest.networks.items():
        onnx = exported.files[network.file]
        for profile in _profiles(source.folder.model, network, source.config):
            yield PlannedEngine(_spec(source, name, exported.manifest, onnx, profile), onnx, network.single_precision)


def planned_release(source: Source) -> PlannedEngine:
    """The engine of a folder that was exported with the published deployment's interface.

    Raises:
        EngineError: The folder was exported with other weights, or its file is damaged.
    """
    require_gpu(source.device)
    manifest = read_manifest(source.folder.path)
    if manifest.weights_sha256 != weights_sha256(source.weights):
        raise EngineError(f"{source.folder.path} was exported with other weights than {source.weights}")
    network = manifest.networks["dsvt"]
    onnx = read_checked(source.folder.path, manifest, network.file)
    (profile,) = _profiles(source.folder.model, network, source.config)
    return PlannedEngine(_spec(source, "dsvt", manifest, onnx, profile), onnx, network.single_precision)


def write_engine(source: Source, planned: PlannedEngine, target: Path, progress: Progress) -> dict[str, Any]:
    """Build an engine and its sidecar at a path of the user's choice.

    Raises:
        EngineError: It cannot be built or written.
    """
    if target.is_dir():
        raise EngineError(f"cannot write {target}: it is a folder")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            report = _build(source, planned, partial, progress)
            write_sidecar(partial, target, planned.spec, report)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"cannot write {target}: {error}") from None
    return report


def cache_engine(source: Source, planned: PlannedEngine, progress: Progress) -> str:
    """Make sure that the cache holds an engine that loads; returns where it is."""
    return _obtain(source, planned, progress)[1]


def engine_folder(config: EngineConfig) -> Path:
    """Where engines are kept."""
    return cache_folder(config) / "tensorrt"


def engines_ready(source: Source) -> bool:
    """Whether loading would build nothing: all engines lie in the cache or are given by path.

    Raises:
        EngineError: TensorRT is missing, or the model folder's export is damaged.
    """
    require_tensorrt()
    config = source.config
    given = {"sparse": config.sparse_path, "dense": config.dense_path}
    if all(given.values()):
        return True
    exported = find_export(
        source.folder,
        source.weights,
        _export_options(config),
        config,
        lambda manifest: _objection(manifest, config),
    )
    if exported is None:
        return False
    there = specs_in(engine_folder(config))
    wanted = [planned.spec for planned in _planned(source, exported) if not given[planned.spec.network]]
    return all(spec.content() in there for spec in wanted)


def _export_options(config: EngineConfig) -> ExportOptions:
    """What engines are built from; counts stay open until then."""
    return ExportOptions(precision=config.precision, layer_norm="decomposed" if _decompose() else "fused")


def _objection(manifest: Manifest, config: EngineConfig) -> str:
    """Why exported networks of the right weights are of no use for engines; empty if they are."""
    capacity = manifest.capacity
    if manifest.precision != config.precision:
        return f"they have precision {manifest.precision}"
    if _decompose() and manifest.layer_norm != "decomposed":
        return f"TensorRT {trt.__version__} does not know their LayerNormalization (export --layer-norm decomposed)"
    if capacity is not None and (config.profile.dynamic or config.profile.voxels not in ((), (capacity.voxels,))):
        return f"they have room for {capacity.voxels} voxels"
    return ""


def _decompose() -> bool:
    """Whether layer norms have to be taken apart for this TensorRT."""
    return release_of(trt.__version__) < LAYER_NORMALIZATION


def require_gpu(device: torch.device) -> None:
    """Check that TensorRT is here and that it can run on `device`.

    Raises:
        EngineError: It is not, or it cannot.
    """
    require_tensorrt()
    if device.type != "cuda":
        raise EngineError(f"backend tensorrt runs on NVIDIA GPUs, not on device {device}: choose another backend")


def _given(source: Source, name: str, path: Path) -> tuple[Engine, bool]:
    """An engine that the user names, and whether its sidecar proves what it is."""
    plan, sidecar = read_engine(path)
    if sidecar is not None:
        wanted = {**_identity(source.folder, source.weights, source.device), "network": name}
        check_spec(path, sidecar["spec"], wanted)
    return _ready(source, name, plan, str(path)), sidecar is not None


def _obtain(source: Source, planned: PlannedEngine, progress: Progress) -> tuple[Engine, str]:
    """An engine of the cache, built if need be."""
    return load_or_build(
        planned.spec,
        engine_folder(source.config),
        load=lambda plan, file: _ready(source, planned.spec.network, plan, file),
        build=lambda path: _build(source, planned, path, progress),
        waiting=lambda text: progress(text, None),
    )


def _ready(source: Source, name: str, plan: bytes, file: str) -> Engine:
    """An engine, loaded and compared with the interface that it should have."""
    engine = Engine(plan, file, source.device, check_outputs=source.config.check_outputs)
    model = source.folder.model
    interface: Specs | None = None
    if name == "sparse":
        interface = sparse_specs(model, None, "float32")
    elif name == "dense":
        interface = dense_specs(model, inference_modules(source.network), "float32")
    if interface is not None:  # that of the published deployment is for other programs
        check_tensors(engine, *interface)
    return engine


def _build(source: Source, planned: PlannedEngine, target: Path, progress: Progress) -> dict[str, Any]:
    """Build into `target`; returns the child's report."""
    spec, config = planned.spec, source.config
    onnx = target.with_name(f"{target.name}.onnx")
    voxels = next((shapes[2][0] for name, shapes in spec.profile.items() if name in ("voxel_features", "src")), None)
    what = f"the {spec.network} network of {spec.model}" + (f" for {voxels} voxels" if voxels else "")
    free = torch.cuda.mem_get_info(source.device)[0]
    request = BuildRequest(
        onnx=str(onnx),
        engine=str(target),
        timing_cache=str(engine_folder(config) / f"timing-{spec.tensorrt}-{spec.gpu.replace(' ', '_')}.cache"),
        profile=spec.profile,
        half=spec.precision == "fp16",
        single_precision=planned.single_precision,
        workspace_bytes=config.workspace_mib << 20 if config.workspace_mib else free // 2,
        optimization_level=config.optimization_level,
        tactic_sources=config.tactic_sources,
    )
    try:
        onnx.write_bytes(planned.onnx)
        report = run_child(request, child_environment(source.device.index or 0), what, progress)
    finally:
        onnx.unlink(missing_ok=True)
    if report["unknown_layers"]:
        _LOG.warning(
            "TensorRT %s names layers in its own way: %d that need float32 may run in float16; see dsvt verify",
            spec.tensorrt,
            len(report["unknown_layers"]),
        )
    return report


def _spec(
    source: Source, name: str, manifest: Manifest, onnx: bytes, profile: dict[str, tuple[Shape, Shape, Shape]]
) -> EngineSpec:
    config = source.config
    return EngineSpec(
        **_identity(source.folder, source.weights, source.device),
        model=manifest.model,
        network=name,
        onnx_sha256=hashlib.sha256(onnx).hexdigest(),
        precision=manifest.precision,
        profile=profile,
        workspace_mib=config.workspace_mib,
        optimization_level=config.optimization_level,
        tactic_sources=config.tactic_sources,
    )


def _identity(folder: ModelFolder, weights: Path, device: torch.device) -> dict[str, str]:
    """What an engine must have been built for, whoever exported its network."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "model_sha256": model_sha256(folder.model),
        "weights_sha256": weights_sha256(weights),
        "tensorrt": str(trt.__version__),
        "gpu": torch.cuda.get_device_name(device),
        "compute_capability": f"{major}.{minor}",
    }


def _profiles(
    model: ModelConfig, network: ExportedNetwork, config: EngineConfig
) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """Minimum, optimum and maximum shapes of a network's inputs, for each engine of it."""
    if not any(isinstance(extent, str) for spec in network.inputs for extent in spec.shape):
        return [{spec.name: (_numbers(spec.shape, {}),) * 3 for spec in network.inputs}]
    voxels = config.profile.voxels or (default_voxels(model),)
    if config.profile.dynamic:
        lowest, usual, highest = voxels
        ranges = [(_counts(model, lowest, 0.0), _counts(model, usual, 0.5), _counts(model, highest, 1.0))]
    else:
        ranges = [(_counts(model, count, 1.0),) * 3 for count in voxels]
    return [
        {
            spec.name: (_numbers(spec.shape, low), _numbers(spec.shape, middle), _numbers(spec.shape, high))
            for spec in network.inputs
        }
        for low, middle, high in ranges
    ]


def _counts(model: ModelConfig, voxels: int, share: float) -> dict[str, int]:
    """The open extents of both interfaces for `voxels` voxels.

    Args:
        model: The model.
        voxels: Number of voxels.
        share: 0 for the fewest sets that so many voxels can make, 1 for the most.
    """
    counts = {"voxel_number": voxels}
    fewest_voxels = voxels
    for number, (stage, room) in enumerate(
        zip(model.backbone_3d.stages, capacity_for(model, voxels).stages, strict=True)
    ):
        counts[f"num_voxels_stage_{number}"] = round(fewest_voxels + share * (room.voxels - fewest_voxels))
        fewest = math.ceil(fewest_voxels / stage.set_size)
        for shift, most in enumerate(room.sets):
            sets = round(fewest + share * (most - fewest))
            counts |= {f"num_sets_stage_{number}_shift_{shift}": sets, f"set_number_shift_{shift}": sets}
        fewest_voxels = math.ceil(fewest_voxels / stage.pool_z)
    return counts


def _numbers(shape: tuple[int | str, ...], counts: dict[str, int]) -> Shape:
    return tuple(counts[extent] if isinstance(extent, str) else extent for extent in shape)
