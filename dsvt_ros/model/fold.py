"""What inference can work out beforehand: batch norms folded into weights, position embeddings as tables."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import MergedHead
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.set_attention import PositionEmbedding, SetAttentionBackbone
from dsvt_ros.model.transfusion_head import CellEmbedding, TransFusionHead


@dataclass(frozen=True)
class InferenceModules:
    """The modules of both networks, folded; every backend and the export start from them."""

    backbone_3d: SetAttentionBackbone
    backbone_2d: BevBackbone
    head: MergedHead | TransFusionHead


def inference_modules(model: DSVT) -> InferenceModules:
    """Folded copies of the modules of `model`, which must be in evaluation mode and is left as it is."""
    backbone_3d, backbone_2d = folded_copy(model.backbone_3d), folded_copy(model.backbone_2d)
    head = folded_copy(model.dense_head)
    if isinstance(head, TransFusionHead):
        return InferenceModules(backbone_3d, backbone_2d, head)
    with torch.no_grad():
        merged = MergedHead(head).to(next(model.parameters()).device)
    return InferenceModules(backbone_3d, backbone_2d, merged.eval())


Module = TypeVar("Module", bound=nn.Module)


def folded_copy(module: Module) -> Module:
    """A copy of a module in evaluation mode, with batch norms folded and position embeddings as tables."""
    copied = copy.deepcopy(module).requires_grad_(False)
    with torch.no_grad():
        tabulate_positions(copied)
        fold_batch_norms(copied)
    return copied


def fold_batch_norms(module: nn.Module) -> None:
    """Fold, in place, every batch norm that directly follows a convolution or linear layer among a module's children.

    `module` must be in evaluation mode. The layers get a bias, and the batch norms become identities.
    """
    for (name, layer), (norm_name, norm) in pairwise(list(module.named_children())):
        folded: nn.Module
        if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            folded = fuse_linear_bn_eval(layer, norm)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)) and isinstance(
            norm, (nn.BatchNorm1d, nn.BatchNorm2d)
        ):
            folded = fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
        else:
            continue
        setattr(module, name, folded)
        setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norms(child)


class PositionTable(nn.Module):
    """The rows of an embedding of positions, one for every cell of the window or map."""

    rows: Tensor

    def __init__(self, embedding: PositionEmbedding | CellEmbedding) -> None:
        super().__init__()
        self.register_buffer("rows", embedding.table(), persistent=False)

    def forward(self, cell_of_voxel: Tensor) -> Tensor:
        """(V,) in-window cells to (V, D) embeddings."""
        return self.rows.index_select(0, cell_of_voxel)

    def table(self) -> Tensor:
        """(cells, D) embedding of every cell."""
        return self.rows


def tabulate_positions(module: nn.Module) -> None:
    """Replace, in place, every position embedding below `module` by its table; evaluation mode only."""
    for name, child in list(module.named_children()):
        if isinstance(child, (PositionEmbedding, CellEmbedding)):
            setattr(module, name, PositionTable(child))
        else:
            tabulate_positions(child)
