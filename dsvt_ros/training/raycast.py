"""Exact ray casting of a batch of scenes, on the CPU or on a GPU.

The rays of a scene form a grid of beams x columns. Each convex part covers a small rectangle of
that grid, whose limits follow from its upright bounding box (`_grid_rectangles`). The rectangles
of all parts are laid out as one flat list of (part, ray) pairs, which are intersected in chunks of
bounded size. The nearest answer of each ray is kept by a minimum over 64-bit keys whose upper half
is the distance and whose lower half is the part: a minimum has no order, so the result
does not depend on the chunks.

Shapes: N rays of all scenes together, beams ascending and columns fastest within a scene; P parts
of all scenes together, frustums of all scenes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsvt_ros.training.lidar import Sensor
from dsvt_ros.training.scene import KERB_WIDTH_M, Scene

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

GROUND = 2**31 - 1
"""Part number of the ground."""

_NO_HIT = 2**63 - 1
_JITTER_CLIP = 4.0
_GROUND_REACH_M = 130.0
_GROUND_AZIMUTHS = 720
_GROUND_RANGES = 192
_GROUND_STEPS = 5


@dataclass(frozen=True)
class Rays:
    """Rays that leave the sensors of a batch.

    Attributes:
        directions: (N, 3) float32 unit vectors, model frame.
        scene_index: (N,) int64.
        origins: (B, 3) float32 sensor positions, model frame.
        first_ray: For each scene, where its rays start.
    """

    directions: Tensor
    scene_index: Tensor
    origins: Tensor
    first_ray: tuple[int, ...]


@dataclass(frozen=True)
class Hits:
    """The nearest thing on each ray, and how often labelled objects were met at all.

    Attributes:
        distances: (N,) float32 metres, +inf where the ray meets nothing.
        parts: (N,) int64 part, `GROUND`, or -1 where the ray meets nothing.
        num_alone: (M,) int64 rays that each object would stop if nothing else were there.
    """

    distances: Tensor
    parts: Tensor
    num_alone: Tensor


@dataclass(frozen=True)
class Parts:
    """The parts of all scenes of a batch on one device.

    Attributes:
        planes: (F, NUM_PLANES, 4) float32.
        round_axes: (R, 3, 3) float32.
        round_centres: (R, 3) float32.
        round_is_cylinder: (R,) float32, 1 for cylinders.
        materials: (P + 1, 4) float32; the last row stands in for the ground and for nothing.
        owners: (P + 1,) int64 row of the batch's boxes, or -1.
        scene_index: (P,) int64.
    """

    planes: Tensor
    round_axes: Tensor
    round_centres: Tensor
    round_is_cylinder: Tensor
    materials: Tensor
    owners: Tensor
    scene_index: Tensor


def parts_from_scenes(scenes: Sequence[Scene], device: torch.device) -> Parts:
    """Concatenates the parts of scenes: the frustums of all, then the round parts of all."""

    def upload(arrays: list[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)

    num_boxes = np.cumsum([0] + [len(scene.boxes) for scene in scenes])
    owners = [
        np.where(scene.owners >= 0, scene.owners + first, -1) for scene, first in zip(scenes, num_boxes, strict=False)
    ]
    return Parts(
        planes=upload([scene.planes for scene in scenes]),
        round_axes=upload([scene.round_axes for scene in scenes]),
        round_centres=upload([scene.round_centres for scene in scenes]),
        round_is_cylinder=upload([scene.round_is_cylinder for scene in scenes]).float(),
        materials=upload([*_by_kind(scenes, [s.materials for s in scenes]), np.zeros((1, 4), np.float32)]),
        owners=upload([*_by_kind(scenes, owners), np.array([-1])]),
        scene_index=upload(_by_kind(scenes, [np.full(len(s.bounds), i) for i, s in enumerate(scenes)])),
    )


def _by_kind(scenes: Sequence[Scene], arrays: Sequence[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
    """Splits (P_i, ...) arrays, one for each scene, into those of frustums and of round parts."""
    counts = [len(scene.planes) for scene in scenes]
    frustums = [array[:count] for array, count in zip(arrays, counts, strict=True)]
    return frustums + [array[count:] for array, count in zip(arrays, counts, strict=True)]


def make_rays(
    sensors: Sequence[Sensor],
    jitter_rad: float,
    generator: torch.Generator,
    device: torch.device,
) -> Rays:
    """Draws the rays of one scan for each sensor.

    Args:
        sensors: One for each scene.
        jitter_rad: Standard deviation of each ray's elevation and azimuth; cut at 4 deviations.
        generator: Source of the jitter, on `device`.
        device: Where the rays are made.
    """
    directions, scene_index, first_ray = [], [], [0]
    for index, sensor in enumerate(sensors):
        columns = torch.arange(sensor.num_columns, device=device, dtype=torch.float32)
        offsets = _tensor(sensor.azimuth_offsets_rad, device)
        azimuth = sensor.first_azimuth_rad + columns * sensor.column_step_rad + offsets[:, None]
        elevation = _tensor(sensor.elevations_rad, device)[:, None].expand_as(azimuth)
        noise = torch.randn((2, *azimuth.shape), generator=generator, device=device)
        noise = jitter_rad * noise.clamp(-_JITTER_CLIP, _JITTER_CLIP)
        azimuth, elevation = azimuth + noise[0], elevation + noise[1]
        in_sensor = torch.stack(
            [
                elevation.cos() * azimuth.cos(),
                elevation.cos() * azimuth.sin(),
                elevation.sin(),
            ],
            dim=-1,
        ).reshape(-1, 3)
        # Not a matrix product: training allows TF32 there, whose 10 bits are far too few.
        rotation = _tensor(sensor.rotation, device)
        directions.append((rotation * in_sensor[:, None]).sum(dim=2))
        scene_index.append(torch.full((len(in_sensor),), index, dtype=torch.int64, device=device))
        first_ray.append(first_ray[-1] + len(in_sensor))
    origins = np.array([[0.0, 0.0, sensor.height_m] for sensor in sensors])
    return Rays(
        directions=torch.cat(directions),
        scene_index=torch.cat(scene_index),
        origins=_tensor(origins, device),
        first_ray=tuple(first_ray[:-1]),
    )


def cast_rays(
    scenes: Sequence[Scene],
    sensors: Sequence[Sensor],
    rays: Rays,
    parts: Parts,
    *,
    jitter_rad: float,
    generator: torch.Generator,
    max_num_pairs: int,
) -> Hits:
    """Finds what each ray meets first.

    Transparent and porous parts stop a ray at random, so that two calls with the generator in the
    same state agree.

    Args:
        scenes: B scenes.
        sensors: Their sensors, as given to `make_rays`.
        rays: The rays of `make_rays`.
        parts: The parts of the scenes, on the rays' device.
        jitter_rad: As given to `make_rays`.
        generator: Source of randomness on the rays' device.
        max_num_pairs: Pairs that are intersected at once; a pair takes about 150 bytes.
    """
    device = rays.directions.device
    keys = _pack(ground_distances(scenes, rays), torch.full_like(rays.scene_index, GROUND))
    rectangles = _batch_rectangles(scenes, sensors, rays, jitter_rad)
    num_frustums = len(parts.planes)
    num_boxes = sum(len(scene.boxes) for scene in scenes)
    plane_offsets = _plane_offsets(parts, rays)
    object_rays: list[Tensor] = []
    for first, last in _chunks(rectangles, num_frustums, max_num_pairs):
        part, ray = _expand(rectangles[first:last], first, device)
        direction = rays.directions[ray]
        if first < num_frustums:
            enter, leave = _meet_frustums(parts.planes, plane_offsets, part, direction)
        else:
            origin = rays.origins[parts.scene_index[part]]
            enter, leave = _meet_rounds(parts, part - num_frustums, origin, direction)
        met = ((enter < leave) & (enter > 0.0)).nonzero()[:, 0]
        part, ray, enter, leave = part[met], ray[met], enter[met], leave[met]
        depth, transparency = parts.materials[part, 1], parts.materials[part, 2]
        draw = torch.rand((2, len(met)), generator=generator, device=device)
        distance = enter - depth * torch.log1p(-draw[0])
        stopped = ((draw[1] >= transparency) & (distance < leave)).nonzero()[:, 0]
        part, ray, distance = part[stopped], ray[stopped], distance[stopped]
        keys.scatter_reduce_(0, ray, _pack(distance, part), "amin")
        owner = parts.owners[part]
        owned = owner >= 0
        object_rays.append((owner[owned] << 32) | ray[owned])
    distinct = torch.unique(torch.cat(object_rays)) if object_rays else keys[:0]
    distances, hit_parts = _unpack(keys)
    return Hits(distances, hit_parts, torch.bincount(distinct >> 32, minlength=num_boxes))


def _tensor(array: FloatArray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)


def _pack(distances: Tensor, parts: Tensor) -> Tensor:
    """Keys whose order is that of the distances: positive floats sort like their bits."""
    keys = (distances.contiguous().view(torch.int32).to(torch.int64) << 32) | parts
    return torch.where(torch.isfinite(distances), keys, _NO_HIT)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    is_hit = keys != _NO_HIT
    distances = (keys >> 32).to(torch.int32).view(torch.float32)
    distances = torch.where(is_hit, distances, torch.inf)
    return distances, torch.where(is_hit, keys & 0xFFFFFFFF, -1)


def _meet_frustums(planes: Tensor, offsets: Tensor, part: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n,) at which rays enter and leave frustums; no hit where enter >= leave."""
    dx, dy, dz = direction.unbind(1)
    enter = torch.zeros_like(dx)
    leave = torch.full_like(dx, torch.inf)
    for index in range(planes.shape[1]):
        # Gathered number by number: on CUDA a gather of short rows is ten times as slow.
        nx, ny, nz = (planes[:, index, axis].contiguous()[part] for axis in range(3))
        ahead = offsets[:, index].contiguous()[part]
        speed = nx * dx + ny * dy + nz * dz
        crossing = ahead / torch.where(speed == 0, 1e-12, speed)
        enter = torch.where(speed < 0, torch.maximum(enter, crossing), enter)
        leave = torch.where(speed < 0, leave, torch.minimum(leave, crossing))
    return enter, leave


