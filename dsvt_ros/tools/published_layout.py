"""The networks arranged as the published release runs them: ``reference`` of ``dsvt benchmark`` and ``dsvt verify``.

Same modules, same weights, same results, without what our backends do ahead or otherwise: batch norms stay layers of
their own, position embeddings are computed for every voxel, layer and frame, sets are gathered before queries, keys and
values are projected, every branch of the head has its own convolutions, and maps lie in memory channel by channel.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import with_overrides
from dsvt_ros.detector import Detector, choose_device
from dsvt_ros.errors import EngineError, ModelError
from dsvt_ros.export.networks import maps_from_tensors, named_maps
from dsvt_ros.model.checkpoint import load_weights, read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pillar_encoder import PillarEncoder
from dsvt_ros.model.set_attention import (
    AttentionPooling,
    AttentionProjections,
    PositionEmbedding,
    SetAttentionEncoder,
    SetAttentionLayer,
)
from dsvt_ros.structures import HeadMaps, Pooling, SetPartition

REFERENCES = {"reference": "fp32", "reference-fp16": "fp16"}
"""Precision by name; fp16 means wherever `torch.autocast` thinks fit."""


def load_reference(
    name: str, model: str, weights: str | None, device: str = "auto", overrides: Mapping[str, Any] | None = None
) -> Detector:
    """A detector with the published arrangement; what lies between the networks is that of the backend torch.

    Args:
        name: One of `REFERENCES`.
        model: As for `Detector.load`, like the rest.
        weights: Weights file; None takes the model folder's own.
        device: Where to run.
        overrides: Dotted keys of `DetectorConfig`.

    Raises:
        ConfigError: An option is unknown or impossible.
        EngineError: As `require_reference`.
        ModelError: The model or its weights are missing, corrupt or do not fit each other.
    """
    folder = open_model(model)
    config = with_overrides(folder.defaults, overrides or {})
    config.check_against(folder.model)
    source = weights or folder.weights
    if source is None:
        raise ModelError(f"model {folder.model.name} comes without weights: name a file with --weights")
    network = DSVT(folder.model)
    load_weights(network, read_weights(source), str(source))
    chosen = choose_device(device)
    require_reference(name, chosen)
    network = network.to(chosen).eval().requires_grad_(False)
    keep_norms(network.vfe)
    return Detector(network, config, chosen, PublishedNetworks(network, name))


def require_reference(name: str, device: torch.device) -> None:
    """`EngineError` where this one of `REFERENCES` does not run."""
    if REFERENCES[name] == "fp16" and device.type != "cuda":
        raise EngineError(f"--backends {name} needs a CUDA device, not {device}; take reference")


def keep_norms(encoder: PillarEncoder) -> None:
    """Keep, in place, the detector from folding the encoder's batch norms: it folds norms that follow their layers."""
    for layer in encoder.pfn_layers:
        linear = layer.linear
        del layer.linear
        layer.linear = linear  # the last of the children now


class PublishedNetworks:
    """Both networks of `model`, eager and unprepared; `model`, in evaluation mode, is left as it is."""

    max_voxels: int | None = None
    channels_last = False

    def __init__(self, model: DSVT, name: str) -> None:
        """Rearrange; `name` is one of `REFERENCES`."""
        self.name, self.precision = name, REFERENCES[name]
        self._model = model.config
        self._device = next(model.parameters()).device
        self._backbone_3d = copy.deepcopy(model.backbone_3d)
        _rearrange(self._backbone_3d)
        self._backbone_3d.to(self._device).eval().requires_grad_(False)
        self._backbone_2d, self._head = copy.deepcopy(model.backbone_2d), copy.deepcopy(model.dense_head)

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) of the last stage, float32."""
        backbone = self._backbone_3d
        with self._autocast():
            # As published, all of them before the first layer.
            positions = [
                [backbone.input_layer(number, block, stage) for block in range(len(backbone.shifts[number]))]
                for number, stage in enumerate(partition.stages)
            ]
            for number, stage in enumerate(partition.stages):
                for block, of_block in enumerate(positions[number]):
                    features = backbone.run_block(number, block, features, of_block, stage)
                if stage.pooling is not None:
                    features = backbone.get_submodule(f"stage_{number}_reduction")(features, stage.pooling)
        return features

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to what the head says, in float32."""
        with self._autocast():
            maps = self._head(self._backbone_2d(bev))
        return maps_from_tensors(dict(named_maps(maps)), self._model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.float16, enabled=self.precision == "fp16")


