"""Labelled lidar scans of random scenes.

    SceneStream("train", seed)[i] ── worker processes, NumPy ──> SensedScene
    cast([SensedScene, ...], seed=..., device=...) ── torch ───> Scan

Scenes of different splits never share a seed: the split is part of the seed of each scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsvt_ros.training.layout import SceneConfig, make_scene
from dsvt_ros.training.lidar import HELD_OUT_LIDARS, Sensor, mount_randomly, sample_training_sensor
from dsvt_ros.training.raycast import (
    GROUND,
    Hits,
    Parts,
    Rays,
    cast_rays,
    make_rays,
    parts_from_scenes,
    surface_normals,
)
from dsvt_ros.training.scene import Scene

SPLITS = ("train", "validation", "test", "held_out")
"""`held_out` has the scenes' style of `test`, measured with lidars that training never uses."""

_MAX_NUM_PAIRS = {"cpu": 250_000, "cuda": 8_000_000}


@dataclass(frozen=True)
class Conditions:
    """Weather, surface and receiver of one scan.

    Attributes:
        gain: Factor on intensities.
        gamma: Exponent on intensities.
        intensity: "measured", or a constant "zero" or "one" for sensors that give none.
        ground_reflectance: Reflectance of the ground.
        intensity_spread: Standard deviation of the logarithm of intensities on objects.
        intensity_floor: Brightness below which the receiver reports 0.
        sensitivity: How far weak targets are seen: range in metres at which a surface that
            reflects a tenth of the light comes back in half of the shots.
        range_noise: Factor on the sensor's range noise.
        drop_out: Share of returns lost at random, on top of the sensor's own.
        clutter: Share of rays that meet rain, dust or insects in the air.
        min_range_m: Returns nearer than this are left out, as the ego vehicle's would be.
    """

    gain: float = 1.0
    gamma: float = 1.0
    intensity: str = "measured"
    ground_reflectance: float = 0.3
    intensity_spread: float = 0.5
    intensity_floor: float = 0.05
    sensitivity: float = 60.0
    range_noise: float = 1.0
    drop_out: float = 0.0
    clutter: float = 0.0
    min_range_m: float = 0.9


def sample_conditions(rng: np.random.Generator) -> Conditions:
    """Draws conditions; one scan in eight has no usable intensity, one in eight has clutter."""
    intensity = str(rng.choice(["measured", "zero", "one"], p=[0.875, 0.1, 0.025]))
    is_dusty = rng.random() < 0.125
    return Conditions(
        gain=float(np.exp(rng.normal(0.0, 0.35))),
        gamma=float(np.exp(rng.normal(0.0, 0.3))),
        intensity=intensity,
        ground_reflectance=float(rng.uniform(0.12, 0.45)),
        intensity_spread=float(rng.uniform(0.1, 1.2)),
        intensity_floor=float(rng.choice([0.0, rng.uniform(0.0, 0.25)], p=[0.4, 0.6])),
        sensitivity=float(np.exp(rng.uniform(np.log(35.0), np.log(110.0)))),
        range_noise=float(rng.uniform(0.5, 1.5)),
        drop_out=float(rng.choice([0.0, rng.uniform(0.0, 0.1)], p=[0.6, 0.4])),
        clutter=float(rng.uniform(0.0, 0.01)) if is_dusty else 0.0,
        min_range_m=float(rng.uniform(0.5, 2.5)),
    )


@dataclass(frozen=True)
class SensedScene:
    """A scene, the sensor in it and the conditions; picklable, without tensors."""

    scene: Scene
    sensor: Sensor
    conditions: Conditions = Conditions()


