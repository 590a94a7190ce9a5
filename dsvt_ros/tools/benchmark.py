"""``dsvt benchmark``: how long each stage takes, how much memory a model needs."""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from dsvt_ros.backends import BACKENDS
from dsvt_ros.backends.tensorrt.runner import TensorRtNetworks
from dsvt_ros.config import ModelConfig
from dsvt_ros.detector import Detector
from dsvt_ros.errors import ConfigError
from dsvt_ros.io.pointcloud2 import cloud_parts_from_points, points_from_msg
from dsvt_ros.tools.arguments import add_columns_option, add_model_options, check_folders, columns_from, overrides_from
from dsvt_ros.tools.benchmark_picture import check_picture, draw_stages, name_of
from dsvt_ros.tools.given_clouds import (
    SIMULATED,
    SIMULATED_POINTS,
    Cloud,
    given_clouds,
    num_pillars,
    point_counts,
    resized,
)
from dsvt_ros.tools.machine import hardware, versions
from dsvt_ros.tools.progress import terminal_progress
from dsvt_ros.tools.published_layout import REFERENCES, load_reference
from dsvt_ros.tools.result_file import write_result

SCHEMA_VERSION = 1
MAX_CLOUDS = 8
"""They are rotated, so that caches do not flatter."""
CONVERTED_POINTS = 180_000
"""Points of the message whose conversion is timed: a large lidar's turn."""
ROS_TOPIC = "/lidar/points"
ROS_TIMEOUT_S = 120.0
"""For everything around the playing of the clouds, which includes loading the model."""


def main(argv: list[str]) -> int:
    """Measure; see ``dsvt benchmark --help``."""
    options = _parser().parse_args(argv)
    backends = options.backends.split(",")
    sizes = point_counts("--points", options.points) if options.points else []
    _check(options, backends)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    results: list[dict[str, Any]] = []
    scaling: list[dict[str, Any]] = []
    clouds: list[Cloud] = []
    for backend in backends:
        started = time.perf_counter()
        detector = _load(options, backend, console)
        load_s = time.perf_counter() - started
        model, device = detector.model, detector.device
        _free(device)  # of what loading has left
        if not clouds:
            clouds = _clouds(options, detector, console)
        asked_for = {"asked_for": backend}
        results.append(asked_for | _measure(detector, clouds, options.runs, console) | {"load_s": _round(load_s)})
        for size in sizes:
            changed = [resized(cloud, size, number) for number, cloud in enumerate(clouds)]
            totals = _totals(detector, changed, options.runs, console)
            scaling.append(asked_for | _described(detector) | {"num_points": size} | totals)
        if options.ros:
            results[-1]["ros"] = _through_ros(options, backend, model, clouds, console)
        del detector
        _free(device)  # before the next one is loaded, whose memory would lie among this one's
    _print(console, results)
    if scaling:
        _print_scaling(console, scaling, sizes)
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "hardware": hardware(device),
        "versions": versions(result["backend"] for result in results),
        "cloud": {
            "source": [Path(path).name for path in options.cloud],
            "num_clouds": len(clouds),
            "num_points": [len(cloud) for cloud in clouds],
            "num_voxels": results[-1]["num_voxels"],
        },
        "results": [{key: value for key, value in result.items() if key != "num_voxels"} for result in results],
        **({"scaling": scaling} if scaling else {}),
        "conversion_ms": _conversion_ms(model, options.runs),
    }
    console.print(
        f"PointCloud2 of {content['conversion_ms']['num_points']} points to columns: "
        f"{content['conversion_ms']['p50']:.2f} ms"
    )
    if options.output:
        write_result(options.output, content, console)
    if options.picture:
        draw_stages(content, options.picture)
        console.print(f"wrote {options.picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt benchmark",
        description="Time every stage of a model, from points in host memory to boxes in host memory.",
    )
    parser.add_argument(
        "--cloud",
        action="append",
        required=True,
        help=f"point file, bag, or {SIMULATED}[:POINTS] for turns of a 64-beam lidar in random streets (by default of "
        f"{SIMULATED_POINTS} points); up to {MAX_CLOUDS} clouds are rotated",
    )
    add_columns_option(parser)
    add_model_options(parser)
    parser.add_argument(
        "--backends",
        default="torch",
        help=f"comma-separated: {', '.join(BACKENDS)}; {' and '.join(REFERENCES)} arrange the networks as the "
        f"published release does, for comparison (default: torch)",
    )
    parser.add_argument("--runs", type=int, default=50, help="measured frames (default: %(default)s)")
    parser.add_argument(
        "--points", metavar="N,N,...", help="also time clouds of so many points, made by thinning or repeating these"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--ros", type=int, metavar="N", help="also send N clouds through the node, over DDS, and time the answers"
    )
    parser.add_argument("--rate", type=float, default=10.0, help="clouds a second with --ros (default: %(default)g)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the stages of each backend as bars")
    return parser


