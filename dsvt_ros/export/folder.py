"""Writing exported model folders."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from dsvt_ros import __version__
from dsvt_ros.capacity import capacity_for
from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import ConfigError, DsvtError, EngineError
from dsvt_ros.export.manifest import MANIFEST, ExportedNetwork, Manifest
from dsvt_ros.export.networks import (
    DenseNetwork,
    ReleaseNetwork,
    SparseNetwork,
    Specs,
    decompose_layer_norms,
    dense_specs,
    release_specs,
    sparse_specs,
    to_half,
)
from dsvt_ros.export.onnx_file import (
    OLDEST_OPSET,
    RELEASE_OPSET,
    export_onnx,
    export_release,
    require_exporter,
    single_precision_nodes,
)
from dsvt_ros.model.checkpoint import load_weights, read_weights, weights_sha256
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.folder import DESCRIPTION, WEIGHTS, ModelFolder, open_model

SPARSE, DENSE, RELEASE = "sparse.onnx", "dense.onnx", "dsvt.onnx"
DEFAULT_OPSET = OLDEST_OPSET  # what most engine builders read

Precision = Literal["fp32", "fp16"]
LayerNormStyle = Literal["fused", "decomposed"]
Interface = Literal["dsvt_ros", "dsvt_release"]


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: Type of weights, inputs and outputs; layer norms, softmax and residual sums are fp32 in both.
        voxels: Room for voxels; None leaves their number open.
        opset: Version of ONNX's standard operators.
        layer_norm: ``fused`` for the operator LayerNormalization, ``decomposed`` where a parser lacks it.
        interface: ``dsvt_ros``, or ``dsvt_release`` for one network with the inputs of the published deployment.
    """

    precision: Precision = "fp32"
    voxels: int | None = None
    opset: int = DEFAULT_OPSET
    layer_norm: LayerNormStyle = "fused"
    interface: Interface = "dsvt_ros"

    def __post_init__(self) -> None:
        if self.voxels is not None and self.voxels < 1:
            raise ConfigError(f"an exported network needs room for at least one voxel, got {self.voxels}")
        if self.interface == "dsvt_ros" and self.opset < OLDEST_OPSET:
            raise ConfigError(f"opset must be at least {OLDEST_OPSET}, got {self.opset}")
        if self.interface == "dsvt_release":
            published = {"precision": "fp32", "voxels": None, "opset": RELEASE_OPSET, "layer_norm": "decomposed"}
            for name, value in published.items():
                if getattr(self, name) != value:
                    raise ConfigError(
                        f"the published interface has {name.replace('_', ' ')} {'open' if value is None else value}, "
                        f"got {getattr(self, name)}"
                    )


def export_networks(
    network: DSVT, options: ExportOptions, progress: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, ExportedNetwork], dict[str, bytes]]:
    """Export both networks of a model in evaluation mode.

    Returns:
        The networks' descriptions by name, and the files' contents by file name.

    Raises:
        EngineError: The export fails.
    """
    require_exporter()
    model = network.config
    modules = inference_modules(copy.deepcopy(network).to("cpu"))
    if options.layer_norm == "decomposed":
        decompose_layer_norms(modules.backbone_3d)
        decompose_layer_norms(modules.head)
    if options.interface == "dsvt_release":
        progress(f"exporting {RELEASE}")
        inputs, outputs = release_specs(model)
        content = export_release(ReleaseNetwork(modules.backbone_3d).eval(), inputs, outputs)
        return {"dsvt": ExportedNetwork(RELEASE, tuple(inputs), tuple(outputs))}, {RELEASE: content}
    if options.precision == "fp16":
        for module in (modules.backbone_3d, modules.backbone_2d, modules.head):
            to_half(module)
    float_type = {"fp32": "float32", "fp16": "float16"}[options.precision]
    capacity = None if options.voxels is None else capacity_for(model, options.voxels)
    parts: list[tuple[str, str, nn.Module, Specs]] = [
        (
            "sparse",
            SPARSE,
            SparseNetwork(modules.backbone_3d, model.backbone_3d),
            sparse_specs(model, capacity, float_type),
        ),
        ("dense", DENSE, DenseNetwork(modules.backbone_2d, modules.head), dense_specs(model, modules, float_type)),
    ]
    networks, files = {}, {}
    for name, file, part, (inputs, outputs) in parts:
        progress(f"exporting {file}")
        files[file] = export_onnx(part.eval(), inputs, outputs, options.opset, name)
        single = single_precision_nodes(files[file]) if options.precision == "fp16" else ()
        networks[name] = ExportedNetwork(file, tuple(inputs), tuple(outputs), single)
    return networks, files


