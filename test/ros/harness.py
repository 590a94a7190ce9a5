"""The node as a process of its own, and a client that talks to it."""

from __future__ import annotations

import array
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class NodeProcess:
    """`dsvt-detector` with these parameters; what it says goes to a file."""

    def __init__(
        self, log: Path, parameters: dict[str, object], module: str = "dsvt_ros.ros.detector_node"
    ) -> None:
        self._log = log
        arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        command = [sys.executable, "-m", module, "--ros-args", *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def end(self, how: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """Exit code, and how long it took to end, s."""
        started = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(20), time.monotonic() - started


def make_cloud(points: np.ndarray, stamp_ns: int, frame_id: str = "lidar"):
    """A PointCloud2 with the columns x, y, z, intensity."""
    from sensor_msgs.msg import PointCloud2, PointField

    points = np.ascontiguousarray(points, np.float32)
    cloud = PointCloud2(height=1, width=len(points), point_step=16, row_step=16 * len(points), is_dense=True)
    cloud.header.frame_id = frame_id
    cloud.header.stamp.sec, cloud.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    cloud.fields = [
        PointField(name=name, offset=4 * i, datatype=7, count=1) for i, name in enumerate(("x", "y", "z", "intensity"))
    ]
    cloud.data = array.array("B")
    cloud.data.frombytes(points.tobytes())
    return cloud


def random_points(number: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform((-12, -12, -0.2, 0), (12, 12, 2.0, 1), (number, 4)).astype(np.float32)


class OdometryPublisher:
    """Publishes what a drive says of itself to `dsvt_detector`."""

    def __init__(self, node) -> None:
        from nav_msgs.msg import Odometry

        self._publisher = node.create_publisher(Odometry, "/dsvt_detector/input/odometry", 100)

    def is_heard(self) -> bool:
        return self._publisher.get_subscription_count() > 0

    def publish(self, drive, stamp_ns: int) -> None:
        from nav_msgs.msg import Odometry

        plain = drive.odometry(stamp_ns)
        message = Odometry(child_frame_id=plain.child_frame_id)
        message.header.frame_id = plain.header.frame_id
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        for kind in ("position", "orientation"):
            for axis, value in vars(getattr(plain.pose.pose, kind)).items():
                setattr(getattr(message.pose.pose, kind), axis, value)
        self._publisher.publish(message)


class Client:
    """Publishes clouds to `dsvt_detector` and keeps what it answers."""

    def __init__(self) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import GetParameters, SetParameters
        from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
        from sensor_msgs.msg import PointCloud2
        from std_msgs.msg import Float64
        from vision_msgs.msg import Detection3DArray, LabelInfo
        from visualization_msgs.msg import MarkerArray

        self.node = rclpy.create_node("client")
        self.detections: list[Detection3DArray] = []
        self.markers: list[MarkerArray] = []
        self.diagnostics: list[DiagnosticArray] = []
        self.latency_ms: list[float] = []
        self.label_info: list[LabelInfo] = []
        # Reliable, so that a loaded machine loses no cloud of a test; the node asks for best effort.
        self.publisher = self.node.create_publisher(PointCloud2, "/dsvt_detector/input/pointcloud", 1)
        subscribe = self.node.create_subscription
        subscribe(Detection3DArray, "/dsvt_detector/output/detections", self.detections.append, 50)
        subscribe(MarkerArray, "/dsvt_detector/output/markers", self.markers.append, 50)
        subscribe(DiagnosticArray, "/diagnostics", self.diagnostics.append, 50)
        subscribe(Float64, "/dsvt_detector/debug/latency_ms", lambda m: self.latency_ms.append(m.data), 50)
        latched = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        subscribe(LabelInfo, "/dsvt_detector/output/label_info", self.label_info.append, latched)
        self._change_state = self.node.create_client(ChangeState, "/dsvt_detector/change_state")
        self._set_parameters = self.node.create_client(SetParameters, "/dsvt_detector/set_parameters")
        self._get_parameters = self.node.create_client(GetParameters, "/dsvt_detector/get_parameters")

    def spin_until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> bool:
        import rclpy

        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            rclpy.spin_once(self.node, timeout_sec=0.05)
        return bool(condition())

    def spin_for(self, seconds: float) -> None:
        self.spin_until(lambda: False, seconds)

    def connect(self) -> None:
        """Wait until the node hears us and we hear the node."""
        assert self.spin_until(lambda: self.publisher.get_subscription_count() and self.label_info)
        assert self.spin_until(lambda: self.node.count_publishers("/dsvt_detector/output/detections"))
        self.spin_for(0.15)  # the node learns of us no later than that

    def ask(self, cloud: object, timeout_s: float = 20.0) -> object:
        """The answer to a cloud."""
        number = len(self.detections)
        self.publisher.publish(cloud)
        assert self.spin_until(lambda: len(self.detections) > number, timeout_s), "no answer"
        return self.detections[-1]

    def change_state(self, transition: int) -> bool:
        from lifecycle_msgs.srv import ChangeState

        request = ChangeState.Request()
        request.transition.id = transition
        return self._call(self._change_state, request).success

    def set_parameter(self, name: str, value: object) -> object:
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self._call(self._set_parameters, request).results[0]

    def get_parameter(self, name: str) -> object:
        from rcl_interfaces.srv import GetParameters

        return self._call(self._get_parameters, GetParameters.Request(names=[name])).values[0]

    def status(self) -> tuple[object, dict[str, str]]:
        """The next diagnostics: the status and its values by key."""
        self.diagnostics.clear()
        assert self.spin_until(lambda: self.diagnostics)
        (status,) = self.diagnostics[-1].status
        return status, {entry.key: entry.value for entry in status.values}

    def close(self) -> None:
        self.node.destroy_node()

    def _call(self, client: object, request: object) -> object:
        assert client.wait_for_service(20.0)
        future = client.call_async(request)
        assert self.spin_until(future.done)
        return future.result()