@dataclass(frozen=True)
class SceneStream:
    """An endless, reproducible sequence of scenes; index it with any number from 0.

    Attributes:
        split: One of `SPLITS`.
        seed: Chooses among sequences of the same split; validation and test leave it at 0.
        config: What scenes are made.
    """

    split: str
    seed: int = 0
    config: SceneConfig = SceneConfig()

    def __post_init__(self) -> None:
        """Check the split's name."""
        if self.split not in SPLITS:
            raise ValueError(f"Unknown split {self.split!r}, expected one of {SPLITS}.")

    def __getitem__(self, index: int) -> SensedScene:
        """Makes scene `index`, the same one each time."""
        if index < 0:
            raise IndexError(f"Scene {index} does not exist: scenes count from 0.")
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, index])
        if self.split == "held_out":
            sensor = mount_randomly(HELD_OUT_LIDARS[index % len(HELD_OUT_LIDARS)], rng)
        else:
            sensor = sample_training_sensor(rng)
        conditions = sample_conditions(rng)
        return SensedScene(make_scene(rng, self.config), sensor, conditions)


@dataclass(frozen=True)
class Scan:
    """Scans of a batch of scenes, with what there was to see.

    Attributes:
        points: (N, 4) float32 [x, y, z, intensity in [0, 1]], metres, model frame.
        batch_index: (N,) int64 scene of each point, ascending.
        boxes: (M, 7) float32 [x, y, z (centre), l, w, h, yaw], model frame. Objects without
            points are listed too.
        labels: (M,) int64: 0 car, 1 pedestrian, 2 cyclist.
        box_batch_index: (M,) int64 scene of each box, ascending.
        num_points: (M,) int64 points on each object.
        occlusion: (M,) float32 share of the rays towards each object that something else stops;
            1 for objects that no ray would meet.
        object_index: (N,) int64 box that each point lies on, -1 for everything else.
        batch_size: Number of scenes.
    """

    points: Tensor
    batch_index: Tensor
    boxes: Tensor
    labels: Tensor
    box_batch_index: Tensor
    num_points: Tensor
    occlusion: Tensor
    object_index: Tensor
    batch_size: int


def cast(
    sensed: Sequence[SensedScene],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    jitter_rad: float = 2e-4,
    max_num_pairs: int | None = None,
) -> Scan:
    """Simulates one scan of each scene.

    The same arguments give the same bytes on the same kind of device. Synchronises with the
    device a few times.

    Args:
        sensed: At least one scene with its sensor.
        seed: Seed of all noise.
        device: Where to compute; the result stays there.
        jitter_rad: Standard deviation of the direction of each ray.
        max_num_pairs: Bound on the memory of one step, see `cast_rays`.
    """
    if not sensed:
        raise ValueError("cast() needs at least one scene.")
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    scenes = [item.scene for item in sensed]
    sensors = [item.sensor for item in sensed]
    rays = make_rays(sensors, jitter_rad, generator, device)
    parts = parts_from_scenes(scenes, device)
    hits = cast_rays(
        scenes,
        sensors,
        rays,
        parts,
        jitter_rad=jitter_rad,
        generator=generator,
        max_num_pairs=max_num_pairs or _MAX_NUM_PAIRS.get(device.type, 4_000_000),
    )
    owner = _owners(hits, parts)
    num_boxes = len(hits.num_alone)
    num_visible = torch.bincount(owner[owner >= 0], minlength=num_boxes)
    points, ray = _measure(sensed, rays, parts, hits, generator)
    object_index = torch.where(ray >= 0, owner[ray.abs()], -1)

    counts = torch.tensor([len(scene.boxes) for scene in scenes])
    alone = hits.num_alone.float()
    return Scan(
        points=points,
        batch_index=rays.scene_index[ray.abs()],
        boxes=torch.from_numpy(np.concatenate([scene.boxes for scene in scenes])).to(device),
        labels=torch.from_numpy(np.concatenate([scene.labels for scene in scenes])).to(device),
        box_batch_index=torch.arange(len(scenes)).repeat_interleave(counts).to(device),
        num_points=torch.bincount(object_index[object_index >= 0], minlength=num_boxes),
        occlusion=1.0 - num_visible / alone.clamp_min(1.0),
        object_index=object_index,
        batch_size=len(scenes),
    )


def _owners(hits: Hits, parts: Parts) -> Tensor:
    """(rays,) box that each ray meets first, -1 for everything else."""
    return parts.owners[_material_rows(hits)]


