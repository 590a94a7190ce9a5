"""The KITTI object data set: folders, calibration, label files, and boxes between its camera and the lidar.

Three frames meet here. *Lidar*: x forward, y left, z up, 1.73 m above the ground. *Camera*: the rectified frame of the
reference camera, x right, y down, z forward, in which label files give boxes. *Image*: pixels of the left colour
camera (``P2``), column and row of the upper left corner first. Everything is computed in double precision.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError
from dsvt_ros.io.point_files import points_from_bin

SENSOR_HEIGHT_M = 1.73
COLUMNS = ("x", "y", "z", "intensity")

# Focal lengths of the recording days and the sizes of their rectified images, pixels.
IMAGE_SIZES = {
    721.5377: (1242, 375),
    707.0493: (1224, 370),
    718.3351: (1238, 374),
    707.0912: (1226, 370),
    718.856: (1241, 376),
}
DEFAULT_IMAGE_SIZE = (1242, 375)

NO_VALUE = -1
"""Truncation and occlusion of detections, which do not know them."""

_NEAR_PLANE_M = 0.1
_LABEL_COLUMNS = 15
_CALIBRATION_SHAPES = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
# The eight corners of a box in units of half its length (x), height (y, up) and width (z), and pairs of them.
_CORNERS = np.array([[x, y, z] for x in (1.0, -1.0) for y in (0.0, 2.0) for z in (1.0, -1.0)])
_EDGES = np.array([(i, j) for i in range(8) for j in range(i + 1, 8) if (_CORNERS[i] != _CORNERS[j]).sum() == 1])


@dataclass(frozen=True, eq=False)
class KittiCalibration:
    """Where the sensors of a frame are.

    Attributes:
        P2: (3, 4) float64, projection from the camera frame to the image of the left colour camera, pixels.
        R0_rect: (3, 3) float64, rotation that rectifies the reference camera.
        Tr_velo_to_cam: (3, 4) float64, from the lidar to the reference camera, metres.
    """

    P2: NDArray[np.float64]
    R0_rect: NDArray[np.float64]
    Tr_velo_to_cam: NDArray[np.float64]

    @property
    def T_camera_lidar(self) -> NDArray[np.float64]:  # noqa: N802
        """(4, 4) from the lidar frame to the rectified camera frame."""
        rotation, T_camera_lidar = np.eye(4), np.eye(4)
        rotation[:3, :3] = self.R0_rect
        T_camera_lidar[:3] = self.Tr_velo_to_cam
        product: NDArray[np.float64] = rotation @ T_camera_lidar
        return product

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of the image in pixels, as the recording day of this focal length has it."""
        focal_length = float(self.P2[0, 0])
        nearest = min(IMAGE_SIZES, key=lambda known: abs(known - focal_length))
        return IMAGE_SIZES[nearest] if abs(nearest - focal_length) < 0.01 else DEFAULT_IMAGE_SIZE


@dataclass(frozen=True, eq=False)
class KittiObjects:
    """Labels or detections of one frame: the columns of a label file.

    Attributes:
        types: M class names, such as ``Car``; ``DontCare`` marks areas of the image without labels.
        truncation: (M,) float64, share of the object outside the image; -1 unknown.
        occlusion: (M,) int64, 0 visible, 1 partly, 2 largely occluded, 3 unknown; -1 for detections.
        alpha: (M,) float64, direction that the object is seen from, radians.
        image_boxes: (M, 4) float64 ``[left, top, right, bottom]``, pixels.
        sizes: (M, 3) float64 ``[height, width, length]``, metres.
        locations: (M, 3) float64, centre of the box's bottom in the camera frame, metres.
        rotation_y: (M,) float64, heading about the camera's y axis, radians; 0 heads to the right.
        scores: (M,) float64; NaN for labels.
    """

    types: tuple[str, ...]
    truncation: NDArray[np.float64]
    occlusion: NDArray[np.int64]
    alpha: NDArray[np.float64]
    image_boxes: NDArray[np.float64]
    sizes: NDArray[np.float64]
    locations: NDArray[np.float64]
    rotation_y: NDArray[np.float64]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.types)

    def select(self, rows: NDArray[np.bool_]) -> KittiObjects:
        """The objects where `rows` (M,) is set."""
        return KittiObjects(
            tuple(name for name, wanted in zip(self.types, rows, strict=True) if wanted),
            *(getattr(self, name)[rows] for name in list(self.__dataclass_fields__)[1:]),
        )

    def of_types(self, *types: str) -> NDArray[np.bool_]:
        """(M,) bool, True where the class is one of `types`, whatever its capitals, as the development kit does."""
        wanted = {name.lower() for name in types}
        return np.array([name.lower() in wanted for name in self.types], bool)


