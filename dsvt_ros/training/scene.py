"""What the lidar looks at: bodies standing on terrain, and their arrays in the model frame.

World frame: fixed to the street, metres, z up. Model frame: REP 103, below the lidar on the
ground, x along the ego heading, z = 0 at the sensor's foot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsvt_ros.training.shapes import (
    Body,
    frustum_extents,
    rotation_from_angles,
    round_extents,
)

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

NUM_PLANES = 10
"""Half-spaces of a frustum: bottom, top, front, rear, left, right and four corner cuts."""


@dataclass(frozen=True)
class Road:
    """A straight strip of street level; what lies outside all roads is raised by the kerb.

    Attributes:
        x, y: A point on its axis, world frame.
        yaw: Direction of the axis.
        half_width: Distance between the axis and each kerb.
    """

    x: float
    y: float
    yaw: float
    half_width: float


@dataclass(frozen=True)
class Terrain:
    """A smooth height field with kerbs along the roads, world frame.

    Attributes:
        slope: (2,) gradient along x and y.
        waves: (K, 4) of [wave number x, wave number y (rad/m), phase (rad), amplitude (m)].
        roads: (R, 5) of [x, y, cos yaw, sin yaw, half width].
        kerb_height: Step up from the roads, metres.
    """

    slope: FloatArray
    waves: FloatArray
    roads: FloatArray
    kerb_height: float

    def height(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Heights of the ground at world positions; broadcasts.

        `raycast.HeightProfiles` is the same formula on tensors.
        """
        x, y = np.asarray(x)[..., None], np.asarray(y)[..., None]
        kx, ky, phase, amplitude = self.waves.T
        rolling = (amplitude * np.sin(kx * x + ky * y + phase)).sum(axis=-1)
        level: FloatArray = x[..., 0] * self.slope[0] + y[..., 0] * self.slope[1] + rolling
        if len(self.roads):
            rx, ry, cos, sin, half_width = self.roads.T
            across = np.abs((y - ry) * cos - (x - rx) * sin)
            outside = np.clip((across - half_width) / KERB_WIDTH_M + 0.5, 0.0, 1.0)
            level = level + self.kerb_height * outside.min(axis=-1)
        return level


KERB_WIDTH_M = 0.1
"""Width over which the ground rises at a kerb."""


@dataclass
class World:
    """Bodies with their poses and speeds, on terrain.

    Attributes:
        terrain: The ground.
        bodies: Everything that stands on it.
        poses: (B, 3) of [x, y, yaw] in the world frame.
        speeds: (B,) along each heading, m/s.
    """

    terrain: Terrain
    bodies: list[Body] = field(default_factory=list)
    poses: FloatArray = field(default_factory=lambda: np.zeros((0, 3)))
    speeds: FloatArray = field(default_factory=lambda: np.zeros(0))

    def after(self, seconds: float) -> World:
        """The same world with every body moved on along its heading."""
        poses = self.poses.copy()
        poses[:, 0] += self.speeds * seconds * np.cos(poses[:, 2])
        poses[:, 1] += self.speeds * seconds * np.sin(poses[:, 2])
        return World(self.terrain, self.bodies, poses, self.speeds)


