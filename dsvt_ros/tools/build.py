"""``dsvt build``: TensorRT engines of a model, built ahead; or a proposal for how large they should be."""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsvt_ros.backends import Progress
from dsvt_ros.backends.tensorrt import load
from dsvt_ros.backends.tensorrt.cache import EngineSpec, read_engine
from dsvt_ros.backends.tensorrt.load import PlannedEngine, Source
from dsvt_ros.capacity import Capacity, StageCapacity, counts_of
from dsvt_ros.config import DetectorConfig, EngineConfig, with_overrides
from dsvt_ros.detector import Detector, choose_device
from dsvt_ros.errors import ConfigError, DataError, EngineError, ModelError
from dsvt_ros.export.manifest import MANIFEST, read_manifest
from dsvt_ros.io.clouds import open_clouds
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder, embedded_models, open_model
from dsvt_ros.postprocess import no_boxes
from dsvt_ros.profile_plan import ProfilePlan, plan_profile
from dsvt_ros.structures import DeviceBoxes
from dsvt_ros.tools.arguments import (
    add_columns_option,
    add_max_frames_option,
    add_override_option,
    add_weights_option,
    columns_from,
    max_frames_from,
    overrides_from,
)
from dsvt_ros.tools.progress import terminal_progress
from dsvt_ros.tools.sweeps import add_motion_options, merged_clouds

RELEASE = "dsvt"
"""The network of the published deployment's interface; this package builds its engine and does not run it."""

# Options that only one of both tasks takes, and whether that is planning.
OWN_OPTIONS = {"profile": False, "output": False} | dict.fromkeys(
    ("columns", "topic", "odometry_topic", "stationary", "max_frames"), True
)


@dataclass(frozen=True)
class MadeEngine:
    """An engine that is ready.

    Attributes:
        spec: What it was made from and for.
        path: Where it is.
        reused: Whether the cache had it already.
        sidecar: What lies beside it.
    """

    spec: EngineSpec
    path: Path
    reused: bool
    sidecar: dict[str, Any]


def main(argv: list[str]) -> int:
    """Build or plan; see ``dsvt build --help``."""
    options = _parser().parse_args(argv)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    for name, planning in OWN_OPTIONS.items():
        if getattr(options, name) is not None and planning != bool(options.plan):
            raise ConfigError(f"--{name.replace('_', '-')} goes {'with' if planning else 'without'} --plan")
    folder = open_model(options.model)
    config = with_overrides(folder.defaults, {**overrides_from(options), **_profile_overrides(options.profile)})
    config.check_against(folder.model)
    if options.plan:
        _plan(options, folder, config, console)
    else:
        _build(options, folder, config.engine, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt build",
        description="Build the TensorRT engines of a model for this GPU, into the cache unless --output is given. With "
        "--plan, count the voxels of clouds and propose what to build; that needs neither TensorRT nor a GPU.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(embedded_models())}, a model folder (exported or not) or model.yaml"
    )
    add_weights_option(parser)
    parser.add_argument(
        "--profile",
        metavar="voxels=N",
        help="room for voxels: voxels=N,N,... for engines of fixed size, voxels=MIN/OPT/MAX for one of any size "
        "between (default: one engine for 3/16 of the grid's columns)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the engines in place of the cache")
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N (default: auto)")
    add_override_option(parser, "engine.precision=fp32")
    parser.add_argument(
        "--plan",
        nargs="+",
        action="extend",
        metavar="CLOUD",
        help="build nothing, count the voxels of these: .npy, .bin, .pcd, .mcap, .db3 or a bag folder",
    )
    add_columns_option(parser)
    parser.add_argument("--topic", help="topic of a bag that has several with clouds")
    add_motion_options(parser)
    add_max_frames_option(parser)
    return parser


def _profile_overrides(text: str | None) -> dict[str, Any]:
    """``--profile`` as overrides of `DetectorConfig`."""
    if text is None:
        return {}
    key, _, value = text.partition("=")
    separator = "/" if "/" in value else ","
    counts = value.split(separator)
    if key != "voxels" or not all(count.strip().isdecimal() for count in counts):
        raise ConfigError(f"--profile takes voxels=N,N,... or voxels=MIN/OPT/MAX, got {text!r}")
    return {"engine.profile.voxels": [int(count) for count in counts], "engine.profile.dynamic": separator == "/"}


# ------------------------------------------------------------------------------------------------ building


