"""Our modules behind pcdet's interface. `FAULTS` names modules that are to give something else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import yaml
from torch import nn

from dsvt_ros.bev import scatter_bev
from dsvt_ros.config import CenterHeadConfig
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.pcdet.reader import read_pcdet
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.model.set_attention import InputLayer, SetAttentionBackbone
from dsvt_ros.model.transfusion_head import ProposalDecoder, TransFusionHead
from dsvt_ros.postprocess import decode, suppress
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import ProposalMaps
from dsvt_ros.voxelization import voxelize

FAULTS: set[str] = set()


def build_network(model_cfg, num_class, dataset):
    """A network from the MODEL section; the data set is asked for what pcdet asks it for."""
    assert isinstance(model_cfg.VFE.NAME, str), "sections are read as attributes"
    assert num_class == len(dataset.class_names)
    if "build" in FAULTS:
        raise KeyError(model_cfg.VFE.NAME)
    features = ["x", "y", "z", *(f"column_{i}" for i in range(3, dataset.point_feature_encoder.num_point_features))]
    content = {
        "CLASS_NAMES": list(dataset.class_names),
        "DATA_CONFIG": {
            "DATASET": "OtherDataset",
            "POINT_CLOUD_RANGE": [round(float(value), 4) for value in dataset.point_cloud_range],
            "DATA_PROCESSOR": [{"NAME": "transform_points_to_voxels", "VOXEL_SIZE": list(dataset.voxel_size)}],
            "POINT_FEATURE_ENCODING": {
                "encoding_type": "absolute_coordinates_encoding",
                "used_feature_list": features,
                "src_feature_list": features,
            },
        },
        "MODEL": _plain(model_cfg),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        found = read_pcdet(path)
    assert tuple(dataset.grid_size) == found.model.grid_size
    assert dataset.depth_downsample_factor is None
    return Network(found)


class Network(nn.Module):
    def __init__(self, found):
        super().__init__()
        model = found.model
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        self.vfe = Vfe(model)
        self.backbone_3d = Backbone3d(model)
        self.map_to_bev_module = MapToBev(model)
        self.backbone_2d = Backbone2d(model.backbone_2d, model.backbone_3d.channels)
        channels = sum(model.backbone_2d.upsample_channels)
        if isinstance(model.head, CenterHeadConfig):
            self.dense_head = Center(found, channels)
        else:
            self.dense_head = TransFusion(found, channels)

    def forward(self, batch):
        for module in (self.vfe, self.backbone_3d, self.map_to_bev_module, self.backbone_2d, self.dense_head):
            batch = module(batch)
        return batch["final_box_dicts"], {}


class Vfe(PillarEncoder):
    def __init__(self, model):
        super().__init__(model)
        self.model = model

    def forward(self, batch):
        points = batch["points"]
        assert not points[:, 0].any(), "the first column is the cloud's number"
        voxels = voxelize(points[:, 1:], self.model)
        features = super().forward(voxels)
        batch["voxel_coords"] = voxels.coords.clone()
        if "vfe" in FAULTS:
            features = features * 1.01
        if "coords" in FAULTS:
            batch["voxel_coords"][0, 3] += 1
        batch["voxel_features"] = batch["pillar_features"] = features
        batch["fake_coords"] = voxels.coords
        return batch


class Input(InputLayer):
    """Gives the sets, as pcdet's does."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model

    def __call__(self, *arguments):
        # Our backbone asks for embeddings; nobody who listens to pcdet's module is to hear that.
        return super().__call__(*arguments) if len(arguments) == 1 else InputLayer.forward(self, *arguments)

    def forward(self, batch):
        self.partition = partition_sets(batch["fake_coords"], self.model)
        info = {"voxel_feats_stage0": batch["voxel_features"]}
        for number, stage in enumerate(self.partition.stages):
            for shift, sets in enumerate(stage.sets):
                indices = torch.zeros(2, 1, 1) if sets is None else sets.indices
                mask = torch.zeros(2, 1, 1) if sets is None else sets.mask
                info[f"set_voxel_inds_stage{number}_shift{shift}"] = indices.flip(1) if "sets" in FAULTS else indices
                info[f"set_voxel_mask_stage{number}_shift{shift}"] = mask[:, 1:] if "masks" in FAULTS else mask
        return info


