"""The Argoverse 2 sensor data set: lidar sweeps and annotations, without its development kit.

A *log* is a folder with ``sensors/lidar/*.feather`` (or the sweeps beside the tables), ``annotations`` and
``city_SE3_egovehicle``; tables may be ``.feather``, as the data set comes, or ``.csv``. Its conventions:

- Everything is in the *ego frame* of the sweep: x forward, y left, z up. Its origin is at the rear axle, and the ground
  about 0.33 m, the radius of a wheel, below it. Sweeps join two lidars, which are on the roof at about x = 1.4 m.
- Coordinates of points are float16: steps of 3 cm at 50 m, 12 cm at 200 m. Intensity is 0 to 255.
- Boxes have their origin at the centre, sizes length, width, height, and a quaternion w, x, y, z. Annotations come ten
  times a second, one set for every sweep.
- Time stamps are nanoseconds; that of a sweep is the name of its file.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError
from dsvt_ros.io.clouds import Scan
from dsvt_ros.io.labelled_sweeps import LabelledSweep, PosedScan
from dsvt_ros.io.stored_poses import pose_from_quaternion, yaw_of

COLUMNS = ("x", "y", "z", "intensity")
FRAME = "egovehicle"
EGO_HEIGHT_M = 0.33
"""Height of the ego frame's origin above the ground."""

ANNOTATIONS = "annotations"
POSES = "city_SE3_egovehicle"
SUFFIXES = (".feather", ".csv")

_ROTATION = ("qw", "qx", "qy", "qz")
_TRANSLATION = ("tx_m", "ty_m", "tz_m")
_SIZE = ("length_m", "width_m", "height_m")

Table = Mapping[str, NDArray[Any]]
"""Columns by name."""


@dataclass(frozen=True)
class ArgoverseLog:
    """A drive of some seconds.

    Attributes:
        path: The folder.
        stamps_ns: Of all its sweeps, in order.
    """

    path: Path
    stamps_ns: tuple[int, ...]

    @cached_property
    def labelled_ns(self) -> tuple[int, ...]:
        """Stamps of the sweeps that have annotations."""
        labelled = set(self._annotations["timestamp_ns"].tolist())
        return tuple(stamp for stamp in self.stamps_ns if stamp in labelled)

    def sweep(self, stamp_ns: int, count: int = 1) -> LabelledSweep:
        """A sweep with its annotations and up to `count` - 1 sweeps before it.

        Raises:
            DataError: A file is missing or is something else.
        """
        last = self.stamps_ns.index(stamp_ns)
        stamps = self.stamps_ns[max(0, last + 1 - count) : last + 1][::-1]
        # One sweep alone needs no poses.
        poses = {stamp_ns: np.eye(4)} if len(stamps) == 1 else self._poses
        missing = [stamp for stamp in stamps if stamp not in poses]
        if missing:
            raise DataError(f"{_table_path(self.path, POSES)} has no pose of sweep {missing[0]}")
        rows = np.flatnonzero(self._annotations["timestamp_ns"] == stamp_ns)
        boxes = [self._box(int(row)) for row in rows]
        T_level_ego = np.eye(4)
        T_level_ego[2, 3] = EGO_HEIGHT_M
        return LabelledSweep(
            scans=tuple(PosedScan(self._scan(stamp), poses[stamp]) for stamp in stamps),
            axes="x_forward",
            T_level_sensor=T_level_ego,
            boxes=np.array(boxes, np.float64).reshape(-1, 7),
            class_names=tuple(str(name) for name in self._annotations["category"][rows]),
            num_points=self._annotations["num_interior_pts"][rows].astype(np.int64),
        )

    @cached_property
    def _annotations(self) -> Table:
        columns = ("timestamp_ns", "category", *_SIZE, *_ROTATION, *_TRANSLATION, "num_interior_pts")
        return read_table(_table_path(self.path, ANNOTATIONS), columns)

    @cached_property
    def _poses(self) -> dict[int, NDArray[np.float64]]:
        path = _table_path(self.path, POSES)
        table = read_table(path, ("timestamp_ns", *_ROTATION, *_TRANSLATION))
        return {int(stamp): _pose(table, row, path) for row, stamp in enumerate(table["timestamp_ns"])}

    def _box(self, row: int) -> list[float]:
        pose = _pose(self._annotations, row, self.path / ANNOTATIONS)
        return [*pose[:3, 3], *(float(self._annotations[name][row]) for name in _SIZE), yaw_of(pose)]

    def _scan(self, stamp_ns: int) -> Scan:
        path = _lidar(self.path) / f"{stamp_ns}.feather"
        table = read_table(path, COLUMNS)
        points = np.stack([table[name].astype(np.float32) for name in COLUMNS], axis=1)
        return Scan(str(path), points, COLUMNS, stamp_ns, FRAME)


