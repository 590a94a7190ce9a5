"""The nuScenes data set: tables and lidar sweeps, read without its development kit.

Its conventions, and where they differ from ours:

- *Sensor frame* of LIDAR_TOP, in which ``.pcd.bin`` files are: x right, y forward, z up; the ground about 1.84 m below,
  tilted by a degree or two, since the sensor is. Files hold float32 x, y, z, intensity (0 to 255) and ring, and returns
  from the roof of the vehicle. The published nuScenes models are trained in this frame, as it is.
- *Ego frame*: x forward, y left, z up, origin on the ground below the rear axle. ``calibrated_sensor`` is the pose of
  a sensor in it.
- *Global frame*: axes of the map, x, y up to thousands of metres. ``ego_pose`` is the pose of the vehicle in it, at the
  time of that sweep: every sweep has one of its own.
- Rotations are quaternions w, x, y, z. Time stamps are microseconds.
- Boxes of ``sample_annotation`` and of result files are in the global frame, origin at the centre, sizes in the order
  *width, length, height*, heading along the length. Ours are ``[x, y, z, length, width, height, yaw(, vx, vy)]``.
- Velocities are metres a second over ground, along the axes of the frame that the box is in: global in files, those of
  the cloud in our boxes. The data set does not store them: they follow from the annotations before and after.

Key frames (*samples*, two a second) have annotations; the sweeps between them (20 a second) have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError
from dsvt_ros.io.clouds import Scan
from dsvt_ros.io.labelled_sweeps import Axes, LabelledSweep, PosedScan
from dsvt_ros.io.point_files import points_from_bin
from dsvt_ros.io.stored_poses import pose_from_quaternion, yaw_of

CHANNEL = "LIDAR_TOP"
COLUMNS = ("x", "y", "z", "intensity", "ring")
AXES: Axes = "x_right"

EGO_RADIUS_M = 1.0
"""Earlier sweeps lose their returns with |x| and |y| below this, as the published models' loader drops them: they are
of the vehicle itself, and would trail behind it (OpenPCDet, nuscenes_dataset.py, remove_ego_points)."""

MAX_VELOCITY_GAP_S = 1.5
"""Annotations further apart than this (twice this for those before and after) tell no velocity, as in the kit."""

_SWEEP_KEYS = ("lidar_file", "timestamp", "lidar2ego", "ego2global", "instances")


@dataclass(frozen=True)
class NuScenesSample:
    """A key frame.

    Attributes:
        token: Its name in all tables.
        scene: Name of its scene, such as ``scene-0103``.
        lidar_token: Its LIDAR_TOP record in ``sample_data``.
    """

    token: str
    scene: str
    lidar_token: str


@dataclass(frozen=True, eq=False)
class NuScenesSweep:
    """One turn of LIDAR_TOP.

    Attributes:
        path: Its ``.pcd.bin`` file.
        stamp_ns: When it was measured.
        T_ego_sensor: (4, 4) float64 pose of the sensor in the ego frame.
        T_global_ego: (4, 4) float64 pose of the vehicle in the global frame at that time.
    """

    path: Path
    stamp_ns: int
    T_ego_sensor: NDArray[np.float64]
    T_global_ego: NDArray[np.float64]

    @property
    def T_global_sensor(self) -> NDArray[np.float64]:  # noqa: N802
        """(4, 4) float64 pose of the sensor in the global frame."""
        product: NDArray[np.float64] = self.T_global_ego @ self.T_ego_sensor
        return product

    @property
    def T_level_sensor(self) -> NDArray[np.float64]:  # noqa: N802
        """(4, 4) float64 pose in the frame with the axes of the ego frame, on the ground below the sensor."""
        pose: NDArray[np.float64] = self.T_ego_sensor.copy()
        pose[:2, 3] = 0
        return pose

    def read(self, *, drop_ego: bool = False) -> PosedScan:
        """Read the cloud.

        Args:
            drop_ego: Leave out returns near the sensor (`EGO_RADIUS_M`).

        Raises:
            DataError: The file is missing or no whole number of points.
        """
        points = points_from_bin(self.path, COLUMNS)
        if drop_ego:
            points = points[~(np.abs(points[:, :2]) < EGO_RADIUS_M).all(axis=1)]
        return PosedScan(Scan(str(self.path), points, COLUMNS, self.stamp_ns, CHANNEL), self.T_global_sensor)


@dataclass(frozen=True, eq=False)
class NuScenesObjects:
    """Annotations of a key frame.

    Attributes:
        categories: M names, such as ``vehicle.car``.
        boxes: (M, 9) float64 ``[x, y, z, length, width, height, yaw, vx, vy]``, global frame; NaN for velocities that
            are not known.
        num_points: (M,) int64, lidar and radar returns on each.
    """

    categories: tuple[str, ...]
    boxes: NDArray[np.float64]
    num_points: NDArray[np.int64]


class NuScenesFolder:
    """A folder of the data set: ``samples``, ``sweeps`` and the tables of one version.

    Attributes:
        path: The folder.
        version: Name of the folder of tables, such as ``v1.0-mini``.
        scenes: Names of all scenes.
    """

    def __init__(self, path: Path, version: str) -> None:
        """Read the tables that lead to clouds; of those of all sensors only LIDAR_TOP's records are kept."""
        self.path = path
        self.version = version
        self._scenes = _by(self._table("scene"), "name")
        self._samples = _by(self._table("sample"))
        sensors = {row["token"] for row in self._table("sensor") if row["channel"] == CHANNEL}
        calibrations = [row for row in self._table("calibrated_sensor") if row["sensor_token"] in sensors]
        self._calibrations = _by(calibrations)
        self._sweeps = _by(
            row for row in self._table("sample_data") if row["calibrated_sensor_token"] in self._calibrations
        )
        poses = {row["ego_pose_token"] for row in self._sweeps.values()}
        self._poses = _by(row for row in self._table("ego_pose") if row["token"] in poses)
        self._key_sweeps = {row["sample_token"]: row["token"] for row in self._sweeps.values() if row["is_key_frame"]}

    @property
    def scenes(self) -> tuple[str, ...]:
        """Names of the scenes, in the order of the table."""
        return tuple(self._scenes)

    def samples(self, scenes: Sequence[str]) -> list[NuScenesSample]:
        """Key frames of scenes, in order.

        Raises:
            DataError: A scene is not in the tables, or a key frame has no LIDAR_TOP record.
        """
        found = []
        for name in scenes:
            token = self._get("scene", self._scenes, name)["first_sample_token"]
            while token:
                row = self._get("sample", self._samples, token)
                if token not in self._key_sweeps:
                    raise DataError(f"{self._file('sample_data')} has no {CHANNEL} key frame of sample {token}")
                found.append(NuScenesSample(token, name, self._key_sweeps[token]))
                token = row["next"]
        return found

    def sweeps(self, sample: NuScenesSample, count: int = 1) -> list[NuScenesSweep]:
        """The key frame and the sweeps before it, newest first: `count` of them, or fewer where the scene begins."""
        found: list[NuScenesSweep] = []
        token = sample.lidar_token
        while token and len(found) < count:
            row = self._get("sample_data", self._sweeps, token)
            calibration = self._get("calibrated_sensor", self._calibrations, row["calibrated_sensor_token"])
            ego = self._get("ego_pose", self._poses, row["ego_pose_token"])
            found.append(
                NuScenesSweep(
                    path=self.path / row["filename"],
                    stamp_ns=row["timestamp"] * 1000,
                    T_ego_sensor=self._pose("calibrated_sensor", calibration),
                    T_global_ego=self._pose("ego_pose", ego),
                )
            )
            token = row["prev"]
        return found

    def scans(self, sample: NuScenesSample, count: int = 1) -> tuple[PosedScan, ...]:
        """The clouds of `sweeps`; the earlier ones without returns from the vehicle itself."""
        return tuple(sweep.read(drop_ego=i > 0) for i, sweep in enumerate(self.sweeps(sample, count)))

    def objects(self, sample: NuScenesSample) -> NuScenesObjects:
        """Annotations of a key frame; the tables of annotations are read at the first call."""
        rows = self._rows_of_sample.get(sample.token, [])
        categories, boxes = [], []
        for row in rows:
            instance = self._get("instance", self._instances, row["instance_token"])
            categories.append(self._get("category", self._categories, instance["category_token"])["name"])
            pose = self._pose("sample_annotation", row)
            width, length, height = row["size"]
            boxes.append([*pose[:3, 3], length, width, height, yaw_of(pose), *self._velocity(row)])
        return NuScenesObjects(
            categories=tuple(categories),
            boxes=np.array(boxes, np.float64).reshape(-1, 9),
            num_points=np.array([row["num_lidar_pts"] + row["num_radar_pts"] for row in rows], np.int64),
        )

    @cached_property
    def _annotations(self) -> dict[str, dict[str, Any]]:
        return _by(self._table("sample_annotation"))

    @cached_property
    def _rows_of_sample(self) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self._annotations.values():
            rows.setdefault(row["sample_token"], []).append(row)
        return rows

    @cached_property
    def _instances(self) -> dict[str, dict[str, Any]]:
        return _by(self._table("instance"))

    @cached_property
    def _categories(self) -> dict[str, dict[str, Any]]:
        return _by(self._table("category"))

    def _velocity(self, row: Mapping[str, Any]) -> NDArray[np.float64]:
        """(2,) vx, vy between the annotations before and after, or one of them and this; NaN if not known."""
        around = [row[key] for key in ("prev", "next") if row[key]]
        neighbors = [self._get("sample_annotation", self._annotations, token) for token in around]
        first, last = neighbors[0] if row["prev"] else row, neighbors[-1] if row["next"] else row
        stamps = [self._get("sample", self._samples, end["sample_token"])["timestamp"] for end in (first, last)]
        elapsed_s = 1e-6 * (stamps[1] - stamps[0])
        if not neighbors or elapsed_s > MAX_VELOCITY_GAP_S * len(neighbors):
            return np.full(2, np.nan)
        moved: NDArray[np.float64] = np.subtract(last["translation"], first["translation"])[:2] / elapsed_s
        return moved

    def _pose(self, table: str, row: Mapping[str, Any]) -> NDArray[np.float64]:
        return pose_from_quaternion(row["rotation"], row["translation"], f"{self._file(table)}, {row['token']}")

    def _get(self, table: str, rows: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
        if key not in rows:
            raise DataError(f"{self._file(table)} has no {key}: are the tables of one download, and complete?")
        return rows[key]

    def _table(self, name: str) -> list[dict[str, Any]]:
        path = self._file(name)
        content = read_json(path)
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise DataError(f"{path} is no nuScenes table: expected a list of records")
        missing = [key for key in _TABLES[name] if any(key not in row for row in content)]
        if missing:
            raise DataError(f"{path} is no nuScenes table: a record has no {' and no '.join(missing)}")
        return content

    def _file(self, table: str) -> Path:
        return self.path / self.version / f"{table}.json"


def open_nuscenes(path: str | Path, version: str | None = None) -> NuScenesFolder:
    """Open a folder of the data set.

    Args:
        path: The folder with ``samples``, ``sweeps`` and one or more ``v1.0-...``.
        version: Which of these; None if there is only one.

    Raises:
        DataError: There is no such folder or version, or a table is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; expected one with samples, sweeps and v1.0-mini or v1.0-trainval")
    versions = sorted(folder.parent.name for folder in path.glob("*/sample_data.json"))
    if not versions:
        raise DataError(f"{path} has no v1.0-*/sample_data.json: is it a nuScenes folder?")
    if version is None and len(versions) > 1:
        raise DataError(f"{path} has the versions {', '.join(versions)}: choose one with --version")
    if version is not None and version not in versions:
        raise DataError(f"{path} has no version {version}, only {', '.join(versions)}")
    return NuScenesFolder(path, version or versions[0])


def read_sweep(path: Path) -> LabelledSweep:
    """Read a single sweep from its JSON description, which takes no tables.

    The file has ``lidar_file`` (a ``.pcd.bin`` beside it), ``timestamp`` (seconds), ``lidar2ego`` and ``ego2global``
    (4 x 4 poses) and ``instances``, each with ``name`` (a detection class, or ``ignore``), ``box``
    ``[x, y, z, length, width, height, yaw]`` in the sensor frame and ``num_lidar_pts``.

    Raises:
        DataError: The file or its cloud is missing or is something else.
    """
    content = read_json(path)
    missing = [key for key in _SWEEP_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path} describes no nuScenes sweep: it has no {' and no '.join(missing)}")
    try:
        instances = content["instances"]
        boxes = np.array([instance["box"] for instance in instances], np.float64).reshape(-1, 7)
        names = tuple(str(instance["name"]) for instance in instances)
        num_points = np.array([int(instance["num_lidar_pts"]) for instance in instances], np.int64)
        T_ego_sensor, T_global_ego = (
            np.array(content[key], np.float64).reshape(4, 4) for key in ("lidar2ego", "ego2global")
        )
        stamp_ns = round(float(content["timestamp"]) * 1e9)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} describes no nuScenes sweep: {error!r}") from None
    sweep = NuScenesSweep(path.parent / str(content["lidar_file"]), stamp_ns, T_ego_sensor, T_global_ego)
    return LabelledSweep((sweep.read(),), AXES, sweep.T_level_sensor, boxes, names, num_points)


def read_json(path: Path) -> Any:
    """The content of a JSON file; `DataError` if it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None


_POSE = ("token", "translation", "rotation")
_TABLES = {
    "scene": ("token", "name", "first_sample_token"),
    "sample": ("token", "timestamp", "next"),
    "sensor": ("token", "channel"),
    "calibrated_sensor": (*_POSE, "sensor_token"),
    "sample_data": (
        "token",
        "sample_token",
        "ego_pose_token",
        "calibrated_sensor_token",
        "timestamp",
        "is_key_frame",
        "filename",
        "prev",
    ),
    "ego_pose": _POSE,
    "sample_annotation": (
        *_POSE,
        "sample_token",
        "instance_token",
        "size",
        "prev",
        "next",
        "num_lidar_pts",
        "num_radar_pts",
    ),
    "instance": ("token", "category_token"),
    "category": ("token", "name"),
}
"""Tables that are read, and the columns that are used."""


def _by(rows: Any, key: str = "token") -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in rows}