def _material_rows(hits: Hits) -> Tensor:
    """(rays,) row of the parts' materials; the last one for the ground and for nothing."""
    return torch.where(hits.parts == GROUND, -1, hits.parts)


def _measure(
    sensed: Sequence[SensedScene],
    rays: Rays,
    parts: Parts,
    hits: Hits,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Turns hits into points as the receiver reports them.

    Returns:
        (n, 4) points, and the (n,) ray of each point. Clutter in the air replaces what its ray
        would have met; its ray number is negative (-ray), never 0.
    """
    device = rays.directions.device
    scan = _per_scene(sensed, device)[rays.scene_index]
    (gain, gamma, constant, ground, spread, floor, sensitivity, noise, drop_out, clutter, low, high) = scan.T
    num_rays = len(rays.directions)
    draw = torch.rand((4, num_rays), generator=generator, device=device)
    shake = torch.randn((2, num_rays), generator=generator, device=device)

    is_hit = torch.isfinite(hits.distances)
    distance = torch.where(is_hit, hits.distances, 1e3)
    points = rays.origins[rays.scene_index] + distance[:, None] * rays.directions
    normals = surface_normals(parts, hits.parts, points)
    incidence = (normals * rays.directions).sum(dim=1).abs().clamp(0.02, 1.0)
    is_part = (hits.parts >= 0) & (hits.parts != GROUND)
    material = parts.materials[_material_rows(hits)]
    # Foliage and clothes scatter in all directions, whatever the outline of the part says.
    incidence = torch.where(is_part & (material[:, 1] > 0.05), 0.7, incidence)
    reflectance = torch.where(is_part, material[:, 0], ground)
    brightness = reflectance * incidence.sqrt()

    # Signal over noise falls with the square of the range.
    signal = 10.0 * reflectance * incidence * (sensitivity / distance.clamp_min(1.0)) ** 2
    seen = 1.0 - torch.exp2(-signal)
    absorbed = torch.where(is_part, material[:, 3], 0.0)
    returned = is_hit & (draw[0] < seen * (1.0 - drop_out) * (1.0 - absorbed))

    in_air = draw[1] < clutter
    # Rain and dust come back from nearby, seldom from farther than 15 m.
    air_distance = low + 0.2 - 4.0 * torch.log1p(-draw[2])
    in_air &= air_distance < distance
    in_air[0] = False
    brightness = torch.where(in_air, 0.05, brightness)
    distance = torch.where(in_air, air_distance, distance + noise * shake[0])
    returned = (returned | in_air) & (distance > low) & (distance < high)

    speckle = torch.exp(torch.where(is_part, spread, 0.12) * shake[1])
    dim = torch.where(is_part, floor, 0.0)
    intensity = gain * (brightness * speckle - dim).clamp_min(0.0) ** gamma
    intensity = torch.where(constant >= 0, constant, intensity.clamp(0.0, 1.0))
    # Receivers report 8 bits.
    intensity = (intensity * 255.0).round() / 255.0
    ray = returned.nonzero()[:, 0]
    xyz = rays.origins[rays.scene_index[ray]] + distance[ray, None] * rays.directions[ray]
    cloud = torch.cat([xyz, intensity[ray, None]], dim=1)
    return cloud, torch.where(in_air[ray], -ray, ray)


def _per_scene(sensed: Sequence[SensedScene], device: torch.device) -> Tensor:
    """(B, 12) the numbers that `_measure` needs of each scene."""
    rows = []
    for item in sensed:
        conditions, lidar = item.conditions, item.sensor.lidar
        rows.append(
            (
                conditions.gain,
                conditions.gamma,
                {"measured": -1.0, "zero": 0.0, "one": 1.0}[conditions.intensity],
                conditions.ground_reflectance,
                conditions.intensity_spread,
                conditions.intensity_floor,
                conditions.sensitivity,
                conditions.range_noise * lidar.range_noise_m,
                1.0 - (1.0 - lidar.drop_out) * (1.0 - conditions.drop_out),
                conditions.clutter,
                conditions.min_range_m,
                lidar.max_range_m,
            )
        )
    return torch.tensor(rows, dtype=torch.float32).to(device)