def _build(options: argparse.Namespace, folder: ModelFolder, config: EngineConfig, console: Console) -> None:
    device = choose_device(options.device)
    load.require_gpu(device)  # before anything takes time
    given = options.weights or folder.weights
    if given is None:
        raise ModelError(
            f"model {folder.model.name} comes without weights: name a file with --weights, a .safetensors or a pcdet "
            f".pth"
        )
    weights = Path(given)
    network = DSVT(folder.model)
    load_weights(network, read_weights(weights), str(weights))
    # It stays on the CPU: nothing runs it, and the GPU's memory is for the builder.
    network.eval().requires_grad_(False)
    source = Source(network, folder, weights, device, config)
    with terminal_progress() as progress:
        progress(f"preparing the networks of {folder.model.name}", None)
        planned = list(_planned(source, options.output))
        made = [
            _make(source, engine, _target(engine, planned, options.output), _numbered(progress, number, len(planned)))
            for number, engine in enumerate(planned, start=1)
        ]
    _print_engines(console, made)
    _print_use(console, options, config, made)


def _planned(source: Source, output: Path | None) -> Iterator[PlannedEngine]:
    """What to build: both networks, or the one of a folder that was exported for other programs."""
    manifest = read_manifest(source.folder.path) if (source.folder.path / MANIFEST).is_file() else None
    if manifest is None or manifest.interface != "dsvt_release":
        yield from load.planned_engines(source)
        return
    folder, profile = source.folder.path, source.config.profile
    if not profile.dynamic or output is None:
        raise ConfigError(
            f"{folder} has the interface dsvt_release, whose engine is for other programs and takes clouds of any "
            f"size: give --output DIR and --profile voxels=MIN/OPT/MAX"
        )
    yield load.planned_release(source)


def _target(engine: PlannedEngine, planned: list[PlannedEngine], output: Path | None) -> Path | None:
    """Where to write an engine; None for the cache."""
    if output is None:
        return None
    network = engine.spec.network
    several = sum(other.spec.network == network for other in planned) > 1
    return output / (f"{network}_{_room(engine.spec)[-1]}.engine" if several else f"{network}.engine")


def _make(source: Source, engine: PlannedEngine, target: Path | None, progress: Progress) -> MadeEngine:
    """Build an engine, or find it in the cache."""
    if target is not None:
        load.write_engine(source, engine, target, progress)
        path, reused = target, False
    else:
        path = load.engine_folder(source.config) / engine.spec.file_name
        origin = load.cache_engine(source, engine, progress)
        if not path.is_file():
            raise EngineError(
                f"{path.parent} cannot be written, so the engine was not kept: give --output DIR, or another "
                f"engine.cache_dir"
            )
        reused = origin == str(path)
    return MadeEngine(engine.spec, path, reused, read_engine(path)[1] or {})


def _numbered(progress: Progress, number: int, count: int) -> Progress:
    """Says which engine of how many."""
    return lambda text, fraction: progress(f"{number} of {count}: {text}", fraction)


def _room(spec: EngineSpec) -> tuple[int, ...]:
    """Number of voxels, or least, usual and largest number; none for the dense network."""
    for name, (minimum, optimum, maximum) in spec.profile.items():
        if name in ("voxel_features", "src"):
            counts = (minimum[0], optimum[0], maximum[0])
            return counts if minimum != maximum else counts[:1]
    return ()


def _print_engines(console: Console, made: list[MadeEngine]) -> None:
    rows = [("network", "voxels", "precision", "build s", "MiB", "file", "layers")]
    for engine in made:
        seconds, layers = engine.sidecar.get("build_s"), engine.sidecar.get("layers", {})
        rows.append(
            (
                engine.spec.network,
                "/".join(map(str, _room(engine.spec))),
                engine.spec.precision,
                "?" if seconds is None else f"{seconds:.0f}",
                f"{engine.path.stat().st_size / 2**20:.1f}",
                engine.path.name,
                "\n".join(f"{kind}: {_counted(precisions)}" for kind, precisions in layers.items()),
            )
        )
    table = Table()
    for title, *values in zip(*rows, strict=True):
        # Wider than a narrow terminal rather than with parts of file names.
        width = max(len(line) for text in (title, *values) for line in text.split("\n"))
        table.add_column(title, justify="right" if title in ("voxels", "build s", "MiB") else "left", min_width=width)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(f"engines in {made[0].path.parent}:")
    console.print(table)
    reused = [engine.path.name for engine in made if engine.reused]
    if reused:
        console.print(f"built before: {', '.join(reused)}")


def _counted(precisions: dict[str, int]) -> str:
    return ", ".join(f"{count} {precision}" for precision, count in precisions.items())


