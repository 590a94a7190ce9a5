"""YAML files as OpenPCDet and the DSVT release structure them, written for these tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

WAYMO_BASE = {
    "DATASET": "WaymoDataset",
    "DATA_PATH": "somewhere/waymo",
    "POINT_CLOUD_RANGE": [-75.2, -75.2, -2, 75.2, 75.2, 4],
    "DATA_AUGMENTOR": {"AUG_CONFIG_LIST": []},
    "POINT_FEATURE_ENCODING": {
        "encoding_type": "absolute_coordinates_encoding",
        "used_feature_list": ["x", "y", "z", "intensity", "elongation"],
        "src_feature_list": ["x", "y", "z", "intensity", "elongation"],
    },
    "DATA_PROCESSOR": [{"NAME": "transform_points_to_voxels", "VOXEL_SIZE": [0.1, 0.1, 0.15]}],
}
CENTER_DICT = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "iou": 1}
PROPOSAL_DICT = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}


def waymo(*, voxels: bool = False, openpcdet: bool = False) -> dict[str, Any]:
    """The Waymo models of either generation."""
    cells = 32 if voxels else 1
    heights = [32, 8, 2, 1] if voxels else [1]
    set_info = [[48, 1]] * 4 if voxels else [[36, 4]]
    content = _model(
        classes=["Vehicle", "Pedestrian", "Cyclist"],
        base="cfgs/dataset_configs/waymo_dataset.yaml",
        limits=[-74.88, -74.88, -2, 74.88, 74.88, 4.0],
        voxel_size=[0.32, 0.32, 6 / cells],
        vfe="DynamicVoxelVFE" if openpcdet else "DynPillarVFE3D",
        width=192,
        grid=[468, 468, cells],
        set_info=set_info,
        windows=[[12, 12, height] for height in heights],
        factor=[2, 2, 1],
        offset=[6, 6, 0],
        strides=[[1, 1, 4], [1, 1, 4], [1, 1, 2]] if voxels else [],
    )
    if openpcdet:
        content["DATA_CONFIG"]["POINTS_TANH_DIM"] = [3, 4]
        content["MODEL"]["BACKBONE_3D"]["USE_CHECKPOINT"] = True
    content["MODEL"]["DENSE_HEAD"] = center_head([["Vehicle", "Pedestrian", "Cyclist"]], stride=1)
    content["MODEL"]["DENSE_HEAD"]["POST_PROCESSING"] = {
        "SCORE_THRESH": 0.1,
        "POST_CENTER_LIMIT_RANGE": [-80, -80, -10.0, 80, 80, 10.0],
        "MAX_OBJ_PER_SAMPLE": 500,
        "USE_IOU_TO_RECTIFY_SCORE": True,
        "IOU_RECTIFIER": [0.68, 0.71, 0.65],
        "NMS_CONFIG": {
            "NMS_TYPE": "class_specific_nms" if openpcdet else "multi_class_nms",
            "NMS_THRESH": [0.75 if openpcdet else 0.7, 0.6, 0.55],
            "NMS_PRE_MAXSIZE": [4096] * 3,
            "NMS_POST_MAXSIZE": [500] * 3,
        },
    }
    return content


def nuscenes() -> dict[str, Any]:
    """The nuScenes model of the release, whose base file it comes without."""
    content = _model(
        classes=[
            "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
            "traffic_cone",
        ],
        base="cfgs/dataset_configs/nuscenes_dataset.yaml",
        limits=[-54.0, -54.0, -5.0, 54.0, 54.0, 3.0],
        voxel_size=[0.3, 0.3, 8.0],
        vfe="DynPillarVFE",
        width=128,
        grid=[360, 360, 1],
        set_info=[[90, 4]],
        windows=[[30, 30, 1]],
        factor=[1, 1, 1],
        offset=[15, 15, 0],
        strides=[],
    )  # fmt: skip
    content["DATA_CONFIG"]["DATA_PROCESSOR"][0]["MASK_Z"] = True
    content["MODEL"]["NAME"] = "TransFusion"
    content["MODEL"]["BACKBONE_2D"]["UPSAMPLE_STRIDES"] = [0.5, 1, 2]
    content["MODEL"]["DENSE_HEAD"] = {
        "NAME": "TransFusionHead",
        "CLASS_AGNOSTIC": False,
        "USE_BIAS_BEFORE_NORM": False,
        "NUM_PROPOSALS": 200,
        "HIDDEN_CHANNEL": 128,
        "NUM_CLASSES": 10,
        "NUM_HEADS": 8,
        "NMS_KERNEL_SIZE": 3,
        "FFN_CHANNEL": 256,
        "DROPOUT": 0,
        "BN_MOMENTUM": 0.1,
        "ACTIVATION": "relu",
        "NUM_HM_CONV": 2,
        "SEPARATE_HEAD_CFG": branches(PROPOSAL_DICT),
        "TARGET_ASSIGNER_CONFIG": {"FEATURE_MAP_STRIDE": 2, "DATASET": "nuScenes"},
        "LOSS_CONFIG": {"LOSS_CLS": {"use_sigmoid": True}},
        "POST_PROCESSING": {
            "SCORE_THRESH": 0.0,
            "POST_CENTER_RANGE": [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
            "USE_IOU_TO_RECTIFY_SCORE": True,
            "IOU_RECTIFIER": [0.5],
            "NMS_CONFIG": {
                "NMS_TYPE": "nms_gpu",
                "NMS_THRESH": 0.2,
                "NMS_PRE_MAXSIZE": 1000,
                "NMS_POST_MAXSIZE": 100,
                "SCORE_THRES": 0.0,
            },
        },
    }
    return content


def custom() -> dict[str, Any]:
    """Somebody's own small model: four point features, other classes in two groups, and everything else different."""
    content = _model(
        classes=["van", "walker", "pole"],
        base=None,
        limits=[0.0, -6.4, -1.0, 12.8, 6.4, 3.0],
        voxel_size=[0.4, 0.4, 2.0],
        vfe="DynamicVoxelVFE",
        width=16,
        grid=[32, 32, 2],
        set_info=[[5, 1], [7, 2]],
        windows=[[6, 5, 2], [6, 5, 1]],
        factor=[2, 1, 1],
        offset=[3, 2, 0],
        strides=[[1, 1, 2]],
    )
    content["DATA_CONFIG"] |= {
        "DATASET": "CustomDataset",
        "POINT_FEATURE_ENCODING": {
            "encoding_type": "absolute_coordinates_encoding",
            "used_feature_list": ["x", "y", "z", "intensity"],
            "src_feature_list": ["x", "y", "z", "intensity", "ring"],
        },
    }
    network = content["MODEL"]
    network["BACKBONE_3D"]["nhead"] = [4, 4]
    network["BACKBONE_2D"] = {
        "NAME": "BaseBEVResBackbone",
        "LAYER_NUMS": [0, 1],
        "LAYER_STRIDES": [2, 2],
        "NUM_FILTERS": [8, 16],
        "UPSAMPLE_STRIDES": [1, 2],
        "NUM_UPSAMPLE_FILTERS": [8, 8],
    }
    network["DENSE_HEAD"] = center_head([["pole", "van"], ["walker"]], stride=2, width=8)
    network["DENSE_HEAD"]["USE_BIAS_BEFORE_NORM"] = True
    network["DENSE_HEAD"]["SEPARATE_HEAD_CFG"] = branches({"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2})
    network["DENSE_HEAD"]["POST_PROCESSING"] = {
        "SCORE_THRESH": 0.2,
        "POST_CENTER_LIMIT_RANGE": [-1.0, -7.0, -10.0, 14.0, 7.0, 10.0],
        "MAX_OBJ_PER_SAMPLE": 40,
        "NMS_CONFIG": {
            "NMS_TYPE": "nms_gpu", "NMS_THRESH": 0.3, "NMS_PRE_MAXSIZE": 1000, "NMS_POST_MAXSIZE": 83,
        },
    }  # fmt: skip
    return content


def center_head(groups: list[list[str]], *, stride: int, width: int = 64) -> dict[str, Any]:
    return {
        "NAME": "CenterHead",
        "CLASS_AGNOSTIC": False,
        "CLASS_NAMES_EACH_HEAD": groups,
        "SHARED_CONV_CHANNEL": width,
        "USE_BIAS_BEFORE_NORM": False,
        "NUM_HM_CONV": 2,
        "BN_EPS": 0.001,
        "BN_MOM": 0.01,
        "SEPARATE_HEAD_CFG": branches(CENTER_DICT),
        "TARGET_ASSIGNER_CONFIG": {"FEATURE_MAP_STRIDE": stride, "NUM_MAX_OBJS": 500},
        "IOU_REG_LOSS": True,
        "LOSS_CONFIG": {"LOSS_WEIGHTS": {"cls_weight": 1.0}},
    }


def branches(channels: dict[str, int]) -> dict[str, Any]:
    return {
        "HEAD_ORDER": [name for name in channels if name != "iou"],
        "HEAD_DICT": {name: {"out_channels": count, "num_conv": 2} for name, count in channels.items()},
    }


def changed(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted key replaced, or removed where it is None."""
    content = copy.deepcopy(content)
    *groups, leaf = key.split(".")
    node = content
    for group in groups:
        node = node[group]
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return content


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _model(
    *,
    classes: list[str],
    base: str | None,
    limits: list[float],
    voxel_size: list[float],
    vfe: str,
    width: int,
    grid: list[int],
    set_info: list[list[int]],
    windows: list[list[int]],
    factor: list[int],
    offset: list[int],
    strides: list[list[int]],
) -> dict[str, Any]:
    stages = len(set_info)
    return {
        "CLASS_NAMES": classes,
        "DATA_CONFIG": ({"_BASE_CONFIG_": base} if base else {})
        | {
            "POINT_CLOUD_RANGE": limits,
            "DATA_AUGMENTOR": {"DISABLE_AUG_LIST": ["placeholder"]},
            "DATA_PROCESSOR": [
                {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
                {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": True}},
                {"NAME": "transform_points_to_voxels_placeholder", "VOXEL_SIZE": voxel_size},
            ],
        },
        "MODEL": {
            "NAME": "CenterPoint",
            "VFE": {
                "NAME": vfe,
                "WITH_DISTANCE": False,
                "USE_ABSLOTE_XYZ": True,
                "USE_NORM": True,
                "NUM_FILTERS": [width, width],
            },
            "BACKBONE_3D": {
                "NAME": "DSVT",
                "INPUT_LAYER": {
                    "sparse_shape": grid,
                    "downsample_stride": strides,
                    "d_model": [width] * stages,
                    "set_info": set_info,
                    "window_shape": windows,
                    "hybrid_factor": factor,
                    "shifts_list": [[[0, 0, 0], offset]] * stages,
                    "normalize_pos": False,
                },
                "block_name": ["DSVTBlock"] * stages,
                "set_info": set_info,
                "d_model": [width] * stages,
                "nhead": [8] * stages,
                "dim_feedforward": [2 * width] * stages,
                "dropout": 0.0,
                "activation": "gelu",
                "output_shape": grid[:2],
                "conv_out_channel": width,
            },
            "MAP_TO_BEV": {
                "NAME": "PointPillarScatter3d",
                "INPUT_SHAPE": [*grid[:2], 1],
                "NUM_BEV_FEATURES": width,
            },
            "BACKBONE_2D": {
                "NAME": "BaseBEVResBackbone",
                "LAYER_NUMS": [1, 2, 2],
                "LAYER_STRIDES": [1, 2, 2],
                "NUM_FILTERS": [128, 128, 256],
                "UPSAMPLE_STRIDES": [1, 2, 4],
                "NUM_UPSAMPLE_FILTERS": [128, 128, 128],
            },
            "POST_PROCESSING": {"RECALL_THRESH_LIST": [0.3, 0.5, 0.7]},
        },
        "OPTIMIZATION": {"NUM_EPOCHS": 24},
    }