class ComputedEmbedding(nn.Module):
    """Position embeddings by their layers, voxel by voxel."""

    def __init__(self, embedding: PositionEmbedding) -> None:
        super().__init__()
        self.layers = embedding.position_embedding_head
        assert isinstance(embedding.offsets, Tensor)
        self.register_buffer("offsets", embedding.offsets, persistent=False)

    def forward(self, cell_of_voxel: Tensor) -> Tensor:
        """(V,) in-window cells to (V, D) embeddings."""
        assert isinstance(self.offsets, Tensor)
        embeddings: Tensor = self.layers(self.offsets[cell_of_voxel])
        return embeddings


class GatheredSetAttention(nn.Module):
    """Set attention over slots: voxels that fill several slots are projected as often (DSVT ``SetAttention``)."""

    def __init__(self, layer: SetAttentionLayer) -> None:
        super().__init__()
        self.self_attn = _library_attention(layer.self_attn, layer.self_attn.num_heads)
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = layer.norm1, layer.norm2

    def forward(self, x: Tensor, position: Tensor, indices: Tensor, mask: Tensor, slot_of_voxel: Tensor) -> Tensor:
        """(V, D) to (V, D); arguments as `SetAttention.forward`, whose inverse index is not used."""
        in_slots, positions = x[indices], position[indices]
        query, key = in_slots + positions, in_slots + positions
        attended = self.self_attn(query, key, in_slots, key_padding_mask=mask)[0]
        of_voxels = torch.zeros_like(x, dtype=attended.dtype)
        of_voxels[indices.reshape(-1)] = attended.reshape(-1, x.shape[1])  # repeated slots hold the same
        x = self.norm1(x + of_voxels)
        output: Tensor = self.norm2(x + self.linear2(F.gelu(self.linear1(x))))
        return output


class GatheredPooling(nn.Module):
    """Attention over the voxels on top of each other, empty slots included (DSVT ``Stage_ReductionAtt_Block``)."""

    def __init__(self, pooling: AttentionPooling) -> None:
        super().__init__()
        self.self_attn = _library_attention(pooling.self_attn, pooling.NUM_HEADS)
        self.pos_embedding, self.norm = pooling.pos_embedding, pooling.norm

    def forward(self, x: Tensor, pooling: Pooling) -> Tensor:
        """(V, D) to (V', D)."""
        in_slots = x[pooling.indices].masked_fill(pooling.mask[:, :, None], 0.0)
        maximum = in_slots.amax(1, keepdim=True)
        attended = self.self_attn(maximum, in_slots + self.pos_embedding, in_slots)[0]
        output: Tensor = self.norm(attended + maximum).squeeze(1)
        return output


def _rearrange(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, PositionEmbedding):
            setattr(module, name, ComputedEmbedding(child))
        elif isinstance(child, SetAttentionEncoder):
            child.win_attn = GatheredSetAttention(child.win_attn)  # type: ignore[assignment]
        elif isinstance(child, AttentionPooling):
            setattr(module, name, GatheredPooling(child))
        else:
            _rearrange(child)


def _library_attention(parameters: AttentionProjections, num_heads: int) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(parameters.out_proj.in_features, num_heads, batch_first=True)
    attention.load_state_dict(parameters.state_dict())
    return attention