@dataclass(frozen=True)
class KittiFolder:
    """A folder of the data set, or its ``training`` part.

    Attributes:
        path: Where ``velodyne``, ``label_2`` and ``calib`` are.
        frames: Names of the frames, such as ``000008``, in order.
    """

    path: Path
    frames: tuple[str, ...]

    def points(self, frame: str) -> NDArray[np.float32]:
        """(N, 4) float32 ``[x, y, z, intensity]``, metres, lidar frame, intensity in [0, 1]."""
        return points_from_bin(self.path / "velodyne" / f"{frame}.bin", COLUMNS)

    def calibration(self, frame: str) -> KittiCalibration:
        """Calibration of a frame."""
        return read_calibration(self.path / "calib" / f"{frame}.txt")

    def labels(self, frame: str) -> KittiObjects:
        """Labelled objects of a frame."""
        return read_objects(self.path / "label_2" / f"{frame}.txt")

    def image_size(self, frame: str, calibration: KittiCalibration) -> tuple[int, int]:
        """Width and height in pixels: of the image if it is there, else as the calibration suggests."""
        path = self.path / "image_2" / f"{frame}.png"
        try:
            with path.open("rb") as file:
                header = file.read(24)
        except OSError:
            return calibration.image_size
        if len(header) < 24 or header[12:16] != b"IHDR":
            raise DataError(f"{path} is no PNG image")
        width, height = struct.unpack(">II", header[16:])
        return width, height


def open_kitti(path: str | Path, *, clouds: bool = True) -> KittiFolder:
    """List the frames of ``DIR/velodyne`` and ``DIR/label_2``, or of ``DIR/training/...``.

    Args:
        path: The folder.
        clouds: Take the frames that have a cloud; otherwise those that have labels.

    Raises:
        DataError: There are none.
    """
    folder, suffix = ("velodyne", ".bin") if clouds else ("label_2", ".txt")
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; expected one with velodyne, label_2 and calib, or training/velodyne ...")
    for root in (path, path / "training"):
        frames = tuple(sorted(file.stem for file in (root / folder).glob(f"*{suffix}")))
        if frames:
            return KittiFolder(root, frames)
    raise DataError(
        f"{path} has no {folder}/*{suffix} and no training/{folder}/*{suffix}: is it a KITTI object folder?"
    )


# ----------------------------------------------------------------------------------------------- text files


def read_calibration(path: Path) -> KittiCalibration:
    """Read ``P2``, ``R0_rect`` and ``Tr_velo_to_cam`` of a calibration file.

    Raises:
        DataError: The file is missing, or one of them is missing or no matrix of finite numbers.
    """
    matrices: dict[str, NDArray[np.float64]] = {}
    for number, line in enumerate(_lines(path), 1):
        name, _, values = line.partition(":")
        if name not in _CALIBRATION_SHAPES:
            continue
        shape = _CALIBRATION_SHAPES[name]
        numbers = _numbers(values.split(), f"{path}, line {number} ({name})")
        if numbers.size != shape[0] * shape[1]:
            raise DataError(
                f"{path}, line {number}: {name} has {numbers.size} numbers, expected {shape[0]} x {shape[1]}"
            )
        matrices[name] = numbers.reshape(shape)
    missing = [name for name in _CALIBRATION_SHAPES if name not in matrices]
    if missing:
        raise DataError(f"{path} has no {' and no '.join(missing)}: it is no calibration of a KITTI object frame")
    return KittiCalibration(**matrices)


def read_objects(path: Path) -> KittiObjects:
    """Read a label file (15 columns) or a detection file (16, the last is the score).

    Raises:
        DataError: The file is missing, or a line has another number of columns or something that is no number.
    """
    types, rows = [], []
    for number, line in enumerate(_lines(path), 1):
        name, *values = line.split()
        if len(values) + 1 not in (_LABEL_COLUMNS, _LABEL_COLUMNS + 1):
            raise DataError(
                f"{path}, line {number} has {len(values) + 1} columns; expected {_LABEL_COLUMNS} (labels) or "
                f"{_LABEL_COLUMNS + 1} (detections: the score comes last)"
            )
        types.append(name)
        row = _numbers(values, f"{path}, line {number}")
        rows.append(row if len(values) == _LABEL_COLUMNS else np.append(row, np.nan))
    table = np.array(rows, np.float64).reshape(-1, _LABEL_COLUMNS)
    return KittiObjects(
        types=tuple(types),
        truncation=table[:, 0],
        occlusion=table[:, 1].astype(np.int64),
        alpha=table[:, 2],
        image_boxes=table[:, 3:7],
        sizes=table[:, 7:10],
        locations=table[:, 10:13],
        rotation_y=table[:, 13],
        scores=table[:, 14],
    )


