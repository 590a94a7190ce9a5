"""The published models on a GPU, and how well their boxes have to agree with those of single precision."""

from __future__ import annotations

import functools

import numpy as np
import torch
from reference import load_reference

from dsvt_ros.comparison import BoxDifference, FoundBoxes
from dsvt_ros.config import DetectorConfig, with_overrides
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.tools.verification import LIMITS

LIMIT = LIMITS["fp16"]
LEAST = 20
"""Boxes to compare."""


@functools.lru_cache(maxsize=1)
def published_network(name: str) -> tuple[DSVT, np.ndarray]:
    """A network in single precision with the weights of the reference, and its cloud."""
    reference = load_reference(name)
    network = DSVT(open_model(name).model)
    load_weights(network, reference.weights, "recipe")
    return network.to(torch.device("cuda")).eval().requires_grad_(False), reference.points


def config_of(name: str) -> DetectorConfig:
    """The cloud goes in as it is."""
    options = {"preprocess.find_ground": False, "preprocess.scale_features": False}
    return with_overrides(open_model(name).defaults, options)


def assert_enough_alike(found: FoundBoxes, expected: FoundBoxes) -> None:
    """As many boxes as ``dsvt verify`` asks for; those at the threshold, or the last candidates, need no match."""
    difference = BoxDifference()
    difference.add(found, expected, LIMIT.center_m, LIMIT.score)
    assert difference.expected > LEAST
    assert difference.matched >= LIMIT.min_matched, difference
    assert difference.yaw_rad.mean < 0.01
