"""rosbag2 bags without ROS: read clouds and any message, write clouds, detections and transforms.

Types are those of ROS 2, whose hashes are the same from Humble on, and the vision_msgs definitions
that lie beside this file; what else a bag contains is never parsed, so foreign types do not matter.
Bags need the package ``rosbags``, which is imported on first use.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError, DsvtError
from dsvt_ros.io.pointcloud2 import CloudLike, Fill, cloud_parts_from_points, points_from_msg

if TYPE_CHECKING:
    from rosbags.interfaces import Connection, Qos
    from rosbags.typesys.store import Typestore

POINT_CLOUD = "sensor_msgs/msg/PointCloud2"
DETECTIONS = "vision_msgs/msg/Detection3DArray"
TRANSFORMS = "tf2_msgs/msg/TFMessage"
ODOMETRY = "nav_msgs/msg/Odometry"

BAG_SUFFIXES = (".mcap", ".db3")
METADATA_FILE = "metadata.yaml"
_EXPECTED = f"a bag folder with {METADATA_FILE}, or a {' or '.join(BAG_SUFFIXES)} file"

_INFINITE = (9223372036, 854775807)  # seconds, nanoseconds: what ROS writes for "no limit"


@dataclass(frozen=True, eq=False)
class BagTopic:
    """One topic of a bag.

    Attributes:
        name: With leading slash.
        message_type: Such as ``sensor_msgs/msg/PointCloud2``.
        num_messages: Of all its publishers.
        reliability: What its publisher offered: ``reliable``, ``best_effort`` or ``unknown``.
        durability: ``volatile``, ``transient_local`` or ``unknown``.
        connection: The entry of rosbags, with definition, hash and QoS; for `BagWriter.copy`.
    """

    name: str
    message_type: str
    num_messages: int
    reliability: str
    durability: str
    connection: Connection


@dataclass(frozen=True, eq=False)
class BagMessage:
    """One message as it lies in the bag.

    Attributes:
        topic: Where it was published.
        timestamp_ns: When it was received.
        cdr: Serialized message; rclpy publishes such bytes as they are.
    """

    topic: BagTopic
    timestamp_ns: int
    cdr: bytes

    def decode(self) -> Any:
        """The message with the attributes of its ROS class.

        Raises:
            DataError: An unknown type, another definition of it, or broken bytes.
        """
        return _decode(self)


@dataclass(frozen=True, eq=False)
class BagCloud:
    """One PointCloud2 of a bag.

    Attributes:
        topic: Topic name.
        stamp_ns: When it was measured (header).
        timestamp_ns: When it was received.
        frame_id: Coordinate frame of the points.
        message: The decoded message; its `data` is a view of `cdr`.
        cdr: The serialized message.
    """

    topic: str
    stamp_ns: int
    timestamp_ns: int
    frame_id: str
    message: CloudLike
    cdr: bytes

    def points(self, columns: Sequence[str], fill: Fill | None = None) -> NDArray[np.float32]:
        """Columns of the cloud, see `points_from_msg`."""
        return points_from_msg(self.message, columns, fill)


@dataclass(frozen=True)
class StaticTransform:
    """Pose of a child frame in its parent: metres, and a unit quaternion (x, y, z, w)."""

    parent: str
    child: str
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)


def is_bag(path: Path) -> bool:
    """Whether the path looks like a bag: a bag folder or a single storage file."""
    return path.suffix in BAG_SUFFIXES or (path / METADATA_FILE).is_file()


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """Message classes of ROS 2 and vision_msgs (of the definitions in ``msg/``).

    Raises:
        DataError: rosbags is not installed.
    """
    _require_rosbags()
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    for file in resources.files("dsvt_ros.io").joinpath("msg").joinpath("vision_msgs").iterdir():
        if file.name.endswith(".msg"):
            name = f"vision_msgs/msg/{file.name.removesuffix('.msg')}"
            store.register(get_types_from_msg(file.read_text(encoding="utf-8"), name))
    return store


def topics_of_bag(path: Path) -> tuple[BagTopic, ...]:
    """Topics of a bag, by name.

    Raises:
        DataError: The bag is missing or damaged, or rosbags is not installed.
    """
    with _opened(path) as reader:
        return _topics(reader.connections)


def messages_from_bag(path: Path, topics: Sequence[str] | None = None) -> Iterator[BagMessage]:
    """Messages in the order of their receive timestamps.

    Args:
        path: ``.mcap``, ``.db3`` or bag folder.
        topics: Wanted topics; all by default.

    Raises:
        DataError: As `topics_of_bag`, at the first message; or the bag has no such topic.
    """
    with _opened(path) as reader:
        by_name = {topic.name: topic for topic in _topics(reader.connections)}
        wanted = by_name if topics is None else [_find_topic(path, by_name, t) for t in topics]
        connections = [c for c in reader.connections if c.topic in wanted]
        if connections:  # rosbags takes an empty list for all of them
            for connection, timestamp_ns, cdr in reader.messages(connections=connections):
                yield BagMessage(by_name[connection.topic], timestamp_ns, bytes(cdr))


def topic_of_type(path: Path, topic: str, message_type: str) -> BagTopic:
    """The topic of this name.

    Raises:
        DataError: No such topic, or another type.
    """
    by_name = {candidate.name: candidate for candidate in topics_of_bag(path)}
    found = by_name[_find_topic(path, by_name, topic)]
    if found.message_type != message_type:
        raise DataError(f"{path}: {found.name} is a {found.message_type}, not a {message_type}")
    return found


def cloud_topic(path: Path, topic: str | None = None) -> BagTopic:
    """The topic to take clouds from: the one asked for, or the only one with PointCloud2.

    Raises:
        DataError: No such topic, another type, no clouds at all, or several topics to choose from.
    """
    if topic is not None:
        return topic_of_type(path, topic, POINT_CLOUD)
    by_name = {candidate.name: candidate for candidate in topics_of_bag(path)}
    clouds = [t for t in by_name.values() if t.message_type == POINT_CLOUD and t.num_messages]
    if not clouds:
        raise DataError(f"{path} has no {POINT_CLOUD}; it has {_listing(by_name)}")
    if len(clouds) > 1:
        raise DataError(
            f"{path} has clouds on several topics; name one of "
            + ", ".join(f"{t.name} ({t.num_messages})" for t in clouds)
        )
    return clouds[0]


def clouds_from_bag(path: Path, topic: str | None = None) -> Iterator[BagCloud]:
    """Clouds of one topic, in the order they were received.

    Args:
        path: ``.mcap``, ``.db3`` or bag folder.
        topic: Topic of the clouds; by default the only one that has any.

    Raises:
        DataError: At once as `cloud_topic`, while iterating for damaged messages.
    """
    name = cloud_topic(path, topic).name

    def clouds() -> Iterator[BagCloud]:
        for message in messages_from_bag(path, [name]):
            cloud = message.decode()
            stamp = cloud.header.stamp
            yield BagCloud(
                topic=name,
                stamp_ns=stamp.sec * 1_000_000_000 + stamp.nanosec,
                timestamp_ns=message.timestamp_ns,
                frame_id=cloud.header.frame_id,
                message=cast("CloudLike", cloud),
                cdr=message.cdr,
            )

    return clouds()


def cloud_msg_from_points(points: NDArray[np.float32], columns: Sequence[str], stamp_ns: int, frame_id: str) -> Any:
    """A PointCloud2 (class of `typestore`) with (N, C) points as float32 fields."""
    parts = cloud_parts_from_points(points, columns)
    types = typestore().types
    return types[POINT_CLOUD](
        header=_header(stamp_ns, frame_id),
        height=1,
        width=len(points),
        fields=[
            types["sensor_msgs/msg/PointField"](name=f.name, offset=f.offset, datatype=f.datatype, count=f.count)
            for f in parts.fields
        ],
        is_bigendian=parts.is_bigendian,
        point_step=parts.point_step,
        row_step=parts.point_step * len(points),
        data=np.frombuffer(parts.data, dtype=np.uint8),
        is_dense=bool(np.isfinite(points).all()),
    )


def detections_msg_from_boxes(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    class_names: Sequence[str],
    stamp_ns: int,
    frame_id: str,
) -> Any:
    """A Detection3DArray (class of `typestore`).

    Each detection repeats the header of the array (Detection3D.msg: "header should match the
    header of the source data") and has one hypothesis. Velocities have no place in it.

    Args:
        boxes: (M, 7 or more) ``[x, y, z, length, width, height, yaw, ...]``, metres and radians.
        scores: (M,).
        class_names: Class of each box.
        stamp_ns: Time of the cloud.
        frame_id: Frame of the boxes.

    Raises:
        DataError: The three do not have the same length.
    """
    if not len(boxes) == len(scores) == len(class_names):
        raise DataError(
            f"got {len(boxes)} boxes, {len(scores)} scores and {len(class_names)} class names; "
            "expected one of each for every detection"
        )
    types = typestore().types
    header = _header(stamp_ns, frame_id)
    detections = []
    for box, score, class_name in zip(boxes.tolist(), scores.tolist(), class_names, strict=True):
        x, y, z, length, width, height, yaw = box[:7]
        pose = _pose((x, y, z), (0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)))
        hypothesis = types["vision_msgs/msg/ObjectHypothesisWithPose"](
            hypothesis=types["vision_msgs/msg/ObjectHypothesis"](class_id=class_name, score=score),
            pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
        )
        size = types["geometry_msgs/msg/Vector3"](x=length, y=width, z=height)
        detections.append(
            types["vision_msgs/msg/Detection3D"](
                header=header,
                results=[hypothesis],
                bbox=types["vision_msgs/msg/BoundingBox3D"](center=pose, size=size),
                id="",
            )
        )
    return types[DETECTIONS](header=header, detections=detections)


class BagWriter:
    """Writes a bag folder (rosbag2, MCAP) that ``ros2 bag play`` plays; use it in a ``with`` block.

    The folder is complete only after the block has ended without an error. Publishers are recorded
    as reliable, which suits best-effort and reliable subscribers alike.

    Args:
        path: Folder to make.
        metadata_version: 9 for Jazzy and later, 8 for Humble.
        overwrite: Replace a bag at `path`. Folders with anything but a bag in them are kept.

    Raises:
        DataError: The path exists, or rosbags is not installed.
    """

    def __init__(self, path: Path, *, metadata_version: Literal[8, 9] = 9, overwrite: bool = False) -> None:
        _require_rosbags()
        from rosbags.rosbag2 import StoragePlugin, Writer

        self.path = path
        if metadata_version not in (8, 9):
            raise DataError(f"got metadata version {metadata_version}; expected 9 (Jazzy and later) or 8 (Humble)")
        if overwrite:
            _remove_bag(path)
        if path.exists():
            raise DataError(f"{path} exists already; remove it or write to another folder")
        self._writer = Writer(path, version=metadata_version, storage_plugin=StoragePlugin.MCAP)
        self._connections: dict[tuple[str, str], Connection] = {}

    def __enter__(self) -> BagWriter:
        try:
            self._writer.open()
        except OSError as error:
            raise DataError(f"{self.path} cannot be made: {error.strerror or error}") from error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(exc_type, exc_value, traceback)

    def write_points(
        self,
        topic: str,
        points: NDArray[np.float32],
        columns: Sequence[str],
        stamp_ns: int,
        frame_id: str,
        timestamp_ns: int | None = None,
    ) -> None:
        """Write (N, C) points as a PointCloud2; received when measured, unless told otherwise."""
        message = cloud_msg_from_points(points, columns, stamp_ns, frame_id)
        self.write_message(topic, message, stamp_ns if timestamp_ns is None else timestamp_ns)

    def write_detections(
        self,
        topic: str,
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        class_names: Sequence[str],
        stamp_ns: int,
        frame_id: str,
        timestamp_ns: int | None = None,
    ) -> None:
        """Write boxes as a Detection3DArray, see `detections_msg_from_boxes`."""
        message = detections_msg_from_boxes(boxes, scores, class_names, stamp_ns, frame_id)
        self.write_message(topic, message, stamp_ns if timestamp_ns is None else timestamp_ns)

    def write_static_transforms(self, transforms: Sequence[StaticTransform], stamp_ns: int) -> None:
        """Write all static transforms in one message: late subscribers get the last one only."""
        types = typestore().types
        message = types[TRANSFORMS](
            transforms=[
                types["geometry_msgs/msg/TransformStamped"](
                    header=_header(stamp_ns, transform.parent),
                    child_frame_id=transform.child,
                    transform=types["geometry_msgs/msg/Transform"](
                        translation=_xyz("geometry_msgs/msg/Vector3", transform.translation),
                        rotation=_quaternion(transform.rotation),
                    ),
                )
                for transform in transforms
            ]
        )
        self.write_message("/tf_static", message, stamp_ns, latched=True)

    def write_message(self, topic: str, message: Any, timestamp_ns: int, *, latched: bool = False) -> None:
        """Write a message made of the classes of `typestore`; latched ones reach late joiners."""
        cdr = typestore().serialize_cdr(message, message.__msgtype__)
        self.write_cdr(topic, message.__msgtype__, cdr, timestamp_ns, latched=latched)

    def write_cdr(
        self,
        topic: str,
        message_type: str,
        cdr: bytes | memoryview,
        timestamp_ns: int,
        *,
        latched: bool = False,
    ) -> None:
        """Write a message of a type of `typestore` that is serialized already.

        Raises:
            DataError: The type is not known.
        """
        key = (topic, message_type)
        if key not in self._connections:
            if message_type not in typestore().fielddefs:
                raise DataError(f"cannot write {topic}: message type {message_type} is not known")
            self._connections[key] = self._writer.add_connection(
                topic,
                message_type,
                typestore=typestore(),
                offered_qos_profiles=[_reliable_qos(latched=latched)],
            )
        self._writer.write(self._connections[key], timestamp_ns, cdr)

    def copy(self, message: BagMessage) -> None:
        """Write a message of another bag as it is, with the QoS and definition it has there.

        Raises:
            DataError: Its type is unknown and its bag says nothing about it.
        """
        source = message.topic.connection
        key = (source.topic, source.msgtype)
        if key not in self._connections:
            qos = getattr(source.ext, "offered_qos_profiles", []) or [_reliable_qos()]
            if source.msgtype in typestore().fielddefs:
                self._connections[key] = self._writer.add_connection(
                    source.topic, source.msgtype, typestore=typestore(), offered_qos_profiles=qos
                )
            elif source.digest and source.msgdef.data:
                self._connections[key] = self._writer.add_connection(
                    source.topic,
                    source.msgtype,
                    msgdef=source.msgdef.data,
                    rihs01=source.digest,
                    offered_qos_profiles=qos,
                )
            else:
                raise DataError(
                    f"cannot copy {source.topic}: its bag lacks the definition or the hash of "
                    f"{source.msgtype}; leave the topic out"
                )
        self._writer.write(self._connections[key], message.timestamp_ns, message.cdr)


def _require_rosbags() -> None:
    try:
        import rosbags.rosbag2  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"bags are read and written with rosbags, which cannot be imported ({error}); "
            "install it with: pip install rosbags"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open rosbags reader; whatever it raises on a damaged bag becomes a DataError.

    Only clouds and detections are decoded, with our own definitions. AnyReader would parse every
    definition in the bag first, and fail where a single foreign one is odd.
    """
    _require_rosbags()
    from rosbags.rosbag2 import Reader

    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_EXPECTED}")
    if not is_bag(path):
        raise DataError(f"{path} is no bag; expected {_EXPECTED}")
    try:
        with Reader(path) as reader:
            yield reader
    except DsvtError:
        raise
    except Exception as error:  # SQLite, MCAP and YAML each have errors of their own
        raise DataError(
            f"{path} cannot be read as a bag: {error or type(error).__name__}; "
            "if its recording was cut short, repair it with: mcap recover, or ros2 bag reindex"
        ) from error


