"""A small nuScenes data set: two scenes of a vehicle that drives past a car, a pedestrian and a landmark."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

SCENES = ("scene-0103", "scene-0916")  # those of the split mini_val
START_US = 1_532_402_927_000_000
STEP_US = 125_000
SWEEPS_OF_SAMPLE = 4
"""A key frame and the sweeps after it."""

SPEED = np.array([4.0, 3.0])
CAR_VELOCITY = np.array([6.0, -2.0])
LANDMARK = np.array([1010.0, 620.0, 3.0])
"""A standing thing that every sweep sees, global frame; its point has intensity 77."""

MOUNT = np.array([0.94, 0.0, 1.84])
TILT = 0.03
"""The sensor looks down to the front, radians."""

EGO_YAW = 0.7
CAR_YAW = -0.3
CAR_SIZE = (1.8, 4.5, 1.6)  # width, length, height
PERSON_SIZE = (0.6, 0.7, 1.75)


def turn_z(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def turn_x(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


# From the sensor's axes (x right, y forward), tilted about its x axis, to those of the vehicle.
SENSOR_ROTATION = turn_z(-math.pi / 2) @ turn_x(-TILT)


def sensor_quaternion() -> list[float]:
    """Product of the two half turns, written out: w, x, y, z."""
    c, s = math.cos(-math.pi / 4), math.sin(-math.pi / 4)
    a, b = math.cos(-TILT / 2), math.sin(-TILT / 2)
    return [c * a, c * b, s * b, s * a]


def after(start: np.ndarray, velocity: np.ndarray, stamp_us: int) -> np.ndarray:
    return start + np.append(velocity, 0.0) * (stamp_us - START_US) / 1e6


def ego_position(stamp_us: int) -> np.ndarray:
    return after(np.array([1000.0, 600.0, 0.0]), SPEED, stamp_us)


def in_sensor(point: np.ndarray, stamp_us: int) -> np.ndarray:
    """A point of the global frame in that of the sensor at a time."""
    ego = turn_z(EGO_YAW).T @ (point - ego_position(stamp_us))
    return SENSOR_ROTATION.T @ (ego - MOUNT)


def car_center(stamp_us: int) -> np.ndarray:
    return after(np.array([1012.0, 604.0, 0.8]), CAR_VELOCITY, stamp_us)


PERSON_CENTER = np.array([1003.0, 611.0, 0.9])


def make_nuscenes(root: Path, version: str = "v1.0-mini", samples: int = 2) -> Path:
    """Write the folder; both scenes are alike."""
    tables: dict[str, list[dict[str, object]]] = {name: [] for name in TABLES}
    tables["category"] = [
        {"token": "c-car", "name": "vehicle.car", "description": ""},
        {"token": "c-person", "name": "human.pedestrian.adult", "description": ""},
    ]
    tables["attribute"] = [
        {"token": "a-moving", "name": "vehicle.moving", "description": ""},
        {"token": "a-standing", "name": "pedestrian.standing", "description": ""},
    ]
    tables["visibility"] = [{"token": "4", "level": "v80-100", "description": ""}]
    tables["sensor"] = [
        {"token": "s-camera", "channel": "CAM_FRONT", "modality": "camera"},
        {"token": "s-lidar", "channel": "LIDAR_TOP", "modality": "lidar"},
    ]
    tables["log"] = [{"token": "log", "logfile": "made-up", "vehicle": "", "date_captured": "", "location": "nowhere"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/map.png"}]
    (root / "maps").mkdir(parents=True)
    (root / "maps" / "map.png").write_bytes(b"")
    for folder in ("samples", "sweeps"):
        (root / folder / "LIDAR_TOP").mkdir(parents=True)
    for number, scene in enumerate(SCENES):
        _add_scene(root, tables, scene, START_US + number * 100_000_000, samples)
    (root / version).mkdir()
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows))
    return root


TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation",
    "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip


def cloud_at(stamp_us: int, landmark_us: int, seed: int) -> np.ndarray:
    """Noise on the ground, returns from the vehicle itself, and the landmark; (N, 5) float32."""
    rng = np.random.default_rng(seed)
    ground = np.column_stack([rng.uniform(-40, 40, (400, 2)), np.full(400, -1.84)])
    own = rng.uniform([-0.8, -0.8, -1], [0.8, 0.8, -0.5], (50, 3))
    xyz = np.concatenate([ground, own, [in_sensor(LANDMARK, landmark_us)]])
    intensity = np.concatenate([rng.uniform(0, 60, 450), [77.0]])
    return np.column_stack([xyz, intensity, np.zeros(451)]).astype(np.float32)


def _add_scene(root: Path, tables: dict[str, list[dict[str, object]]], scene: str, begin_us: int, samples: int) -> None:
    sample_tokens = [f"{scene}-{k}" for k in range(samples)]
    tables["scene"].append(
        {
            "token": scene + "-token",
            "name": scene,
            "description": "",
            "log_token": "log",
            "nbr_samples": samples,
            "first_sample_token": sample_tokens[0],
            "last_sample_token": sample_tokens[-1],
        }
    )
    tables["calibrated_sensor"] += [
        {
            "token": f"{scene}-{kind}",
            "sensor_token": f"s-{kind}",
            "translation": MOUNT.tolist(),
            "rotation": sensor_quaternion(),
            "camera_intrinsic": [],
        }
        for kind in ("camera", "lidar")
    ]
    num_sweeps = samples * SWEEPS_OF_SAMPLE
    for k in range(num_sweeps):
        # Places repeat from scene to scene, time goes on.
        place_us, stamp_us = START_US + k * STEP_US, begin_us + k * STEP_US
        key = k % SWEEPS_OF_SAMPLE == 0
        name = f"{'samples' if key else 'sweeps'}/LIDAR_TOP/{scene}__{stamp_us}.pcd.bin"
        cloud_at(place_us, place_us, seed=k).tofile(root / name)
        common = {"timestamp": stamp_us, "height": 0, "width": 0, "fileformat": "pcd"}
        tables["ego_pose"].append(
            {
                "token": f"{scene}-pose-{k}",
                "timestamp": stamp_us,
                "translation": ego_position(place_us).tolist(),
                "rotation": [math.cos(EGO_YAW / 2), 0.0, 0.0, math.sin(EGO_YAW / 2)],
            }
        )
        tables["sample_data"].append(
            {
                "token": f"{scene}-lidar-{k}",
                "sample_token": sample_tokens[k // SWEEPS_OF_SAMPLE],
                "ego_pose_token": f"{scene}-pose-{k}",
                "calibrated_sensor_token": f"{scene}-lidar",
                "filename": name,
                "is_key_frame": key,
                "prev": f"{scene}-lidar-{k - 1}" if k else "",
                "next": f"{scene}-lidar-{k + 1}" if k + 1 < num_sweeps else "",
                **common,
            }
        )
    for k, token in enumerate(sample_tokens):
        stamp_us = begin_us + k * SWEEPS_OF_SAMPLE * STEP_US
        tables["sample"].append(
            {
                "token": token,
                "timestamp": stamp_us,
                "scene_token": scene + "-token",
                "prev": sample_tokens[k - 1] if k else "",
                "next": sample_tokens[k + 1] if k + 1 < samples else "",
            }
        )
        place_us = START_US + k * SWEEPS_OF_SAMPLE * STEP_US
        objects = (
            ("car", car_center(place_us), CAR_YAW, CAR_SIZE, "a-moving"),
            ("person", PERSON_CENTER, 1.2, PERSON_SIZE, "a-standing"),
        )
        for kind, center, yaw, size, attribute in objects:
            tables["sample_annotation"].append(
                {
                    "token": f"{token}-{kind}",
                    "sample_token": token,
                    "instance_token": f"{scene}-{kind}",
                    "attribute_tokens": [attribute],
                    "visibility_token": "4",
                    "translation": center.tolist(),
                    "size": list(size),
                    "rotation": [math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)],
                    "num_lidar_pts": 7,
                    "num_radar_pts": 2,
                    "prev": f"{sample_tokens[k - 1]}-{kind}" if k else "",
                    "next": f"{sample_tokens[k + 1]}-{kind}" if k + 1 < samples else "",
                }
            )
    for kind in ("car", "person"):
        tables["instance"].append(
            {
                "token": f"{scene}-{kind}",
                "category_token": f"c-{kind}",
                "nbr_annotations": samples,
                "first_annotation_token": f"{sample_tokens[0]}-{kind}",
                "last_annotation_token": f"{sample_tokens[-1]}-{kind}",
            }
        )


def make_sweep_json(folder: Path) -> Path:
    """One sweep with its JSON description: a car, a pedestrian, a truck, and an object of no class."""
    folder.mkdir(parents=True, exist_ok=True)
    cloud_at(START_US, START_US, seed=0).tofile(folder / "sweep.pcd.bin")
    T_ego_sensor, T_global_ego = np.eye(4), np.eye(4)
    T_ego_sensor[:3, :3], T_ego_sensor[:3, 3] = SENSOR_ROTATION, MOUNT
    T_global_ego[:3, :3], T_global_ego[:3, 3] = turn_z(EGO_YAW), ego_position(START_US)
    instances = [
        {"name": name, "box": [x, y, -1.0, 4.0, 1.8, 1.6, 0.5], "num_lidar_pts": points}
        for name, x, y, points in (
            ("car", 3.0, 10.0, 20), ("pedestrian", -5.0, 20.0, 3), ("truck", 9.0, 40.0, 9), ("ignore", 0.0, 9.0, 4)
        )
    ]  # fmt: skip
    content = {
        "lidar_file": "sweep.pcd.bin",
        "token": "t",
        "timestamp": START_US / 1e6,
        "lidar2ego": T_ego_sensor.tolist(),
        "ego2global": T_global_ego.tolist(),
        "instances": instances,
    }
    path = folder / "sweep.json"
    path.write_text(json.dumps(content))
    return path