def _check(options: argparse.Namespace, backends: list[str]) -> None:
    for backend in backends:
        if backend not in (*BACKENDS, *REFERENCES):
            raise ConfigError(
                f"--backends: no backend {backend!r}; expected {', '.join(BACKENDS)}, {', '.join(REFERENCES)}"
            )
        if options.ros is not None and backend in REFERENCES:
            raise ConfigError(f"--ros: the node has no backend {backend}; leave it out of --backends")
    if options.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {options.runs}")
    if options.ros is not None and (options.ros < 1 or not options.rate > 0):
        raise ConfigError(f"--ros and --rate must be positive, got {options.ros} and {options.rate:g}")
    check_folders(options, "output", "picture")
    if options.picture:
        check_picture(options.picture)


def _load(options: argparse.Namespace, backend: str, console: Console) -> Detector:
    overrides = overrides_from(options)
    if backend in REFERENCES:
        return load_reference(backend, options.model, options.weights, options.device, overrides)
    with terminal_progress(console) as progress:
        return Detector.load(options.model, options.weights, backend, options.device, overrides, progress)


def _free(device: torch.device) -> None:
    """Give back the memory of what nothing needs any more, detectors among it, which hold themselves in a cycle."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _clouds(options: argparse.Namespace, detector: Detector, console: Console) -> list[Cloud]:
    model = detector.model
    given = given_clouds(options.cloud, columns_from(options, model), model, detector.config.preprocess)
    clouds = list(islice(given, MAX_CLOUDS))
    if all(source.partition(":")[0] == SIMULATED for source in options.cloud):
        pillars = [num_pillars(cloud, model) for cloud in clouds]
        console.print(
            f"{len(clouds)} simulated clouds of {len(clouds[0]):,} points, {min(pillars):,} to {max(pillars):,} "
            f"pillars of 0.32 m (waymo_pillar)"
        )
    return clouds


def _measure(detector: Detector, clouds: list[Cloud], runs: int, console: Console) -> dict[str, Any]:
    """Total and stage times over `runs` frames each."""
    totals = _totals(detector, clouds, runs, console)
    stages: dict[str, list[float]] = {}
    with detector.timed_stages():
        for run in range(runs):
            detector.detect(clouds[run % len(clouds)])
            for stage, ms in detector.timing_ms.items():
                stages.setdefault(stage, []).append(ms)
    engines = {}
    if isinstance(detector.networks, TensorRtNetworks):
        times = detector.networks.engine_times_ms(runs)
        engines = {"engine_ms": {name: _round(np.median(values)) for name, values in times.items()}}
    return {
        **_described(detector),
        "stage_ms": {stage: _round(np.median(values)) for stage, values in stages.items()},
        "stage_quantiles_ms": {stage: _quantiles(values) for stage, values in stages.items()},
        **engines,
        **totals,
    }


def _described(detector: Detector) -> dict[str, Any]:
    return {"backend": detector.backend, "precision": detector.precision}


def _totals(detector: Detector, clouds: list[Cloud], runs: int, console: Console) -> dict[str, Any]:
    """Times of `runs` whole frames after a warm-up over every cloud twice, and the most memory they took.

    On CUDA also the device's side of it: how long from its first to its last work on a frame, waits for the host in
    between included, and how long it was at work (`_busy_ms`); and how many clouds of a recording it answers a second.
    """
    for cloud in clouds * 2:
        detector.detect(cloud)
    cuda = detector.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(detector.device)
    totals: list[float] = []
    device: list[float] = []
    voxels: list[int] = []
    title = f"{detector.backend} on {detector.device}, {len(clouds[0]):,} points"
    for run in track(range(runs), title, console=console, transient=True):
        events = _record(detector.device) if cuda else None
        start = time.perf_counter()
        detector.detect(clouds[run % len(clouds)])
        totals.append(1e3 * (time.perf_counter() - start))
        if events is not None:
            last = _record(detector.device)
            last.synchronize()
            device.append(events.elapsed_time(last))
        voxels.append(detector.num_voxels)
    # Not what is allocated: the memory of a captured graph counts as free between its replays.
    peak = torch.cuda.max_memory_reserved(detector.device) if cuda else 1024 * _peak_resident_kib()
    on_device = {}
    if cuda:
        on_device = {
            "device_ms": _quantiles(device),
            "device_busy_ms": _busy_ms(detector, clouds, runs),
            "frames_per_s": _frames_per_s(detector, clouds, runs),
        }
    return {
        "total_ms": _quantiles(totals),
        **on_device,
        "peak_memory_mib": round(peak / 2**20),
        "num_voxels": voxels[: len(clouds)],
    }


def _record(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _busy_ms(detector: Detector, clouds: list[Cloud], runs: int) -> float:
    """Mean time of a frame in which kernels and copies run on the GPU; what is left of the total is the host's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for run in range(runs):
            detector.detect(clouds[run % len(clouds)])
        torch.cuda.synchronize(detector.device)
    on_device = (event for event in profile.events() if event.device_type.name == "CUDA")
    return _round(1e-3 * sum(event.time_range.elapsed_us() for event in on_device) / runs)


