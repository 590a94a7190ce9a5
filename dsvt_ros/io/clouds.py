"""Any file or bag with clouds as a sequence of scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError, PointCloudError
from dsvt_ros.io.bags import BAG_SUFFIXES, BagCloud, clouds_from_bag, is_bag
from dsvt_ros.io.point_files import (
    DEFAULT_COLUMNS,
    points_from_bin,
    points_from_npy,
    points_from_pcd,
)
from dsvt_ros.io.point_times import FIELD_NAMES as POINT_TIMES
from dsvt_ros.io.pointcloud2 import (
    DATATYPES,
    REQUIRED_COLUMNS,
    CloudLike,
    Fill,
    fill_of_columns,
    layout_from_msg,
    match_column,
)

FILE_SUFFIXES = (".npy", ".bin", ".pcd")
_EXPECTED = f"a {', '.join((*FILE_SUFFIXES, *BAG_SUFFIXES))} file or a bag folder with metadata.yaml"


@dataclass(frozen=True, eq=False)
class Scan:
    """One cloud.

    Attributes:
        source: Path, for bags with the position among the topic's clouds: ``drive.mcap#12``.
        points: (N, C) float32, unfiltered; metres, in the frame `frame_id`.
        columns: C names, as the file has them. Times of points of a bag are left out: float32 cannot hold them, and
            a model's feature ``time`` means the age of a sweep.
        stamp_ns: When it was measured; None for files, which do not say.
        frame_id: Coordinate frame; empty for files.
        message: What it was read from; None for files.
    """

    source: str
    points: NDArray[np.float32]
    columns: tuple[str, ...]
    stamp_ns: int | None = None
    frame_id: str = ""
    message: CloudLike | None = None


def open_clouds(path: str | Path, columns: Sequence[str] | None = None, topic: str | None = None) -> Iterator[Scan]:
    """Scans of a ``.npy``, ``.bin`` or ``.pcd`` file, of a bag folder, ``.mcap`` or ``.db3`` file.

    Args:
        path: File or bag folder.
        columns: What the columns of ``.npy`` and ``.bin`` are, `DEFAULT_COLUMNS` by default; the
            other kinds name theirs.
        topic: Topic of a bag, needed where several have clouds.

    Returns:
        One scan for a file, those of the topic for a bag, each read when asked for.

    Raises:
        DataError: At once for a path that is missing, of another kind or a bag without clouds;
            while iterating for contents that are not what the suffix claims.
        PointCloudError: While iterating, for a cloud whose sizes contradict each other.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_EXPECTED}")
    if is_bag(path):
        return _scans_of_bag(path, clouds_from_bag(path, topic))
    if path.is_dir() or path.suffix.lower() not in FILE_SUFFIXES:
        kind = "a folder without metadata.yaml" if path.is_dir() else f"of kind {path.suffix!r}"
        raise DataError(f"{path} is {kind}; expected {_EXPECTED}")
    if topic is not None:
        raise DataError(f"got topic {topic} for {path}, but only bags have topics")
    return _scan_of_file(path, columns)


def select_columns(scan: Scan, wanted: Sequence[str], fill: Fill | None = None) -> NDArray[np.float32]:
    """Columns of a scan, in the order wanted; names and synonyms as in `points_from_msg`.

    Args:
        scan: Any scan.
        wanted: C names.
        fill: Value of the columns that the scan may lack, by name or one for each of `wanted`.

    Returns:
        (N, C) float32; the scan's own array where it has exactly these columns.

    Raises:
        PointCloudError: A column without fill value is missing.
    """
    if scan.columns == tuple(wanted):
        return scan.points
    defaults = fill_of_columns(wanted, fill)
    points = np.empty((len(scan.points), len(wanted)), dtype=np.float32)
    for target, column in enumerate(wanted):
        source = match_column(column, scan.columns)
        if source is not None:
            points[:, target] = scan.points[:, source]
        elif column in defaults:
            points[:, target] = defaults[column]
        else:
            raise PointCloudError(
                f"{scan.source} has no column {column!r}, only {', '.join(scan.columns)}"
                + ("" if column in REQUIRED_COLUMNS else "; give a fill value to do without it")
            )
    return points


def _scan_of_file(path: Path, columns: Sequence[str] | None) -> Iterator[Scan]:
    suffix = path.suffix.lower()
    if suffix == ".pcd":
        points, names = points_from_pcd(path)
    elif suffix == ".bin":
        names = DEFAULT_COLUMNS if columns is None else tuple(columns)
        points = points_from_bin(path, names)
    else:
        points = points_from_npy(path)
        names = _names_of_array(path, points.shape[1], columns)
    yield Scan(str(path), points, names)


def _names_of_array(path: Path, num_columns: int, columns: Sequence[str] | None) -> tuple[str, ...]:
    """Column names of an array; x, y and z alone need not be named."""
    names = DEFAULT_COLUMNS if columns is None else tuple(columns)
    if columns is None and num_columns == len(REQUIRED_COLUMNS):
        names = REQUIRED_COLUMNS
    if num_columns != len(names):
        raise DataError(
            f"{path} has {num_columns} columns, but {len(names)} names were expected "
            f"({','.join(names)}); name them all with --columns"
        )
    return names


def _scans_of_bag(path: Path, clouds: Iterator[BagCloud]) -> Iterator[Scan]:
    for index, cloud in enumerate(clouds):
        layout = layout_from_msg(cloud.message)
        names = [
            f.name for f in layout.fields if f.name and f.datatype in DATATYPES and f.name.lower() not in POINT_TIMES
        ]
        columns = tuple(dict.fromkeys((*REQUIRED_COLUMNS, *names)))
        points = cloud.points(columns)
        yield Scan(f"{path}#{index}", points, columns, cloud.stamp_ns, cloud.frame_id, cloud.message)
