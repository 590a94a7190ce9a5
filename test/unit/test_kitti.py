"""KITTI's files and frames, by hand and on a few real frames where they are at hand."""

import struct
from pathlib import Path

import numpy as np
import pytest

from dsvt_ros.errors import DataError
from dsvt_ros.io.kitti import (
    KittiCalibration,
    boxes_from_objects,
    in_field_of_view,
    is_seen,
    objects_from_boxes,
    open_kitti,
    read_calibration,
    read_objects,
    upright_boxes,
    write_objects,
)

REAL = Path(__file__).parents[3] / "shared" / "data" / "kitti"
IMAGE = (1242, 375)
# Lidar x forward, y left, z up -> camera x right, y down, z forward; the camera 0.27 m ahead and 0.08 m below.
AXES = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])
SIMPLE = KittiCalibration(
    P2=np.array([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]]), R0_rect=np.eye(3), Tr_velo_to_cam=AXES
)
CALIBRATION_TEXT = """P0: 7.0e+02 0 600 0 0 7.0e+02 180 0 0 0 1 0
P2: 7.0e+02 0 600 0 0 7.0e+02 180 0 0 0 1 0
R0_rect: 1 0 0 0 1 0 0 0 1
Tr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27

"""
CAR = "Car 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57"
DONT_CARE = "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10"


def tilted():
    """A calibration like real ones: axes a degree off, a projection with offsets."""
    angle = 0.0148
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    projection = np.array([[721.5377, 0, 609.5593, 44.857], [0, 721.5377, 172.854, 0.2164], [0, 0, 1, 0.00275]])
    return KittiCalibration(projection, tilt, AXES)


def to_objects(boxes, calibration=SIMPLE):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
    return objects_from_boxes(boxes, np.ones(len(boxes)), ["Car"] * len(boxes), calibration, IMAGE)


def test_box_to_camera_by_hand():
    objects = to_objects([10, 2, -1, 4, 1.6, 1.5, 0.3])
    # The bottom is at z = -1.75: 2 m to the left is x = -2, 1.75 below the lidar is 1.67 below the camera.
    np.testing.assert_allclose(objects.locations, [[-2, 1.67, 9.73]], atol=1e-12)
    np.testing.assert_allclose(objects.sizes, [[1.5, 1.6, 4]])
    np.testing.assert_allclose(objects.rotation_y, [-0.3 - np.pi / 2])
    np.testing.assert_allclose(objects.alpha, [-0.3 - np.pi / 2 + np.arctan2(2, 9.73)])
    assert objects.occlusion.tolist() == [-1]


def test_box_to_lidar_by_hand(tmp_path):
    path = tmp_path / "label.txt"
    path.write_text("Car 0 0 0 0 0 1 1 1.5 1.6 4 3.0 1.67 9.73 0\n")
    # rotation_y 0 heads to the right, which is -y of the lidar: yaw -pi/2.
    box = boxes_from_objects(read_objects(path), SIMPLE)
    np.testing.assert_allclose(box, [[10, -3, -1.0, 4, 1.6, 1.5, -np.pi / 2]], atol=1e-12)


@pytest.mark.parametrize("calibration", [SIMPLE, tilted()])
def test_boxes_survive_the_round_trip(calibration):
    rng = np.random.default_rng(0)
    boxes = rng.uniform([5, -20, -2, 1, 1, 1, -3.14], [60, 20, 1, 5, 2, 2, 3.14], (50, 7))
    back = boxes_from_objects(to_objects(boxes, calibration), calibration)
    np.testing.assert_allclose(back, boxes, atol=1e-9)


def test_upright_boxes_keep_distances_and_headings():
    boxes = np.array([[10, 2, -1, 4, 1.6, 1.5, 0.3], [20, -5, 0, 1, 1, 2, -2.0]])
    upright = upright_boxes(to_objects(boxes))
    shift = [0.27, 0, -0.08, 0, 0, 0, 0]
    np.testing.assert_allclose(upright, boxes - shift, atol=1e-12)


def test_image_box_by_hand():
    # A cube of 2 m, its front face 9 m before the camera and centred on the axis: 700 * 1 / 9 = 77.78 pixels each way.
    objects = to_objects([10.27, 0, -0.08, 2, 2, 2, 0])
    np.testing.assert_allclose(objects.image_boxes, [[522.222, 102.222, 677.778, 257.778]], atol=1e-3)


def test_image_box_is_cut_at_the_image_and_the_camera():
    beside, behind, outside = [1, -2, -1, 4, 1.6, 1.5, 0], [-10, 0, -1, 4, 1.6, 1.5, 0], [10, 30, -1, 4, 1.6, 1.5, 0]
    objects = to_objects([beside, behind, outside])
    assert is_seen(objects.image_boxes).tolist() == [True, False, False]
    # The part ahead of the camera: seen from x = 1.2 m at 2.73 m depth to the right edge, with its foot cut off.
    left, _, right, bottom = objects.image_boxes[0]
    assert (right, bottom) == (1241, 374)
    assert left == pytest.approx(600 + 700 * 1.2 / 2.73)
    np.testing.assert_array_equal(objects.image_boxes[1:], 0)
    assert len(to_objects([])) == 0


