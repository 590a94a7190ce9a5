"""Whole frames of few points, and the detector that runs torch stage by stage, against which they are compared."""

from __future__ import annotations

import numpy as np
import torch
from fused_fixtures import DEVICE
from tiny import randomize

from dsvt_ros import Detector
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.comparison import BoxDifference, FoundBoxes
from dsvt_ros.config import DetectorConfig, ModelConfig, TransFusionHeadConfig, with_overrides
from dsvt_ros.fused.frame import FrameResult, FusedFrames
from dsvt_ros.fused.suppress import boxes_from_rows
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.poses import pose_matrix
from dsvt_ros.preprocess import boxes_to_source
from dsvt_ros.structures import Boxes3D, HeadMaps

THRESHOLD = 0.3
MARGIN = 0.01
"""Of a score that decides whether a box is one."""
SHAKEN = 30
"""Runs a little off, which have to see the same in a cloud that frames are compared on."""
MAX_SEEDS = 100
"""Of clouds, among which there has to be such a one."""


def options_of(**changes) -> DetectorConfig:
    return with_overrides(
        DetectorConfig(), {"postprocess.score_threshold": THRESHOLD, "preprocess.find_ground": False} | changes
    )


def network_with_spread_scores(model: ModelConfig) -> DSVT:
    """Random weights, scores that lie far apart, and headings of which rounding does not change much."""
    torch.manual_seed(0)
    network = randomize(DSVT(model))
    head = network.dense_head
    proposals = isinstance(model.head, TransFusionHeadConfig)
    for output in [head.heatmap_head[1]] if proposals else [group.hm[1] for group in head.heads_list]:
        output.weight.mul_(40)
    for branch in [head.prediction_head["rot"]] if proposals else [group.rot for group in head.heads_list]:
        branch[1].bias.add_(1)
    return network.to(DEVICE)


def stage_by_stage(network: DSVT, config: DetectorConfig, room: int | None = None) -> Detector:
    """The reference, which drops the farthest voxels where there is only so much room."""
    networks = TorchNetworks(network)
    networks.max_voxels = room
    return Detector(network, config, DEVICE, networks)


def points_in(model: ModelConfig, count: int, seed: int = 0) -> np.ndarray:
    """(N, 4) all over the range."""
    low, high = np.array(model.point_cloud_range).reshape(2, 3)
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(low, high, (count, 3)), rng.uniform(0, 1, count)]).astype(np.float32)


def boxes_of(frames: FusedFrames, clouds, poses=None) -> tuple[list[Boxes3D], FrameResult]:
    """Boxes of each cloud in its own frame, and the result."""
    poses = [np.eye(4)] * len(clouds) if poses is None else poses
    result = frames(clouds, poses)
    assert result.rows.shape[0] == len(clouds)
    found = [boxes_from_rows(rows, frames.model, DetectorConfig().postprocess) for rows in result.rows]
    return [boxes_to_source(boxes, pose) for boxes, pose in zip(found, poses, strict=True)], result


def assert_alike(found: Boxes3D, expected: Boxes3D) -> None:
    """All boxes but those at the threshold or the last candidates, in both directions."""
    difference = _difference(found, expected)
    assert difference.expected > 2, "there is something to compare"
    assert difference.matched == 1
    assert difference.size_m.largest < 0.02
    assert difference.yaw_rad.largest < 0.005
    order = np.lexsort((-found.scores, found.labels))
    assert (found.scores[order] == found.scores).all(), "those of a class come by descending score"


def _difference(found: Boxes3D, expected: Boxes3D) -> BoxDifference:
    difference = BoxDifference()
    difference.add(_as_found(found), _as_found(expected), 0.02, MARGIN)
    return difference


def _as_found(boxes: Boxes3D) -> FoundBoxes:
    scores = torch.as_tensor(boxes.scores)
    settled = scores > max(THRESHOLD, boxes.scores.min(initial=1)) + MARGIN
    return FoundBoxes(torch.as_tensor(boxes.boxes), scores, torch.as_tensor(boxes.labels), settled)


def assert_same_frame(frames: FusedFrames, network: DSVT, config: DetectorConfig, *counts: int) -> None:
    """Two clouds of so many points, of sensors that stand and look elsewhere; boxes come back into their frames."""
    poses = [np.eye(4), pose_matrix([0.4, -0.2, 0.3, 0.02, -0.01, 0.7])]
    reference = stage_by_stage(network, config)
    shaken = Detector(network, config, DEVICE, Shaken(network))
    torch.manual_seed(0)
    clouds = [_decided_cloud(reference, shaken, count, pose) for count, pose in zip(counts, poses, strict=True)]
    found, result = boxes_of(frames, clouds, poses)
    num_points = num_voxels = 0
    for cloud, pose, ours in zip(clouds, poses, found, strict=True):
        assert_alike(ours, reference.detect(cloud, pose))
        num_points += reference.num_points
        num_voxels += reference.num_voxels
    assert (result.num_points, result.num_voxels, result.num_dropped_voxels) == (num_points, num_voxels, 0)


class Shaken(TorchNetworks):
    """Maps further off than those in float16 are, anew in every call."""

    def dense(self, bev: torch.Tensor) -> HeadMaps:
        """As `Networks.dense`."""
        maps = self._backbone_2d(bev)
        return self._head(maps * (1 + 4e-3 * torch.randn_like(maps)))


def _decided_cloud(reference: Detector, shaken: Detector, count: int, pose: np.ndarray) -> np.ndarray:
    """One in which rounding decides nothing, such as which cell becomes the last proposal."""
    for seed in range(MAX_SEEDS):
        cloud = points_in(reference.model, count, seed)
        expected = reference.detect(cloud, pose)
        if all(_difference(shaken.detect(cloud, pose), expected).matched == 1 for _ in range(SHAKEN)):
            return cloud
    raise AssertionError(f"rounding decides something in each of {MAX_SEEDS} clouds")


def assert_drops_the_farthest(frames: FusedFrames, reference: Detector, points: np.ndarray, room: int) -> None:
    """More voxels than there is room for in both."""
    (found,), result = boxes_of(frames, [points])
    assert_alike(found, reference.detect(points, np.eye(4)))
    assert result.num_points == reference.num_points == len(points)
    assert result.num_voxels == reference.num_voxels
    assert result.num_dropped_voxels == reference.num_dropped_voxels == result.num_voxels - room


def assert_sees_nothing(frames: FusedFrames, cloud: np.ndarray) -> None:
    (found,), result = boxes_of(frames, [cloud])
    assert len(found) == 0
    assert (result.num_points, result.num_voxels, result.num_dropped_voxels) == (0, 0, 0)
