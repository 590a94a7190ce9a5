"""``DATA_CONFIG``: the range, the columns of a point and how many sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dsvt_ros.model.pcdet.section import Section
from dsvt_ros.model.pcdet.translation import Translation


@dataclass(frozen=True)
class DataSet:
    """What one of their data set classes means for a model, beyond what its YAML says."""

    ground_z: float
    axes: Literal["x_forward", "x_right"] = "x_forward"


DATA_SETS = {
    "WaymoDataset": DataSet(ground_z=0.0),
    "NuScenesDataset": DataSet(ground_z=-1.84, axes="x_right"),
    "KittiDataset": DataSet(ground_z=-1.73),
}
FEATURE_NAMES = {"timestamp": "time"}
"""Columns that have another name here."""
VOXEL_STEPS = ("transform_points_to_voxels_placeholder", "transform_points_to_voxels", "calculate_grid_size")
OTHER_STEPS = ("mask_points_and_boxes_outside_range", "shuffle_points")


def translate_data(out: Translation, data: Section, network: Section) -> None:
    """Range, voxel size, features, frame and sweeps; the rest of ``DATA_CONFIG`` is about training."""
    out.take(data, {"POINT_CLOUD_RANGE": "model.point_cloud_range"})
    out.put("model.voxel_size", _voxel_size(data), data, "DATA_PROCESSOR")
    _features(out, data, network)

    name = data.word("DATASET")
    if name not in DATA_SETS:
        out.remarks.append(
            f"the height of the ground in the frame of {name} is not known: model.ground_z is 0, which matters to "
            f"preprocess.find_ground alone"
        )
    known = DATA_SETS.get(name, DataSet(ground_z=0.0))
    out.put("model.ground_z", known.ground_z, data, "DATASET")
    out.put("model.axes", known.axes, data, "DATASET")

    if data.get("SEQUENCE_CONFIG") and data.section("SEQUENCE_CONFIG").get("ENABLED"):
        sequence = data.section("SEQUENCE_CONFIG")
        sequence.only("ONEHOT_TIMESTAMP", False, default=False)
        first, last = sequence.numbers("SAMPLE_OFFSET", count=2)
        out.put("model.sweeps", last - first + 1, sequence, "SAMPLE_OFFSET")
    elif data.get("MAX_SWEEPS"):
        out.take(data, {"MAX_SWEEPS": "model.sweeps"})

    # Whereas the other encoders, and ours, leave them out by themselves.
    if network.section("VFE").need("NAME") == "DynPillarVFE" and not any(step.get("MASK_Z") for step in _steps(data)):
        out.remarks.append("DynPillarVFE keeps points above and below the range in their pillar; here they are dropped")


def _features(out: Translation, data: Section, network: Section) -> None:
    encoding = data.section("POINT_FEATURE_ENCODING")
    encoding.only("encoding_type", "absolute_coordinates_encoding")
    encoding.only("filter_sweeps", False, default=False)
    squashed = _squashed_columns(data, encoding.names("src_feature_list"), network)
    features = [
        {"name": FEATURE_NAMES.get(name, name)} | ({"scale": "tanh"} if name in squashed else {})
        for name in encoding.names("used_feature_list")
    ]
    out.put("model.features", features, data, "POINT_FEATURE_ENCODING", "DATASET", "POINTS_TANH_DIM")


def _squashed_columns(data: Section, columns: list[str], network: Section) -> list[str]:
    """Columns that go through tanh, which the code of their data sets does."""
    name = data.word("DATASET")
    if name in ("KittiDataset", "NuScenesDataset"):  # these do not read POINTS_TANH_DIM
        return []
    if data.get("POINTS_TANH_DIM") == []:
        return []
    if data.get("POINTS_TANH_DIM") is not None:
        dimensions = data.numbers("POINTS_TANH_DIM")
        if not set(dimensions) <= set(range(len(columns))):
            raise data.error("POINTS_TANH_DIM", f"is {dimensions}, but there are {len(columns)} columns")
        return [columns[dimension] for dimension in dimensions]
    if name != "WaymoDataset":
        return []
    generation = _generation(network)
    if generation is None:
        raise data.error(
            "POINTS_TANH_DIM",
            "is missing, and nothing tells whether the model comes from the DSVT release, which then squashes columns "
            "3 and 4, or from OpenPCDet, which squashes 3: add [3, 4] or [3]",
        )
    return columns[3:5] if generation == "release" else columns[3:4]


def _generation(network: Section) -> Literal["release", "openpcdet"] | None:
    """Whose YAML it is, as far as names tell."""
    head = network.section("DENSE_HEAD")
    nms = head.section("POST_PROCESSING").get("NMS_CONFIG") or {}
    names = {network.section("VFE").get("NAME"), head.get("NAME"), nms.get("NMS_TYPE")}
    if names & {"DynPillarVFE3D", "TransFusionHead", "multi_class_nms"}:
        return "release"
    return "openpcdet" if names & {"DynamicVoxelVFE", "class_specific_nms"} else None


def _voxel_size(data: Section) -> Any:
    """The voxel size among the steps that prepare a cloud; others than usual are refused."""
    size = None
    for step in _steps(data):
        name = step.get("NAME")
        if name in VOXEL_STEPS:
            size = step.get("VOXEL_SIZE")
        elif name not in OTHER_STEPS:
            raise data.error("DATA_PROCESSOR", f"has the step {name}, which is not done here")
    if size is None:
        raise data.error("DATA_PROCESSOR", "has no step with a VOXEL_SIZE")
    return size


def _steps(data: Section) -> list[dict[str, Any]]:
    steps = data.need("DATA_PROCESSOR")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise data.error("DATA_PROCESSOR", "must be a list of steps")
    return steps