def _frames_per_s(detector: Detector, clouds: list[Cloud], runs: int) -> float:
    """How many clouds a second are answered that are all there beforehand."""
    start = time.perf_counter()
    for _ in detector.detect_all(islice(cycle(clouds), runs)):
        pass
    return _round(runs / (time.perf_counter() - start))


def _through_ros(
    options: argparse.Namespace,
    backend: str,
    model: ModelConfig,
    clouds: list[Cloud],
    console: Console,
) -> dict[str, Any]:
    """Latencies of the node with the same settings, which gets the clouds at a fixed rate."""
    from dsvt_ros.io.bags import BagWriter
    from dsvt_ros.tools.ros_run import play_to_node

    path = Path(options.model)
    parameters = {
        "model": str(path.absolute()) if path.exists() else options.model,
        "backend": backend,
        "device": options.device,
        "qos.reliability": "reliable",
        **dict(text.split("=", 1) for text in options.overrides),
    }
    if options.weights:
        parameters["weights"] = str(Path(options.weights).absolute())
    with tempfile.TemporaryDirectory(prefix="dsvt_benchmark_") as name:
        folder = Path(name)
        with BagWriter(folder / "clouds") as bag:
            for number in range(options.ros):
                stamp_ns = round(number * 1e9 / options.rate)
                cloud = clouds[number % len(clouds)]
                bag.write_points(ROS_TOPIC, cloud, model.feature_names, stamp_ns, "lidar")
        heard = play_to_node(
            folder / "clouds",
            folder,
            ROS_TOPIC,
            parameters,
            console.print,
            wait_for_answers=False,
            restamp=True,
            timeout_s=ROS_TIMEOUT_S + options.ros / options.rate,
        )
    received = [reply.sent_to_received_ms for reply in heard.replies]
    return {
        "rate_hz": options.rate,
        "num_sent": heard.num_sent,
        "num_answered": len(received),
        "stamp_to_publish_ms": _quantiles(heard.latency_ms),
        "sent_to_received_ms": _quantiles(received),
    }


