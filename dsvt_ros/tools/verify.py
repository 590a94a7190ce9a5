"""``dsvt verify``: every backend against torch in single precision, on the same clouds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsvt_ros.backends import Networks
from dsvt_ros.backends.onnxruntime import OnnxRuntimeNetworks, Session, require_onnxruntime
from dsvt_ros.backends.tensorrt.load import Source, load_networks, require_gpu
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.comparison import BoxDifference, TensorDifference, boxes_from_maps, common_proposals, map_differences
from dsvt_ros.config import parse_assignment, with_overrides
from dsvt_ros.detector import Detector, choose_device
from dsvt_ros.errors import ConfigError, DataError, EngineError, ModelError
from dsvt_ros.export.cache import read_networks
from dsvt_ros.export.manifest import Manifest, read_manifest
from dsvt_ros.export.networks import named_maps, release_inputs
from dsvt_ros.io.clouds import open_clouds, select_columns
from dsvt_ros.io.point_files import parse_columns
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import HeadMaps, SetPartition
from dsvt_ros.tools.machine import hardware, versions
from dsvt_ros.tools.progress import terminal_progress

SCHEMA_VERSION = 2  # 2: means of the boxes' differences, magnitudes of tensors


@dataclass(frozen=True)
class Limits:
    """What may differ.

    Attributes:
        max_error: Largest difference of any tensor, as a share of its largest value.
        min_cosine: Smallest cosine similarity of any tensor.
        min_matched: Smallest share of matched boxes, in both directions.
        center_m: Distance of the centres of matched boxes.
        score: Difference of the scores of matched boxes; boxes this near to the threshold are left out.
    """

    max_error: float
    min_cosine: float
    min_matched: float = 0.99
    center_m: float = 0.02
    score: float = 0.01


LIMITS = {
    "fp32": Limits(max_error=1e-3, min_cosine=0.99999),
    "fp16": Limits(max_error=0.1, min_cosine=0.999),
}


@dataclass
class Result:
    """One backend's differences from the reference, and which limits they exceed."""

    backend: str
    precision: str
    limits: Limits
    tensors: dict[str, TensorDifference]
    boxes: BoxDifference
    dropped_voxels: int = 0

    def exceeded(self) -> list[str]:
        """The limits that are exceeded, in words."""
        limits, found = self.limits, []
        for name, difference in self.tensors.items():
            if not difference.max_error <= limits.max_error * difference.magnitude:
                allowed = f"{limits.max_error:g} of {difference.magnitude:.3g}"
                found.append(f"{name}: error {difference.max_error:.3g}, limit {allowed}")
            if not difference.cosine >= limits.min_cosine:
                found.append(f"{name}: cosine {difference.cosine:.6f}, limit {limits.min_cosine:g}")
        if self.boxes.matched < limits.min_matched:
            found.append(f"boxes: {self.boxes.matched:.2%} matched, limit {limits.min_matched:.2%}")
        return found


def main(argv: list[str]) -> int:
    """Verify; see ``dsvt verify --help``.

    Returns:
        0 if all backends are within the limits, 1 if not.
    """
    options = _parser().parse_args(argv)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    folder = open_model(options.model)
    manifest = read_manifest(folder.path)
    if folder.weights is None:
        raise ModelError(f"{folder.path} has no weights to compare with: export the model again")
    device = choose_device(options.device)
    network = DSVT(folder.model)
    load_weights(network, read_weights(folder.weights), str(folder.weights))
    network = network.to(device).eval().requires_grad_(False)
    config = with_overrides(folder.defaults, dict(parse_assignment(text) for text in options.overrides))
    config.check_against(folder.model)
    limits = _limits(options, manifest.precision)

    # Those of the folder, whatever its defaults say.
    engine = dataclasses.replace(config.engine, precision=manifest.precision)  # type: ignore[arg-type]
    source = Source(network, folder, folder.weights, device, engine)

    results = []
    for backend, networks in _backends(options.backends, manifest, source, console):
        result = Result(backend, manifest.precision, limits, {}, BoxDifference())
        # The reference drops the same voxels where the exported network has no room for all.
        expected = Recorder(TorchNetworks(network), networks.max_voxels)
        found = Recorder(networks, networks.max_voxels)
        reference, other = (Detector(network, config, device, part) for part in (expected, found))
        count = 0
        for points in _clouds(options, reference):
            reference.detect(points)
            other.detect(points)
            _compare(result, found, expected, reference)
            result.dropped_voxels += other.num_dropped_voxels
            count += 1
        if not count:
            raise DataError(f"{', '.join(options.cloud)}: no clouds in there")
        results.append(result)
        _print(console, result, count)
    if options.output:
        options.output.write_text(json.dumps(_json(options, manifest, device, results), indent=1) + "\n")
        console.print(f"wrote {options.output}")
    return 1 if any(result.exceeded() for result in results) else 0