def write_objects(path: Path, objects: KittiObjects) -> None:
    """Write a detection file of 16 columns; objects without a score (labels) get the 15 columns of a label file.

    Pixels and metres have four decimals, where the data set has two: rounding to centimetres moves overlaps.

    Raises:
        DataError: The file cannot be written.
    """
    lines = []
    for i, name in enumerate(objects.types):
        geometry = [objects.alpha[i], *objects.image_boxes[i], *objects.sizes[i], *objects.locations[i]]
        columns = [name, f"{objects.truncation[i]:.2f}", str(objects.occlusion[i])]
        columns += [f"{value:.4f}" for value in (*geometry, objects.rotation_y[i])]
        if not np.isnan(objects.scores[i]):
            columns.append(f"{objects.scores[i]:.6f}")
        lines.append(" ".join(columns) + "\n")
    try:
        path.write_text("".join(lines))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file") from None


def _numbers(values: Sequence[str], where: str) -> NDArray[np.float64]:
    try:
        numbers = np.array([float(value) for value in values], np.float64)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not np.isfinite(numbers).all():
        raise DataError(f"{where}: a number is not finite")
    return numbers


# ------------------------------------------------------------------------------------------------- geometry


def boxes_from_objects(objects: KittiObjects, calibration: KittiCalibration) -> NDArray[np.float64]:
    """Bring boxes of the camera frame into the lidar frame.

    The centre of the bottom is transformed and half the height added; the heading becomes ``-rotation_y - pi/2``, as
    if the axes of camera and lidar were exactly parallel (they are to about one degree): the usual convention, which
    keeps boxes upright in both frames.

    Args:
        objects: M objects; ``DontCare`` rows give meaningless boxes.
        calibration: Of their frame.

    Returns:
        (M, 7) float64 ``[x, y, z, length, width, height, yaw]``, lidar frame, yaw in [-pi, pi).
    """
    T_lidar_camera = np.linalg.inv(calibration.T_camera_lidar).astype(np.float64)
    bottom = _transformed(objects.locations, T_lidar_camera)
    height, width, length = objects.sizes.T
    x, y, z = bottom.T
    return np.stack([x, y, z + height / 2, length, width, height, _wrapped(-objects.rotation_y - np.pi / 2)], axis=1)


def objects_from_boxes(
    boxes: NDArray[np.float32] | NDArray[np.float64],
    scores: NDArray[np.float32] | NDArray[np.float64],
    types: Sequence[str],
    calibration: KittiCalibration,
    image_size: tuple[int, int],
) -> KittiObjects:
    """Bring boxes of the lidar frame into the camera frame and the image.

    Args:
        boxes: (M, 7 or more) ``[x, y, z, length, width, height, yaw]``, lidar frame.
        scores: (M,) scores.
        types: M class names of KITTI.
        calibration: Of the frame.
        image_size: Width and height, pixels.

    Returns:
        M objects; those outside the image have an empty image box.
    """
    boxes = boxes.astype(np.float64)
    bottom = boxes[:, :3] - boxes[:, 5:6] * np.array([0.0, 0.0, 0.5])
    location = _transformed(bottom, calibration.T_camera_lidar)
    rotation_y = _wrapped(-boxes[:, 6] - np.pi / 2)
    sizes = boxes[:, [5, 4, 3]]
    return KittiObjects(
        types=tuple(types),
        truncation=np.full(len(boxes), float(NO_VALUE)),
        occlusion=np.full(len(boxes), NO_VALUE),
        alpha=_wrapped(rotation_y - np.arctan2(location[:, 0], location[:, 2])),
        image_boxes=project_boxes(location, sizes, rotation_y, calibration, image_size),
        sizes=sizes,
        locations=location,
        rotation_y=rotation_y,
        scores=scores.astype(np.float64),
    )