def _conversion_ms(model: ModelConfig, runs: int) -> dict[str, Any]:
    """Time to read the columns of the model from a PointCloud2 with six float32 fields."""
    names = ("x", "y", "z", "intensity", "ring", "time")
    rows = np.random.default_rng(0).uniform(-50, 50, (CONVERTED_POINTS, len(names))).astype(np.float32)
    parts = cloud_parts_from_points(rows, names)
    msg = SimpleNamespace(
        fields=parts.fields,
        point_step=parts.point_step,
        row_step=parts.point_step * CONVERTED_POINTS,
        height=1,
        width=CONVERTED_POINTS,
        is_bigendian=parts.is_bigendian,
        is_dense=True,
        data=parts.data,
    )
    fill = {feature.name: feature.fill for feature in model.features[3:]}
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        points_from_msg(msg, model.feature_names, fill)
        times.append(1e3 * (time.perf_counter() - start))
    return {"num_points": CONVERTED_POINTS, "point_step": parts.point_step, "p50": _round(np.median(times[3:]))}


def _print(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(title="milliseconds, p50 (p95) of stages; total from points to boxes in host memory")
    table.add_column("stage")
    for result in results:
        table.add_column(name_of(result), justify="right")
    for stage in dict.fromkeys(stage for result in results for stage in result["stage_ms"]):
        table.add_row(stage, *(_median_and_tail(result["stage_quantiles_ms"].get(stage)) for result in results))
    if any("engine_ms" in result for result in results):
        for name in ("sparse", "dense"):
            row = (f"{result['engine_ms'][name]:.2f}" if "engine_ms" in result else "" for result in results)
            table.add_row(f"{name} engine alone", *row)
    for quantile in ("p50", "p95", "p99"):
        table.add_row(f"total {quantile}", *(f"{result['total_ms'][quantile]:.2f}" for result in results))
    if "device_ms" in results[0]:
        table.add_row("device, first to last work", *(f"{result['device_ms']['p50']:.2f}" for result in results))
        table.add_row("device at work, mean", *(f"{result['device_busy_ms']:.2f}" for result in results))
        table.add_row("clouds a second, in a row", *(f"{result['frames_per_s']:.0f}" for result in results))
    table.add_row("memory, MiB", *(str(result["peak_memory_mib"]) for result in results))
    table.add_row("load, s", *(f"{result['load_s']:.1f}" for result in results))
    for name in ("stamp_to_publish_ms", "sent_to_received_ms"):
        if any("ros" in result for result in results):
            row = (f"{result['ros'][name]['p50']:.2f}" if "ros" in result else "" for result in results)
            table.add_row(f"node, {name.removesuffix('_ms').replace('_', ' ')} p50", *row)
    console.print(table)


def _median_and_tail(quantiles: dict[str, float] | None) -> Text:
    """What a cell shows of a stage; nothing where the backend has no such stage."""
    if quantiles is None:
        return Text()
    return Text.assemble(f"{quantiles['p50']:.2f}", (f" ({quantiles['p95']:.2f})", "dim"))


def _print_scaling(console: Console, scaling: list[dict[str, Any]], sizes: list[int]) -> None:
    table = Table(title="milliseconds, totals by size of the clouds: p50 (p95)")
    table.add_column("points", justify="right")
    table.add_column("voxels", justify="right")
    for entry in scaling[:: len(sizes)]:
        table.add_column(name_of(entry), justify="right")
    for row, size in enumerate(sizes):
        entries = scaling[row :: len(sizes)]
        times = (_median_and_tail(entry["total_ms"]) for entry in entries)
        table.add_row(f"{size:,}", f"{np.median(entries[0]['num_voxels']):,.0f}", *times)
    console.print(table)


def _peak_resident_kib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": _round(np.percentile(values, q)) for q in (50, 95, 99)}


def _round(value: float) -> float:
    return round(float(value), 3)