# Backends to compare, and the check that they are here.
COMPARED: dict[str, Callable[[torch.device], object]] = {
    "onnxruntime": require_onnxruntime,
    "tensorrt": require_gpu,
}


class Recorder:
    """Networks that keep what they gave for the last cloud."""

    channels_last: bool

    def __init__(self, networks: Networks, max_voxels: int | None) -> None:
        self.name, self.precision, self.max_voxels = networks.name, networks.precision, max_voxels
        self.channels_last = networks.channels_last
        self.features: Tensor | None = None
        self.maps: HeadMaps | None = None
        self._networks = networks

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """As `Networks.sparse`."""
        self.features = self._networks.sparse(features, partition)
        return self.features

    def dense(self, bev: Tensor) -> HeadMaps:
        """As `Networks.dense`."""
        self.maps = self._networks.dense(bev)
        return self.maps

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The outputs by name; none if the cloud had no voxels."""
        if self.features is None or self.maps is None:
            return []
        return [("features", self.features), *named_maps(self.maps)]


class ReleaseNetworks(TorchNetworks):
    """The sparse network of the published interface in ONNX Runtime, the dense one in torch."""

    name = "onnxruntime (dsvt_release)"
    precision = "fp32"

    def __init__(self, network: DSVT, session: Session) -> None:
        super().__init__(network)
        self._tables = inference_modules(network).backbone_3d.input_layer
        self._session = session

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V, D)."""
        (output,) = self._session.run(release_inputs(self._tables, features, partition))
        return output


def _backends(
    asked_for: str | None, manifest: Manifest, source: Source, console: Console
) -> Iterator[tuple[str, Networks]]:
    """The backends that were asked for, or every one that can run the folder's files here."""
    names = asked_for.split(",") if asked_for else [*COMPARED]
    if manifest.interface == "dsvt_release":  # a part of a detector, which only ONNX Runtime completes here
        names = ["onnxruntime"]
    if unknown := set(names) - set(COMPARED):
        raise ConfigError(f"--backends: no {', '.join(sorted(unknown))}; expected {', '.join(COMPARED)}")
    available, missing = [], []
    for name in names:
        try:
            COMPARED[name](source.device)
            available.append(name)
        except EngineError as error:
            if asked_for:
                raise
            missing.append(str(error))
    if not available:
        raise EngineError("; ".join(missing))
    for text in missing:
        console.print(f"left out: {text}")
    for name in available:
        if name == "onnxruntime":
            yield _onnxruntime(manifest, source)
        else:
            with terminal_progress(console) as progress:
                networks, _ = load_networks(source, progress)
            yield name, networks


def _onnxruntime(manifest: Manifest, source: Source) -> tuple[str, Networks]:
    files = read_networks(source.folder.path, manifest)
    if manifest.interface == "dsvt_release":
        described = manifest.networks["dsvt"]
        session = Session(described, files[described.file], source.device, None)
        release = ReleaseNetworks(source.network, session)
        return release.name, release
    networks = OnnxRuntimeNetworks(source.network.config, manifest, files, source.device)
    return networks.name, networks


def _compare(result: Result, found: Recorder, expected: Recorder, detector: Detector) -> None:
    """Add the last cloud."""
    if found.maps is None or expected.maps is None:
        return
    ours, theirs = (
        boxes_from_maps(maps, detector.model, detector.config.postprocess, result.limits.score)
        for maps in (found.maps, expected.maps)
    )
    found.maps, expected.maps = common_proposals(found.maps, expected.maps)
    map_differences(result.tensors, found.tensors(), expected.tensors())
    result.boxes.add(ours, theirs, result.limits.center_m, result.limits.score)
    found.features = found.maps = expected.features = expected.maps = None


def _clouds(options: argparse.Namespace, detector: Detector) -> Iterator[NDArray[np.float32]]:
    names = parse_columns(options.columns) if options.columns else detector.model.feature_names
    fill = {feature.name: feature.fill for feature in detector.model.features[3:]}
    count = 0
    for path in options.cloud:
        for scan in open_clouds(path, names):
            if options.max_frames is not None and count >= options.max_frames:
                return
            count += 1
            yield select_columns(scan, detector.model.feature_names, fill)