def _topics(connections: Sequence[Connection]) -> tuple[BagTopic, ...]:
    """Topics of the connections; a topic with several publishers has the QoS of the first."""
    by_name: dict[str, list[Connection]] = {}
    for connection in connections:
        by_name.setdefault(connection.topic, []).append(connection)
    topics = []
    for name, group in sorted(by_name.items()):
        profiles: Sequence[Qos] = getattr(group[0].ext, "offered_qos_profiles", [])
        reliability = profiles[0].reliability.name.lower() if profiles else "unknown"
        durability = profiles[0].durability.name.lower() if profiles else "unknown"
        num_messages = sum(connection.msgcount for connection in group)
        topics.append(BagTopic(name, group[0].msgtype, num_messages, reliability, durability, group[0]))
    return tuple(topics)


def _find_topic(path: Path, by_name: dict[str, BagTopic], topic: str) -> str:
    """Full name of a topic, given with or without leading slash."""
    for name in (topic, f"/{topic}"):
        if name in by_name:
            return name
    raise DataError(f"{path} has no topic {topic}; it has {_listing(by_name)}")


def _listing(by_name: dict[str, BagTopic]) -> str:
    return ", ".join(f"{t.name} ({t.message_type})" for t in by_name.values()) or "no topics"


def _decode(message: BagMessage) -> Any:
    name, message_type = message.topic.name, message.topic.message_type
    store = typestore()
    if message_type not in store.fielddefs:
        raise DataError(f"cannot decode {name}: message type {message_type} is not known")
    digest = message.topic.connection.digest
    if digest and digest != store.hash_rihs01(message_type):
        raise DataError(
            f"cannot decode {name}: the bag's {message_type} has type hash {digest}; "
            f"expected {store.hash_rihs01(message_type)}"
        )
    try:
        return store.deserialize_cdr(message.cdr, message_type)
    except Exception as error:  # besides SerdeError: whatever NumPy and struct find in the bytes
        raise DataError(
            f"a message of {name}, received at {message.timestamp_ns} ns, is damaged: {error or type(error).__name__}"
        ) from error


