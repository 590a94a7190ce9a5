"""Plays the clouds of a bag over DDS: ``python -m dsvt_ros.ros.player BAG --to TOPIC``.

Publishes the bytes of the bag as they are, at the bag's pace, once somebody listens.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import PointCloud2
from vision_msgs.msg import Detection3DArray

from dsvt_ros.errors import DataError, DsvtError
from dsvt_ros.io.bags import cloud_topic, messages_from_bag


def stamp_from_cdr(cdr: bytes) -> int:
    """Header stamp in nanoseconds of a serialized message that starts with a header."""
    # Four bytes of encapsulation, the second of which tells the byte order (DDSI-RTPS 10.2).
    order = "<" if cdr[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", cdr, 4)
    return int(seconds) * 10**9 + int(nanoseconds)


def with_stamp(cdr: bytes, stamp_ns: int) -> bytes:
    """A serialized message that starts with a header, with another stamp."""
    order = "<" if cdr[1] & 1 else ">"
    seconds, nanoseconds = divmod(stamp_ns, 10**9)
    return cdr[:4] + struct.pack(f"{order}iI", seconds, nanoseconds) + cdr[12:]


class Player(Node):
    """Publishes clouds and, if asked to, waits for each answer before the next one.

    Args:
        to: Topic to publish on.
        reliability: ``reliable`` or ``best_effort``.
        answers: Topic of Detection3DArrays that must be offered before the first cloud; empty: none.
        wait: Send a cloud only after the answer to the one before.
        restamp: Give each cloud the time at which it is sent.
    """

    def __init__(self, to: str, reliability: str, answers: str, *, wait: bool, restamp: bool) -> None:
        super().__init__("player")
        self._wait, self._restamp = wait, restamp
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy[reliability.upper()])
        self._clouds = self.create_publisher(PointCloud2, to, qos)
        self._answered: set[int] = set()
        self._answers = answers
        if wait:
            self.create_subscription(Detection3DArray, answers, self._on_answer, 10, raw=True)

    def connect(self, timeout_s: float) -> None:
        """Wait for a subscriber of the clouds, and for a publisher of the answers.

        Raises:
            DataError: There is none in time.
        """
        if not self._wait_for(lambda: self._clouds.get_subscription_count() > 0, timeout_s):
            raise DataError(f"nobody subscribed to {self._clouds.topic_name} within {timeout_s:g} s")
        if self._answers and not self._wait_for(lambda: self.count_publishers(self._answers) > 0, timeout_s):
            raise DataError(f"nobody offered {self._answers} within {timeout_s:g} s")

    def play(self, bag: Path, answer_timeout_s: float) -> None:
        """Publish the clouds and print a line ``{"stamp_ns", "bag_stamp_ns", "sent_ns"}`` (monotonic) for each."""
        first_ns: int | None = None
        started = time.monotonic()
        for message in messages_from_bag(bag, [cloud_topic(bag).name]):
            first_ns = message.timestamp_ns if first_ns is None else first_ns
            due = started + (message.timestamp_ns - first_ns) / 1e9
            self._wait_for(lambda due=due: time.monotonic() >= due, float("inf"))  # type: ignore[misc]
            cdr, bag_stamp_ns = message.cdr, stamp_from_cdr(message.cdr)
            stamp_ns = time.time_ns() if self._restamp else bag_stamp_ns
            cdr = with_stamp(cdr, stamp_ns) if self._restamp else cdr
            line = {"stamp_ns": stamp_ns, "bag_stamp_ns": bag_stamp_ns, "sent_ns": time.monotonic_ns()}
            print(json.dumps(line), flush=True)
            self._clouds.publish(cdr)
            if self._wait:
                self._wait_for(lambda stamp_ns=stamp_ns: stamp_ns in self._answered, answer_timeout_s)  # type: ignore[misc]

    def _on_answer(self, cdr: bytes) -> None:
        self._answered.add(stamp_from_cdr(cdr))

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            rclpy.spin_once(self, timeout_sec=0.01)
        return True


def main(argv: list[str] | None = None) -> int:
    """Play a bag; exit code 1 if nobody listens or the bag cannot be read."""
    parser = argparse.ArgumentParser(prog="player", description="Play the clouds of a bag over DDS.")
    parser.add_argument("bag", type=Path)
    parser.add_argument("--to", required=True, help="topic to publish on")
    parser.add_argument("--reliability", choices=("reliable", "best_effort"), default="best_effort")
    answers = parser.add_mutually_exclusive_group()
    answers.add_argument("--answers", metavar="TOPIC", help="topic of detections to wait for after each cloud")
    answers.add_argument("--connect-to", metavar="TOPIC", help="topic of detections that must be offered first")
    parser.add_argument("--restamp", action="store_true", help="give each cloud the time at which it is sent")
    parser.add_argument("--answer-timeout", type=float, default=10.0, metavar="S")
    parser.add_argument("--connect-timeout", type=float, default=20.0, metavar="S")
    options = parser.parse_args(argv)
    player: Player | None = None
    try:
        rclpy.init()
        topic = options.answers or options.connect_to or ""
        wait = options.answers is not None
        player = Player(options.to, options.reliability, topic, wait=wait, restamp=options.restamp)
        player.connect(options.connect_timeout)
        player.play(options.bag, options.answer_timeout)
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    except DsvtError as error:
        print(f"player: {error}", file=sys.stderr)
        return 1
    finally:
        if player is not None:
            player.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
