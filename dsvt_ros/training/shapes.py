r"""Convex parts and the bodies they make up, in a body's own frame.

A body stands on z = 0 around its own origin, heading along +x. Its parts are of two kinds:

    frustum: between two parallel rectangles          round: ellipsoid or cylinder, any tilt

          +---- top ----+   z1                              semi-axes, then yaw, pitch, roll
         /               \                                   (cylinder: along its own z)
        +---- bottom -----+  z0, corners may be cut

`scene.py` turns the rows collected here into arrays in the model frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

FRUSTUM_COLUMNS = 11
"""z0, z1, bottom x0, x1, half width, top x0, x1, half width, centre y, front and rear cut."""

ROUND_COLUMNS = 10
"""centre x, y, z, semi-axes x, y, z, yaw, pitch, roll, whether it is a cylinder."""


class Material(NamedTuple):
    """How a part answers a ray.

    Attributes:
        reflectance: Share of the light that comes back at normal incidence; above 1 for mirrors
            made to send light back (number plates, signs).
        depth_m: Mean path inside the part before the ray is stopped: 0 for hard surfaces,
            centimetres for clothes, decimetres for foliage.
        transparency: Share of the rays that pass through the part as if it were not there.
        absorption: Share of the stopped rays that never come back.
    """

    reflectance: float
    depth_m: float = 0.0
    transparency: float = 0.0
    absorption: float = 0.0


@dataclass(frozen=True)
class Body:
    """A rigid group of parts.

    Attributes:
        frustums: (F, FRUSTUM_COLUMNS) float64.
        rounds: (R, ROUND_COLUMNS) float64.
        materials: (F + R, 4) float64, the columns of `Material`, frustums first.
        size: length, width, height of the box around the body, metres.
        label: 0 car, 1 pedestrian, 2 cyclist, or -1 for what has no label.
    """

    frustums: FloatArray
    rounds: FloatArray
    materials: FloatArray
    size: tuple[float, float, float]
    label: int = -1


def rotation_from_angles(yaw: FloatArray, pitch: FloatArray, roll: FloatArray) -> FloatArray:
    """(N, 3, 3) rotations Rz(yaw) Ry(pitch) Rx(roll) from (N,) angles in radians."""
    cy, sy = np.cos(yaw), np.sin(yaw)
    cp, sp = np.cos(pitch), np.sin(pitch)
    cr, sr = np.cos(roll), np.sin(roll)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def frustum_extents(frustums: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lower and upper corners, both (F, 3), of the boxes around frustums in the body frame."""
    z0, z1, bx0, bx1, bw, tx0, tx1, tw, yc = frustums.T[:9]
    half_width = np.maximum(bw, tw)
    low = np.stack([np.minimum(bx0, tx0), yc - half_width, z0], axis=1)
    high = np.stack([np.maximum(bx1, tx1), yc + half_width, z1], axis=1)
    return low, high


def round_extents(rounds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Lower and upper corners, both (R, 3), of the boxes around round parts in the body frame."""
    axes = rotation_from_angles(*rounds.T[6:9]) * rounds[:, None, 3:6]
    is_cylinder = rounds[:, 9:10] > 0.5
    across = np.sqrt(axes[:, :, 0] ** 2 + axes[:, :, 1] ** 2)
    along = np.abs(axes[:, :, 2])
    half = np.where(is_cylinder, across + along, np.sqrt(across**2 + along**2))
    return rounds[:, :3] - half, rounds[:, :3] + half


@dataclass
class PartList:
    """Collects the parts of one body."""

    _frustums: list[tuple[float, ...]] = field(default_factory=list)
    _rounds: list[tuple[float, ...]] = field(default_factory=list)
    _frustum_materials: list[Material] = field(default_factory=list)
    _round_materials: list[Material] = field(default_factory=list)

    def frustum(
        self,
        material: Material,
        z: tuple[float, float],
        bottom: tuple[float, float, float],
        top: tuple[float, float, float],
        *,
        y: float = 0.0,
        cut: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Adds a frustum.

        Args:
            material: What it is made of.
            z: Heights of its bottom and its top.
            bottom: x from, x to and half width of the bottom rectangle.
            top: The same of the top rectangle.
            y: Centre of both rectangles in y.
            cut: Legs of the vertical 45 degree cuts at the front and the rear corners.
        """
        self._frustums.append((*z, *bottom, *top, y, *cut))
        self._frustum_materials.append(material)

    def box(
        self,
        material: Material,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
    ) -> None:
        """Adds an axis-aligned box by its centre and its full size."""
        x, y, z = centre
        length, width, height = size
        rectangle = (x - length / 2, x + length / 2, width / 2)
        self.frustum(material, (z - height / 2, z + height / 2), rectangle, rectangle, y=y)

    def ellipsoid(
        self,
        material: Material,
        centre: tuple[float, float, float],
        semi: tuple[float, float, float],
        *,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
    ) -> None:
        """Adds an ellipsoid by its centre and semi-axes, then turned in place."""
        self._rounds.append((*centre, *semi, yaw, pitch, roll, 0.0))
        self._round_materials.append(material)

    def cylinder(
        self,
        material: Material,
        centre: tuple[float, float, float],
        radius: float,
        length: float,
        *,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
    ) -> None:
        """Adds a cylinder; its axis is z before it is turned in place."""
        self._rounds.append((*centre, radius, radius, length / 2, yaw, pitch, roll, 1.0))
        self._round_materials.append(material)

    def limb(
        self,
        material: Material,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        radius: float,
    ) -> None:
        """Adds a slim ellipsoid that reaches from one joint to the next."""
        (x0, y0, z0), (x1, y1, z1) = start, end
        dx, dy, dz = x1 - x0, y1 - y0, z1 - z0
        length = (dx * dx + dy * dy + dz * dz) ** 0.5
        self.ellipsoid(
            material,
            ((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2),
            (radius, radius, length / 2 + 0.4 * radius),
            yaw=float(np.arctan2(dy, dx)),
            pitch=float(np.arctan2(np.hypot(dx, dy), dz)),
        )

    def body(self, label: int = -1, size: tuple[float, float, float] | None = None) -> Body:
        """Returns the body, with the origin moved to the middle of its footprint.

        Args:
            label: Class of the body, -1 for none.
            size: Length, width and height to report, for bodies whose parts are already centred
                and whose box leaves out small parts (the mirrors of a car). By default the tight
                box around all parts; the ground stays at z = 0.
        """
        frustums = np.array(self._frustums, dtype=np.float64).reshape(-1, FRUSTUM_COLUMNS)
        rounds = np.array(self._rounds, dtype=np.float64).reshape(-1, ROUND_COLUMNS)
        materials = np.array(self._frustum_materials + self._round_materials, dtype=np.float64)
        if size is None:
            corners = [*frustum_extents(frustums), *round_extents(rounds)]
            low = np.concatenate(corners[0::2]).min(axis=0)
            high = np.concatenate(corners[1::2]).max(axis=0)
            middle = (low + high) / 2
            frustums[:, [2, 3, 5, 6]] -= middle[0]
            frustums[:, 8] -= middle[1]
            rounds[:, :2] -= middle[:2]
            size = (float(high[0] - low[0]), float(high[1] - low[1]), float(high[2]))
        return Body(frustums, rounds, materials.reshape(-1, 4), size, label)