def export_folder(
    source: ModelFolder,
    weights: Path,
    output: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write a model folder with ONNX files: description, weights, networks and, last, the manifest.

    Files appear under their names only when they are complete, and without a manifest the networks are not used, so an
    interrupted export leaves nothing that could be mistaken for a whole one.

    Args:
        source: The model; `output` may be its own folder.
        weights: Weights file.
        output: Folder to write; made where there is none.
        options: How to export.
        overwrite: Replace an earlier export.
        progress: Told what is going on.

    Raises:
        ConfigError: `output` holds something else.
        ModelError: The weights do not fit.
        EngineError: The export fails, or the folder cannot be written.
    """
    require_exporter()
    network = DSVT(source.model)
    state = read_weights(weights)
    load_weights(network, state, str(weights))
    network.eval().requires_grad_(False)
    files: dict[str, bytes] = {}
    if not _describes(output / DESCRIPTION, source):
        files[DESCRIPTION] = description_of(source).encode()
    if weights.suffix == ".safetensors":
        files[WEIGHTS] = weights.read_bytes()
    else:
        from safetensors.torch import save

        files[WEIGHTS] = save({name: value.contiguous() for name, value in sorted(state.items())})
    if not overwrite:
        _refuse_to_overwrite(output, files)
    networks, graphs = export_networks(network, options, progress)
    files |= graphs

    manifest = manifest_for(source.model, options, networks, files, weights_sha256(weights))
    progress(f"writing {output}")
    try:
        write_folder(output, files, manifest)
    except OSError as error:
        raise EngineError(f"cannot write {output}: {error}") from None
    return manifest


def manifest_for(
    model: ModelConfig,
    options: ExportOptions,
    networks: dict[str, ExportedNetwork],
    files: Mapping[str, bytes],
    weights_hash: str,
) -> Manifest:
    """The manifest of an export."""
    return Manifest(
        model=model.name,
        interface=options.interface,
        precision=options.precision,
        opset=options.opset,
        layer_norm=options.layer_norm,
        capacity=None if options.voxels is None else capacity_for(model, options.voxels),
        networks=networks,
        model_sha256=model_sha256(model),
        weights_sha256=weights_hash,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        versions=package_versions(),
    )


def model_sha256(model: ModelConfig) -> str:
    """Hash of a model's description."""
    return hashlib.sha256(json.dumps(_plain(model), sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape an exported file."""
    versions = {"dsvt_ros": __version__, "torch": torch.__version__}
    for name in ("onnx", "onnxscript"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a distribution's own build may come without metadata
            versions[name] = "unknown"
    return versions


def description_of(folder: ModelFolder) -> str:
    """The text of ``model.yaml`` for a model that may come from elsewhere."""
    content = {"model": _plain(folder.model), "defaults": _plain(folder.defaults)}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value


def _describes(path: Path, source: ModelFolder) -> bool:
    """Whether a description is there already and says the same; its comments are then kept."""
    if not path.is_file():
        return False
    try:
        there = open_model(path)
    except DsvtError:
        return False
    return (there.model, there.defaults) == (source.model, source.defaults)


def _refuse_to_overwrite(output: Path, files: Mapping[str, bytes]) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; --output takes a folder")
    there = [name for name in (SPARSE, DENSE, RELEASE, MANIFEST) if (output / name).exists()]
    there += [
        name for name, content in files.items() if (output / name).exists() and (output / name).read_bytes() != content
    ]
    if there:
        raise ConfigError(f"{output} holds {', '.join(there)} already: name another folder, or add --overwrite")


def write_folder(output: Path, files: Mapping[str, bytes], manifest: Manifest) -> None:
    """Write files and, last, their manifest, each at once; networks that do not belong to it go."""
    output.mkdir(parents=True, exist_ok=True)
    content = {**files, MANIFEST: manifest.to_json().encode()}
    partial = {name: output / f".{name}.{os.getpid()}.partial" for name in content}
    try:
        for name, path in partial.items():
            path.write_bytes(content[name])
        (output / MANIFEST).unlink(missing_ok=True)
        for name in (SPARSE, DENSE, RELEASE):
            if name not in content:
                (output / name).unlink(missing_ok=True)
        for name, path in partial.items():  # the manifest is the last one
            path.replace(output / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
