"""``dsvt verify``: every backend against torch in single precision, on the same clouds."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dsvt_ros.backends import Networks
from dsvt_ros.backends.frames import FrameNetworks
from dsvt_ros.backends.onnxruntime import OnnxRuntimeNetworks, Session, require_onnxruntime
from dsvt_ros.backends.tensorrt.load import Source, load_networks, require_gpu
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.torch_frames import TorchFrameNetworks, require_half_precision
from dsvt_ros.backends.triton import TritonNetworks, require_triton
from dsvt_ros.capacity import room_for_voxels
from dsvt_ros.comparison import BoxDifference, boxes_from_maps, common_proposals, map_differences, settled_as
from dsvt_ros.config import with_overrides
from dsvt_ros.detector import Detector, choose_device
from dsvt_ros.errors import ConfigError, EngineError, ModelError
from dsvt_ros.export.cache import read_networks
from dsvt_ros.export.manifest import Manifest, read_manifest
from dsvt_ros.export.networks import named_maps, release_inputs
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.folder import open_model
from dsvt_ros.preprocess import boxes_to_source
from dsvt_ros.structures import Boxes3D, HeadMaps, SetPartition
from dsvt_ros.tools.arguments import add_override_option, check_folders, overrides_from
from dsvt_ros.tools.machine import hardware, versions
from dsvt_ros.tools.progress import terminal_progress
from dsvt_ros.tools.published_layout import REFERENCES, PublishedNetworks, require_reference
from dsvt_ros.tools.result_file import write_result
from dsvt_ros.tools.verification import (
    Result,
    add_cloud_options,
    add_limit_options,
    clouds_from,
    limits_from,
    print_result,
    require_clouds,
)

SCHEMA_VERSION = 2  # 2: means of the boxes' differences, magnitudes of tensors


def main(argv: list[str]) -> int:
    """Verify; see ``dsvt verify --help``.

    Returns:
        0 if all backends are within the limits, 1 if not.
    """
    options = _parser().parse_args(argv)
    check_folders(options, "output")
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if options.against == "pcdet":
        from dsvt_ros.tools.verify_pcdet import verify_against_pcdet

        return verify_against_pcdet(options, console)
    if options.weights:
        raise ConfigError("--weights goes with --against pcdet; an exported folder is compared with its own weights")
    folder = open_model(options.model)
    manifest = read_manifest(folder.path)
    if folder.weights is None:
        raise ModelError(f"{folder.path} has no weights to compare with: export the model again")
    device = choose_device(options.device)
    network = DSVT(folder.model)
    load_weights(network, read_weights(folder.weights), str(folder.weights))
    network = network.to(device).eval().requires_grad_(False)
    config = with_overrides(folder.defaults, overrides_from(options))
    config.check_against(folder.model)

    # Those of the folder, whatever its defaults say.
    engine = dataclasses.replace(config.engine, precision=manifest.precision)  # type: ignore[arg-type]
    source = Source(network, folder, folder.weights, device, engine)

    results = []
    for backend, networks in _backends(options.backends, manifest, source, console):
        limits = limits_from(options, networks.precision)
        result = Result(backend, networks.precision, limits, {}, BoxDifference())
        # Boxes of some backends come from whole frames, which share only the networks with what gives the tensors.
        frames = Detector(network, config, device, networks) if isinstance(networks, FrameNetworks) else None
        # The reference drops the same voxels where the other one has no room for all.
        room = networks.max_voxels if frames is None else room_for_voxels(folder.model, config.engine)
        expected, found = Recorder(TorchNetworks(network), room), Recorder(networks, room)
        reference, other = (Detector(network, config, device, part) for part in (expected, found))
        for points in clouds_from(options, folder.model, config.preprocess):
            # Single precision as it is said to be: by default convolutions would round to TF32 on a GPU.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                reference.detect(points)
            other.detect(points)
            whole = None
            if frames is not None:
                whole = boxes_to_source(frames.detect(points), np.linalg.inv(frames.T_model_source).astype(np.float64))
            _compare(result, found, expected, reference, whole)
            result.dropped_voxels += other.num_dropped_voxels
        require_clouds(options, result)
        results.append(result)
        print_result(console, result, "torch fp32")
    if options.output:
        write_result(options.output, _json(options, manifest, device, results), console)
    return 1 if any(result.exceeded() for result in results) else 0


# Backends to compare, and the check that they are here.
COMPARED: dict[str, Callable[[torch.device], object]] = {
    "onnxruntime": require_onnxruntime,
    "tensorrt": require_gpu,
    "triton": require_triton,
    "torch": require_half_precision,
}
NAMED_ONLY: dict[str, Callable[[torch.device], object]] = {
    name: partial(require_reference, name) for name in REFERENCES
}
"""Likewise, of what is compared only when asked for."""


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
    checks = COMPARED | NAMED_ONLY
    if unknown := set(names) - set(checks):
        raise ConfigError(f"--backends: no {', '.join(sorted(unknown))}; expected {', '.join(checks)}")
    available, missing = [], []
    for name in names:
        try:
            checks[name](source.device)
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
        elif name == "triton":
            yield name, TritonNetworks(source.network)  # of the folder's weights; in fp16 whatever the precision
        elif name == "torch":
            yield name, TorchFrameNetworks(source.network)  # likewise
        elif name in NAMED_ONLY:
            yield name, PublishedNetworks(source.network, name)
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


def _compare(
    result: Result, found: Recorder, expected: Recorder, detector: Detector, whole: Boxes3D | None = None
) -> None:
    """Add the last cloud, if it had voxels; `whole`: the boxes, in the model's frame, of a run that gives no maps."""
    if found.maps is None or expected.maps is None:
        return
    ours, theirs = (
        boxes_from_maps(maps, detector.model, detector.config.postprocess, result.limits.score)
        for maps in (found.maps, expected.maps)
    )
    if whole is not None:
        ours = settled_as(whole, ours, result.limits.center_m, result.limits.score)
    found.maps, expected.maps = common_proposals(found.maps, expected.maps)
    map_differences(result.tensors, found.tensors(), expected.tensors())
    result.boxes.add(ours, theirs, result.limits.center_m, result.limits.score)
    result.num_clouds += 1
    found.features = found.maps = expected.features = expected.maps = None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt verify",
        description="Compare every backend that can run an exported model with torch in single precision.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder that dsvt export wrote")
    parser.add_argument(
        "--against",
        choices=("torch", "pcdet"),
        default="torch",
        help="pcdet: compare torch with the original network instead; the model, which may be an OpenPCDet YAML here, "
        "comes from one, and the package pcdet is installed (default: torch)",
    )
    parser.add_argument("--weights", metavar="FILE", help="with --against pcdet: weights (default: the model's)")
    add_cloud_options(parser)
    parser.add_argument(
        "--backends",
        metavar="LIST",
        help=f"comma-separated: {', '.join(COMPARED)} (default: those that run here); {' and '.join(NAMED_ONLY)} are "
        f"those of dsvt benchmark",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_override_option(parser, "postprocess.score_threshold=0.4")
    add_limit_options(parser)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    return parser


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
        "results": [result.to_json() for result in results],
    }