def _print_use(console: Console, options: argparse.Namespace, config: EngineConfig, made: list[MadeEngine]) -> None:
    """The command that runs what was built."""
    paths = {engine.spec.network: engine.path.resolve() for engine in made}  # of several, the last and largest
    if RELEASE in paths:
        console.print("for programs made for the published deployment; this package runs engines of its own interface")
        return
    words = ["--backend", "tensorrt", *_repeated(options)]
    if options.output is not None:
        for network, path in paths.items():
            words += ["--set", f"engine.{network}_path={path}"]
    elif config.profile.voxels:
        words += ["--set", f"engine.profile.voxels={','.join(map(str, config.profile.voxels))}"]
        words += ["--set", "engine.profile.dynamic=true"] if config.profile.dynamic else []
    console.print(f"used by: dsvt detect CLOUD --model {shlex.join([options.model, *words])}")
    if options.output is not None and len(made) > len(paths):
        console.print(
            "engine.sparse_path names one engine, here the largest; to choose among several for each cloud, build them "
            "into the cache"
        )


def _repeated(options: argparse.Namespace) -> list[str]:
    """The options of this command that the next one needs too; the profile is said anew."""
    words = ["--weights", options.weights] if options.weights else []
    for text in options.overrides:
        if text.startswith("engine.") and not text.startswith("engine.profile."):
            words += ["--set", text]
    return words


# ------------------------------------------------------------------------------------------------ planning


NO_VOXELS = Capacity((StageCapacity(0, (0, 0)),))


class CountingDetector(Detector):
    """Goes as far with a cloud as is needed to count its sets; the weights do not matter for that.

    Attributes:
        counts: Voxels and sets of the last cloud.
    """

    counts = NO_VOXELS

    def forward(self, points: Tensor) -> DeviceBoxes:
        """The first stages of `Detector.forward`; finds nothing."""
        voxels = self._voxelize(points)
        self.counts = counts_of(self._partition(voxels.coords, self.model)) if len(voxels) else NO_VOXELS
        return no_boxes(self.model, points)


def _plan(options: argparse.Namespace, folder: ModelFolder, config: DetectorConfig, console: Console) -> None:
    max_frames = max_frames_from(options)
    columns = columns_from(options, folder.model)
    # Opened before anything is read, so that a wrong path is answered at once.
    opened = [open_clouds(path, columns, options.topic) for path in options.plan]
    detector = CountingDetector(DSVT(folder.model), config, choose_device(options.device))
    clouds = itertools.islice(merged_clouds(options, options.plan, opened, detector), max_frames)
    counts = []
    with terminal_progress() as progress:
        for _, merged in clouds:
            detector.detect(merged.points)
            counts.append(detector.counts)
            if len(counts) % 20 == 0:
                progress(f"counting voxels: {len(counts)} clouds", None)
    where = ", ".join(options.plan)
    if not counts:
        raise DataError(f"{where}: no clouds in there")
    if not any(cloud.voxels for cloud in counts):
        raise DataError(f"{where}: none of {len(counts)} clouds has points in the range of model {folder.model.name}")
    _print_plan(console, options, plan_profile(counts, folder.model), len(counts))


def _print_plan(console: Console, options: argparse.Namespace, plan: ProfilePlan, clouds: int) -> None:
    empty = f", {clouds - plan.clouds} without points in the model's range" if clouds > plan.clouds else ""
    table = Table(title=f"{clouds} cloud{'s' if clouds > 1 else ''}{empty}")
    table.add_column("")
    for name in ("min", "median", "p95", "max"):
        table.add_column(name, justify="right")
    rows = [("voxels", plan.voxels), *((f"sets, shift {number}", spread) for number, spread in enumerate(plan.sets))]
    for name, spread in rows:
        table.add_row(name, *map(str, (spread.minimum, spread.median, spread.p95, spread.maximum)))
    console.print(table)
    table = Table(title="engines; padding is a share of the work of set attention")
    table.add_column("")
    for name in ("voxels", "clouds", "padding", "cut clouds"):
        table.add_column(name, justify="right")
    for name, buckets in (("default", plan.default), ("proposed", plan.proposed)):
        sizes, served = (", ".join(map(str, values)) for values in (buckets.voxels, buckets.clouds))
        table.add_row(name, sizes, served, f"{buckets.padding:.0%}", f"{buckets.cut / plan.clouds:.1%}")
    console.print(table)
    console.print("proposed, the smallest engine with room takes a cloud:")
    _print_lines(console, options, plan.proposed.voxels, dynamic=False)
    console.print("or one engine that takes clouds as they are, yet more slowly than one of their size:")
    _print_lines(console, options, plan.dynamic, dynamic=True)


def _print_lines(console: Console, options: argparse.Namespace, voxels: tuple[int, ...], *, dynamic: bool) -> None:
    """The command, and the parameters of the node."""
    counts = ("/" if dynamic else ",").join(map(str, voxels))
    words = [options.model, "--profile", f"voxels={counts}", *_repeated(options)]
    console.print(f"  dsvt build {shlex.join(words)}")
    console.print(f"  engine.profile.voxels: [{', '.join(map(str, voxels))}]")
    if dynamic:
        console.print("  engine.profile.dynamic: true")
