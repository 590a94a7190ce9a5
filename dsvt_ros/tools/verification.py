"""What ``dsvt verify`` compares and how it says so."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table

from dsvt_ros.comparison import BoxDifference, TensorDifference
from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.errors import ConfigError, DataError, EngineError
from dsvt_ros.tools.arguments import add_columns_option, add_max_frames_option, columns_from, max_frames_from
from dsvt_ros.tools.given_clouds import NUM_SIMULATED, SIMULATED, Cloud, given_clouds


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
    """How far one way to compute a model is from another, and which limits that exceeds.

    Attributes:
        backend: The one.
        precision: Its precision.
        limits: What may differ.
        tensors: Differences by tensor.
        boxes: Differences of the boxes.
        num_clouds: How many clouds were compared; those without points in the model's range are not.
        dropped_voxels: Voxels left out on both sides.
        unequal: What had to be the same and is not, with the difference in words.
    """

    backend: str
    precision: str
    limits: Limits
    tensors: dict[str, TensorDifference]
    boxes: BoxDifference
    num_clouds: int = 0
    dropped_voxels: int = 0
    unequal: dict[str, str] = field(default_factory=dict)

    def exceeded(self) -> list[str]:
        """The limits that are exceeded, in words."""
        limits, found = self.limits, [f"{name}: {text}" for name, text in self.unequal.items()]
        for name, difference in self.tensors.items():
            if not difference.max_error <= limits.max_error * difference.magnitude:
                allowed = f"{limits.max_error:g} of {difference.magnitude:.3g}"
                found.append(f"{name}: error {difference.max_error:.3g}, limit {allowed}")
            if not difference.cosine >= limits.min_cosine:
                found.append(f"{name}: cosine {difference.cosine:.6f}, limit {limits.min_cosine:g}")
        if self.boxes.matched < limits.min_matched:
            found.append(f"boxes: {self.boxes.matched:.2%} matched, limit {limits.min_matched:.2%}")
        return found

    def to_json(self) -> dict[str, Any]:
        """As ``dsvt verify --output`` writes it."""
        return {
            "backend": self.backend,
            "precision": self.precision,
            "tensors": {
                name: {key: getattr(t, key) for key in ("magnitude", "max_error", "mean_error", "cosine")}
                for name, t in self.tensors.items()
            },
            "boxes": {**dataclasses.asdict(self.boxes), "matched": self.boxes.matched},
            "dropped_voxels": self.dropped_voxels,
            "limits": dataclasses.asdict(self.limits),
            "exceeded": self.exceeded(),
        }


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of `Limits`."""
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


def limits_from(options: argparse.Namespace, precision: str) -> Limits:
    """The limits of a precision, changed by options."""
    if precision not in LIMITS:
        raise EngineError(f"precision {precision} is unknown; expected {', '.join(LIMITS)}")
    given = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(Limits)}
    for name, value in given.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    return dataclasses.replace(LIMITS[precision], **{name: v for name, v in given.items() if v is not None})


def add_cloud_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cloud --columns --max-frames``."""
    parser.add_argument(
        "--cloud",
        nargs="+",
        action="extend",
        required=True,
        metavar="CLOUD",
        help=f"point files, bags, or {SIMULATED}[:POINTS] for {NUM_SIMULATED} turns of a simulated lidar",
    )
    add_columns_option(parser)
    add_max_frames_option(parser)


def clouds_from(options: argparse.Namespace, model: ModelConfig, config: PreprocessConfig) -> Iterator[Cloud]:
    """The clouds that the options of `add_cloud_options` name, in the model's columns."""
    clouds = given_clouds(options.cloud, columns_from(options, model), model, config)
    return islice(clouds, max_frames_from(options))


def require_clouds(options: argparse.Namespace, result: Result) -> None:
    """`DataError` where the options of `add_cloud_options` named no cloud that could be compared."""
    if not result.num_clouds:
        raise DataError(f"{', '.join(options.cloud)}: no clouds with points in the model's range")


def print_result(console: Console, result: Result, reference: str) -> None:
    """Print the differences from `reference` and what exceeds the limits."""
    clouds = f"{result.num_clouds} cloud{'s' if result.num_clouds > 1 else ''}"
    table = Table(title=f"{result.backend}, {result.precision}, against {reference} on {clouds}")
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
