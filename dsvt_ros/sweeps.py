"""Several sweeps of a moving lidar as one cloud: standing things fall onto themselves, moving ones leave a trail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dsvt_ros.config import ModelConfig, PreprocessConfig
from dsvt_ros.deskew import compensate, sensor_path
from dsvt_ros.errors import PointCloudError
from dsvt_ros.motion import Motion, MotionError
from dsvt_ros.poses import relative_pose
from dsvt_ros.preprocess import drop_missing, is_return, transform

MAX_SPEED_M_S = 100.0
"""A sensor that seems to move faster was not tracked: the odometry jumped."""

JUMP_M = 10.0
"""Added to what that speed allows, since a short time makes any noise fast."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """One cloud and where its sensor was.

    Attributes:
        points: (N, C) float32 on the device in the model's columns, metres, in the sensor's frame at `stamp_ns`.
        stamp_ns: When it was measured.
        T_fixed_sensor: (4, 4) float64, pose of the sensor at `stamp_ns` in a frame that all sweeps share.
    """

    points: Tensor
    stamp_ns: int
    T_fixed_sensor: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MergedSweeps:
    """What the network gets to see.

    Attributes:
        points: (N, C), see `merge_sweeps`.
        num_sweeps: How many are in it.
        num_wanted: How many there should be.
        problem: Why sweeps were left out or not compensated for motion; empty if nothing went wrong.
    """

    points: Tensor
    num_sweeps: int
    num_wanted: int
    problem: str = ""


def merge_sweeps(sweeps: Sequence[Sweep], age_column: int) -> Tensor:
    """All points in the frame of the first sweep, each with the age of its sweep.

    The transforms between sweeps are computed in double precision, so that a fixed frame with its origin a million
    metres away does no harm; what remains is applied to the points in float32.

    Args:
        sweeps: Newest first, at least one. Missing returns must be gone: moved away from (0, 0, 0), nothing would
            tell them from points.
        age_column: Column that takes the age, s: 0 for the first sweep, positive for older ones.

    Returns:
        (N, C) float32 on the device, the sweeps one after the other.
    """
    newest = sweeps[0]
    moves = np.stack([relative_pose(newest.T_fixed_sensor, sweep.T_fixed_sensor) for sweep in sweeps])
    T_newest_sweep = torch.as_tensor(moves, dtype=torch.float32, device=newest.points.device)
    moved = [newest.points, *(transform(s.points, T) for s, T in zip(sweeps[1:], T_newest_sweep[1:], strict=True))]
    merged = torch.cat(moved)
    start = 0
    for sweep in sweeps:
        stop = start + len(sweep.points)
        merged[start:stop, age_column] = (newest.stamp_ns - sweep.stamp_ns) / 1e9
        start = stop
    return merged


class SweepBuffer:
    """Keeps the last sweeps of one sensor on the device and merges them with each new one.

    Sweeps are kept in the sensor's own frame and placed anew with every cloud, so odometry that arrives late still
    serves the next one. A stamp that goes back (a bag that starts again) or another frame begins anew.

    Args:
        model: Says which column holds the age and how many sweeps are merged by default.
        device: Where the points are kept.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._age_column = model.age_column
        self._frame_id = ""
        self._kept: list[tuple[Tensor, int]] = []  # points and stamp of each sweep, newest first

    def add(
        self,
        points: ArrayLike | Tensor,
        stamp_ns: int,
        frame_id: str,
        motion: Motion,
        config: PreprocessConfig,
        *,
        wait_s: float = 0.0,
        point_times: Callable[[], NDArray[np.float32]] | None = None,
    ) -> MergedSweeps:
        """Merge a new cloud with those before it.

        Sweeps whose place is not known are left out, never taken as they are. The wait for the new cloud's own pose
        is spared while not even the previous one's is known: then there is no motion, not just a late one.

        Args:
            points: (N, C) float32 in the model's columns, in the sensor's frame; missing returns are dropped, and the
                column of the age is overwritten.
            stamp_ns: The cloud's stamp.
            frame_id: The sensor's frame.
            motion: Where the sensor is.
            config: How many sweeps, how old, and from which distance on points count.
            wait_s: How long to wait for the sensor's newest pose.
            point_times: Asked for the (N,) times of points after the stamp, s, NaN where one is not known, if
                `motion_compensation` is on; may raise `PointCloudError`.
        """
        if not self._kept or not _is_known(motion, self._kept[0][1], frame_id):
            wait_s = 0.0
        deadline_s = time.monotonic() + wait_s
        problem = self.keep(points, stamp_ns, frame_id, motion, config, wait_s=wait_s, point_times=point_times)
        placed, missing = self._placed(motion, max(deadline_s - time.monotonic(), 0.0))
        cloud = placed[0].points
        if self._age_column is not None:
            cloud = merge_sweeps(placed, self._age_column)
        return MergedSweeps(cloud, len(placed), self._num_wanted(config), "; ".join(filter(None, (problem, missing))))

    def keep(
        self,
        points: ArrayLike | Tensor,
        stamp_ns: int,
        frame_id: str,
        motion: Motion,
        config: PreprocessConfig,
        *,
        wait_s: float = 0.0,
        point_times: Callable[[], NDArray[np.float32]] | None = None,
    ) -> str:
        """Take in a cloud that is not to be answered itself, so that later ones find it among the older sweeps.

        Args:
            points: As those of `add`, like the rest.
            stamp_ns: The cloud's stamp.
            frame_id: The sensor's frame.
            motion: Where the sensor is.
            config: How many sweeps, how old, and from which distance on points count.
            wait_s: How long to wait for the sensor's newest pose.
            point_times: Times of points.

        Returns:
            Why its points are not compensated for motion; empty if they are, or need not be.
        """
        self._forget(stamp_ns, frame_id, self._num_wanted(config), config.max_sweep_age)
        cloud, problem = torch.as_tensor(points).to(self._device, torch.float32), ""
        if config.motion_compensation and point_times is not None:
            try:
                cloud = self._compensated(cloud, stamp_ns, motion, config, wait_s, point_times())
            except (MotionError, PointCloudError) as error:
                problem = f"points are not compensated for motion: {error}"
        self._kept.insert(0, (drop_missing(cloud, self._model, config), stamp_ns))
        return problem

    def _num_wanted(self, config: PreprocessConfig) -> int:
        return 1 if self._age_column is None else config.sweeps or self._model.sweeps

    def _forget(self, stamp_ns: int, frame_id: str, num_wanted: int, max_age_s: float) -> None:
        """Let go of the sweeps that the new cloud can do nothing with."""
        went_back = bool(self._kept) and stamp_ns < self._kept[0][1]
        if went_back or frame_id != self._frame_id:
            self._kept, self._frame_id = [], frame_id
        oldest_ns = stamp_ns - round(max_age_s * 1e9)
        self._kept = [kept for kept in self._kept[: num_wanted - 1] if oldest_ns <= kept[1] < stamp_ns]

    def _compensated(
        self,
        cloud: Tensor,
        stamp_ns: int,
        motion: Motion,
        config: PreprocessConfig,
        wait_s: float,
        offsets_s: NDArray[np.float32],
    ) -> Tensor:
        """The cloud as at its stamp; points whose time is not known stay where they are."""
        if not np.isfinite(offsets_s).any():
            return cloud
        first_s, last_s = float(np.nanmin(offsets_s)), float(np.nanmax(offsets_s))
        path = sensor_path(motion, stamp_ns, self._frame_id, first_s, last_s, wait_s)
        offsets = torch.as_tensor(offsets_s).to(self._device)
        moved = compensate(cloud, torch.nan_to_num(offsets), first_s, last_s, path)
        # Missing returns stay at the origin too, where they are recognized.
        moves = torch.isfinite(offsets) & is_return(cloud, config)
        return torch.where(moves[:, None], moved, cloud)

    def _placed(self, motion: Motion, wait_s: float) -> tuple[list[Sweep], str]:
        """The newest sweep and the older ones whose place relative to it is known; and why others are missing."""
        (cloud, stamp_ns), *older = self._kept
        alone = [Sweep(cloud, stamp_ns, np.eye(4))]
        if not older:
            return alone, ""
        try:
            newest = Sweep(cloud, stamp_ns, motion.pose_at(stamp_ns, self._frame_id, wait_s))
        except MotionError as error:
            return alone, f"older sweeps are left out: {error}"
        placed, problem = [newest], ""
        for points, kept_ns in older:
            try:
                T_fixed_sensor = motion.pose_at(kept_ns, self._frame_id)
            except MotionError as error:
                problem = str(error)
                continue
            distance_m = float(np.linalg.norm(T_fixed_sensor[:3, 3] - newest.T_fixed_sensor[:3, 3]))
            age_s = (stamp_ns - kept_ns) / 1e9
            if distance_m > JUMP_M + MAX_SPEED_M_S * age_s:
                problem = f"the sensor jumped by {distance_m:.1f} m in {age_s:.2f} s"
                continue
            placed.append(Sweep(points, kept_ns, T_fixed_sensor))
        missing = len(self._kept) - len(placed)
        return placed, f"{missing} older sweeps are left out: {problem}" if missing else ""


def _is_known(motion: Motion, stamp_ns: int, frame_id: str) -> bool:
    try:
        motion.pose_at(stamp_ns, frame_id)
    except MotionError:
        return False
    return True
