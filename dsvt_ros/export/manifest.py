"""What an exported model folder holds, with the hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvt_ros.capacity import Capacity, StageCapacity
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import TensorSpec

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3  # 2: single_precision; 3: capacity of stages


@dataclass(frozen=True)
class ExportedNetwork:
    """One ONNX file.

    Attributes:
        file: Its name in the folder.
        inputs: What it takes.
        outputs: What it gives.
        single_precision: Nodes that compute in float32 in a float16 network: those whose sums need it. TensorRT 8 has
            to be told; later releases and other programs see it in the types of the file.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    single_precision: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        model: Name of the model.
        interface: ``dsvt_ros`` (networks ``sparse`` and ``dense``) or ``dsvt_release`` (network ``dsvt``).
        precision: ``fp32`` or ``fp16``: type of weights, inputs and outputs.
        opset: Version of ONNX's standard operators.
        layer_norm: ``fused`` (one operator) or ``decomposed``.
        capacity: Room for voxels and sets; None if their number is free.
        networks: The ONNX files.
        model_sha256: Hash of the model's description, whatever the layout of ``model.yaml``.
        weights_sha256: Hash of the exported weights, whatever kind of file they came in.
        sha256: Hash of every file by name.
        versions: Versions of the packages that wrote the files.
    """

    model: str
    interface: str
    precision: str
    opset: int
    layer_norm: str
    capacity: Capacity | None
    networks: dict[str, ExportedNetwork]
    model_sha256: str
    weights_sha256: str
    sha256: dict[str, str]
    versions: dict[str, str]

    def to_json(self) -> str:
        """The text of the file: the same for the same content."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a model folder.

    Raises:
        EngineError: It is missing, or not what this version writes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise EngineError(f"{folder} has no {MANIFEST}: export the model (dsvt export --output DIR) and name DIR")
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise EngineError(f"{path} has schema_version {content['schema_version']}, expected {SCHEMA_VERSION}")
        capacity = content["capacity"]
        return Manifest(
            model=str(content["model"]),
            interface=str(content["interface"]),
            precision=str(content["precision"]),
            opset=int(content["opset"]),
            layer_norm=str(content["layer_norm"]),
            capacity=None if capacity is None else _capacity(capacity),
            networks={str(name): _network(network) for name, network in content["networks"].items()},
            model_sha256=str(content["model_sha256"]),
            weights_sha256=str(content["weights_sha256"]),
            sha256={str(name): str(value) for name, value in content["sha256"].items()},
            versions={str(name): str(value) for name, value in content["versions"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EngineError(f"{path} is no manifest of dsvt_ros ({error!r}): export the model again") from None


def read_checked(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The content of a file, if it is the one that the manifest knows.

    Raises:
        EngineError: The file is missing or has another hash.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path} ({error.strerror}): export the model again") from None
    expected, found = manifest.sha256.get(name, "none"), hashlib.sha256(content).hexdigest()
    if found != expected:
        raise EngineError(
            f"{path} is not the file that {MANIFEST} describes (SHA-256 {found[:12]}..., expected "
            f"{expected[:12]}...): it is damaged or from another export; export the model again"
        )
    return content


def _network(content: Mapping[str, Any]) -> ExportedNetwork:
    inputs, outputs = (
        tuple(TensorSpec(str(entry["name"]), str(entry["type"]), tuple(entry["shape"])) for entry in content[direction])
        for direction in ("inputs", "outputs")
    )
    single = tuple(str(name) for name in content["single_precision"])
    return ExportedNetwork(str(content["file"]), inputs, outputs, single)


def _capacity(content: dict[str, Any]) -> Capacity:
    return Capacity(
        tuple(
            StageCapacity(int(stage["voxels"]), (int(stage["sets"][0]), int(stage["sets"][1])))
            for stage in content["stages"]
        )
    )
