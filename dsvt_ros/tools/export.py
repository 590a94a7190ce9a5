"""``dsvt export``: a model folder with ONNX files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console

from dsvt_ros.capacity import default_voxels
from dsvt_ros.errors import ConfigError, ModelError
from dsvt_ros.export.folder import DEFAULT_OPSET, ExportOptions, export_folder
from dsvt_ros.export.onnx_file import RELEASE_OPSET
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pcdet.files import ORIGIN, write_origin
from dsvt_ros.tools.arguments import add_weights_option, model_help
from dsvt_ros.tools.pcdet_table import pcdet_table


def main(argv: list[str]) -> int:
    """Export; see ``dsvt export --help``."""
    arguments = _parser().parse_args(argv)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    folder = open_model(arguments.model)
    weights = Path(arguments.weights) if arguments.weights else folder.weights
    if weights is None:
        raise ModelError(
            f"model {folder.model.name} comes without weights: name a file with --weights, a .safetensors or a pcdet "
            f".pth"
        )
    options = _options(arguments, default_voxels(folder.model))
    if folder.pcdet:
        console.print(pcdet_table(folder.pcdet))
    start = time.perf_counter()
    manifest = export_folder(
        folder, weights, arguments.output, options, overwrite=arguments.overwrite, progress=console.print
    )
    if folder.pcdet:
        write_origin(arguments.output / ORIGIN, folder.pcdet.config)
    room = "any number of voxels"
    if manifest.capacity:
        sets = ", ".join(str(count) for stage in manifest.capacity.stages for count in stage.sets if count)
        room = f"up to {manifest.capacity.voxels} voxels in {sets} sets"
    files = ", ".join(network.file for network in manifest.networks.values())
    console.print(
        f"{manifest.model}: {files} in {manifest.precision} for {room}, opset {manifest.opset}, layer norm "
        f"{manifest.layer_norm}, {time.perf_counter() - start:.0f} s"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt export", description="Write a model folder with the networks as ONNX files."
    )
    parser.add_argument("--model", default="demo", help=model_help())
    add_weights_option(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    parser.add_argument(
        "--precision", choices=("fp16", "fp32"), default="fp32", help="type of weights and tensors (default: fp32)"
    )
    counts = parser.add_mutually_exclusive_group()
    counts.add_argument(
        "--voxels", type=int, metavar="N", help="room for voxels (default: by the grid); farther ones are dropped"
    )
    counts.add_argument("--dynamic", action="store_true", help="leave the numbers of voxels and sets open")
    parser.add_argument("--opset", type=int, metavar="N", help=f"ONNX operator set (default: {DEFAULT_OPSET})")
    parser.add_argument(
        "--layer-norm",
        choices=("fused", "decomposed"),
        help="decomposed: for TensorRT 8.5, whose parser lacks LayerNormalization (default: fused)",
    )
    parser.add_argument(
        "--interface",
        choices=("dsvt_ros", "dsvt_release"),
        default="dsvt_ros",
        help="dsvt_release: one file dsvt.onnx with the inputs and outputs of the published deployment",
    )
    return parser


def _options(arguments: argparse.Namespace, voxels: int) -> ExportOptions:
    """Options with the defaults of the interface."""
    release = arguments.interface == "dsvt_release"
    if release and arguments.voxels is not None:
        raise ConfigError("--voxels: the interface dsvt_release leaves the number of voxels open, as published")
    open_counts = arguments.dynamic or release
    return ExportOptions(
        precision=arguments.precision,
        voxels=None if open_counts else voxels if arguments.voxels is None else arguments.voxels,
        opset=(RELEASE_OPSET if release else DEFAULT_OPSET) if arguments.opset is None else arguments.opset,
        layer_norm=arguments.layer_norm or ("decomposed" if release else "fused"),
        interface=arguments.interface,
    )
