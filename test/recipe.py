"""Deterministic weights and point clouds for the parity references (NumPy only).

Every weight is drawn from its own stream, seeded by the CRC-32 of its state-dict key, so anybody can rebuild the very
weights that produced a reference file from the list of keys and shapes alone; no checkpoint has to be stored.

    weights = make_weights(read_keys("keys_waymo_pillar.txt"), seed=11)
    weights |= overrides            # the few tensors stored in the reference file under "override/<key>"
"""
from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np


def read_keys(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read `key<TAB>[shape]<TAB>dtype` lines into {key: (shape, dtype)}; '#' starts a comment line."""
    keys = {}
    for line in Path(path).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        key, shape, dtype = line.split("\t")[:3]
        dims = shape.strip("[]")
        keys[key] = (tuple(int(d) for d in dims.split(",")) if dims else (), dtype.split()[0])
    return keys


def make_weights(keys: dict[str, tuple[tuple[int, ...], str]], seed: int) -> dict[str, np.ndarray]:
    """Draw every tensor of a state dict.

    Norm scales lie in [0.75, 1.25), running variances in [0.5, 1.5), biases and running means are N(0, 0.1^2), and
    matrices and kernels are uniform in +-sqrt(3 / fan_in) (fan_in = product of all dimensions but the first).
    A norm is recognised by its shape: a 1-D `.weight`.
    """
    weights = {}
    for key, (shape, dtype) in keys.items():
        rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(key.encode()), seed]))
        if dtype == "int64":
            value = np.full(shape, 7, np.int64)
        elif key.endswith("running_var"):
            value = 0.5 + rng.random(shape)
        elif key.endswith(".weight") and len(shape) == 1:
            value = 0.75 + 0.5 * rng.random(shape)
        elif len(shape) <= 1 or key.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        else:
            bound = np.sqrt(3.0 / np.prod(shape[1:]))
            value = rng.uniform(-bound, bound, shape)
        weights[key] = value if dtype == "int64" else np.asarray(value, np.float32)
    return weights


def make_points(num_points: int, seed: int, *, range_m: float, ground_z: float, time_column: bool) -> np.ndarray:
    """A seeded cloud (N, 5) float32 [x, y, z, intensity, elongation | time lag]: ground rings, boxes and walls."""
    rng = np.random.default_rng(seed)
    num_ground, num_box = int(0.55 * num_points), int(0.25 * num_points)
    num_wall = num_points - num_ground - num_box
    azimuth = rng.uniform(-np.pi, np.pi, num_ground)
    radius = np.minimum(2.0 / np.tan(rng.uniform(0.025, 0.3, num_ground)), 1.05 * range_m)
    radius *= 1 + 0.01 * rng.standard_normal(num_ground)
    ground_height = ground_z + 0.05 * rng.standard_normal(num_ground)
    ground = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), ground_height], 1)
    count = 60
    centre = rng.uniform(-0.8 * range_m, 0.8 * range_m, (count, 2))
    size = np.where(rng.random((count, 1)) < 0.6, [[4.5, 1.9, 1.6]], [[0.8, 0.8, 1.7]])
    yaw = rng.uniform(-np.pi, np.pi, count)
    which = rng.integers(0, count, num_box)
    unit = rng.uniform(-0.5, 0.5, (num_box, 3))
    unit[np.arange(num_box), rng.integers(0, 2, num_box)] = rng.choice([-0.5, 0.5], num_box)
    local = unit * size[which]
    cos, sin = np.cos(yaw[which]), np.sin(yaw[which])
    turned = [local[:, 0] * cos - local[:, 1] * sin, local[:, 0] * sin + local[:, 1] * cos]
    box = np.stack([*turned, local[:, 2] + size[which, 2] / 2 + ground_z], 1)
    box[:, :2] += centre[which]
    along, side = rng.uniform(-1.05 * range_m, 1.05 * range_m, num_wall), rng.integers(0, 4, num_wall)
    offset = np.array([-22.0, 24.0, -28.0, 20.0])[side] + 0.4 * rng.standard_normal(num_wall)
    wall_xy = np.where((side < 2)[:, None], np.stack([along, offset], 1), np.stack([offset, along], 1))
    wall = np.concatenate([wall_xy, rng.uniform(ground_z, ground_z + 4.5, (num_wall, 1))], 1)
    xyz = np.concatenate([ground, box, wall])[rng.permutation(num_points)]
    intensity = np.tanh(rng.exponential(0.3, num_points))
    last = 0.05 * rng.integers(0, 10, num_points) if time_column else rng.uniform(0, 0.3, num_points)
    return np.column_stack([xyz, intensity, last]).astype(np.float32)
