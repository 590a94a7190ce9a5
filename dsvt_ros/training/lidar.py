"""Beam layouts of rotating lidars, modelled on public data sheets.

Angles are radians in the sensor frame (REP 103: x forward, y left, z up), elevation positive
upwards, azimuth counter-clockwise from +x. Beams are always sorted by ascending elevation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LidarModel:
    """What a rotating lidar's data sheet says.

    Attributes:
        name: Name of the preset.
        elevations_deg: Elevation of each beam, ascending, degrees.
        num_columns: Firings in one turn.
        max_range_m: Longest range of a bright target.
        range_noise_m: Standard deviation of the range.
        drop_out: Share of returns lost for no visible reason.
        staggered: Whether each beam has its own azimuth offset (a share of one column step).
    """

    name: str
    elevations_deg: tuple[float, ...]
    num_columns: int
    max_range_m: float
    range_noise_m: float = 0.02
    drop_out: float = 0.02
    staggered: bool = True

    def __post_init__(self) -> None:
        """Check the beam order, which the culling of the ray caster relies on."""
        if not self.elevations_deg or list(self.elevations_deg) != sorted(self.elevations_deg):
            raise ValueError(f"{self.name}: elevations_deg must be ascending and not empty.")
        if self.num_columns < 8:
            raise ValueError(f"{self.name}: num_columns is {self.num_columns}, expected >= 8.")

    @property
    def num_beams(self) -> int:
        """Number of beams."""
        return len(self.elevations_deg)


def _even(low_deg: float, high_deg: float, num_beams: int) -> tuple[float, ...]:
    return tuple(float(angle) for angle in np.linspace(low_deg, high_deg, num_beams))


def _dense_near_horizon(low_deg: float, high_deg: float, num_beams: int, exponent: float) -> tuple[float, ...]:
    """Beams whose spacing shrinks from the lowest one towards the highest one."""
    steps = 1.0 - np.linspace(1.0, 0.0, num_beams) ** exponent
    return tuple(float(angle) for angle in low_deg + (high_deg - low_deg) * steps)


def _hdl64_elevations() -> tuple[float, ...]:
    """Two blocks of 32 lasers: 1/2 degree apart below -8.8 degrees and 1/3 degree above."""
    return _even(-24.33, -8.83, 32) + _even(-8.33, 2.0, 32)


def _vlp32_elevations() -> tuple[float, ...]:
    """32 beams: 1/3 degree apart around the horizon, opening towards both ends."""
    low = (-25.0, -15.64, -11.31, -8.84, -7.25, -6.15, -5.33)
    high = (1.67, 2.33, 3.33, 4.67, 7.0, 10.33, 15.0)
    return low + _even(-4.67, 1.33, 18) + high


def _pandar40_elevations() -> tuple[float, ...]:
    """40 beams: 1/3 degree apart between -6 and +2 degrees, 1 degree and more outside."""
    low = (-25.0, -19.0, -14.0, -13.0, -12.0, -11.0, -10.0, -9.0, -8.0, -7.0)
    return low + _even(-6.0, 2.0, 25) + (3.0, 5.0, 8.0, 11.0, 15.0)


HDL64 = LidarModel("hdl64", _hdl64_elevations(), 2083, 120.0)
HDL32 = LidarModel("hdl32", _even(-30.67, 10.67, 32), 1084, 80.0, staggered=False)
WAYMO_TOP = LidarModel("waymo_top", _dense_near_horizon(-17.6, 2.4, 64, 1.6), 2650, 75.0, 0.015)
OS1_64 = LidarModel("os1_64", _even(-22.5, 22.5, 64), 1024, 100.0, 0.025)
OS1_128 = LidarModel("os1_128", _even(-22.5, 22.5, 128), 1024, 100.0, 0.025)
OS1_128_FINE = LidarModel("os1_128_fine", _even(-22.5, 22.5, 128), 2048, 100.0, 0.025)
VLP16 = LidarModel("vlp16", _even(-15.0, 15.0, 16), 1800, 100.0, 0.02, staggered=False)
VLP32 = LidarModel("vlp32", _vlp32_elevations(), 1800, 150.0, 0.02)
PANDAR40 = LidarModel("pandar40", _pandar40_elevations(), 1800, 150.0, 0.02)

TRAINING_LIDARS = (HDL64, HDL32, WAYMO_TOP, OS1_64, OS1_128, OS1_128_FINE, VLP16, VLP32)
"""Presets that training data is made with."""

HELD_OUT_LIDARS = (PANDAR40,)
"""Presets that the network never sees in training: they measure transfer to a new sensor."""

_TRAINING_WEIGHTS = np.array([0.34, 0.1, 0.14, 0.12, 0.07, 0.05, 0.06, 0.12])


@dataclass(frozen=True)
class Sensor:
    """A lidar as it is mounted, at (0, 0, height_m) of the model frame.

    Attributes:
        lidar: The beam layout.
        height_m: Height above the ground below the sensor.
        roll_rad: Tilt about +x, positive lowers the right side (-y).
        pitch_rad: Tilt about +y, positive lowers the front.
        sector_rad: Opening angle around +x inside which the sensor measures; 2 pi is a full turn.
        elevation_errors_rad: (beams,) deviation of each beam from its data sheet; None for none.
        stagger: (beams,) azimuth offset of each beam in [0, 1) column steps; None for none.
    """

    lidar: LidarModel
    height_m: float = 1.73
    roll_rad: float = 0.0
    pitch_rad: float = 0.0
    sector_rad: float = 2.0 * np.pi
    elevation_errors_rad: FloatArray | None = None
    stagger: FloatArray | None = None

    @property
    def column_step_rad(self) -> float:
        """Azimuth between two firings."""
        return 2.0 * np.pi / self.lidar.num_columns

    @property
    def is_full_turn(self) -> bool:
        """Whether the last column is a neighbour of the first one."""
        return self.num_columns == self.lidar.num_columns

    @property
    def num_columns(self) -> int:
        """Firings inside the sector."""
        share = min(1.0, self.sector_rad / (2.0 * np.pi))
        return max(1, round(self.lidar.num_columns * share))

    @property
    def first_azimuth_rad(self) -> float:
        """Azimuth of column 0; the columns are centred on +x."""
        return -0.5 * self.column_step_rad * self.num_columns

    @property
    def elevations_rad(self) -> FloatArray:
        """(beams,) elevation of each beam, ascending."""
        elevations: FloatArray = np.radians(np.asarray(self.lidar.elevations_deg))
        if self.elevation_errors_rad is not None:
            elevations = np.sort(elevations + self.elevation_errors_rad)
        return elevations

    @property
    def azimuth_offsets_rad(self) -> FloatArray:
        """(beams,) azimuth that each beam is ahead of its column."""
        if self.stagger is None:
            return np.zeros(self.lidar.num_beams)
        return self.stagger * self.column_step_rad

    @property
    def rotation(self) -> FloatArray:
        """(3, 3) rotation that takes the sensor frame to the model frame."""
        cr, sr = np.cos(self.roll_rad), np.sin(self.roll_rad)
        cp, sp = np.cos(self.pitch_rad), np.sin(self.pitch_rad)
        about_x = np.array([[1.0, 0.0, 0.0], [0.0, cr, -sr], [0.0, sr, cr]])
        about_y = np.array([[cp, 0.0, sp], [0.0, 1.0, 0.0], [-sp, 0.0, cp]])
        rotation: FloatArray = about_y @ about_x
        return rotation


_USUAL_HEIGHTS_M = {"hdl64": 1.73, "hdl32": 1.84, "waymo_top": 2.1}


def mount_randomly(lidar: LidarModel, rng: np.random.Generator) -> Sensor:
    """Mounts a lidar at a random height (0.6 to 2.2 m) with a random small tilt.

    Half of the sensors whose data sets are well known sit close to their usual height. One in
    eight measures a sector only, as data sets cropped to a camera's field of view do.
    """
    usual_m = _USUAL_HEIGHTS_M.get(lidar.name)
    if usual_m is not None and rng.random() < 0.6:
        height_m = float(np.clip(rng.normal(usual_m, 0.06), 0.6, 2.2))
    else:
        height_m = float(rng.uniform(0.6, 2.2))
    tilt_rad = np.radians(np.clip(rng.normal(0.0, 0.7, 2), -2.0, 2.0))
    is_sector = rng.random() < 0.125
    return Sensor(
        lidar=lidar,
        height_m=height_m,
        roll_rad=float(tilt_rad[0]),
        pitch_rad=float(tilt_rad[1]),
        sector_rad=float(np.radians(rng.uniform(80.0, 200.0))) if is_sector else 2.0 * np.pi,
        elevation_errors_rad=np.radians(rng.normal(0.0, 0.04, lidar.num_beams)),
        stagger=rng.random(lidar.num_beams) if lidar.staggered else None,
    )


def sample_training_sensor(rng: np.random.Generator) -> Sensor:
    """Draws one of `TRAINING_LIDARS` and mounts it."""
    index = rng.choice(len(TRAINING_LIDARS), p=_TRAINING_WEIGHTS / _TRAINING_WEIGHTS.sum())
    return mount_randomly(TRAINING_LIDARS[index], rng)