def _limits(options: argparse.Namespace, precision: str) -> Limits:
    if precision not in LIMITS:
        raise EngineError(f"precision {precision} is unknown; expected {', '.join(LIMITS)}")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)}
    for name, value in given.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    return dataclasses.replace(LIMITS[precision], **{name: v for name, v in given.items() if v is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt verify",
        description="Compare every backend that can run an exported model with torch in single precision.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder that dsvt export wrote")
    parser.add_argument(
        "--cloud", nargs="+", action="extend", required=True, metavar="CLOUD", help="point files or bags"
    )
    parser.add_argument("--columns", help="columns of .npy and .bin files, such as x,y,z,intensity,ring")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N clouds")
    parser.add_argument(
        "--backends", metavar="LIST", help=f"comma-separated: {', '.join(COMPARED)} (default: those that run here)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="as for dsvt detect"
    )
    texts = {
        "max_error": "largest difference of a tensor, as a share of its largest value",
        "min_cosine": "smallest cosine similarity of a tensor",
        "min_matched": "smallest share of matched boxes",
        "center_m": "largest distance of matched boxes, m",
        "score": "largest difference of their scores",
    }
    for name, text in texts.items():
        values = {getattr(limits, name): precision for precision, limits in LIMITS.items()}
        default = " or ".join(f"{v:g}" + (f" for {p}" if len(values) > 1 else "") for v, p in values.items())
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, metavar="X", help=f"limit: {text} (default: {default})")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    return parser


def _print(console: Console, result: Result, clouds: int) -> None:
    title = f"{result.backend}, {result.precision}, against torch fp32 on {clouds} cloud{'s' if clouds > 1 else ''}"
    table = Table(title=title)
    table.add_column("tensor")
    for name in ("largest value", "largest error", "mean error", "cosine"):
        table.add_column(name, justify="right")
    for name, tensor in result.tensors.items():
        numbers = (f"{value:.2e}" for value in (tensor.magnitude, tensor.max_error, tensor.mean_error))
        table.add_row(name, *numbers, f"{tensor.cosine:.7f}")
    console.print(table)
    boxes = result.boxes
    console.print(
        f"boxes: {boxes.expected_matched} of {boxes.expected} found again, {boxes.found_matched} of {boxes.found} "
        f"expected"
    )
    differences = Table()
    differences.add_column("matched boxes")
    for name in ("largest", "mean"):
        differences.add_column(name, justify="right")
    rows = {"centre, m": boxes.center_m, "size, m": boxes.size_m, "yaw, rad": boxes.yaw_rad, "score": boxes.score}
    for name, spread in rows.items():
        differences.add_row(name, f"{spread.largest:.2e}", f"{spread.mean:.2e}")
    console.print(differences)
    if result.dropped_voxels:
        console.print(f"{result.dropped_voxels} voxels beyond the capacity were left out on both sides")
    exceeded = result.exceeded()
    for text in exceeded:
        console.print(f"exceeded: {text}")
    if not exceeded:
        console.print("within the limits")


def _json(
    options: argparse.Namespace, manifest: Manifest, device: torch.device, results: list[Result]
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": manifest.model,
        "reference": {"backend": "torch", "precision": "fp32", "device": str(device)},
        "export": {
            "interface": manifest.interface,
            "precision": manifest.precision,
            "opset": manifest.opset,
            "layer_norm": manifest.layer_norm,
            "capacity": dataclasses.asdict(manifest.capacity) if manifest.capacity else None,
        },
        "hardware": hardware(device),
        "versions": versions(result.backend for result in results),
        "clouds": [Path(path).name for path in options.cloud],
        "results": [
            {
                "backend": result.backend,
                "precision": result.precision,
                "tensors": {
                    name: {
                        "magnitude": t.magnitude,
                        "max_error": t.max_error,
                        "mean_error": t.mean_error,
                        "cosine": t.cosine,
                    }
                    for name, t in result.tensors.items()
                },
                "boxes": {**dataclasses.asdict(result.boxes), "matched": result.boxes.matched},
                "dropped_voxels": result.dropped_voxels,
                "limits": dataclasses.asdict(result.limits),
                "exceeded": result.exceeded(),
            }
            for result in results
        ],
    }