def _remove_bag(path: Path) -> None:
    """Remove a bag folder; whatever else lies there is left alone."""
    if not path.is_dir():
        return
    others = [
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() or (entry.name != METADATA_FILE and entry.suffix not in BAG_SUFFIXES)
    ]
    if others:
        raise DataError(f"{path} is no bag: it has {', '.join(sorted(others)[:3])} in it")
    shutil.rmtree(path)


def _reliable_qos(*, latched: bool = False) -> Qos:
    from rosbags import interfaces as ros

    infinite = ros.QosTime(*_INFINITE)
    durability = ros.QosDurability.TRANSIENT_LOCAL if latched else ros.QosDurability.VOLATILE
    return ros.Qos(
        history=ros.QosHistory.KEEP_LAST,
        depth=1 if latched else 5,
        reliability=ros.QosReliability.RELIABLE,
        durability=durability,
        deadline=infinite,
        lifespan=infinite,
        liveliness=ros.QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=infinite,
        avoid_ros_namespace_conventions=False,
    )


def _header(stamp_ns: int, frame_id: str) -> Any:
    types = typestore().types
    sec, nanosec = divmod(stamp_ns, 1_000_000_000)
    stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _pose(position: Sequence[float], rotation: Sequence[float]) -> Any:
    return typestore().types["geometry_msgs/msg/Pose"](
        position=_xyz("geometry_msgs/msg/Point", position), orientation=_quaternion(rotation)
    )


def _xyz(message_type: str, values: Sequence[float]) -> Any:
    x, y, z = values
    return typestore().types[message_type](x=x, y=y, z=z)


def _quaternion(values: Sequence[float]) -> Any:
    x, y, z, w = values
    return typestore().types["geometry_msgs/msg/Quaternion"](x=x, y=y, z=z, w=w)