def test_field_of_view():
    # 10 m ahead a pixel is 10 / 700 m: the left edge of the image is 600 pixels, 8.43 m from the axis.
    points = np.array([[10.27, 0, 0], [-10, 0, 0], [10.27, 8.4, 0], [10.27, 8.6, 0], [10.27, 0, 3], [np.nan, 0, 0]])
    seen = in_field_of_view(points.astype(np.float32), SIMPLE, IMAGE)
    assert seen.tolist() == [True, False, True, False, False, False]


def test_text_round_trip(tmp_path):
    rng = np.random.default_rng(1)
    boxes = rng.uniform([5, -3, -2, 1, 1, 1, -3], [60, 3, 1, 5, 2, 2, 3], (5, 7))
    objects = objects_from_boxes(
        boxes, rng.uniform(size=5), ["Car", "Pedestrian", "Van", "Car", "Cyclist"], SIMPLE, IMAGE
    )
    path = tmp_path / "000000.txt"
    write_objects(path, objects)
    assert [len(line.split()) for line in path.read_text().splitlines()] == [16] * 5
    back = read_objects(path)
    assert back.types == objects.types
    for name in ("truncation", "occlusion", "alpha", "image_boxes", "sizes", "locations", "rotation_y"):
        np.testing.assert_allclose(getattr(back, name), getattr(objects, name), atol=5e-5)
    np.testing.assert_allclose(back.scores, objects.scores, atol=5e-7)
    write_objects(path, objects.select(np.zeros(5, bool)))
    assert path.read_text() == ""
    assert len(read_objects(path)) == 0


def test_labels_are_read(tmp_path):
    path = tmp_path / "000001.txt"
    path.write_text(f"{CAR}\n{DONT_CARE}\n")
    labels = read_objects(path)
    assert labels.types == ("Car", "DontCare")
    assert labels.of_types("car").tolist() == [True, False]
    np.testing.assert_allclose(labels.locations[0], [-16.53, 2.39, 58.49])
    assert np.isnan(labels.scores).all()
    write_objects(path, labels.select(labels.of_types("Car")))
    assert len(path.read_text().split()) == 15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Car 0 0 1", "line 1 has 4 columns; expected 15"),
        (f"{CAR}\n{CAR} 0.5 7", "line 2 has 17 columns"),
        (CAR.replace("58.49", "far"), "line 1: could not convert"),
        (CAR.replace("58.49", "nan"), "not finite"),
        (b"\xff\xfe\x00", "no text file"),
    ],
)
def test_wrong_labels(tmp_path, text, message):
    path = tmp_path / "000001.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_objects(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_objects(tmp_path / "none.txt")


def test_calibration(tmp_path):
    path = tmp_path / "000001.txt"
    path.write_text(CALIBRATION_TEXT)
    calibration = read_calibration(path)
    np.testing.assert_array_equal(calibration.P2, SIMPLE.P2)
    np.testing.assert_array_equal(calibration.T_camera_lidar[:3], AXES)
    assert calibration.image_size == (1242, 375)
    assert tilted().image_size == (1242, 375)
    for text, message in [
        (CALIBRATION_TEXT.replace("R0_rect", "R_rect"), "has no R0_rect"),
        (CALIBRATION_TEXT.replace("-0.27", ""), "Tr_velo_to_cam has 11 numbers"),
        (CALIBRATION_TEXT.replace("-0.27", "x"), "Tr_velo_to_cam"),
        ("", "has no P2 and no R0_rect and no Tr_velo_to_cam"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_calibration(path)


def test_folder(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        open_kitti(tmp_path / "none")
    with pytest.raises(DataError, match="has no velodyne"):
        open_kitti(tmp_path)
    root = tmp_path / "training"
    (root / "velodyne").mkdir(parents=True)
    for name in ("000002", "000000"):
        np.arange(8, dtype=np.float32).tofile(root / "velodyne" / f"{name}.bin")
    folder = open_kitti(tmp_path)
    assert (folder.path, folder.frames) == (root, ("000000", "000002"))
    np.testing.assert_array_equal(folder.points("000002")[1], [4, 5, 6, 7])
    with pytest.raises(DataError, match=r"calib.000002\.txt cannot be read"):
        folder.calibration("000002")
    assert folder.image_size("000002", SIMPLE) == (1242, 375)
    (root / "image_2").mkdir()
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", 1238, 374)
    (root / "image_2" / "000002.png").write_bytes(header)
    assert folder.image_size("000002", SIMPLE) == (1238, 374)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs KITTI frames in ../shared")
def test_real_boxes_hold_points_and_fit_the_image():
    folder = open_kitti(REAL)
    for frame in folder.frames:
        calibration, labels = folder.calibration(frame), folder.labels(frame)
        points = folder.points(frame)
        assert in_field_of_view(points, calibration, folder.image_size(frame, calibration)).mean() > 0.99
        near = (labels.locations[:, 2] < 40) & ~labels.of_types("DontCare")
        labels = labels.select(near & (labels.occlusion < 2))
        boxes = boxes_from_objects(labels, calibration)
        for box in boxes:
            offset = points[:, :3] - box[:3]
            cos, sin = np.cos(box[6]), np.sin(box[6])
            local = np.stack(
                [cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0], offset[:, 2]], axis=1
            )
            assert (np.abs(local) < box[3:6] / 2).all(axis=1).sum() >= 10
        projected = to_objects(boxes, calibration).image_boxes
        # Image boxes of people are drawn around the limbs, not around the 3D box.
        rigid = labels.of_types("Car", "Truck", "Van")
        assert np.abs(projected - labels.image_boxes)[rigid].max(initial=0) < 4
