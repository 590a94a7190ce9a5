"""The whole network, with the state-dict keys of published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsvt_ros.bev import scatter_bev
from dsvt_ros.config import CenterHeadConfig, ModelConfig
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import CenterHead
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.model.set_attention import SetAttentionBackbone
from dsvt_ros.model.transfusion_head import TransFusionHead
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import HeadMaps, Voxels


class DSVT(nn.Module):
    """DSVT-Pillar or DSVT-Voxel: encoder, set attention, BEV backbone and head."""

    global_step: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        self.vfe = PillarEncoder(model)
        self.backbone_3d = SetAttentionBackbone(model)
        self.backbone_2d = BevBackbone(model.backbone_2d, model.backbone_3d.channels)
        channels = sum(model.backbone_2d.upsample_channels)
        self.dense_head: CenterHead | TransFusionHead
        if isinstance(model.head, CenterHeadConfig):
            self.dense_head = CenterHead(model.head, channels, len(model.class_names))
        else:
            self.dense_head = TransFusionHead(model.head, channels, model.class_names, model.map_size)

    def forward(self, voxels: Voxels) -> HeadMaps:
        """Voxels of B clouds to the head's maps; the order of steps is that of `Detector.forward`."""
        features = self.vfe(voxels)
        partition = partition_sets(voxels.coords, self.config, voxels.batch_size)
        features = self.backbone_3d(features, partition)
        bev = scatter_bev(features, partition.coords, self.config.grid_size, voxels.batch_size)
        maps: HeadMaps = self.dense_head(self.backbone_2d(bev))
        return maps