@dataclass(frozen=True)
class Scene:
    """One instant of a world in the model frame; plain arrays, so that workers can send it.

    F frustums come first among the P = F + R parts.

    Attributes:
        planes: (F, NUM_PLANES, 4) float32 [nx, ny, nz, d]; inside is n p <= d.
        round_axes: (R, 3, 3) float32; maps p - centre to the unit ball or unit cylinder.
        round_centres: (R, 3) float32.
        round_is_cylinder: (R,) bool.
        bounds: (P, 7) float32 upright boxes [x, y, z, l, w, h, yaw] around the parts.
        materials: (P, 4) float32, the columns of `shapes.Material`.
        owners: (P,) int64 row of `boxes` that the part belongs to, or -1.
        boxes: (M, 7) float32 [x, y, z (centre), l, w, h, yaw] of the labelled bodies.
        labels: (M,) int64.
        body_indices: (M,) int64 index of each box's body in the world.
        speeds: (M,) float32 along each box's heading, m/s.
        terrain: The ground, in the world frame.
        ego_pose: (4,) [x, y, z, yaw] of the model frame in the world frame.
    """

    planes: Float32Array
    round_axes: Float32Array
    round_centres: Float32Array
    round_is_cylinder: npt.NDArray[np.bool_]
    bounds: Float32Array
    materials: Float32Array
    owners: IntArray
    boxes: Float32Array
    labels: IntArray
    body_indices: IntArray
    speeds: Float32Array
    terrain: Terrain
    ego_pose: FloatArray


def scene_from_world(
    world: World, ego_pose: tuple[float, float, float] = (0.0, 0.0, 0.0), reach_m: float = 110.0
) -> Scene:
    """Builds the arrays of a world as seen from an ego pose.

    Args:
        world: The bodies and the ground.
        ego_pose: x, y and yaw of the model frame in the world frame.
        reach_m: Bodies whose origin is farther away are left out.
    """
    ego_x, ego_y, ego_yaw = ego_pose
    ego_z = float(world.terrain.height(np.float64(ego_x), np.float64(ego_y)))
    offset = world.poses[:, :2] - (ego_x, ego_y)
    kept = np.flatnonzero(np.hypot(offset[:, 0], offset[:, 1]) < reach_m)
    cos, sin = np.cos(ego_yaw), np.sin(ego_yaw)
    x, y = world.poses[kept, 0], world.poses[kept, 1]
    poses = np.stack(
        [
            offset[kept, 0] * cos + offset[kept, 1] * sin,
            offset[kept, 1] * cos - offset[kept, 0] * sin,
            world.terrain.height(x, y) - ego_z,
            world.poses[kept, 2] - ego_yaw,
        ],
        axis=1,
    )
    bodies = [world.bodies[index] for index in kept]
    labels = np.array([body.label for body in bodies], dtype=np.int64)
    sizes = np.array([body.size for body in bodies], dtype=np.float64).reshape(-1, 3)
    labelled = np.flatnonzero(labels >= 0)
    row_of_body = np.full(len(bodies), -1, dtype=np.int64)
    row_of_body[labelled] = np.arange(len(labelled))

    num_frustums = np.array([len(body.frustums) for body in bodies], dtype=np.int64)
    num_rounds = np.array([len(body.rounds) for body in bodies], dtype=np.int64)
    body_of_frustum = np.repeat(np.arange(len(bodies)), num_frustums)
    body_of_round = np.repeat(np.arange(len(bodies)), num_rounds)
    frustums = np.concatenate([np.zeros((0, 11)), *(body.frustums for body in bodies)])
    rounds = np.concatenate([np.zeros((0, 10)), *(body.rounds for body in bodies)])
    materials = [body.materials[: len(body.frustums)] for body in bodies]
    materials += [body.materials[len(body.frustums) :] for body in bodies]
    planes, frustum_bounds = _place_frustums(frustums, poses[body_of_frustum])
    axes, centres, round_bounds = _place_rounds(rounds, poses[body_of_round])

    boxes = np.concatenate([poses[labelled, :3], sizes[labelled], poses[labelled, 3:]], axis=1)
    boxes[:, 2] += boxes[:, 5] / 2
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    return Scene(
        planes=planes.astype(np.float32),
        round_axes=axes.astype(np.float32),
        round_centres=centres.astype(np.float32),
        round_is_cylinder=rounds[:, 9] > 0.5,
        bounds=np.concatenate([frustum_bounds, round_bounds]).astype(np.float32),
        materials=np.concatenate([np.zeros((0, 4)), *materials]).astype(np.float32),
        owners=row_of_body[np.concatenate([body_of_frustum, body_of_round])],
        boxes=boxes.astype(np.float32),
        labels=labels[labelled],
        body_indices=kept[labelled].astype(np.int64),
        speeds=world.speeds[kept[labelled]].astype(np.float32),
        terrain=world.terrain,
        ego_pose=np.array([ego_x, ego_y, ego_z, ego_yaw]),
    )


