"""``dsvt verify --against pcdet``: our network in torch against the original one, module by module."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from dsvt_ros.bev import scatter_bev
from dsvt_ros.comparison import BoxDifference, FoundBoxes, TensorDifference, boxes_from_maps, common_proposals
from dsvt_ros.config import PostprocessConfig, with_overrides
from dsvt_ros.detector import choose_device
from dsvt_ros.errors import ConfigError, ModelError
from dsvt_ros.export.networks import named_maps
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder, open_model
from dsvt_ros.model.pcdet.files import ORIGIN
from dsvt_ros.model.pcdet.reader import PcdetModel, read_pcdet
from dsvt_ros.preprocess import drop_missing, scale_features
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import SetPartition
from dsvt_ros.tools.arguments import overrides_from
from dsvt_ros.tools.machine import hardware, versions
from dsvt_ros.tools.pcdet_reference import Computed, PcdetReference
from dsvt_ros.tools.result_file import write_result
from dsvt_ros.tools.verification import Limits, Result, clouds_from, limits_from, print_result, require_clouds
from dsvt_ros.voxelization import voxelize

SCHEMA_VERSION = 1


def verify_against_pcdet(options: argparse.Namespace, console: Console) -> int:
    """Compare on the clouds of the options.

    Returns:
        0 if everything is within the limits, 1 if not.
    """
    folder = open_model(options.model)
    theirs = _origin(folder)
    source = options.weights or folder.weights
    if source is None:
        raise ModelError(f"model {folder.model.name} comes without weights: name a file with --weights")
    weights = read_weights(source)
    device = choose_device(options.device)
    reference = PcdetReference(theirs.config, folder.model, weights, device)
    network = DSVT(folder.model)
    load_weights(network, weights, str(source))
    network = network.to(device).eval().requires_grad_(False)
    config = with_overrides(folder.defaults, overrides_from(options))
    if theirs.turns_boxes:
        config = with_overrides(config, {"postprocess.nms_geometry": "dsvt_release"})
    config.check_against(folder.model)

    result = Result("torch", "fp32", limits_from(options, "fp32"), {}, BoxDifference())
    # TF32 would round the convolutions of both, and each in its own way.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for cloud in clouds_from(options, folder.model, config.preprocess):
            points = torch.as_tensor(cloud, device=device)
            points = drop_missing(points, folder.model, config.preprocess)
            points = scale_features(points, folder.model, config.preprocess)
            if not len(voxelize(points, folder.model)):
                continue  # the original code fails without voxels
            compare(
                result,
                compute(network, points, config.postprocess),
                reference(points.clone()),
                network,
                config.postprocess,
            )
            result.num_clouds += 1
    require_clouds(options, result)
    print_result(console, result, f"pcdet {reference.version}")
    if options.output:
        content = {
            "schema_version": SCHEMA_VERSION,
            "model": folder.model.name,
            "reference": {"package": "pcdet", "version": reference.version, "device": str(device)},
            "hardware": hardware(device),
            "versions": versions(["torch"]),
            "clouds": [Path(path).name for path in options.cloud],
            "results": [result.to_json()],
        }
        write_result(options.output, content, console)
    return 1 if result.exceeded() else 0


def _origin(folder: ModelFolder) -> PcdetModel:
    """The OpenPCDet YAML behind a model."""
    if folder.pcdet:
        return folder.pcdet
    path = folder.path / ORIGIN
    if not path.is_file():
        raise ConfigError(
            f"--against pcdet needs a model that comes from an OpenPCDet YAML, and {folder.model.name} does not: name "
            f"the YAML itself, with --weights, or a folder that dsvt export made of it ({ORIGIN} in there)"
        )
    found = read_pcdet(path)
    if dataclasses.replace(found.model, name=folder.model.name) != folder.model:
        raise ConfigError(f"{path} describes another model than the model.yaml beside it; export the model again")
    return found


def compute(network: DSVT, points: Tensor, config: PostprocessConfig) -> Computed:
    """Our network, stage by stage, on (N, C) points."""
    model = network.config
    voxels = voxelize(points, model)
    features = network.vfe(voxels)
    partition = partition_sets(voxels.coords, model)
    pillars = network.backbone_3d(features, partition)
    bev = network.backbone_2d(scatter_bev(pillars, partition.coords, model.grid_size, 1))
    maps = network.dense_head(bev)
    found = boxes_from_maps(maps, model, config, margin=0.0)
    return Computed(
        discrete={"voxel_coords": voxels.coords, **_sets(partition)},
        features={"voxel_features": features, "backbone_3d": pillars, "backbone_2d": bev},
        maps=maps,
        boxes=found.boxes,
        scores=found.scores,
        labels=found.labels,
    )


def _sets(partition: SetPartition) -> dict[str, Tensor]:
    """Sets and masks by the names of the original code; of the shifts that a stage uses."""
    named = {}
    for number, stage in enumerate(partition.stages):
        for shift, sets in enumerate(stage.sets):
            if sets is not None:
                named[f"inds_stage{number}_shift{shift}"] = sets.indices
                named[f"mask_stage{number}_shift{shift}"] = sets.mask
    return named


def compare(result: Result, ours: Computed, theirs: Computed, network: DSVT, config: PostprocessConfig) -> None:
    """Add one cloud."""
    for name, tensor in ours.discrete.items():
        difference = _inequality(tensor, theirs.discrete.get(name))
        if difference:
            result.unequal[name] = difference
    our_maps, their_maps = common_proposals(ours.maps, theirs.maps)
    expected = {**theirs.features, **dict(named_maps(their_maps))}
    for name, tensor in (*ours.features.items(), *named_maps(our_maps)):
        if tensor.shape != expected[name].shape:
            result.unequal[name] = f"shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        else:
            result.tensors.setdefault(name, TensorDifference()).add(tensor, expected[name])
    limits, model = result.limits, network.config
    found = boxes_from_maps(ours.maps, model, config, limits.score)
    known = _with_settled(theirs, boxes_from_maps(theirs.maps, model, config, limits.score), limits)
    result.boxes.add(found, known, limits.center_m, limits.score)


def _inequality(ours: Tensor, theirs: Tensor | None) -> str:
    """How two tensors that must be the same differ, in words; empty if they do not."""
    if theirs is None:
        return "missing"
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    different = int((ours != theirs.to(ours.dtype)).sum())
    return f"{different} of {ours.numel()} entries differ" if different else ""


def _with_settled(theirs: Computed, decoded: FoundBoxes, limits: Limits) -> FoundBoxes:
    """Their boxes, where those that a rounding error may remove are told by our decoding of their maps.

    A box of theirs that our decoding does not have counts as settled: it must be found.
    """
    settled = torch.ones_like(theirs.labels, dtype=torch.bool)
    if len(theirs.boxes) and len(decoded.boxes):
        distance = torch.cdist(theirs.boxes[:, :3].double(), decoded.boxes[:, :3].double())
        other_class = theirs.labels[:, None] != decoded.labels[None]
        nearest = distance.masked_fill(other_class, torch.inf).min(1)
        settled = decoded.settled[nearest.indices] | (nearest.values > limits.center_m)
    return FoundBoxes(theirs.boxes, theirs.scores, theirs.labels, settled)
