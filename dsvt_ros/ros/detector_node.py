"""The node `dsvt_detector`: sensor_msgs/PointCloud2 in, vision_msgs/Detection3DArray out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType  # type: ignore[attr-defined,unused-ignore]
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
)
from rclpy.time import Time
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import Float64, Header
from vision_msgs.msg import Detection3DArray, LabelInfo
from visualization_msgs.msg import MarkerArray

from dsvt_ros.backends import Progress
from dsvt_ros.config import AGE, DetectorConfig, PreprocessConfig, flatten, leaves
from dsvt_ros.errors import ConfigError, DsvtError, PointCloudError
from dsvt_ros.host_memory import keep_freed_memory
from dsvt_ros.host_threads import spin_briefly
from dsvt_ros.io.point_times import offsets_from_msg
from dsvt_ros.io.pointcloud2 import RawCloud, match_column, points_from_msg, raw_from_msg
from dsvt_ros.model.folder import open_model
from dsvt_ros.ros import parameters
from dsvt_ros.ros.conversions import (
    label_info_from_classes,
    markers_from_boxes,
    msg_from_boxes,
)
from dsvt_ros.ros.counters import Counters
from dsvt_ros.ros.diagnostics import status_from_report
from dsvt_ros.ros.motion import SensorMotion
from dsvt_ros.ros.node_config import Settings, node_config_from_overrides
from dsvt_ros.ros.transforms import SensorPose, Transforms
from dsvt_ros.ros.transport import use_large_sockets
from dsvt_ros.ros.worker import Worker
from dsvt_ros.structures import Boxes3D

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

if TYPE_CHECKING:
    from torch import Tensor

    from dsvt_ros.detector import Detector
    from dsvt_ros.motion import Motion
    from dsvt_ros.sweeps import MergedSweeps, SweepBuffer

    DetectorWorker: TypeAlias = Worker[Detector, PointCloud2]

THROTTLE_S = 5.0
"""The same complaint is logged at most this often."""

FINISH_S = 5.0
"""How long deactivation waits for the cloud that is being processed."""

EXIT_S = 1.0
"""The same when the process is told to end."""

BUILD_LOG_S = 15.0
"""How often the log tells how building engines goes on."""


class InterruptedLoadError(Exception):
    """The process was told to end while the model was loading."""


class DetectorNode(LifecycleNode):
    """Answers clouds with boxes while active.

    The executor's thread only puts the newest cloud into a slot; a worker thread owns the
    detector. Each cloud that the worker takes and can read gets exactly one answer with its own
    header, empty if processing it fails. A cloud that is replaced in the slot counts as dropped,
    one that cannot be read as refused: neither is answered.

    Raises:
        DsvtError: A parameter is unknown or impossible, or there is no such model.
    """

    def __init__(self) -> None:
        super().__init__("dsvt_detector")
        overrides = parameters.parameter_overrides(self)
        node_config = node_config_from_overrides(overrides)
        folder = open_model(node_config.model)
        settings = Settings(node_config, folder.defaults).changed(overrides)
        settings.detector.check_against(folder.model)
        self._model = folder.model
        self._settings = settings
        self._applied = settings.detector
        parameters.declare(self, settings)
        self.add_on_set_parameters_callback(self._on_set_parameters)

        self._state = "unconfigured"
        self._counters = Counters()
        self._worker: DetectorWorker | None = None
        self._subscription: Any = None
        self._transforms: Transforms | None = None
        self._sensor_pose: SensorPose | None = None
        self._motion: SensorMotion | None = None
        self._sweeps: SweepBuffer | None = None
        self._merged: MergedSweeps | None = None
        self._newest: PointCloud2 | None = None
        self._replaced: deque[PointCloud2] = deque(maxlen=max(self._model.sweeps, settings.detector.preprocess.sweeps))
        self._backend: str = settings.node.backend
        self._device = settings.node.device
        self._stage_ms: dict[str, float] = {}
        self._voxels = 0, 0
        self._loading = False
        self._preparation = ""
        self._fields_seen: list[str] = []

        names = {feature.name: feature.name for feature in self._model.features}
        if "intensity" in names:
            names["intensity"] = settings.node.input.intensity_field
        self._columns = tuple(names.values())
        self._fill = {names[f.name]: f.fill for f in self._model.features}

        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Steady: a simulated clock that stands still must not silence the diagnostics.
        self._diagnostics_timer = self.create_timer(
            settings.node.diagnostics.period_s,
            self._on_diagnostics_timer,
            clock=Clock(clock_type=ClockType.STEADY_TIME),
        )

    @property
    def autostart(self) -> bool:
        """Whether to configure and activate without being told."""
        return self._settings.node.autostart

    @property
    def build_only(self) -> bool:
        """Whether to end as soon as the engines are built."""
        return self._settings.node.build_only

    # ------------------------------------------------------------------------------- life cycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and offer the outputs; fails with one sentence if that is impossible."""
        try:
            detector = self._load()
        except InterruptedLoadError:
            return TransitionCallbackReturn.FAILURE
        except Exception as error:
            self._release(EXIT_S)
            known = isinstance(error, DsvtError)
            self.get_logger().error(f"cannot configure: {error if known else f'{type(error).__name__}: {error}'}")
            return TransitionCallbackReturn.FAILURE
        self._backend, self._device = detector.backend, str(detector.device)
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._detections_publisher = self.create_publisher(Detection3DArray, "~/output/detections", reliable)
        self._markers_publisher = self.create_publisher(MarkerArray, "~/output/markers", reliable)
        self._labels_publisher = self.create_publisher(LabelInfo, "~/output/label_info", latched)
        self._processing_publisher = self.create_publisher(Float64, "~/debug/processing_time_ms", reliable)
        self._latency_publisher = self.create_publisher(Float64, "~/debug/latency_ms", reliable)
        self._publish_label_info()
        self._state = "inactive"
        self.get_logger().info(
            f"model {self._model.name} on {self._backend}, {self._device}; classes {', '.join(self._model.class_names)}"
        )
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe to the clouds."""
        reliability = {
            "best_effort": ReliabilityPolicy.BEST_EFFORT,
            "reliable": ReliabilityPolicy.RELIABLE,
        }[self._settings.node.qos.reliability]
        self._counters.restart()
        self._subscription = self.create_subscription(
            PointCloud2,
            "~/input/pointcloud",
            self._on_cloud,
            QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=reliability),
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible_qos),
        )
        self._state = "active"
        self.get_logger().info(f"active: waiting for clouds on {self._subscription.topic_name}")
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening; the cloud in work is still answered."""
        self._unsubscribe()
        if self._worker is not None and self._worker.drain(FINISH_S):
            self._counters.dropped()
        self._state = "inactive"
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        self._release(FINISH_S)
        self._state = "unconfigured"
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from whatever state."""
        self._release(EXIT_S)
        self._state = "finalized"
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> bool:
        """Let go of everything before the process ends; False if the worker is still computing."""
        return self._release(EXIT_S)

    def _load(self) -> Detector:
        """Load the detector in the worker's thread and wait for it.

        Raises:
            InterruptedLoadError: The process was told to end meanwhile.
            DsvtError: What is wrong with the model or the options.
        """
        settings = self._settings
        self._listen(settings)
        self._applied = settings.detector
        self.get_logger().info(f"loading model {settings.node.model}")
        self._worker = Worker(lambda: _load_detector(settings, self._on_progress), self._answer)
        self._loading = True
        try:
            # The executor may be waiting for this very call, so the diagnostics are published from here.
            report_at = time.monotonic() + settings.node.diagnostics.period_s
            while (detector := self._worker.loaded(timeout_s=0.1)) is None:
                if not self.context.ok():
                    raise InterruptedLoadError
                if time.monotonic() >= report_at:
                    self._publish_diagnostics()
                    report_at += settings.node.diagnostics.period_s
        finally:
            self._loading, self._preparation = False, ""
        if self._motion is not None:
            from dsvt_ros.sweeps import SweepBuffer

            self._sweeps = SweepBuffer(detector.model, detector.device)
        return detector

    def _listen(self, settings: Settings) -> None:
        """Start to listen to where the sensor is, as far as the settings and the model need to know."""
        preprocess, source = settings.detector.preprocess, settings.node.motion.source
        if preprocess.model_frame:
            if preprocess.sensor_pose:
                raise ConfigError(
                    "preprocess.sensor_pose and preprocess.model_frame both say where the sensor is; give one"
                )
            because = f"preprocess.model_frame is {preprocess.model_frame!r}"
            self._transforms = Transforms(self, because, instead="give numbers in preprocess.sensor_pose")
            self._sensor_pose = SensorPose(self._transforms, preprocess.model_frame)
        if self._model.age_column is None and not preprocess.motion_compensation:
            return
        if self._transforms is None and source != "stationary":
            try:
                self._transforms = Transforms(self, "motion.source is tf", instead="set it to odometry")
            except ConfigError:
                if source == "tf":
                    raise
        self._motion = SensorMotion(self, settings.node.motion, preprocess, self._transforms)

    def _on_progress(self, text: str, fraction: float | None) -> None:
        """Note how loading goes on, in the worker's thread; ends it when the process is told to end."""
        if not self.context.ok():
            raise InterruptedLoadError
        self._preparation = text + (f", {fraction:.0%}" if fraction is not None else "")
        self.get_logger().info(self._preparation, throttle_duration_sec=BUILD_LOG_S)

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None

    def _release(self, timeout_s: float) -> bool:
        """Undo configure; False if the worker is still busy after that time."""
        self._unsubscribe()
        stopped = self._worker is None or self._worker.stop(timeout_s)
        self._worker = None
        if self._motion is not None:
            self._motion.close()
        if self._transforms is not None:
            self._transforms.close()
        self._transforms = self._sensor_pose = self._motion = self._sweeps = self._merged = self._newest = None
        self._replaced.clear()
        for name in ("detections", "markers", "labels", "processing", "latency"):
            publisher = self.__dict__.pop(f"_{name}_publisher", None)
            if publisher is not None:
                self.destroy_publisher(publisher)
        return stopped

    # ----------------------------------------------------------------------------------- clouds

    def _on_cloud(self, cloud: PointCloud2) -> None:
        if self._worker is None:
            return
        replaced = self._worker.put(cloud)
        self._counters.received(replaced=replaced)
        if self._sweeps is None or self._model.age_column is None:
            return
        if replaced and self._newest is not None:
            self._replaced.append(self._newest)
        self._newest = cloud

    def _answer(self, detector: Detector, cloud: PointCloud2) -> None:
        """Answer one cloud, in the worker's thread."""
        started = time.perf_counter()
        try:
            boxes = self._boxes_of(detector, cloud)
            if boxes is not None:
                self._publish(boxes, cloud.header, started)
        except Exception as error:
            # Publishing fails when the process is told to end: nobody waits for an answer then.
            if self.context.ok():
                self._counters.failed(f"{type(error).__name__}: {error}")
                self.get_logger().error(
                    f"cannot answer a cloud: {type(error).__name__}: {error}",
                    throttle_duration_sec=THROTTLE_S,
                )

    def _boxes_of(self, detector: Detector, cloud: PointCloud2) -> Boxes3D | None:
        """Boxes of a cloud: none if it fails on the way, None if it cannot even be read."""
        settings = self._settings
        try:
            self._note_fields(cloud)
            raw = raw_from_msg(cloud, self._columns, self._fill)
        except PointCloudError as error:
            self._counters.refused(str(error))
            self.get_logger().error(f"cloud refused: {error}", throttle_duration_sec=THROTTLE_S)
            return None
        try:
            if settings.detector is not self._applied:
                detector.configure(_live_options(settings.detector))
                self._applied = settings.detector
                self._publish_label_info()
            pose = None
            if self._sensor_pose is not None:
                pose = self._sensor_pose.at(cloud.header, settings.node.input.transform_timeout_s)
                pose = detector.pose_in_model(pose)
            boxes = detector.detect(self._with_older_sweeps(raw, cloud), pose)
        except DsvtError as error:
            self._counters.failed(str(error))
            self.get_logger().error(f"empty answer: {error}", throttle_duration_sec=THROTTLE_S)
        except Exception as error:
            self._counters.failed(f"{type(error).__name__}: {error}")
            self.get_logger().error(
                f"empty answer to a cloud of {len(raw)} points: {type(error).__name__}: {error}",
                throttle_duration_sec=THROTTLE_S,
            )
        else:
            self._stage_ms = detector.timing_ms
            self._voxels = detector.num_voxels, detector.num_dropped_voxels
            return boxes
        return _no_boxes(self._model.class_names)

    def _with_older_sweeps(self, raw: RawCloud, cloud: PointCloud2) -> RawCloud | Tensor:
        """The points and those of older sweeps where the model wants them, compensated for motion if asked to."""
        motion, sweeps = self._motion, self._sweeps
        if motion is None or sweeps is None:
            return raw
        source, config = motion.current(), self._applied.preprocess
        stamp_ns = Time.from_msg(cloud.header.stamp).nanoseconds
        self._keep_replaced(sweeps, source, config, stamp_ns, cloud.header.frame_id)
        self._merged = merged = sweeps.add(
            raw.points(),
            stamp_ns,
            cloud.header.frame_id,
            source,
            config,
            wait_s=self._settings.node.motion.wait_s,
            point_times=partial(offsets_from_msg, cloud, stamp_ns),
        )
        if merged.problem:
            self.get_logger().warning(
                f"{merged.num_sweeps} of {merged.num_wanted} sweeps: {merged.problem}",
                throttle_duration_sec=THROTTLE_S,
            )
        return merged.points

    def _keep_replaced(
        self, sweeps: SweepBuffer, motion: Motion, config: PreprocessConfig, stamp_ns: int, frame_id: str
    ) -> None:
        """Let clouds that a newer one replaced serve as older sweeps of the one at this stamp."""
        while self._replaced:
            older = self._replaced.popleft()
            older_ns = Time.from_msg(older.header.stamp).nanoseconds
            # One that came after this cloud is lost: it would be taken for the beginning of something new.
            if 0 < stamp_ns - older_ns <= config.max_sweep_age * 1e9 and older.header.frame_id == frame_id:
                with suppress(PointCloudError):
                    points = points_from_msg(older, self._columns, self._fill)
                    point_times = partial(offsets_from_msg, older, older_ns)
                    sweeps.keep(points, older_ns, frame_id, motion, config, point_times=point_times)

    def _publish(self, boxes: Boxes3D, header: Header, started: float) -> None:
        """Publish the answer to a cloud and how long it took."""
        self._detections_publisher.publish(msg_from_boxes(boxes, header))
        processing_ms = (time.perf_counter() - started) * 1e3
        latency_ms = (self.get_clock().now() - Time.from_msg(header.stamp)).nanoseconds / 1e6
        self._counters.answered(processing_ms, latency_ms)
        self._processing_publisher.publish(Float64(data=processing_ms))
        self._latency_publisher.publish(Float64(data=latency_ms))
        markers = self._settings.node.markers
        if markers.enabled and self._markers_publisher.get_subscription_count():
            self._markers_publisher.publish(markers_from_boxes(boxes, header, lifetime_s=markers.lifetime_s))

    def _note_fields(self, cloud: PointCloud2) -> None:
        """Warn once for each layout about columns of the model that the cloud does not have."""
        fields = [field.name for field in cloud.fields]
        if fields == self._fields_seen or not fields:
            return
        self._fields_seen = fields
        for column, fill in self._fill.items():
            if match_column(column, fields) is None and column not in ("x", "y", "z", AGE):
                self.get_logger().warning(
                    f"clouds have no field {column}, which model {self._model.name} uses: it is taken as "
                    f"{fill:g}, which may cost detections; they have {', '.join(fields)}"
                )

    def _on_incompatible_qos(self, event: Any) -> None:
        policy = QoSPolicyKind(event.last_policy_kind).name.lower()
        advice = (
            "set qos.reliability to best_effort, which hears every publisher"
            if policy == "reliability"
            else "the publisher must offer at least what a volatile, keep-last subscription asks for"
        )
        self.get_logger().warning(
            f"a publisher of the input topic offers an incompatible {policy} policy and is not heard: {advice}"
        )

    # --------------------------------------------------------------- parameters and diagnostics

    def _on_set_parameters(self, changed: list[Parameter[Any]]) -> SetParametersResult:
        known = {**dict(flatten(self._settings.node)), **dict(flatten(self._settings.detector))}
        values = {p.name: p.value for p in changed if p.name in known}
        try:
            settings = self._settings.changed(values)
            settings.detector.check_against(self._model)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if settings.detector == self._settings.detector:
            settings = Settings(settings.node, self._settings.detector)
        # The worker sees it before its next cloud.
        self._settings = settings
        return SetParametersResult(successful=True)

    def _publish_label_info(self) -> None:
        header = Header(stamp=self.get_clock().now().to_msg())
        threshold = self._applied.postprocess.score_threshold
        self._labels_publisher.publish(label_info_from_classes(self._model.class_names, threshold, header))

    def _on_diagnostics_timer(self) -> None:
        if not self._loading:
            self._publish_diagnostics()

    def _publish_diagnostics(self) -> None:
        topic = self._subscription.topic_name if self._subscription is not None else None
        facts = {"model": self._model.name, "backend": self._backend, "device": self._device}
        facts |= {"voxels": str(self._voxels[0]), "voxels dropped": str(self._voxels[1])}
        merged, motion = self._merged, self._motion
        if motion is not None:
            facts |= {"motion": motion.describe()}
        if merged is not None:
            facts |= {"sweeps": f"{merged.num_sweeps} of {merged.num_wanted}"}
        facts |= {f"stage {name}": f"{ms:.1f} ms" for name, ms in self._stage_ms.items()}
        status = status_from_report(
            self._counters.report(),
            self._settings.node.diagnostics,
            name=f"{self.get_fully_qualified_name().lstrip('/')}: detector",
            state="loading" if self._loading else self._state,
            preparation=self._preparation,
            num_publishers=self.count_publishers(topic) if topic is not None else 0,
            motion_problem=merged.problem if merged is not None else "",
            facts=facts,
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics_publisher.publish(message)


def _load_detector(settings: Settings, progress: Progress) -> Detector:
    from dsvt_ros.detector import Detector

    backend = settings.node.backend
    if settings.node.build_only:
        if backend not in ("auto", "tensorrt"):
            raise ConfigError(f"build_only builds TensorRT engines, which backend {backend} does not use")
        backend = "tensorrt"

    overrides = dict(flatten(settings.detector))
    if overrides["preprocess.cloud_axes"] == "model":
        overrides["preprocess.cloud_axes"] = "x_forward"  # REP 103, whatever the model was trained in
    detector = Detector.load(
        settings.node.model,
        settings.node.weights or None,
        backend=backend,
        device=settings.node.device,
        overrides=overrides,
        progress=progress,
    )
    detector.warm_up()
    return detector


def _live_options(config: DetectorConfig) -> dict[str, Any]:
    return {key: value for key, option, value in leaves(config) if option.metadata["live"]}


def _no_boxes(class_names: tuple[str, ...]) -> Boxes3D:
    return Boxes3D(
        boxes=np.zeros((0, 7), np.float32),
        scores=np.zeros(0, np.float32),
        labels=np.zeros(0, np.int64),
        class_names=class_names,
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until it is told to end; exit code 1 if it cannot start."""
    arguments = list(sys.argv if args is None else args)
    parser = argparse.ArgumentParser(
        prog="dsvt-detector",
        description="Find objects in lidar clouds. Settings are ROS parameters: "
        "dsvt-detector --ros-args --params-file FILE -p NAME:=VALUE -r FROM:=TO",
    )
    keep_freed_memory()  # before the worker's thread gets an arena of its own
    spin_briefly()
    transport = use_large_sockets(os.environ)
    node: DetectorNode | None = None
    exit_code, stopped = 0, True
    interrupted = threading.Event()
    try:
        parser.parse_args(remove_ros_args(arguments)[1:])
        if threading.current_thread() is threading.main_thread():
            # rclpy's own handler ends `spin`; a KeyboardInterrupt could come up anywhere inside it.
            signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
        rclpy.init(args=arguments)
        if interrupted.is_set():
            return 0
        node = DetectorNode()
        if transport:
            node.get_logger().info(transport)
        if node.build_only:
            exit_code = 0 if node.trigger_configure() == TransitionCallbackReturn.SUCCESS or not rclpy.ok() else 1
        elif not node.autostart:
            rclpy.spin(node)
        else:
            exit_code = _run(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except DsvtError as error:
        print(f"dsvt-detector: {error}", file=sys.stderr)
        exit_code = 1
    except RuntimeError as error:  # rclpy's own, such as a parameter file that cannot be read
        if node is None or rclpy.ok():  # otherwise we were told to end in the middle of a call
            print(f"dsvt-detector: {type(error).__name__}: {error}", file=sys.stderr)
            exit_code = 1
    finally:
        if node is not None:
            stopped = node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    if not stopped:
        # Ending the interpreter under a network that still computes would crash it.
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _run(node: DetectorNode) -> int:
    """Configure, activate and serve; loading may take minutes, during which the executor goes on answering."""
    failed = threading.Event()

    def bring_up() -> None:
        success = TransitionCallbackReturn.SUCCESS
        try:
            if node.trigger_configure() == success and node.trigger_activate() == success:
                return
        except Exception as error:  # of rclpy, when it is shut down in the middle of a call
            if rclpy.ok():
                node.get_logger().error(f"cannot start: {type(error).__name__}: {error}")
        if rclpy.ok():
            failed.set()
            rclpy.try_shutdown()

    thread = threading.Thread(target=bring_up, name="bring-up")
    thread.start()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        thread.join()
    return 1 if failed.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
