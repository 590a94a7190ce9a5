"""The whole network, with the state-dict keys of published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsvt_ros.bev import scatter_bev
from dsvt_ros.config import ModelConfig
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import CenterHead, HeadMaps
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.model.set_attention import SetAttentionBackbone
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import Voxels


class DSVT(nn.Module):
    """DSVT-Pillar: encoder, set attention, BEV backbone and head."""

    global_step: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.config = model
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        self.vfe = PillarEncoder(model)
        self.backbone_3d = SetAttentionBackbone(model.backbone_3d, flat=model.grid_size[2] == 1)
        self.backbone_2d = BevBackbone(model.backbone_2d, model.backbone_3d.channels)
        self.dense_head = CenterHead(model.head, sum(model.backbone_2d.upsample_channels), len(model.class_names))

    def forward(self, voxels: Voxels) -> HeadMaps:
        """Voxels of B clouds to the head's maps; the order of steps is that of `Detector.forward`."""
        features = self.vfe(voxels)
        partition = partition_sets(voxels.coords, self.config.grid_size, self.config.backbone_3d)
        features = self.backbone_3d(features, partition)
        bev = scatter_bev(features, voxels.coords, self.config.grid_size, voxels.batch_size)
        maps: HeadMaps = self.dense_head(self.backbone_2d(bev))
        return maps