def open_argoverse2(path: str | Path) -> list[ArgoverseLog]:
    """The logs in a folder, or the one that it is.

    Raises:
        DataError: There is no log with sweeps and annotations.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; expected an Argoverse 2 log, or a folder of logs such as sensor/val")
    folders = [path] if _has_annotations(path) else sorted(f for f in path.iterdir() if _has_annotations(f))
    if not folders:
        raise DataError(f"{path} and its folders have no {ANNOTATIONS}.feather or .csv: is it a labelled log?")
    logs = []
    for folder in folders:
        stamps = sorted(int(file.stem) for file in _lidar(folder).glob("*.feather") if file.stem.isdecimal())
        if not stamps:
            raise DataError(f"{folder} has no sweeps: expected sensors/lidar/TIMESTAMP.feather or TIMESTAMP.feather")
        logs.append(ArgoverseLog(folder, tuple(stamps)))
    return logs


def labelled_sweeps(logs: list[ArgoverseLog], count: int = 1) -> Iterator[LabelledSweep]:
    """All labelled sweeps, each with up to `count` - 1 sweeps before it."""
    for log in logs:
        for stamp_ns in log.labelled_ns:
            yield log.sweep(stamp_ns, count)


def read_table(path: Path, columns: tuple[str, ...]) -> Table:
    """Columns of a ``.feather`` or ``.csv`` file, as numbers where they are.

    Raises:
        DataError: The file is missing, is something else or lacks a column; or pyarrow is missing.
    """
    try:
        table = _read_csv(path) if path.suffix == ".csv" else _read_feather(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise DataError(f"{path} is no {path.suffix[1:]} table: {error}") from None
    missing = [name for name in columns if name not in table]
    if missing:
        raise DataError(f"{path} has no column {' and no '.join(missing)}, only {', '.join(table)}")
    return table


def _read_feather(path: Path) -> dict[str, NDArray[Any]]:
    try:
        from pyarrow import feather
    except ImportError:
        raise DataError(
            f"{path}: reading .feather files needs pyarrow; install it with pip install pyarrow "
            "(or dsvt_ros[argoverse])"
        ) from None
    with path.open("rb") as file:
        table = feather.read_table(file)
    return {name: table[name].to_numpy() for name in table.column_names}


def _read_csv(path: Path) -> dict[str, NDArray[Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    uneven = [number for number, row in enumerate(rows, 2) if len(row) != len(header)]
    if uneven:
        raise ValueError(f"line {uneven[0]} has another number of columns than the first line")
    return {name: _numbers([row[i] for row in rows]) for i, name in enumerate(header)}


def _numbers(texts: list[str]) -> NDArray[Any]:
    """int64 where all are whole numbers (time stamps are too long for float64), else float64, else text."""
    for kind in (np.int64, np.float64):
        try:
            return np.array(texts).astype(kind)
        except ValueError:
            continue
    return np.array(texts)


def _pose(table: Table, row: int, where: Path) -> NDArray[np.float64]:
    rotation, translation = ([float(table[name][row]) for name in names] for names in (_ROTATION, _TRANSLATION))
    return pose_from_quaternion(rotation, translation, f"{where}, row {row}")


def _has_annotations(folder: Path) -> bool:
    return any((folder / f"{ANNOTATIONS}{suffix}").is_file() for suffix in SUFFIXES)


def _table_path(folder: Path, name: str) -> Path:
    """The table's file of either kind; the feather file where neither exists, for the message."""
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def _lidar(folder: Path) -> Path:
    """Where a log's sweeps are."""
    lidar = folder / "sensors" / "lidar"
    return lidar if lidar.is_dir() else folder
