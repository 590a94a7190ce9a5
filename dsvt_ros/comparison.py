"""How far two runs of the same model are apart: tensor by tensor, and box by box."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig, PostprocessConfig
from dsvt_ros.postprocess import decode, suppress
from dsvt_ros.structures import Boxes3D, DeviceBoxes, HeadMaps, ProposalMaps


@dataclass
class TensorDifference:
    """Differences of one tensor over several clouds.

    Attributes:
        max_error: Largest absolute difference; infinite where a value is not finite.
        mean_error: Mean absolute difference.
        magnitude: Largest absolute value that was expected.
        cosine: Smallest cosine similarity over the clouds.
    """

    max_error: float = 0.0
    mean_error: float = 0.0
    magnitude: float = 0.0
    cosine: float = 1.0
    _count: int = field(default=0, repr=False)

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Take another cloud into account; nothing happens for empty tensors."""
        if not expected.numel():
            return
        found, expected = found.double().flatten(), expected.double().flatten()
        error = (found - expected).abs()
        largest = float(error.max()) if torch.isfinite(found).all() else math.inf
        self.max_error = max(self.max_error, largest)
        self.magnitude = max(self.magnitude, float(expected.abs().max()))
        total = self._count + len(error)
        self.mean_error += (float(error.mean()) - self.mean_error) * len(error) / total
        self._count = total
        norms = float(found.norm() * expected.norm())
        cosine = float(found @ expected) / norms if norms else float(torch.equal(found, expected))
        self.cosine = min(self.cosine, cosine) if math.isfinite(cosine) else -1.0


