"""``dsvt demo``: a simulated drive through the node, compared with what was simulated."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import DsvtError
from dsvt_ros.io.bags import DETECTIONS, BagWriter, StaticTransform, clouds_from_bag, messages_from_bag, typestore
from dsvt_ros.io.detections import boxes_from_msg
from dsvt_ros.model.folder import open_model
from dsvt_ros.structures import Boxes3D
from dsvt_ros.tools.picture import draw_bev
from dsvt_ros.tools.ros_run import DETECTIONS as FOUND
from dsvt_ros.tools.ros_run import play_to_node
from dsvt_ros.tools.scoring import MIN_POINTS, FrameScore, score_frame

SEED = 2
NUM_FRAMES = 30
PERIOD_S = 0.3
SENSOR_HEIGHT_M = 1.73
START_NS = 1_735_689_600_000_000_000
"""Stamp of the first cloud, the same in every run."""

CLOUDS = "/lidar/points"
KNOWN = "/simulation/objects"
COLUMNS = ("x", "y", "z", "intensity")
FRAME_ID = "lidar"

MIN_FOUND = 0.8
MAX_FALSE_PER_FRAME = 2.0
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class KnownFrame:
    """One cloud of the drive and what is in it, in the lidar's frame.

    Attributes:
        stamp_ns: Of the cloud.
        points: (N, 4) float32 `COLUMNS`.
        objects: All simulated objects.
        num_points: (T,) points on each object.
    """

    stamp_ns: int
    points: NDArray[np.float32]
    objects: Boxes3D
    num_points: NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """The detections of one cloud.

    Attributes:
        boxes: In the lidar's frame.
        latency_ms: From sending the cloud to receiving its detections.
        message: Serialized Detection3DArray.
    """

    boxes: Boxes3D
    latency_ms: float
    message: bytes


def main(argv: list[str]) -> int:
    """Run the demonstration; see ``dsvt demo --help``."""
    options = _parser().parse_args(argv)
    # Files and pipes, as in CI, have no width of their own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    with_ros = not options.no_ros
    if with_ros and importlib.util.find_spec("rclpy") is None:
        console.print("rclpy is not installed: the detector runs in this process, without ROS (as with --no-ros)")
        with_ros = False
    # Ends like Ctrl-C does, so that the children are ended too.
    signal.signal(signal.SIGTERM, _interrupt)
    model = open_model("demo").model
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dsvt_demo_") as name:
        folder = Path(name)
        started = time.monotonic()
        console.print(f"[bold]1/4[/] Simulating {options.frames} lidar scans of a drive through a street")
        drive = simulate(options.frames, model)
        bag = folder / "drive"
        write_bag(bag, drive, None)
        points = int(np.mean([len(frame.points) for frame in drive]))
        console.print(f"    {points} points a scan, {time.monotonic() - started:.0f} s")
        if with_ros:
            answers = run_ros(bag, folder, options.weights, console)
        else:
            answers = run_in_process(bag, options.weights, console)
        console.print(f"[bold]4/4[/] Comparing with the simulated objects that have {MIN_POINTS} points or more")
        return report(drive, answers, model, options.output_dir, console)


def simulate(num_frames: int, model: ModelConfig) -> list[KnownFrame]:
    """The drive, the same in every run, as a lidar on a roof sees it."""
    from dsvt_ros.training.drive import make_drive

    frames = []
    for frame in make_drive(SEED, num_frames, PERIOD_S):
        points, boxes = frame.points.copy(), frame.boxes.copy()
        points[:, 2] -= SENSOR_HEIGHT_M
        boxes[:, 2] -= SENSOR_HEIGHT_M
        objects = Boxes3D(boxes, np.ones(len(boxes), np.float32), frame.labels, model.class_names)
        frames.append(KnownFrame(START_NS + frame.stamp_ns, points, objects, frame.num_points))
    return frames


def write_bag(path: Path, drive: Sequence[KnownFrame], answers: dict[int, Answer] | None) -> None:
    """Write a bag with the clouds, the simulated objects and, if there are any, the detections."""
    with BagWriter(path, overwrite=True) as bag:
        pose = StaticTransform("base_link", FRAME_ID, (0.0, 0.0, SENSOR_HEIGHT_M))
        bag.write_static_transforms([pose], START_NS)
        for frame in drive:
            bag.write_points(CLOUDS, frame.points, COLUMNS, frame.stamp_ns, FRAME_ID)
            objects = frame.objects
            names = [objects.class_name(i) for i in range(len(objects))]
            bag.write_detections(KNOWN, objects.boxes, objects.scores, names, frame.stamp_ns, FRAME_ID)
            answer = (answers or {}).get(frame.stamp_ns)
            if answer is not None:
                received_ns = frame.stamp_ns + round(answer.latency_ms * 1e6)
                bag.write_cdr(FOUND, DETECTIONS, answer.message, received_ns)


def run_ros(bag: Path, folder: Path, weights: Path | None, console: Console) -> dict[int, Answer]:
    """Play the bag to the node, each in a process of its own, and receive what it answers in a third.

    Returns:
        Answers by stamp.

    Raises:
        ChildError: The node does not start, or one of the processes fails.
    """
    # Reliable, since small socket buffers, as in many containers, would lose best-effort clouds.
    parameters = {
        "qos.reliability": "reliable",
        "preprocess.sensor_pose": f"[0.0, 0.0, {SENSOR_HEIGHT_M}, 0.0, 0.0, 0.0]",
    }
    if weights is not None:
        parameters["weights"] = str(weights.absolute())
    steps = iter((2, 3))

    def say(text: str) -> None:
        console.print(text if text.startswith(" ") else f"[bold]{next(steps)}/4[/] {text}")

    heard = play_to_node(
        bag, folder, CLOUDS, parameters, say, wait_for_answers=True, restamp=False, timeout_s=TIMEOUT_S
    )
    class_names = open_model("demo").model.class_names
    answers: dict[int, Answer] = {}
    for reply in heard.replies:
        if reply.stamp_ns in answers:
            raise DsvtError(f"the cloud of {reply.stamp_ns} ns was answered twice")
        boxes = boxes_from_msg(typestore().deserialize_cdr(reply.cdr, DETECTIONS), class_names)
        answers[reply.stamp_ns] = Answer(boxes, reply.sent_to_received_ms, reply.cdr)
    return answers


def run_in_process(bag: Path, weights: Path | None, console: Console) -> dict[int, Answer]:
    """The same without ROS: read the bag's clouds and detect, one after the other."""
    from dsvt_ros.detector import Detector
    from dsvt_ros.io.bags import detections_msg_from_boxes

    console.print("[bold]2/4[/] Loading the detector in this process")
    started = time.monotonic()
    pose = (0.0, 0.0, SENSOR_HEIGHT_M, 0.0, 0.0, 0.0)
    detector = Detector.load("demo", weights, overrides={"preprocess.sensor_pose": pose})
    fill = {feature.name: feature.fill for feature in detector.model.features}
    detector.detect(np.zeros((1, len(fill)), np.float32))
    console.print(f"    {detector.backend} on {detector.device} after {time.monotonic() - started:.0f} s")
    console.print("[bold]3/4[/] Detecting in the clouds of the bag")
    answers = {}
    started = time.monotonic()
    for cloud in clouds_from_bag(bag):
        begin = time.perf_counter()
        boxes = detector.detect(cloud.points(detector.model.feature_names, fill))
        latency_ms = (time.perf_counter() - begin) * 1e3
        names = [boxes.class_name(i) for i in range(len(boxes))]
        message = detections_msg_from_boxes(boxes.boxes, boxes.scores, names, cloud.stamp_ns, cloud.frame_id)
        cdr = bytes(typestore().serialize_cdr(message, DETECTIONS))
        answers[cloud.stamp_ns] = Answer(boxes, latency_ms, cdr)
    console.print(f"    {len(answers)} clouds, {time.monotonic() - started:.0f} s")
    return answers


