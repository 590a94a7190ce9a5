"""A short, reproducible drive through a simulated street."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from dsvt_ros.training.layout import SceneConfig, make_world, rectangles_overlap
from dsvt_ros.training.lidar import HDL64, Sensor
from dsvt_ros.training.scene import World, scene_from_world
from dsvt_ros.training.simulator import Conditions, SensedScene, cast


@dataclass(frozen=True)
class DriveFrame:
    """One scan of a drive; points and boxes in the model frame of that instant.

    Attributes:
        stamp_ns: Time since the start of the drive, nanoseconds.
        points: (N, 4) float32 [x, y, z, intensity in [0, 1]].
        boxes: (M, 7) float32 [x, y, z (centre), l, w, h, yaw].
        velocities: (M, 2) float32 over ground, in the axes of the model frame, m/s.
        labels: (M,) int64: 0 car, 1 pedestrian, 2 cyclist.
        track_ids: (M,) int64, constant for each object throughout the drive.
        num_points: (M,) int64 points on each object.
        occlusion: (M,) float32, see `simulator.Scan`.
        ego_pose: x, y, z, yaw of the model frame in the world frame.
    """

    stamp_ns: int
    points: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    velocities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    track_ids: npt.NDArray[np.int64]
    num_points: npt.NDArray[np.int64]
    occlusion: npt.NDArray[np.float32]
    ego_pose: tuple[float, float, float, float]


def make_drive(
    seed: int,
    num_frames: int,
    period_s: float = 0.1,
    *,
    sensor: Sensor | None = None,
    config: SceneConfig | None = None,
    speed: float = 6.0,
) -> Iterator[DriveFrame]:
    """Drives along a street and measures as it goes; computed on the CPU, frame by frame.

    Args:
        seed: Chooses the street; the same seed gives the same bytes.
        num_frames: Scans to make.
        period_s: Time between two scans.
        sensor: The lidar and its mount; by default half of the columns of an HDL-64E at 1.73 m.
        config: What street; by default a street or a crossing, with the ego vehicle along it.
        speed: Of the ego vehicle, m/s.

    Yields:
        The frames in order of time.
    """
    if num_frames < 0 or period_s <= 0:
        raise ValueError(f"Expected num_frames >= 0 and period_s > 0, got {num_frames} and {period_s}.")
    # Drives have seeds of their own, apart from those of `simulator.SPLITS`.
    rng = np.random.default_rng([99, seed])
    config = config or SceneConfig(("street", "crossing"), (0.6, 0.4), density=1.2, turn_share=0.0)
    sensor = sensor or Sensor(replace(HDL64, num_columns=HDL64.num_columns // 2), stagger=rng.random(HDL64.num_beams))
    world, (ego_x, ego_y, _) = make_world(rng, config)
    stamps = period_s * np.arange(num_frames, dtype=np.float64)
    ego = np.stack([ego_x + speed * stamps, np.full(num_frames, ego_y)], axis=1)
    world = _clear(world, ego, stamps)
    for index, seconds in enumerate(stamps):
        scene = scene_from_world(world.after(float(seconds)), (float(ego[index, 0]), ego_y, 0.0))
        sensed = SensedScene(scene, sensor, Conditions(min_range_m=2.2))
        scan = cast([sensed], seed=seed * 100_003 + index, device=torch.device("cpu"))
        heading = scene.boxes[:, 6]
        yield DriveFrame(
            stamp_ns=round(float(seconds) * 1e9),
            points=scan.points.numpy(),
            boxes=scene.boxes,
            velocities=scene.speeds[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1),
            labels=scene.labels,
            track_ids=scene.body_indices,
            num_points=scan.num_points.numpy(),
            occlusion=scan.occlusion.numpy(),
            ego_pose=(float(scene.ego_pose[0]), float(scene.ego_pose[1]), float(scene.ego_pose[2]), 0.0),
        )


def _clear(world: World, ego: npt.NDArray[np.float64], stamps: npt.NDArray[np.float64]) -> World:
    """Stops the bodies that would run into others, then removes those in the ego vehicle's way.

    Args:
        world: At the start of the drive.
        ego: (T, 2) positions of the ego vehicle, which heads along +x.
        stamps: (T,) seconds.
    """
    speeds = world.speeds.copy()
    sizes = np.array([body.size for body in world.bodies]).reshape(-1, 3)
    is_in_way = np.zeros(len(speeds), dtype=bool)
    must_stop = speeds > 0
    # A body that has stopped can be in the way of another one, hence the repetition.
    while must_stop.any():
        must_stop[:] = False
        is_in_way[:] = False
        for (ego_x, ego_y), seconds in zip(ego, stamps, strict=True):
            poses = World(world.terrain, world.bodies, world.poses, speeds).after(float(seconds)).poses
            turned = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=1)
            rectangles = np.concatenate([poses[:, :2], turned, sizes[:, :2] / 2], axis=1)
            is_in_way |= rectangles_overlap(np.array([ego_x, ego_y, 1.0, 0.0, 3.0, 1.2]), rectangles)
            for index in np.flatnonzero(speeds):
                overlaps = rectangles_overlap(rectangles[index], rectangles)
                must_stop[index] |= int(overlaps.sum()) > 1
        speeds[must_stop] = 0.0
    kept = np.flatnonzero(~is_in_way)
    return World(world.terrain, [world.bodies[i] for i in kept], world.poses[kept], speeds[kept])