def _plane_offsets(parts: Parts, rays: Rays) -> Tensor:
    """(F, NUM_PLANES) signed distances from the sensor to each plane, positive if inside."""
    origin = rays.origins[parts.scene_index[: len(parts.planes)]]
    normal, offset = parts.planes[:, :, :3], parts.planes[:, :, 3]
    return offset - (normal * origin[:, None]).sum(dim=2)


def _meet_rounds(parts: Parts, part: Tensor, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (n,) at which rays enter and leave ellipsoids and cylinders."""
    axes = parts.round_axes[part]
    start = (axes * (origin - parts.round_centres[part])[:, None]).sum(dim=2)
    step = (axes * direction[:, None]).sum(dim=2)
    # The z term of the quadric is there for ellipsoids, the caps for cylinders.
    weight = torch.ones_like(step)
    weight[:, 2] -= parts.round_is_cylinder[part]
    a = (weight * step * step).sum(dim=1).clamp_min(1e-12)
    b = (weight * start * step).sum(dim=1)
    # The squared distance of closest approach keeps its digits where b * b - a * c would not.
    nearest = start - (b / a)[:, None] * step
    room = 1.0 - (weight * nearest * nearest).sum(dim=1)
    half = (room.clamp_min(0.0) / a).sqrt()
    enter, leave = -b / a - half, -b / a + half
    along = torch.where(step[:, 2] == 0, 1e-12, step[:, 2])
    low, high = (-1.0 - start[:, 2]) / along, (1.0 - start[:, 2]) / along
    enter = torch.maximum(enter, torch.minimum(low, high))
    leave = torch.minimum(leave, torch.maximum(low, high))
    return enter, torch.where(room > 0, leave, -torch.inf)


def surface_normals(parts: Parts, part: Tensor, points: Tensor) -> Tensor:
    """(n, 3) outward unit normals at points on or in parts; straight up for the ground."""
    num_frustums = len(parts.planes)
    normals = torch.zeros_like(points)
    normals[:, 2] = 1.0
    flat = ((part >= 0) & (part < num_frustums)).nonzero()[:, 0]
    planes = parts.planes[part[flat]]
    height = (planes[:, :, :3] * points[flat][:, None]).sum(dim=2) - planes[:, :, 3]
    nearest = height.argmax(dim=1)
    normals[flat] = planes[torch.arange(len(flat), device=points.device), nearest, :3]
    curved = ((part >= num_frustums) & (part != GROUND)).nonzero()[:, 0]
    index = part[curved] - num_frustums
    axes = parts.round_axes[index]
    local = (axes * (points[curved] - parts.round_centres[index])[:, None]).sum(dim=2)
    local[:, 2] *= 1.0 - parts.round_is_cylinder[index]
    outward = (axes * local[:, :, None]).sum(dim=1)
    normals[curved] = outward / outward.norm(dim=1, keepdim=True).clamp_min(1e-9)
    return normals


def _batch_rectangles(scenes: Sequence[Scene], sensors: Sequence[Sensor], rays: Rays, jitter_rad: float) -> IntArray:
    """(P, 6) of [first column, columns, first beam, beams, grid width, first ray of the scene]."""
    rectangles = []
    for scene, sensor, first_ray in zip(scenes, sensors, rays.first_ray, strict=True):
        limits = grid_rectangles(scene, sensor, jitter_rad)
        grid = np.broadcast_to([sensor.num_columns, first_ray], (len(limits), 2))
        rectangles.append(np.concatenate([limits, grid], axis=1))
    return np.concatenate(_by_kind(scenes, rectangles)).astype(np.int64)


def grid_rectangles(scene: Scene, sensor: Sensor, jitter_rad: float) -> IntArray:
    """Part of the ray grid that each part of a scene can possibly meet.

    Returns:
        (P, 4) int64 of [first column, number of columns, first beam, number of beams]; columns
        count on beyond the last one, back to 0, where the sensor measures a full turn.
    """
    x, y, z, length, width, height, yaw = scene.bounds.astype(np.float64).T
    z = z - sensor.height_m
    cos, sin = np.cos(yaw), np.sin(yaw)
    half_x, half_y = length / 2, width / 2
    # Sensor position in each box, to find the nearest and the farthest point of the footprint.
    from_x, from_y = np.abs(x * cos + y * sin), np.abs(y * cos - x * sin)
    near = np.hypot(np.maximum(from_x - half_x, 0.0), np.maximum(from_y - half_y, 0.0))
    far = np.hypot(from_x + half_x, from_y + half_y)

    rotation = sensor.rotation
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=float)
    corner_x = half_x[:, None] * signs[:, 0]
    corner_y = half_y[:, None] * signs[:, 1]
    corners = np.stack(
        [
            x[:, None] + corner_x * cos[:, None] - corner_y * sin[:, None],
            y[:, None] + corner_x * sin[:, None] + corner_y * cos[:, None],
            z[:, None] + height[:, None] / 2 * signs[:, 2],
        ],
        axis=2,
    )
    corners = corners @ rotation
    centres = np.stack([x, y, z], axis=1) @ rotation
    middle = np.arctan2(centres[:, 1], centres[:, 0])
    turns = np.arctan2(corners[:, :, 1], corners[:, :, 0]) - middle[:, None]
    turns = (turns + np.pi) % (2 * np.pi) - np.pi
    left, right = turns.max(axis=1), turns.min(axis=1)
    # Beside or above the sensor a box can surround it, and the tilt can carry it across.
    tilt = float(np.arccos(np.clip(rotation[2, 2], -1.0, 1.0)))
    reach = np.abs(z) + height / 2
    around = (near <= 0.05 + 1.1 * tilt * reach) | (left - right > 0.95 * np.pi)
    left, right = np.where(around, np.pi, left), np.where(around, -np.pi, right)

    # Elevation in the sensor frame is that in the model frame plus the tilt towards the azimuth;
    # the margin covers how that tilt changes across the part.
    high, low = z + height / 2, z - height / 2
    top = np.arctan2(high, np.where(high > 0, near, far))
    bottom = np.arctan2(low, np.where(low > 0, far, near))
    towards = np.arctan2(y, x)
    shift = np.arcsin(rotation[0, 2] * np.cos(towards) + rotation[1, 2] * np.sin(towards))
    margin = tilt * np.minimum(0.5 * (left - right), 2.0) + 2.0 * tilt**2 + 1e-4
    noise = _JITTER_CLIP * jitter_rad
    elevations = sensor.elevations_rad
    first_beam = np.searchsorted(elevations, bottom + shift - margin - noise)
    last_beam = np.searchsorted(elevations, top + shift + margin + noise, side="right")

    step = sensor.column_step_rad
    offsets = sensor.azimuth_offsets_rad
    # Jitter in azimuth is that of the ray's angles; both ends are widened by rounding outwards.
    start = middle - sensor.first_azimuth_rad
    if not sensor.is_full_turn:
        # Count columns from the side of the sector on which the part lies.
        start = (middle + np.pi) % (2 * np.pi) - np.pi - sensor.first_azimuth_rad
    first_column = np.floor((start + right - noise - offsets.max()) / step).astype(np.int64)
    last_column = np.ceil((start + left + noise - offsets.min()) / step).astype(np.int64)
    if sensor.is_full_turn:
        num_columns = np.minimum(last_column - first_column + 1, sensor.num_columns)
        first_column = first_column % sensor.num_columns
    else:
        first_column = np.clip(first_column, 0, sensor.num_columns)
        num_columns = np.clip(last_column + 1, 0, sensor.num_columns) - first_column
    num_beams = np.maximum(last_beam - first_beam, 0)
    return np.stack([first_column, np.maximum(num_columns, 0), first_beam, num_beams], axis=1)


def _chunks(rectangles: IntArray, num_frustums: int, max_num_pairs: int) -> list[tuple[int, int]]:
    """Runs of parts with at most `max_num_pairs` pairs (or one part), kinds kept apart."""
    counts = rectangles[:, 1] * rectangles[:, 3]
    chunks = []
    for begin, end in ((0, num_frustums), (num_frustums, len(rectangles))):
        total = np.cumsum(counts[begin:end])
        first = begin
        while first < end:
            done = total[first - begin - 1] if first > begin else 0
            fits = int(np.searchsorted(total, done + max_num_pairs, side="right"))
            last = max(first + 1, begin + fits)
            if total[last - begin - 1] > done:
                chunks.append((first, last))
            first = last
    return chunks


def _expand(rectangles: IntArray, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Part (n,) and ray (n,) of every cell of the parts' rectangles, both int64."""
    counts = rectangles[:, 1] * rectangles[:, 3]
    total = int(counts.sum())
    table = torch.from_numpy(np.concatenate([rectangles, (np.cumsum(counts) - counts)[:, None]], axis=1)).to(
        device, torch.int32
    )
    row = torch.repeat_interleave(
        torch.arange(len(rectangles), device=device),
        torch.from_numpy(counts).to(device),
        output_size=total,
    )
    first_column, columns, first_beam, _, width, first_ray, start = table.T.contiguous()
    cell = torch.arange(total, device=device, dtype=torch.int32) - start[row]
    columns = columns[row]
    beam = cell // columns
    column = first_column[row] + cell - beam * columns
    width = width[row]
    column = torch.where(column >= width, column - width, column)
    ray = first_ray[row] + (first_beam[row] + beam) * width + column
    return row + first, ray.to(torch.int64)


@dataclass(frozen=True)
class HeightProfiles:
    """The ground along n horizontal lines from the origin of the model frame.

    Along a line each wave of `scene.Terrain` is a sine of the range, and the distance from a
    road's axis is linear in it, so that little is left to do for each range.

    Attributes:
        level: (n,) offset of heights, metres.
        slope: (n,).
        phase, number, amplitude: (n, K) phase at the origin, wave number along the line, height.
        offset, drift: (n, R) distance to the left of each road's axis at the origin, and its change per metre.
        half_width: (n, R) of the roads.
        kerb_height: (n,).
    """

    level: Tensor
    slope: Tensor
    phase: Tensor
    number: Tensor
    amplitude: Tensor
    offset: Tensor
    drift: Tensor
    half_width: Tensor
    kerb_height: Tensor

    @classmethod
    def along(cls, scenes: Sequence[Scene], scene_index: Tensor, unit_x: Tensor, unit_y: Tensor) -> HeightProfiles:
        """Profiles of given scenes along (n,) horizontal unit vectors of the model frame."""

        def per_line(rows: list[FloatArray]) -> Tensor:
            return _tensor(np.stack(rows), unit_x.device)[scene_index]

        num_waves = max(len(scene.terrain.waves) for scene in scenes)
        num_roads = max(len(scene.terrain.roads) for scene in scenes)
        waves, roads, grounds, axes = [], [], [], []
        for scene in scenes:
            terrain = scene.terrain
            x, y, z, yaw = scene.ego_pose
            cos, sin = np.cos(yaw), np.sin(yaw)
            # Padding: waves of no height, and a road that is everywhere off the road.
            wave = np.zeros((num_waves, 4))
            wave[: len(terrain.waves)] = terrain.waves
            road = np.tile([0.0, 0.0, 1.0, 0.0, -1e9], (num_roads, 1))
            road[: len(terrain.roads)] = terrain.roads
            kx, ky, phase, amplitude = wave.T
            waves.append(np.stack([phase + kx * x + ky * y, kx * cos + ky * sin, ky * cos - kx * sin, amplitude]))
            rx, ry, road_cos, road_sin, half_width = road.T
            roads.append(
                np.stack(
                    [
                        (y - ry) * road_cos - (x - rx) * road_sin,
                        sin * road_cos - cos * road_sin,
                        cos * road_cos + sin * road_sin,
                        half_width,
                    ]
                )
            )
            gx, gy = terrain.slope
            kerb_height = terrain.kerb_height if len(terrain.roads) else 0.0
            grounds.append(np.array([gx * x + gy * y - z, gx * cos + gy * sin, gy * cos - gx * sin, kerb_height]))
            axes.append([cos, sin])
        level, slope_x, slope_y, kerb = per_line(grounds).unbind(1)
        phase_, number_x, number_y, amplitude_ = per_line(waves).unbind(1)
        offset, drift_x, drift_y, half = per_line(roads).unbind(1)
        ux, uy = unit_x[:, None], unit_y[:, None]
        return cls(
            level=level,
            slope=slope_x * unit_x + slope_y * unit_y,
            phase=phase_,
            number=number_x * ux + number_y * uy,
            amplitude=amplitude_,
            offset=offset,
            drift=drift_x * ux + drift_y * uy,
            half_width=half,
            kerb_height=kerb,
        )

    def height(self, ranges: Tensor) -> Tensor:
        """Heights (n, S) in the model frame at horizontal ranges (n, S) or (S,)."""
        height = self.level[:, None] + self.slope[:, None] * ranges
        for k in range(self.phase.shape[1]):
            angle = torch.addcmul(self.phase[:, k, None], self.number[:, k, None], ranges)
            height = torch.addcmul(height, self.amplitude[:, k, None], angle.sin_())
        if self.offset.shape[1] == 0:
            return height
        outside = torch.full_like(height, torch.inf)
        for k in range(self.offset.shape[1]):
            across = torch.addcmul(self.offset[:, k, None], self.drift[:, k, None], ranges).abs_()
            outside = torch.minimum(outside, across - self.half_width[:, k, None])
        raised = (outside / KERB_WIDTH_M + 0.5).clamp_(0.0, 1.0)
        return torch.addcmul(height, self.kerb_height[:, None], raised)


def ground_distances(scenes: Sequence[Scene], rays: Rays) -> Tensor:
    """(N,) float32 distances at which rays meet the ground, +inf where they do not.

    On a polar grid around each sensor the slope at which the sensor sees the ground rises to a
    running maximum: a ray meets the ground between the two ranges where that maximum passes the
    ray's own slope. The crossing itself is then found on the exact surface.
    """
    device = rays.directions.device
    ranges = _tensor(np.geomspace(0.3, _GROUND_REACH_M, _GROUND_RANGES), device)
    azimuths = torch.arange(_GROUND_AZIMUTHS, device=device).repeat(len(scenes)) * (2 * np.pi / _GROUND_AZIMUTHS)
    scene_index = torch.arange(len(scenes), device=device).repeat_interleave(_GROUND_AZIMUTHS)
    grid = HeightProfiles.along(scenes, scene_index, azimuths.cos(), azimuths.sin())
    slopes = (grid.height(ranges) - rays.origins[scene_index, 2, None]) / ranges
    horizon = slopes.cummax(dim=1).values

    dx, dy, dz = rays.directions.unbind(1)
    across = torch.hypot(dx, dy).clamp_min(1e-6)
    ray_slope = dz / across
    turn = torch.atan2(dy, dx) * (_GROUND_AZIMUTHS / (2 * np.pi))
    row = turn.round().to(torch.int64) % _GROUND_AZIMUTHS + rays.scene_index * _GROUND_AZIMUTHS
    first_cell = row * _GROUND_RANGES
    # Each ray searches a row of its own, hence the bisection by hand. It ends at the last cell at
    # the latest: whether the ray gets there is asked afterwards.
    low = torch.zeros_like(row)
    high = torch.full_like(row, _GROUND_RANGES - 1)
    flat = horizon.reshape(-1)
    for _ in range((_GROUND_RANGES - 1).bit_length()):
        middle = (low + high) >> 1
        is_above = flat[first_cell + middle] < ray_slope
        low, high = torch.where(is_above, middle + 1, low), torch.where(is_above, high, middle)
        low = torch.minimum(low, high)
    meets = flat[first_cell + high] >= ray_slope
    distances = torch.full_like(dx, torch.inf)
    down = meets.nonzero()[:, 0]
    unit_x, unit_y = (dx / across)[down], (dy / across)[down]
    lines = HeightProfiles.along(scenes, rays.scene_index[down], unit_x, unit_y)
    origin_z, slope = rays.origins[rays.scene_index[down], 2], ray_slope[down]

    def clearance(at: Tensor) -> Tensor:
        """Height of the rays above the ground at a range."""
        return origin_z + slope * at - lines.height(at[:, None])[:, 0]

    # The grid's azimuth is not quite the ray's: look one step farther to both sides.
    near = ranges[(high[down] - 2).clamp_min(0)]
    far = ranges[(high[down] + 1).clamp_max(_GROUND_RANGES - 1)]
    above, below = clearance(near), clearance(far)
    for _ in range(_GROUND_STEPS):
        # False position, with the side that stays halved (Illinois), in a bracket that only shrinks.
        share = (above / (above - below)).nan_to_num(0.5).clamp(0.02, 0.98)
        at = near + share * (far - near)
        value = clearance(at)
        is_near = value > 0
        near, far = torch.where(is_near, at, near), torch.where(is_near, far, at)
        above, below = (
            torch.where(is_near, value, 0.5 * above),
            torch.where(is_near, 0.5 * below, value),
        )
    share = (above / (above - below)).nan_to_num(0.5).clamp(0.0, 1.0)
    distances[down] = (near + share * (far - near)) / across[down]
    return distances