def report(
    drive: Sequence[KnownFrame], answers: dict[int, Answer], model: ModelConfig, folder: Path, console: Console
) -> int:
    """Print the table, write picture and bag; 0 if enough objects were found without too many false boxes."""
    nothing = Boxes3D(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), model.class_names)
    z = (0.0, 0.0, SENSOR_HEIGHT_M) * 2
    limits = tuple(np.subtract(model.point_cloud_range, z).tolist())
    scores = []
    for frame in drive:
        boxes = answers[frame.stamp_ns].boxes if frame.stamp_ns in answers else nothing
        scores.append(score_frame(boxes, frame.objects, frame.num_points, limits))
    console.print(_frames_table(drive, answers, scores, model.class_names))

    shown = len(drive) // 2
    boxes = answers[drive[shown].stamp_ns].boxes if drive[shown].stamp_ns in answers else nothing
    console.print(_boxes_table(boxes, scores[shown], shown))
    picture = folder / "demo.png"
    found_here = f"{scores[shown].num_found} of {scores[shown].num_known} objects found"
    title = f"dsvt_ros demo: scan {shown + 1} of a simulated drive, {found_here}"
    draw_bev(drive[shown].points, boxes, _subset(drive[shown].objects, scores[shown].known), picture, title)
    bag = folder / "demo_bag"
    write_bag(bag, drive, answers)
    num_messages = sum(1 for _ in messages_from_bag(bag, [FOUND])) if answers else 0
    console.print(f"wrote {picture}", markup=False, soft_wrap=True)
    contents = f"{len(drive)} clouds ({CLOUDS}), {num_messages} detection arrays ({FOUND}), objects ({KNOWN})"
    console.print(f"wrote {bag}: {contents}", markup=False, soft_wrap=True)

    known, found = sum(s.num_known for s in scores), sum(s.num_found for s in scores)
    false_per_frame = sum(s.num_false for s in scores) / len(scores)
    if answers:
        p50, p95 = np.percentile([answer.latency_ms for answer in answers.values()], (50, 95))
        console.print(f"latency p50 {p50:.0f} ms, p95 {p95:.0f} ms; {false_per_frame:.2f} false boxes a frame")
    succeeded = True
    if len(answers) < len(drive):
        console.print(f"{len(drive) - len(answers)} clouds were not answered; their objects count as not found")
    if found < MIN_FOUND * known:
        console.print(f"[red]not enough: at least {MIN_FOUND:.0%} of the objects must be found[/]")
        succeeded = False
    if false_per_frame > MAX_FALSE_PER_FRAME:
        console.print(f"[red]too many false boxes: at most {MAX_FALSE_PER_FRAME:g} a frame are allowed[/]")
        succeeded = False
    console.print(f"{found} of {known} objects found")
    return 0 if succeeded else 1