@dataclass(frozen=True)
class FoundBoxes:
    """Boxes of one cloud.

    Attributes:
        boxes: (M, 7) or (M, 9) boxes after suppression, in the model's frame.
        scores: (M,) scores.
        labels: (M,) classes.
        settled: (M,) bool, False for boxes that a small change of a score removes: near the threshold, or near the cut
            that leaves the best peaks, `max_candidates` or as many as there are proposals.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    settled: Tensor


@dataclass
class Spread:
    """Largest and mean of some values; 0 without values."""

    largest: float = 0.0
    mean: float = 0.0
    count: int = 0

    def add(self, values: Tensor) -> None:
        """Take (N,) values into account."""
        if not len(values):
            return
        self.largest = max(self.largest, float(values.max()))
        self.count += len(values)
        self.mean += (float(values.double().mean()) - self.mean) * len(values) / self.count


@dataclass
class BoxDifference:
    """Differences of boxes over several clouds; those in place, size, heading and score are of matched pairs.

    Attributes:
        expected: Settled boxes of the reference.
        found: Settled boxes of the other run.
        expected_matched: Of the former, those that the other run has too.
        found_matched: Of the latter, those that the reference has too.
        center_m: Distance of centres.
        size_m: Largest difference of the three extents.
        yaw_rad: Difference of the heading.
        score: Difference of the score.
    """

    expected: int = 0
    found: int = 0
    expected_matched: int = 0
    found_matched: int = 0
    center_m: Spread = field(default_factory=Spread)
    size_m: Spread = field(default_factory=Spread)
    yaw_rad: Spread = field(default_factory=Spread)
    score: Spread = field(default_factory=Spread)

    @property
    def matched(self) -> float:
        """The smaller share of matched boxes of both directions; 1 without boxes."""
        shares = ((self.expected_matched, self.expected), (self.found_matched, self.found))
        return min(matched / count if count else 1.0 for matched, count in shares)

    def add(self, found: FoundBoxes, expected: FoundBoxes, center_m: float, score: float) -> None:
        """Take another cloud into account: boxes match with the same label, `center_m` and `score` apart at most."""
        for ours, theirs, is_expected in ((expected, found, True), (found, expected, False)):
            rows = ours.settled.nonzero().squeeze(1)
            matched = 0
            if len(rows) and len(theirs.boxes):
                distance = torch.cdist(ours.boxes[rows, :3].double(), theirs.boxes[:, :3].double())
                change = (ours.scores[rows, None] - theirs.scores[None]).abs()
                fits = (ours.labels[rows, None] == theirs.labels[None]) & (distance <= center_m) & (change <= score)
                nearest = torch.where(fits, distance, torch.full_like(distance, math.inf)).argmin(1)
                hit = fits.any(1)
                matched = int(hit.sum())
                self._measure(ours.boxes[rows][hit], theirs.boxes[nearest][hit])
                self.score.add(change[hit, nearest[hit]])
            if is_expected:
                self.expected, self.expected_matched = self.expected + len(rows), self.expected_matched + matched
            else:
                self.found, self.found_matched = self.found + len(rows), self.found_matched + matched

    def _measure(self, ours: Tensor, theirs: Tensor) -> None:
        difference = (ours - theirs).double()
        self.center_m.add(difference[:, :3].norm(dim=1))
        self.size_m.add(difference[:, 3:6].abs().amax(1))
        self.yaw_rad.add(torch.atan2(difference[:, 6].sin(), difference[:, 6].cos()).abs())


def boxes_from_maps(maps: HeadMaps, model: ModelConfig, config: PostprocessConfig, margin: float) -> FoundBoxes:
    """Decode and suppress, and tell which boxes are settled.

    Args:
        maps: Maps of one cloud.
        model: The model.
        config: Threshold, candidates and suppression.
        margin: Heatmap score that separates a settled box from the threshold and from the candidates' cut.
    """
    # The threshold applies to the heatmap's score, which the rectifier changes afterwards.
    plain = replace(config, iou_rectifier=())
    candidates = decode(maps, model, plain)
    kept = suppress(decode(maps, model, config), model, config)
    boxes, labels = kept.boxes[kept.keep], kept.labels[kept.keep]

    def score_of(candidates: DeviceBoxes) -> Tensor:
        same = (boxes[:, None] == candidates.boxes[None]).all(2) & (labels[:, None] == candidates.labels[None])
        return candidates.scores[same.int().argmax(1)]

    if not len(boxes):
        return FoundBoxes(boxes, kept.scores[kept.keep], labels, labels.bool())
    settled = score_of(candidates) > config.score_threshold + margin
    if isinstance(maps, ProposalMaps):
        # A sure head leaves of the score what made the proposal.
        candidates = decode(replace(maps, heatmap=torch.full_like(maps.heatmap, 100.0)), model, plain)
    if isinstance(maps, ProposalMaps) or len(candidates.scores) == config.max_candidates:
        settled &= score_of(candidates) > float(candidates.scores.min()) + margin
    return FoundBoxes(boxes, kept.scores[kept.keep], labels, settled)


def settled_as(boxes: Boxes3D, like: FoundBoxes, center_m: float, score: float) -> FoundBoxes:
    """Boxes of a run without maps: settled where their equals in `like` are, and where they have none.

    Args:
        boxes: In the model's frame.
        like: Of the same kernels, from maps.
        center_m: Distance of the centres of equals.
        score: Difference of their scores.
    """
    device = like.boxes.device
    rows, scores, labels = (torch.as_tensor(part, device=device) for part in (boxes.boxes, boxes.scores, boxes.labels))
    settled = torch.ones_like(labels, dtype=torch.bool)
    if len(rows) and len(like.boxes):
        distance = torch.cdist(rows[:, :3].double(), like.boxes[:, :3].double())
        fits = (labels[:, None] == like.labels[None]) & (distance <= center_m)
        fits &= (scores[:, None] - like.scores[None]).abs() <= score
        nearest = torch.where(fits, distance, torch.full_like(distance, math.inf)).argmin(1)
        settled = ~fits.any(1) | like.settled[nearest]
    return FoundBoxes(rows, scores, labels, settled)


def map_differences(
    differences: dict[str, TensorDifference],
    found: Iterable[tuple[str, Tensor]],
    expected: Iterable[tuple[str, Tensor]],
) -> None:
    """Add named tensors of a cloud to their differences."""
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        differences.setdefault(name, TensorDifference()).add(ours, theirs)


def common_proposals(found: HeadMaps, expected: HeadMaps) -> tuple[HeadMaps, HeadMaps]:
    """The proposals of one cloud that both runs have, in the same order; other heads' maps as they are.

    Which cells become proposals, and in which order, hangs on tiny differences of scores.
    """
    if not isinstance(found, ProposalMaps) or not isinstance(expected, ProposalMaps):
        return found, expected
    keys = [maps.label[0].long() * (1 << 32) + maps.cell[0].long() for maps in (found, expected)]
    rows = (keys[0][:, None] == keys[1][None]).nonzero()

    def pick(maps: ProposalMaps, chosen: Tensor) -> ProposalMaps:
        values: dict[str, Any] = {entry.name: getattr(maps, entry.name) for entry in fields(maps)}
        picked: dict[str, Any] = {name: None if v is None else v[..., chosen] for name, v in values.items()}
        return ProposalMaps(**picked)

    return pick(found, rows[:, 0]), pick(expected, rows[:, 1])
