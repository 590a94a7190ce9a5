"""What the published modules computed from seeded weights and clouds, and how far our stages are from it.

Run as a script, it prints the largest difference of every stage for every published model: ``make parity``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import recipe
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.bev import scatter_bev
from dsvt_ros.config import with_overrides
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.postprocess import decode, suppress
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import CenterMaps, DeviceBoxes, HeadMaps, ProposalMaps, SetPartition
from dsvt_ros.voxelization import voxelize

DATA = Path(__file__).parent / "data" / "reference"
SEED = 11
NAMES = ("waymo_pillar", "waymo_voxel", "nuscenes_pillar")

# Largest allowed difference of what a name starts with; the first that fits counts.
LIMITS = {
    "voxels": 0.0,
    "sets": 0.0,
    "pillars": 0.0,
    "features": 1e-4,
    "positions": 1e-5,
    "attention": 1e-4,
    "sparse": 1e-4,
    "bev": 1e-4,
    "head": 1e-3,
    "boxes: centre": 0.01,
    "boxes: score": 1e-3,
    "boxes: size": 1e-3,
    "boxes": 0.0,
}


@dataclass(frozen=True)
class Reference:
    """A published model's outputs, and what they were computed from.

    Attributes:
        name: The model.
        arrays: The outputs by name.
        points: (N, C) cloud; scaled columns go in unscaled.
        weights: State dict.
    """

    name: str
    arrays: dict[str, NDArray[np.generic]]
    points: NDArray[np.float32]
    weights: dict[str, Tensor]


def load_reference(name: str) -> Reference:
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    if name == "nuscenes_pillar":
        points = recipe.make_points(9000, SEED, range_m=54.0, ground_z=-1.8, time_column=True)
        points[:, 3] *= 255
    else:
        points = recipe.make_points(9000, SEED, range_m=75.0, ground_z=0.0, time_column=False)
    weights = recipe.make_weights(recipe.read_keys(DATA / f"keys_{name}.txt"), SEED)
    weights |= {key.removeprefix("override__"): value for key, value in arrays.items() if key.startswith("override__")}
    return Reference(name, arrays, points, {key: torch.as_tensor(value) for key, value in weights.items()})


@dataclass
class Comparison:
    """Largest absolute difference of everything that a reference knows, by name.

    Attributes:
        reference: The published model's outputs.
        largest: The differences.
        found: Our boxes by geometry of the suppression.
    """

    reference: Reference
    largest: dict[str, float] = field(default_factory=dict)
    found: dict[str, DeviceBoxes] = field(default_factory=dict)

    def add(self, name: str, found: Tensor, key: str) -> None:
        expected = self.reference.arrays[key]
        assert tuple(found.shape) == expected.shape, f"{name}: {tuple(found.shape)} instead of {expected.shape}"
        self.record(name, np.abs(found.numpy().astype(np.float64) - expected).max(initial=0.0))

    def record(self, name: str, difference: float) -> None:
        self.largest[name] = max(self.largest.get(name, 0.0), float(difference))

    def exceeded(self) -> dict[str, float]:
        return {name: value for name, value in self.largest.items() if not value <= limit_of(name)}


def limit_of(name: str) -> float:
    return next(limit for start, limit in LIMITS.items() if name.startswith(start))


def compare(name: str) -> Comparison:
    """Run every stage of a model in PyTorch on the CPU, each on what ours before it gave."""
    reference = load_reference(name)
    arrays, model = reference.arrays, open_model(name).model
    network = DSVT(model).eval()
    load_weights(network, reference.weights, "recipe")
    result = Comparison(reference)
    inside: dict[str, Tensor] = {}
    for path, module in network.backbone_3d.named_modules():
        if f"backbone_3d__{path}__mean" in arrays:
            module.register_forward_hook(lambda _m, _i, output, path=path: inside.update({path: output}))
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(reference.points), model)
        result.add("voxels", voxels.coords, "voxel_coords")
        features = network.vfe(voxels)
        picked = torch.as_tensor(arrays["voxel_pick"]).long()
        result.add("features of voxels", features[picked], "voxel_features_pick")
        result.add("features: mean", features.double().mean(0), "voxel_features_mean")
        partition = partition_sets(voxels.coords, model)
        _compare_partition(result, network, partition, picked)
        sparse = network.backbone_3d(features, partition)
        assert len(inside) == sum(key.startswith("backbone_3d__") and key.endswith("__mean") for key in arrays)
        for path, output in inside.items():
            result.add("attention layers: mean", output.mean(0), f"backbone_3d__{path}__mean")
            result.add("attention layers", output[:4], f"backbone_3d__{path}__first4")
        result.add("sparse network", sparse[torch.as_tensor(arrays["backbone_pick"]).long()], "backbone_out_pick")
        result.add("sparse network: mean", sparse.double().mean(0), "backbone_out_mean")
        result.add("sparse network: deviation", sparse.double().std(0), "backbone_out_std")
        bev = network.backbone_2d(scatter_bev(sparse, partition.coords, model.grid_size, 1))
        first = bev.shape[-1] // 2 - 4
        crop = slice(first, first + 8)
        result.add("bev backbone", bev[0, :, crop, crop], "bev_crop")
        result.add("bev backbone: mean", bev[0].double().mean((1, 2)), "bev_mean")
        maps = network.dense_head(bev)
        _compare_head(result, maps)
        _compare_boxes(result, maps)
    return result


def _compare_partition(result: Comparison, network: DSVT, partition: SetPartition, picked: Tensor) -> None:
    arrays = result.reference.arrays
    for number, (stage, described) in enumerate(zip(partition.stages, network.config.backbone_3d.stages, strict=True)):
        for shift, sets in enumerate(stage.sets):
            name = f"partition__set_voxel_{{}}_stage{number}_shift{shift}"
            if sets is None:
                assert name.format("inds") not in arrays
                continue
            mask = np.unpackbits(arrays[name.format("mask")], axis=-1)[..., : described.set_size].astype(bool)
            assert tuple(sets.mask.shape) == mask.shape
            result.add("sets", sets.indices, name.format("inds"))
            result.record("sets: masks", float((sets.mask.numpy() != mask).max()))
        for block in range(described.num_blocks):
            positions = network.backbone_3d.input_layer(number, block, stage)
            for shift, position in enumerate(positions):
                key = f"partition__pos_embed_stage{number}_block{block}_shift{shift}_pick"
                if key in arrays:
                    result.add("positions", position[picked[: len(arrays[key])]], key)
    if "backbone_out_coords" in arrays:
        result.add("pillars", partition.coords, "backbone_out_coords")


def _compare_head(result: Comparison, maps: HeadMaps) -> None:
    if isinstance(maps, CenterMaps):
        crop = slice(226, 242)
        for ours in ("center", "center_z", "dim", "rot", "iou", "heatmap"):
            theirs = "hm" if ours == "heatmap" else ours
            values = getattr(maps, ours)[0]
            result.add(f"head: {ours}", values[:, crop, crop], f"head__{theirs}__crop_centre16")
            result.add(f"head: {ours}: mean", values.double().mean((1, 2)), f"head__{theirs}__mean")
        return
    assert isinstance(maps, ProposalMaps)
    arrays = result.reference.arrays
    result.add("head: class of proposals", maps.label, "head__query_labels")
    peaks = np.take_along_axis(arrays["head__query_heatmap_score"], maps.label[:, None].numpy(), 1)[:, 0]
    result.record("head: peak", np.abs(maps.peak.numpy() - peaks).max())
    rows = 180
    cell = torch.stack([maps.cell // rows, maps.cell % rows], 1) + 0.5
    result.add("head: center", maps.center + cell, "head__center")
    for name in ("height", "dim", "rot", "vel", "iou", "heatmap"):
        result.add(f"head: {name}", getattr(maps, name), f"head__{name}")


def _compare_boxes(result: Comparison, maps: HeadMaps) -> None:
    arrays = result.reference.arrays
    folder = open_model(result.reference.name)
    for geometry in ("dsvt_release", "exact"):
        options = with_overrides(folder.defaults, {"postprocess.nms_geometry": geometry}).postprocess
        result.found[geometry] = suppress(decode(maps, folder.model, options), folder.model, options)
    found = result.found["dsvt_release"]
    boxes, scores, labels = (values[found.keep].numpy() for values in (found.boxes, found.scores, found.labels))
    result.record("boxes: number", abs(len(boxes) - len(arrays["boxes"])))
    nearest, distance = match_boxes(boxes, labels, arrays)
    result.record("boxes: unmatched", len(arrays["boxes"]) - len(set(nearest)))
    result.record("boxes: centre, m", distance.max())
    result.record("boxes: score", np.abs(scores[nearest] - arrays["scores"]).max())
    result.record("boxes: size, heading, velocity", np.abs(boxes[nearest] - arrays["boxes"])[:, 3:].max())


def match_boxes(
    boxes: NDArray[np.float32], labels: NDArray[np.int64], arrays: dict[str, NDArray[np.generic]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each published box the nearest of ours with its label, and how far its centre is."""
    distance = np.linalg.norm(boxes[:, None, :3] - arrays["boxes"][None, :, :3], axis=-1)
    distance[labels[:, None] != arrays["labels"].astype(np.int64)[None] - 1] = np.inf
    return distance.argmin(0), distance.min(0)


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Largest differences from what the published modules computed.")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write them as JSON too")
    options = parser.parse_args()
    results = {name: compare(name).largest for name in NAMES}
    table = Table(title="largest absolute difference from the published modules, torch on the CPU, fp32")
    for column in ("", *NAMES, "allowed"):
        table.add_column(column, justify="left" if not column else "right")
    rows = list(dict.fromkeys(name for largest in results.values() for name in largest))
    order = list(LIMITS)
    rows.sort(key=lambda name: next(i for i, start in enumerate(order) if name.startswith(start)))
    for row in rows:
        cells = [f"{largest[row]:.1e}" if row in largest else "" for largest in results.values()]
        table.add_row(row, *(cell.replace("0.0e+00", "0") for cell in cells), f"{limit_of(row):g}")
    Console().print(table)
    if options.output:
        versions = {"torch": torch.__version__, "numpy": np.__version__}
        content = {"schema_version": 1, "versions": versions, "largest_difference": results}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    exceeded = [name for largest in results.values() for name, value in largest.items() if value > limit_of(name)]
    return 1 if exceeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