def _frames_table(
    drive: Sequence[KnownFrame], answers: dict[int, Answer], scores: Sequence[FrameScore], class_names: tuple[str, ...]
) -> Table:
    table = Table(title="Detections of each cloud", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for name in ("cloud", "time, s", "points", *class_names, "found", "false", "latency, ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, (frame, score) in enumerate(zip(drive, scores, strict=True)):
        seconds = f"{(frame.stamp_ns - START_NS) / 1e9:.1f}"
        answer = answers.get(frame.stamp_ns)
        if answer is None:
            cells, latency = ["-"] * len(class_names), "no answer"
        else:
            cells = [str(int((answer.boxes.labels == label).sum())) for label in range(len(class_names))]
            latency = f"{answer.latency_ms:.0f}"
        found = f"{score.num_found}/{score.num_known}"
        table.add_row(str(index + 1), seconds, str(len(frame.points)), *cells, found, str(score.num_false), latency)
    return table


def _boxes_table(boxes: Boxes3D, score: FrameScore, index: int) -> Table:
    title = f"Boxes of cloud {index + 1}, drawn in demo.png (m, degrees; frame {FRAME_ID})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("class", no_wrap=True)
    for name in ("score", "x", "y", "z", "length", "width", "height", "yaw", ""):
        table.add_column(name, justify="right")
    order = np.lexsort((-boxes.scores, boxes.labels))
    for i in order:
        numbers = [f"{value:.2f}" for value in boxes.boxes[i, :6]]
        yaw = f"{(round(np.degrees(float(boxes.boxes[i, 6]))) + 179) % 360 - 179}"
        table.add_row(boxes.class_name(i), f"{boxes.scores[i]:.2f}", *numbers, yaw, "false" if score.false[i] else "")
    return table


def _subset(boxes: Boxes3D, chosen: NDArray[np.bool_]) -> Boxes3D:
    return replace(boxes, boxes=boxes.boxes[chosen], scores=boxes.scores[chosen], labels=boxes.labels[chosen])


def _interrupt(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsvt demo",
        description="Detect objects in a simulated drive and compare with what was simulated. Writes demo.png and "
        "the bag demo_bag; exit status 0 only if at least 80 %% of the objects with 20 points or more were found "
        "with at most 2 false boxes a frame.",
    )
    parser.add_argument("--no-ros", action="store_true", help="run the detector in this process, without DDS")
    parser.add_argument("--output-dir", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="other weights for the model demo")
    parser.add_argument(
        "--frames", type=_positive, default=NUM_FRAMES, metavar="N", help="clouds (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
