"""Options that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsvt_ros.backends import BACKENDS
from dsvt_ros.config import ModelConfig, parse_assignment
from dsvt_ros.detector import Detector
from dsvt_ros.errors import ConfigError
from dsvt_ros.io.point_files import parse_columns
from dsvt_ros.model.folder import embedded_models, open_model
from dsvt_ros.tools.progress import terminal_progress


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model --weights --backend --device --set``."""
    parser.add_argument("--model", default="demo", help=model_help())
    add_weights_option(parser)
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="who runs the networks (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_override_option(parser, "postprocess.score_threshold=0.4")


def model_help() -> str:
    """What ``--model`` takes."""
    return (
        f"{', '.join(embedded_models())}, a model folder, its model.yaml, or a model's YAML of OpenPCDet "
        f"(default: %(default)s)"
    )


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights``."""
    parser.add_argument(
        "--weights", metavar="FILE", help="weights, .safetensors or a pcdet .pth (default: the model's)"
    )


def add_override_option(parser: argparse.ArgumentParser, example: str) -> None:
    """Add ``--set``."""
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help=f"an option such as {example}; may be repeated",
    )


def overrides_from(options: argparse.Namespace) -> dict[str, Any]:
    """The ``--set`` assignments as overrides of `DetectorConfig`."""
    return dict(parse_assignment(text) for text in options.overrides)


def load_detector(options: argparse.Namespace) -> Detector:
    """The detector that the options describe."""
    overrides = overrides_from(options)
    theirs = open_model(options.model).pcdet
    if theirs:
        print(
            f"{options.model}: {'; '.join(('an OpenPCDet model, see dsvt export', *theirs.remarks))}", file=sys.stderr
        )
    with terminal_progress() as progress:
        return Detector.load(
            options.model, options.weights, options.backend, options.device, overrides, progress=progress
        )


def add_columns_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--columns``."""
    parser.add_argument(
        "--columns", help="columns of .npy and .bin files, such as x,y,z,intensity,ring (default: the model's)"
    )


def columns_from(options: argparse.Namespace, model: ModelConfig) -> tuple[str, ...]:
    """The columns of files that do not name theirs: ``--columns``, or those that the model takes."""
    return parse_columns(options.columns) if options.columns else model.feature_names


def add_max_frames_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-frames``."""
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N clouds")


def max_frames_from(options: argparse.Namespace) -> int | None:
    """After how many clouds to stop; None for never.

    Raises:
        ConfigError: ``--max-frames`` is not positive.
    """
    number: int | None = options.max_frames
    if number is not None and number < 1:
        raise ConfigError(f"--max-frames must be at least 1, got {number}")
    return number


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Check, before there is anything to write, that the folders of files to write are there.

    Args:
        options: Among them `Path`s, or None for what is not written.
        names: Those to check, such as ``output``.

    Raises:
        ConfigError: A folder is missing.
    """
    for name in names:
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: there is no folder {path.parent}")
