"""Publishes or counts large clouds for `test_local_dds.py`: cloud_process.py publish|count NUMBER BYTES RATE."""

import array
import json
import sys
import time

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import PointCloud2

QOS = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def publish(node: Node, number: int, size: int, rate: float) -> None:
    publisher = node.create_publisher(PointCloud2, "clouds", QOS)
    deadline = time.monotonic() + 20
    while publisher.get_subscription_count() == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    message = PointCloud2(point_step=22, width=size // 22, height=1, row_step=size)
    message.data = array.array("B", bytes(size))
    due = time.monotonic()
    for _ in range(number):
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
    time.sleep(1)  # the last one is still on its way


def count(node: Node, number: int, size: int, rate: float) -> None:
    latency_ms: list[float] = []

    def received(message: PointCloud2) -> None:
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        if len(message.data) == size:
            latency_ms.append((node.get_clock().now().nanoseconds - stamp) / 1e6)

    node.create_subscription(PointCloud2, "clouds", received, QOS)
    deadline = time.monotonic() + 22 + number / rate
    while len(latency_ms) < number and time.monotonic() < deadline:
        rclpy.spin_once(node, timeout_sec=0.2)
    print(json.dumps({"received": len(latency_ms), "latency_ms": sorted(latency_ms)}))


if __name__ == "__main__":
    role, arguments = sys.argv[1], (int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    rclpy.init()
    node = rclpy.create_node(role)
    try:
        {"publish": publish, "count": count}[role](node, *arguments)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()
