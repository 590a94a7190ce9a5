"""Bags: written and read back, by us and by rosbags' own reader, and broken ones."""

import math
import sqlite3
import sys
from contextlib import closing

import numpy as np
import pytest

from dsvt_ros.errors import DataError
from dsvt_ros.io import bags
from dsvt_ros.io.bags import (
    DETECTIONS,
    POINT_CLOUD,
    BagWriter,
    StaticTransform,
    cloud_topic,
    clouds_from_bag,
    detections_msg_from_boxes,
    messages_from_bag,
    topics_of_bag,
    typestore,
)

highlevel = pytest.importorskip("rosbags.highlevel", reason="bags need rosbags")
rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="bags need rosbags")

XYZI = ("x", "y", "z", "intensity")
STAMP = 1_700_000_000_123_456_789
POINTS = np.array([[1, 2, 3, 4], [np.nan, 0, 0, 0]], dtype=np.float32)
BOXES = np.array([[1, 2, 3, 4.5, 2, 1.5, math.pi / 3], [0, 0, 0, 1, 1, 2, -3]], np.float32)
SCORES = np.array([0.75, 0.5], np.float32)
NAMES = ["car", "pedestrian"]


@pytest.fixture
def bag(tmp_path):
    """Transforms, two clouds and one array of detections."""
    with BagWriter(tmp_path / "drive") as writer:
        writer.write_static_transforms([StaticTransform("base_link", "lidar", (0, 0, 1.8))], STAMP)
        writer.write_points("/points", POINTS, XYZI, STAMP, "lidar", STAMP + 5)
        writer.write_detections("/detections", BOXES, SCORES, NAMES, STAMP, "lidar", STAMP + 6)
        writer.write_points("/points", POINTS[:0], XYZI, STAMP + 100_000_000, "lidar")
    return tmp_path / "drive"


def write_sqlite(path, *, definitions=True, messages=1):
    """A bag in the other storage, as Humble writes it where it has no definitions."""
    with rosbag2.Writer(path, version=8, storage_plugin=rosbag2.StoragePlugin.SQLITE3) as writer:
        connection = writer.add_connection("/points", POINT_CLOUD, typestore=typestore())
        for index in range(messages):
            cloud = bags.cloud_msg_from_points(POINTS, XYZI, STAMP, "lidar")
            cdr = typestore().serialize_cdr(cloud, POINT_CLOUD)
            writer.write(connection, STAMP + index, cdr)
    (storage,) = path.glob("*.db3")
    if not definitions:
        with closing(sqlite3.connect(storage)) as database:
            database.execute("DROP TABLE message_definitions")
            database.execute("ALTER TABLE topics DROP COLUMN type_description_hash")
            database.execute("UPDATE schema SET schema_version = 3")
            database.commit()
    return storage


