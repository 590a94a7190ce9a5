"""Detecting in the clouds of a data set: from its frame and intensities to the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from dsvt_ros.config import ModelConfig
from dsvt_ros.detector import Detector
from dsvt_ros.io.clouds import select_columns
from dsvt_ros.io.labelled_sweeps import Axes, PosedScan
from dsvt_ros.preprocess import drop_missing
from dsvt_ros.structures import Boxes3D
from dsvt_ros.sweeps import Sweep, merge_sweeps
from dsvt_ros.training.evaluation import SCORE_THRESHOLD

THRESHOLD_KEY = "postprocess.score_threshold"
INTENSITY_KEY = "preprocess.intensity_scale"

INTENSITY_MAX = 255.0
"""Of nuScenes and Argoverse 2."""


def T_model_sensor(  # noqa: N802
    model: ModelConfig,
    axes: Axes,
    T_level_sensor: NDArray[np.float64],  # noqa: N803
) -> NDArray[np.float64]:
    """(4, 4) pose of a sensor in the model's frame.

    A model that was trained along the axes of the sensor sees its clouds as they are, but for the height of the ground.
    For other models clouds are levelled, then turned.

    Args:
        model: Gives the axes and the height of the ground.
        axes: Of the sensor's frame.
        T_level_sensor: As in `LabelledSweep`.
    """
    pose = np.eye(4)
    if model.axes == axes:
        pose[2, 3] = T_level_sensor[2, 3]
    else:
        if model.axes == "x_right":  # x right is -y of the level frame, y forward its x
            pose[:2, :2] = [[0, -1], [1, 0]]
        pose = pose @ T_level_sensor
    pose[2, 3] += model.ground_z
    return pose


def detect(detector: Detector, scans: Sequence[PosedScan], pose: NDArray[np.float64]) -> Boxes3D:
    """Detect in a cloud, together with those before it if the model takes several sweeps.

    Args:
        detector: Any.
        scans: The cloud, then earlier ones, newest first; where there are fewer than the model takes, it gets those.
        pose: `T_model_sensor` of the first.

    Returns:
        Boxes in the frame of the first.
    """
    model, config = detector.model, detector.config.preprocess
    fill = {feature.name: feature.fill for feature in model.features[3:]}
    newest = scans[0].scan
    if model.age_column is None:
        return detector.detect(select_columns(newest, model.feature_names, fill), pose)
    sweeps = []
    for posed in scans[: num_sweeps(detector)]:
        stamp_ns = posed.scan.stamp_ns or 0
        if (newest.stamp_ns or 0) - stamp_ns <= config.max_sweep_age * 1e9:
            points = torch.as_tensor(select_columns(posed.scan, model.feature_names, fill), device=detector.device)
            sweeps.append(Sweep(drop_missing(points, model, config), stamp_ns, posed.T_fixed_sensor))
    return detector.detect(merge_sweeps(sweeps, model.age_column), pose)


def num_sweeps(detector: Detector) -> int:
    """How many sweeps the network sees at once."""
    if detector.model.age_column is None:
        return 1
    return detector.config.preprocess.sweeps or detector.model.sweeps


def suit_intensity(detector: Detector, overrides: Sequence[str]) -> None:
    """Scale intensities of 0 to 255 to 0 to 1, unless the user says how.

    Models with the axes of nuScenes were trained on it, and take intensities as its files have them.

    Args:
        detector: Its option `INTENSITY_KEY` is set.
        overrides: Keys that the user has set.
    """
    if detector.model.axes != "x_right" and INTENSITY_KEY not in overrides:
        detector.configure({INTENSITY_KEY: 1 / INTENSITY_MAX})


@contextmanager
def low_scores(detector: Detector) -> Iterator[None]:
    """Let boxes with scores down to `SCORE_THRESHOLD` through meanwhile, for a complete precision-recall curve."""
    own = detector.config.postprocess.score_threshold
    detector.configure({THRESHOLD_KEY: min(SCORE_THRESHOLD, own)})
    try:
        yield
    finally:
        detector.configure({THRESHOLD_KEY: own})
