"""Receives detections over DDS: ``python -m dsvt_ros.ros.receiver TOPIC``.

Prints ``{"ready": true}`` once somebody publishes, then a line ``{"stamp_ns", "received_ns", "cdr"}`` for each message:
header stamp, monotonic time, and the serialized message in base64. With ``--latency TOPIC`` also a line
``{"latency_ms"}`` for each number published there.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from std_msgs.msg import Float64
from vision_msgs.msg import Detection3DArray

from dsvt_ros.ros.player import stamp_from_cdr


class Receiver(Node):
    """Prints every message of a topic, and the numbers of another one."""

    def __init__(self, topic: str, latency: str) -> None:
        super().__init__("receiver")
        self._topic = topic
        self.create_subscription(Detection3DArray, topic, self._on_detections, 50, raw=True)
        if latency:
            self.create_subscription(Float64, latency, self._on_latency, 50)

    def connect(self) -> None:
        """Wait until somebody publishes."""
        while self.count_publishers(self._topic) == 0:
            rclpy.spin_once(self, timeout_sec=0.05)
        print(json.dumps({"ready": True}), flush=True)

    def _on_detections(self, cdr: bytes) -> None:
        line = {
            "stamp_ns": stamp_from_cdr(cdr),
            "received_ns": time.monotonic_ns(),
            "cdr": base64.b64encode(cdr).decode("ascii"),
        }
        print(json.dumps(line), flush=True)

    def _on_latency(self, message: Float64) -> None:
        print(json.dumps({"latency_ms": message.data}), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print detections until told to end."""
    parser = argparse.ArgumentParser(prog="receiver", description="Print the detections of a topic.")
    parser.add_argument("topic")
    parser.add_argument("--latency", default="", metavar="TOPIC", help="topic of std_msgs/Float64 to print too")
    options = parser.parse_args(argv)
    receiver: Receiver | None = None
    try:
        rclpy.init()
        receiver = Receiver(options.topic, options.latency)
        receiver.connect()
        rclpy.spin(receiver)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        if receiver is not None:
            receiver.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