def _place_frustums(frustums: FloatArray, poses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Half-spaces (F, NUM_PLANES, 4) and upright bounds (F, 7) of frustums at (F, 4) poses."""
    z0, z1, bx0, bx1, bw, tx0, tx1, tw, yc, cut_front, cut_rear = frustums.T
    rise, zero, one = z1 - z0, np.zeros(len(frustums)), np.ones(len(frustums))
    slant = np.sqrt(0.5) * one
    x_front, x_rear = np.maximum(bx1, tx1), np.minimum(bx0, tx0)
    half_width = np.maximum(bw, tw)
    # Normal and one point of each plane; a cut of no length lies outside and cuts nothing.
    rows = [
        ((zero, zero, -one), (zero, zero, z0)),
        ((zero, zero, one), (zero, zero, z1)),
        ((rise, zero, bx1 - tx1), (bx1, zero, z0)),
        ((-rise, zero, tx0 - bx0), (bx0, zero, z0)),
        ((zero, rise, bw - tw), (zero, yc + bw, z0)),
        ((zero, -rise, bw - tw), (zero, yc - bw, z0)),
        ((slant, slant, zero), (x_front - cut_front, yc + half_width, zero)),
        ((slant, -slant, zero), (x_front - cut_front, yc - half_width, zero)),
        ((-slant, slant, zero), (x_rear + cut_rear, yc + half_width, zero)),
        ((-slant, -slant, zero), (x_rear + cut_rear, yc - half_width, zero)),
    ]
    normals = np.stack([np.stack(normal, axis=1) for normal, _ in rows], axis=1)
    points = np.stack([np.stack(point, axis=1) for _, point in rows], axis=1)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    distances = (normals * points).sum(axis=2)
    cos, sin = np.cos(poses[:, 3, None]), np.sin(poses[:, 3, None])
    turned = np.stack(
        [
            normals[:, :, 0] * cos - normals[:, :, 1] * sin,
            normals[:, :, 0] * sin + normals[:, :, 1] * cos,
            normals[:, :, 2],
        ],
        axis=2,
    )
    distances = distances + (turned * poses[:, None, :3]).sum(axis=2)
    planes = np.concatenate([turned, distances[:, :, None]], axis=2)
    return planes, _place_bounds(*frustum_extents(frustums), poses)


def _place_rounds(rounds: FloatArray, poses: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Axes (R, 3, 3), centres (R, 3) and upright bounds (R, 7) of round parts at (R, 4) poses."""
    zero = np.zeros(len(rounds))
    turn = rotation_from_angles(poses[:, 3], zero, zero)
    rotation = turn @ rotation_from_angles(*rounds.T[6:9])
    axes = rotation.transpose(0, 2, 1) / rounds[:, 3:6, None]
    centres = (turn @ rounds[:, :3, None])[:, :, 0] + poses[:, :3]
    return axes, centres, _place_bounds(*round_extents(rounds), poses)


def _place_bounds(low: FloatArray, high: FloatArray, poses: FloatArray) -> FloatArray:
    """Boxes (N, 7) [x, y, z, l, w, h, yaw] from corners in the body frame and (N, 4) poses."""
    middle = (low + high) / 2
    cos, sin = np.cos(poses[:, 3]), np.sin(poses[:, 3])
    centre = np.stack(
        [
            middle[:, 0] * cos - middle[:, 1] * sin,
            middle[:, 0] * sin + middle[:, 1] * cos,
            middle[:, 2],
        ],
        axis=1,
    )
    return np.concatenate([centre + poses[:, :3], high - low, poses[:, 3:]], axis=1)
