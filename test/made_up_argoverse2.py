"""A small Argoverse 2 log: three sweeps, of which two have annotations."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

STAMPS_NS = (315_973_157_959_879_000, 315_973_158_059_879_001, 315_973_158_159_879_002)
SPEED_M = 0.5
"""How far the vehicle drives from sweep to sweep, to the north of the city, which is forward for it."""

YAW = 0.4
BUS = ("BUS", 12.0, 3.0, 3.4, YAW, 10.0, -4.0, 1.4, 90)
CAR = ("REGULAR_VEHICLE", 4.6, 1.9, 1.6, -YAW, 20.0, 3.0, 0.5, 25)
HIDDEN = ("PEDESTRIAN", 0.6, 0.7, 1.8, 0.0, 8.0, 8.0, 0.6, 0)


def annotation_rows() -> list[dict[str, object]]:
    rows = []
    for stamp, objects in ((STAMPS_NS[1], (BUS, CAR)), (STAMPS_NS[2], (CAR, HIDDEN))):
        for category, length, width, height, yaw, x, y, z, points in objects:
            rows.append(
                {
                    "timestamp_ns": stamp,
                    "track_uuid": category.lower(),
                    "category": category,
                    "length_m": length,
                    "width_m": width,
                    "height_m": height,
                    "qw": math.cos(yaw / 2),
                    "qx": 0.0,
                    "qy": 0.0,
                    "qz": math.sin(yaw / 2),
                    "tx_m": x,
                    "ty_m": y,
                    "tz_m": z,
                    "num_interior_pts": points,
                }
            )
    return rows


def pose_rows() -> list[dict[str, object]]:
    half = math.pi / 4
    return [
        {"timestamp_ns": stamp, "qw": math.cos(half), "qx": 0.0, "qy": 0.0, "qz": math.sin(half)}
        | {"tx_m": 1468.0, "ty_m": 211.0 + SPEED_M * k, "tz_m": 13.0}
        for k, stamp in enumerate(STAMPS_NS)
    ]


def make_log(folder: Path, *, suffix: str = ".csv", beside: bool = False) -> Path:
    """Write the log; sweeps need pyarrow, and so do tables with suffix ``.feather``."""
    lidar = folder if beside else folder / "sensors" / "lidar"
    lidar.mkdir(parents=True)
    for k, stamp in enumerate(STAMPS_NS):
        write_feather(lidar / f"{stamp}.feather", sweep_columns(k))
    for name, rows in (("annotations", annotation_rows()), ("city_SE3_egovehicle", pose_rows())):
        write_table(folder / f"{name}{suffix}", rows)
    return folder


def sweep_columns(k: int) -> dict[str, np.ndarray]:
    """Noise on the ground, and a post that stands at x = 15 m of the first sweep."""
    rng = np.random.default_rng(k)
    xyz = np.column_stack([rng.uniform(-30, 30, (300, 2)), np.full(300, -0.33)])
    xyz = np.concatenate([xyz, [[15 - SPEED_M * k, 2.0, 1.0]]]).astype(np.float16)
    intensity = np.append(rng.integers(0, 60, 300), 255).astype(np.uint8)
    columns = {name: xyz[:, i] for i, name in enumerate("xyz")}
    return columns | {"intensity": intensity, "laser_number": np.zeros(301, np.uint8)}


def write_feather(path: Path, columns: dict[str, np.ndarray]) -> None:
    import pyarrow as pa
    from pyarrow import feather

    feather.write_feather(pa.table({name: pa.array(values) for name, values in columns.items()}), str(path))


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".feather":
        write_feather(path, {name: np.array([row[name] for row in rows]) for name in rows[0]})
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