class Backbone3d(SetAttentionBackbone):
    def __init__(self, model):
        super().__init__(model)
        self.input_layer = Input(model)

    def forward(self, batch):
        self.input_layer(batch)
        partition = self.input_layer.partition
        batch["pillar_features"] = super().forward(batch["voxel_features"], partition)
        batch["voxel_features"] = batch["pillar_features"]
        batch["voxel_coords"] = partition.coords
        if "backbone_3d" in FAULTS:
            batch["pillar_features"] = batch["pillar_features"].neg()
        return batch


class MapToBev(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        batch["spatial_features"] = scatter_bev(
            batch["pillar_features"], batch["voxel_coords"], self.model.grid_size, batch["batch_size"]
        )
        return batch


class Backbone2d(BevBackbone):
    def forward(self, batch):
        batch["spatial_features_2d"] = super().forward(batch["spatial_features"])
        if "backbone_2d" in FAULTS:
            raise RuntimeError("expected scalar type Float")
        return batch


def final_boxes(maps, found):
    """The last step, with labels from 1 on."""
    config = found.defaults.postprocess
    boxes = suppress(decode(maps, found.model, config), found.model, config)
    keep = boxes.keep.clone()
    if "boxes" in FAULTS:
        keep[keep.nonzero()[::2]] = False
    return [{"pred_boxes": boxes.boxes[keep], "pred_scores": boxes.scores[keep], "pred_labels": boxes.labels[keep] + 1}]


class Center(CenterHead):
    def __init__(self, found, channels):
        super().__init__(found.model.head, channels, len(found.model.class_names))
        self.found = found
        self.forward_ret_dict = {}

    def forward(self, batch):
        shared = self.shared_conv(batch["spatial_features_2d"])
        groups = [head(shared) for head in self.heads_list]
        if "head" in FAULTS:
            groups[0]["center"] = groups[0]["center"] + 0.1
        self.forward_ret_dict["pred_dicts"] = groups
        maps = super().forward(batch["spatial_features_2d"])
        batch["final_box_dicts"] = final_boxes(maps, self.found)
        return batch


class Decoder(ProposalDecoder):
    """Takes pcdet's arguments; the work is done with ours, which the head leaves here."""

    def forward(self, query, key, query_pos, key_pos, key_padding_mask=None):
        return super().forward(*self.arguments)


class TransFusion(TransFusionHead):
    def __init__(self, found, channels):
        model = found.model
        super().__init__(model.head, channels, model.class_names, model.map_size)
        self.found = found
        self.decoder = Decoder(model.head, model.map_size)

    def predict(self, inputs):
        shared = self.shared_conv(inputs)
        scores = self.heatmap_head(shared)
        self.query_labels, cell, peak = self.find_proposals(scores)
        features = shared.flatten(2).transpose(1, 2)
        rows = inputs.shape[3]
        position = torch.stack([cell // rows, cell % rows], dim=-1) + 0.5
        proposals = features.gather(1, cell[:, :, None].expand(-1, -1, features.shape[2]))
        self.decoder.arguments = (proposals + self.encodings()[self.query_labels], cell, features)
        decoded = self.decoder(proposals, features, position.view(-1, 1, 2), None).transpose(1, 2)
        output = {name: branch(decoded) for name, branch in self.prediction_head.items()}
        self.maps = ProposalMaps(label=self.query_labels, cell=cell, peak=peak, **{"vel": None, "iou": None, **output})
        output["center"] = output["center"] + position.transpose(1, 2)
        if "head" in FAULTS:
            output["height"] = output["height"] + 0.1
        output["query_heatmap_score"] = peak[:, None].expand(-1, scores.shape[1], -1)
        return output

    def forward(self, batch):
        output = self.predict(batch["spatial_features_2d"].transpose(2, 3).contiguous())
        output["center"].mul_(2)  # boxes are decoded in place
        batch["final_box_dicts"] = final_boxes(self.maps, self.found)
        return batch


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value