class TestReading:
    def test_clouds(self, bag):
        first, second = clouds_from_bag(bag)
        assert (first.topic, first.frame_id) == ("/points", "lidar")
        assert (first.stamp_ns, first.timestamp_ns) == (STAMP, STAMP + 5)
        np.testing.assert_array_equal(first.points(XYZI), POINTS)
        assert second.points(("x", "y", "z", "time"), {"time": 0}).shape == (0, 4)
        assert second.stamp_ns == second.timestamp_ns == STAMP + 100_000_000

    def test_storage_file_without_its_folder(self, bag):
        (storage,) = bag.glob("*.mcap")
        assert len(list(clouds_from_bag(storage, "points"))) == 2

    @pytest.mark.parametrize("definitions", [True, False])
    def test_sqlite(self, tmp_path, definitions):
        storage = write_sqlite(tmp_path / "old", definitions=definitions)
        for path in (storage, storage.parent):
            (cloud,) = clouds_from_bag(path)
            np.testing.assert_array_equal(cloud.points(XYZI), POINTS)

    def test_topics(self, bag):
        topics = {t.name: t for t in topics_of_bag(bag)}
        assert sorted(topics) == ["/detections", "/points", "/tf_static"]
        assert topics["/points"].message_type == POINT_CLOUD
        assert topics["/points"].num_messages == 2
        assert topics["/points"].reliability == "reliable"
        assert topics["/points"].durability == "volatile"
        assert topics["/tf_static"].durability == "transient_local"

    def test_messages_in_the_order_of_arrival(self, bag):
        names = [m.topic.name for m in messages_from_bag(bag)]
        assert names == ["/tf_static", "/points", "/detections", "/points"]
        assert [m.timestamp_ns - STAMP for m in messages_from_bag(bag, ["detections"])] == [6]

    def test_several_topics_with_clouds(self, tmp_path):
        with BagWriter(tmp_path / "two") as writer:
            for topic in ("/front", "/rear", "/rear"):
                writer.write_points(topic, POINTS, XYZI, STAMP, "lidar")
        with pytest.raises(DataError, match=r"name one of /front \(1\), /rear \(2\)"):
            clouds_from_bag(tmp_path / "two")
        assert len(list(clouds_from_bag(tmp_path / "two", "/rear"))) == 2

    def test_topics_that_do_not_fit(self, bag):
        with pytest.raises(DataError, match=r"no topic /rear; it has /detections \(vision_msgs"):
            clouds_from_bag(bag, "/rear")
        with pytest.raises(DataError, match="/detections is a vision_msgs/msg/Detection3DArray"):
            cloud_topic(bag, "/detections")
        with pytest.raises(DataError, match="no topic /rear"):
            list(messages_from_bag(bag, ["/rear"]))

    def test_no_clouds(self, tmp_path):
        with BagWriter(tmp_path / "empty"):
            pass
        with pytest.raises(DataError, match=f"has no {POINT_CLOUD}; it has no topics"):
            clouds_from_bag(tmp_path / "empty")
        assert list(messages_from_bag(tmp_path / "empty")) == []

    def test_foreign_types_do_not_matter(self, tmp_path):
        path = tmp_path / "foreign"
        with rosbag2.Writer(path, version=9, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
            odd = writer.add_connection(
                "/odd", "my_msgs/msg/Odd", msgdef="this is ((( no definition", rihs01="RIHS01_0"
            )
            points = writer.add_connection("/points", POINT_CLOUD, typestore=typestore())
            cloud = bags.cloud_msg_from_points(POINTS, XYZI, STAMP, "lidar")
            writer.write(odd, STAMP, b"\x00\x01\x00\x00abcd")
            writer.write(points, STAMP, typestore().serialize_cdr(cloud, POINT_CLOUD))
        assert len(list(clouds_from_bag(path))) == 1
        odd_message, _ = messages_from_bag(path)
        with pytest.raises(DataError, match="my_msgs/msg/Odd is not known"):
            odd_message.decode()
        with BagWriter(tmp_path / "copy") as writer:
            for message in messages_from_bag(path):
                writer.copy(message)
        assert [m.cdr for m in messages_from_bag(path)] == [m.cdr for m in messages_from_bag(tmp_path / "copy")]

    def test_another_definition_of_a_known_type(self, tmp_path):
        path = tmp_path / "other"
        with rosbag2.Writer(path, version=9, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
            connection = writer.add_connection(
                "/points", POINT_CLOUD, msgdef="uint8 other\n", rihs01="RIHS01_" + "0" * 64
            )
            writer.write(connection, STAMP, b"\x00\x01\x00\x00a")
        with pytest.raises(DataError, match=r"type hash RIHS01_0+; expected RIHS01_9198"):
            list(clouds_from_bag(path))

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"does not exist; expected a bag folder.*\.db3"):
            topics_of_bag(tmp_path / "none.mcap")

    def test_folder_that_is_no_bag(self, tmp_path):
        with pytest.raises(DataError, match="is no bag; expected a bag folder with metadata"):
            topics_of_bag(tmp_path)

    @pytest.mark.parametrize("name", ["a.mcap", "a.db3", "metadata.yaml"])
    @pytest.mark.parametrize("content", [b"", b"no bag at all" * 100, b"\x89MCAP0\r\n"])
    def test_other_contents(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        path = tmp_path if name == "metadata.yaml" else tmp_path / name
        with pytest.raises(DataError, match="cannot be read as a bag: "):
            topics_of_bag(path)

    def test_cut_short(self, bag):
        (storage,) = bag.glob("*.mcap")
        storage.write_bytes(storage.read_bytes()[:-200])
        with pytest.raises(DataError, match="cannot be read as a bag"):
            list(clouds_from_bag(storage))

    def test_damaged_message(self, tmp_path):
        with BagWriter(tmp_path / "damaged") as writer:
            writer.write_cdr("/points", POINT_CLOUD, b"\x00\x01\x00\x00" + b"\xff" * 9, STAMP)
        with pytest.raises(DataError, match=f"/points, received at {STAMP} ns, is damaged"):
            list(clouds_from_bag(tmp_path / "damaged"))

    def test_an_error_of_the_caller_stays_what_it_is(self, bag):
        with pytest.raises(ZeroDivisionError):
            [1 / 0 for _ in clouds_from_bag(bag)]

    def test_without_rosbags(self, bag, monkeypatch):
        monkeypatch.setitem(sys.modules, "rosbags.rosbag2", None)
        with pytest.raises(DataError, match="install it with: pip install rosbags"):
            topics_of_bag(bag)
        with pytest.raises(DataError, match="install it with: pip install rosbags"):
            BagWriter(bag.parent / "new")


class TestWriting:
    def test_type_hash_of_detections(self):
        # of vision_msgs as released for Humble to Kilted
        assert typestore().hash_rihs01(DETECTIONS) == (
            "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"
        )

    @pytest.mark.parametrize("store", ["ROS2_JAZZY", "ROS2_KILTED"])
    def test_hashes_are_the_same_in_later_releases(self, store):
        from rosbags.typesys import Stores, get_typestore

        later = get_typestore(Stores[store])
        for name in (POINT_CLOUD, bags.TRANSFORMS, "visualization_msgs/msg/MarkerArray"):
            assert later.hash_rihs01(name) == typestore().hash_rihs01(name)

    def test_rosbags_reads_it_with_the_definitions_inside(self, bag):
        with highlevel.AnyReader([bag]) as reader:
            messages = {
                connection.topic: reader.deserialize(raw, connection.msgtype)
                for connection, _, raw in reader.messages()
            }
        (transform,) = messages["/tf_static"].transforms
        assert (transform.header.frame_id, transform.child_frame_id) == ("base_link", "lidar")
        assert transform.transform.translation.z == 1.8
        assert transform.transform.rotation.w == 1
        assert len(messages["/detections"].detections) == 2

    def test_detections(self):
        message = detections_msg_from_boxes(BOXES, SCORES, NAMES, STAMP, "lidar")
        assert (message.header.stamp.sec, message.header.stamp.nanosec) == divmod(STAMP, 10**9)
        car, pedestrian = message.detections
        assert car.header == message.header
        (result,) = car.results
        assert (result.hypothesis.class_id, result.hypothesis.score) == ("car", 0.75)
        assert result.pose.pose == car.bbox.center
        assert (car.bbox.size.x, car.bbox.size.y, car.bbox.size.z) == (4.5, 2, 1.5)
        center = car.bbox.center
        assert (center.position.x, center.position.y, center.position.z) == (1, 2, 3)
        # 60 degrees about z
        assert center.orientation.z == pytest.approx(0.5, abs=1e-6)
        assert center.orientation.w == pytest.approx(math.sqrt(3) / 2, abs=1e-6)
        turned = pedestrian.bbox.center.orientation
        assert 2 * math.atan2(turned.z, turned.w) == pytest.approx(-3)

    def test_no_detections(self, tmp_path):
        empty = np.empty((0, 7), np.float32)
        with BagWriter(tmp_path / "none") as writer:
            writer.write_detections("/d", empty, empty[:, 0], [], STAMP, "lidar")
        (message,) = messages_from_bag(tmp_path / "none")
        assert list(message.decode().detections) == []

    def test_detections_of_different_lengths(self):
        with pytest.raises(DataError, match="2 boxes, 1 scores and 2 class names"):
            detections_msg_from_boxes(BOXES, SCORES[:1], NAMES, STAMP, "lidar")

    def test_is_dense_is_true_only_without_nan(self):
        assert not bags.cloud_msg_from_points(POINTS, XYZI, STAMP, "lidar").is_dense
        assert bags.cloud_msg_from_points(POINTS[:1], XYZI, STAMP, "lidar").is_dense

    @pytest.mark.parametrize(("version", "reliability"), [(8, "reliability: 1"), (9, "reliable")])
    def test_metadata_version(self, tmp_path, version, reliability):
        with BagWriter(tmp_path / "bag", metadata_version=version) as writer:
            writer.write_points("/points", POINTS, XYZI, STAMP, "lidar")
        text = (tmp_path / "bag" / "metadata.yaml").read_text(encoding="utf-8")
        assert f"version: {version}\n" in text
        assert "storage_identifier: mcap" in text
        assert reliability in text
        (topic,) = topics_of_bag(tmp_path / "bag")
        assert topic.reliability == "reliable"

    def test_unknown_metadata_version(self, tmp_path):
        with pytest.raises(DataError, match=r"version 5; expected 9 .* or 8"):
            BagWriter(tmp_path / "bag", metadata_version=5)

    def test_unknown_type(self, tmp_path):
        with (
            pytest.raises(DataError, match="my_msgs/msg/Odd is not known"),
            BagWriter(tmp_path / "bag") as writer,
        ):
            writer.write_cdr("/odd", "my_msgs/msg/Odd", b"", STAMP)

    def test_copies_are_identical(self, bag, tmp_path):
        with BagWriter(tmp_path / "copy", metadata_version=8) as writer:
            for message in messages_from_bag(bag):
                writer.copy(message)
        before, after = (list(messages_from_bag(p)) for p in (bag, tmp_path / "copy"))
        assert [m.cdr for m in before] == [m.cdr for m in after]
        assert [m.timestamp_ns for m in before] == [m.timestamp_ns for m in after]
        assert [m.topic.connection.ext for m in before] == [m.topic.connection.ext for m in after]

    def test_copy_from_a_bag_without_definitions(self, tmp_path):
        storage = write_sqlite(tmp_path / "old", definitions=False, messages=2)
        with BagWriter(tmp_path / "new") as writer:
            for message in messages_from_bag(storage):
                writer.copy(message)
        assert len(list(clouds_from_bag(tmp_path / "new"))) == 2


class TestOverwriting:
    def test_existing_bag_is_kept(self, bag):
        with pytest.raises(DataError, match="exists already"):
            BagWriter(bag)
        assert len(list(clouds_from_bag(bag))) == 2

    def test_existing_bag_is_replaced_on_request(self, bag):
        with BagWriter(bag, overwrite=True) as writer:
            writer.write_points("/points", POINTS, XYZI, STAMP, "lidar")
        assert len(list(clouds_from_bag(bag))) == 1

    def test_a_folder_with_other_files_is_kept(self, bag):
        (bag / "notes.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(DataError, match=r"is no bag: it has notes\.txt"):
            BagWriter(bag, overwrite=True)
        assert (bag / "notes.txt").exists()

    def test_a_file_is_kept(self, tmp_path):
        (tmp_path / "bag").write_text("mine", encoding="utf-8")
        with pytest.raises(DataError, match="exists already"):
            BagWriter(tmp_path / "bag", overwrite=True)