def upright_boxes(objects: KittiObjects) -> NDArray[np.float64]:
    """Boxes of the camera frame with its axes renamed: x forward, y left, z up, origin at the camera.

    Overlaps computed in this frame are those of the camera frame, which the labels are given in; no calibration is
    needed.

    Returns:
        (M, 7) float64 ``[x, y, z, length, width, height, yaw]``, z at the centre.
    """
    right, down, forward = objects.locations.T
    height, width, length = objects.sizes.T
    yaw = _wrapped(-objects.rotation_y - np.pi / 2)
    return np.stack([forward, -right, -down + height / 2, length, width, height, yaw], axis=1)


def project_boxes(
    locations: NDArray[np.float64],
    sizes: NDArray[np.float64],
    rotation_y: NDArray[np.float64],
    calibration: KittiCalibration,
    image_size: tuple[int, int],
) -> NDArray[np.float64]:
    """Image boxes that hold the projection of 3D boxes, clipped to the image.

    What lies behind the camera is cut off before the projection.

    Args:
        locations: (M, 3) bottom centres, camera frame.
        sizes: (M, 3) ``[height, width, length]``.
        rotation_y: (M,) headings.
        calibration: Gives ``P2``.
        image_size: Width and height, pixels.

    Returns:
        (M, 4) float64 ``[left, top, right, bottom]``; zeros for boxes that no pixel sees.
    """
    height, width, length = sizes.T[:, :, None] / 2
    along, up, across = _CORNERS.T[:, None]
    cos, sin = np.cos(rotation_y)[:, None], np.sin(rotation_y)[:, None]
    x = cos * length * along + sin * width * across
    z = -sin * length * along + cos * width * across
    corners = np.stack([x, -height * up, z], axis=-1) + locations[:, None]

    start, end = corners[:, _EDGES[:, 0]], corners[:, _EDGES[:, 1]]
    # Edges through the near plane are cut there; those behind it collapse to a point that is left out.
    depth_start, depth_end = start[..., 2], end[..., 2]
    crosses = (depth_start < _NEAR_PLANE_M) != (depth_end < _NEAR_PLANE_M)
    share = (_NEAR_PLANE_M - depth_start) / np.where(crosses, depth_end - depth_start, 1.0)
    cut = start + share[..., None] * (end - start)
    start = np.where((crosses & (depth_start < _NEAR_PLANE_M))[..., None], cut, start)
    end = np.where((crosses & (depth_end < _NEAR_PLANE_M))[..., None], cut, end)

    ends = np.concatenate([start, end], axis=1)
    in_front = ends[..., 2] >= _NEAR_PLANE_M * (1 - 1e-9)
    homogeneous = ends @ calibration.P2[:, :3].T + calibration.P2[:, 3]
    pixels = homogeneous[..., :2] / np.where(in_front, homogeneous[..., 2], 1.0)[..., None]
    low = np.where(in_front[..., None], pixels, np.inf).min(axis=1)
    high = np.where(in_front[..., None], pixels, -np.inf).max(axis=1)
    limits = np.array(image_size, np.float64) - 1
    image_boxes = np.concatenate([np.clip(low, 0, limits), np.clip(high, 0, limits)], axis=1)
    return np.where(is_seen(image_boxes)[:, None], image_boxes, 0.0)


def is_seen(image_boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(M,) bool, whether boxes (M, 4) that were clipped to the image have an area left."""
    left, top, right, bottom = image_boxes.T
    seen: NDArray[np.bool_] = (right > left) & (bottom > top)
    return seen


def in_field_of_view(
    points: NDArray[np.float32], calibration: KittiCalibration, image_size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Tell which points the camera sees.

    Args:
        points: (N, 3 or more) x, y, z first, lidar frame.
        calibration: Of the frame.
        image_size: Width and height, pixels.

    Returns:
        (N,) bool; False behind the camera and for NaN.
    """
    camera = _transformed(points[:, :3].astype(np.float64), calibration.T_camera_lidar)
    homogeneous = camera @ calibration.P2[:, :3].T + calibration.P2[:, 3]
    in_front = homogeneous[:, 2] > 0
    pixels = homogeneous[:, :2] / np.where(in_front, homogeneous[:, 2], 1.0)[:, None]
    column, row = pixels.T
    width, height = image_size
    seen: NDArray[np.bool_] = in_front & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return seen


def _transformed(points: NDArray[np.float64], T_target_source: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: N803
    moved: NDArray[np.float64] = points @ T_target_source[:3, :3].T + T_target_source[:3, 3]
    return moved


def _wrapped(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
