"""The node, a player and a receiver, each in a process of its own: what is sent, and what comes back."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvt_ros.tools.processes import ChildError, Children

DETECTIONS = "/dsvt_detector/output/detections"
LATENCY = "/dsvt_detector/debug/latency_ms"
LAST_ANSWER_S = 5.0


@dataclass(frozen=True)
class Reply:
    """The answer to one cloud.

    Attributes:
        stamp_ns: Of the cloud, as it was in the bag.
        sent_to_received_ms: From handing the cloud to DDS to having its detections from there.
        cdr: Serialized Detection3DArray.
    """

    stamp_ns: int
    sent_to_received_ms: float
    cdr: bytes


@dataclass(frozen=True)
class Conversation:
    """What went over DDS.

    Attributes:
        num_sent: Clouds.
        replies: Answers, in the order in which they came.
        latency_ms: From a cloud's stamp to its answer's publication, as the node says; of stamps from another time they
            mean nothing.
    """

    num_sent: int
    replies: list[Reply]
    latency_ms: list[float]


def play_to_node(
    bag: Path,
    folder: Path,
    topic: str,
    parameters: Mapping[str, str],
    say: Callable[[str], None],
    *,
    wait_for_answers: bool,
    restamp: bool,
    timeout_s: float,
) -> Conversation:
    """Start the node in an isolated ROS domain, play a bag to it, and collect what it answers.

    Args:
        bag: Holds clouds on `topic`.
        folder: Where the processes' output goes.
        topic: Of the clouds.
        parameters: Of the node.
        say: Told how it goes on.
        wait_for_answers: Send a cloud only after the answer to the one before; otherwise keep the bag's pace.
        restamp: Give each cloud the time at which it is sent.
        timeout_s: For everything.

    Raises:
        ChildError: The node does not start, one of the processes fails, or nothing is answered.
    """
    from dsvt_ros.ros.local_dds import isolated_environment

    isolated = isolated_environment()
    say(f"Starting the node dsvt_detector in a process of its own (ROS domain {isolated['ROS_DOMAIN_ID']})")
    arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    with Children(folder, os.environ | isolated, timeout_s) as children:
        started = time.monotonic()
        remap = ("-r", f"~/input/pointcloud:={topic}")
        node = children.start("node", "dsvt_ros.ros.detector_node", "--ros-args", *remap, *arguments)
        receiver = children.start("receiver", "dsvt_ros.ros.receiver", DETECTIONS, "--latency", LATENCY)
        children.wait(node, "it was active", "active: waiting for clouds")
        children.wait(receiver, "it heard of the node", "ready")
        say(f"    active after {time.monotonic() - started:.0f} s: {topic} -> {DETECTIONS}")
        say("Playing the clouds over DDS from a second process, receiving in a third")
        started = time.monotonic()
        options = ["--answers", DETECTIONS] if wait_for_answers else ["--connect-to", DETECTIONS]
        options += ["--restamp"] if restamp else []
        player = children.start(
            "player", "dsvt_ros.ros.player", str(bag), "--to", topic, "--reliability", "reliable", *options
        )
        children.wait(player, "the bag was over")
        sent = {line["stamp_ns"]: line for line in map(json.loads, player.lines)}
        deadline = time.monotonic() + LAST_ANSWER_S
        while _count(receiver.lines, "cdr") < len(sent) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines: list[dict[str, Any]] = [json.loads(line) for line in receiver.lines]
        received = [line for line in lines if "cdr" in line]
        say(f"    {len(sent)} clouds sent, {len(received)} answered, {time.monotonic() - started:.0f} s")
        if not received:
            raise ChildError(f"the node answered none of {len(sent)} clouds; it said last:\n{node.last_words()}")
    replies = []
    for line in received:
        of_cloud = sent[line["stamp_ns"]]
        milliseconds = (line["received_ns"] - of_cloud["sent_ns"]) / 1e6
        replies.append(Reply(of_cloud["bag_stamp_ns"], milliseconds, base64.b64decode(line["cdr"])))
    return Conversation(len(sent), replies, [line["latency_ms"] for line in lines if "latency_ms" in line])


def _count(lines: list[str], key: str) -> int:
    return sum(f'"{key}"' in line for line in lines)
