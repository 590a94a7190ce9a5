"""The set-attention backbone on rows that lie set after set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.export.networks import to_half
from dsvt_ros.fused.structures import FusedStage, ShiftSets
from dsvt_ros.fused.weights import half
from dsvt_ros.model.set_attention import SetAttentionBackbone, SetAttentionEncoder
from dsvt_ros.padded.attention import SetAttention, set_attention
from dsvt_ros.padded.norm import sum_norm
from dsvt_ros.structures import Pooling

Place = tuple[int, int]
"""A window shift and a sort order: in which order rows lie."""


@dataclass(frozen=True)
class Layer:
    """Weights of a layer in float16.

    A projection adds to what lies in memory: `addmm` starts from the features that are added to its result anyway. Its
    bias they carry already. Therefore features between layers are those of the network plus `out_proj.bias` of the
    layer that they go into, and features before the second linear layer are those of the network plus its bias; what
    else reads them has the difference taken off its own bias.

    Attributes:
        place: Window shift whose sets it attends in, and which of a block's two layers it is: sort order of its sets,
            and window shift of its positions.
        qkv_weight: (D, 3 D).
        table: (cells, 3 D), what is added to queries, keys and values in each cell of a window.
        out_weight: (D, D) after attention.
        up_weight: (D, hidden) into the feed-forward network.
        up_bias: (hidden,).
        down_weight: (hidden, D) out of it.
        norms: Weights and biases of the norms after attention, feed-forward network and the whole layer; of a block's
            second layer also of that after the block.
    """

    place: Place
    qkv_weight: Tensor
    table: Tensor
    out_weight: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    norms: list[tuple[Tensor, Tensor]]


class PaddedBackbone3d:
    """`SetAttentionBackbone` on stages of fixed capacity, as `PaddedPartition` makes them.

    It moves all rows, those beyond the number of voxels too, so `order` must hold each row once.
    """

    def __init__(self, backbone: SetAttentionBackbone, config: Backbone3dConfig, device: torch.device) -> None:
        """Take over the weights of a backbone whose position embeddings are tables.

        Raises:
            EngineError: Weights beyond the range of float16.
        """
        self._heads, self._width = config.num_heads, config.channels // config.num_heads
        self._attentions = [
            set_attention(device, stage.set_size, self._heads, self._width) for stage in config.stages
        ]
        self._norm = sum_norm(device, config.channels)
        with torch.no_grad():
            found = [_layers_of_stage(backbone, stage, shifts) for stage, shifts in enumerate(config.shifts)]
        self._layers = [layers for layers, _ in found]
        self._first_biases = [first_bias for _, first_bias in found]
        self._poolings = [backbone.get_submodule(f"stage_{stage}_reduction") for stage in range(len(config.stages) - 1)]
        for pooling in self._poolings:
            to_half(pooling)

    def __call__(self, features: Tensor, stages: tuple[FusedStage, ...]) -> Tensor:
        """(V, D) float16 voxel features to (V', D) of the last stage; never waits for the device."""
        for number, stage in enumerate(stages):
            rows = _Rows(stage, self._attentions[number])
            x = features + self._first_biases[number]
            for layer in self._layers[number]:
                x = self._run_layer(layer, x, rows)
            features = rows.back(x)
            if stage.pooled is not None:
                pooling = Pooling(stage.pooled.clamp_min(0).long(), stage.pooled < 0)
                features = self._poolings[number](features, pooling)
        return features

    def _run_layer(self, layer: Layer, x: Tensor, rows: _Rows) -> Tensor:
        """Features of a layer's input to those of the next one's, in its own order."""
        x = rows.go(x, layer.place)
        if layer.place[1] == 0:
            rows.block_input = x
        qkv = layer.table.index_select(0, rows.cells()).addmm_(x, layer.qkv_weight)
        attended = rows.attend(qkv.view(len(x), 3, self._heads, self._width))
        after_attention, after_network, after_layer, *after_block = layer.norms
        y = self._norm(torch.addmm(x, attended, layer.out_weight), *after_attention)
        # In one with the product, cuBLAS has GELU by tanh alone: up to 5e-4 from the exact one, as float16 is at 1.
        hidden = torch._addmm_activation(layer.up_bias, y, layer.up_weight, use_gelu=True)
        y = self._norm(y.addmm_(hidden, layer.down_weight), *after_network)
        y = self._norm(y, *after_layer, x)
        for norm in after_block:
            y = self._norm(y, *norm, rows.block_input)
        return y


class _Rows:
    """Where the rows of a stage lie, which follow the sets of one layer after the other.

    Attributes:
        block_input: What the block that runs began with.
    """

    block_input: Tensor

    def __init__(self, stage: FusedStage, attention: SetAttention) -> None:
        self._stage, self._attention = stage, attention
        self._at: Place | None = None
        self._order: dict[Place, Tensor] = {}
        self._cells: dict[Place, Tensor] = {}
        self._place_of_voxel: dict[Place, Tensor] = {}
        self._moves: dict[tuple[Place, Place], Tensor] = {}
        self._sets: dict[int, Any] = {}

    def go(self, rows: Tensor, place: Place) -> Tensor:
        """Rows in the order of a layer; those of the block's input with them, where the block has begun."""
        before, self._at = self._at, place
        self._enter(place)
        move = self._order[place] if before is None else self._move(before, place)
        if place[1] == 1:
            self.block_input = self.block_input.index_select(0, move)
        return rows.index_select(0, move)

    def back(self, rows: Tensor) -> Tensor:
        """Rows in the order of voxels."""
        assert self._at is not None
        return rows.index_select(0, self._place_of_voxel[self._at])

    def cells(self) -> Tensor:
        """(V,) cells in a window, of the shift whose positions the layer takes."""
        assert self._at is not None
        return self._cells[self._at]

    def attend(self, qkv: Tensor) -> Tensor:
        """See `SetAttention.attend`."""
        assert self._at is not None
        shift = self._at[0]
        if shift not in self._sets:
            self._sets[shift] = self._attention.prepare(self._of_shift(shift).set_start, len(qkv))
        return self._attention.attend(qkv, self._sets[shift])

    def _enter(self, place: Place) -> None:
        if place in self._order:
            return
        shift, order = place
        sets = self._of_shift(shift)
        self._order[place] = sets.order[order].long()
        self._cells[place] = self._stage.cells[order].index_select(0, self._order[place])
        self._place_of_voxel[place] = sets.position[order].long()

    def _move(self, before: Place, place: Place) -> Tensor:
        if (before, place) not in self._moves:
            self._moves[before, place] = self._place_of_voxel[before].index_select(0, self._order[place])
        return self._moves[before, place]

    def _of_shift(self, shift: int) -> ShiftSets:
        sets = self._stage.sets[shift]
        assert sets is not None
        return sets


def _layers_of_stage(
    backbone: SetAttentionBackbone, stage: int, shifts: tuple[int, ...]
) -> tuple[list[Layer], Tensor]:
    """The layers, and what the first one's input carries."""
    encoders, tables, block_norms = [], [], []
    for block in range(len(shifts)):
        for encoder in backbone.get_submodule(f"stage_{stage}.{block}.encoder_list").children():
            assert isinstance(encoder, SetAttentionEncoder)
            encoders.append(encoder)
        embeddings = backbone.input_layer.posembed_layers[stage][block]  # type: ignore[index]
        tables += [embedding.table() for embedding in embeddings]
        block_norms.append(backbone.get_submodule(f"residual_norm_stage_{stage}.{block}"))
    # What features carry before each layer, and after the last one.
    carried: list[Tensor] = [encoder.win_attn.self_attn.out_proj.bias for encoder in encoders]
    carried.append(torch.zeros_like(carried[0]))
    layers = []
    for number, (encoder, table) in enumerate(zip(encoders, tables, strict=True)):
        block, order = divmod(number, 2)
        last_norms: list[tuple[nn.Module, Tensor]] = [(encoder.norm, carried[number + 1])]
        if order == 1:
            last_norms = [(encoder.norm, -carried[number - 1]), (block_norms[block], carried[number + 1])]
        layers.append(_layer(encoder, (shifts[block], order), table, carried[number], last_norms))
    return layers, half(carried[0])


def _layer(
    encoder: SetAttentionEncoder,
    place: Place,
    positions: Tensor,
    carried: Tensor,
    last_norms: list[tuple[nn.Module, Tensor]],
) -> Layer:
    """A layer's weights.

    Args:
        encoder: The layer.
        place: Its place.
        positions: (cells, D) position embeddings.
        carried: (D,) what its input carries.
        last_norms: The norms after the whole layer, and what is to be added to their biases.
    """
    layer = encoder.win_attn
    weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
    channels = weight.shape[1]
    # (x + position) W = x W + position W, and the position has only as many values as a window has cells.
    table = (bias - weight @ carried).expand(len(positions), -1).clone()
    table[:, : 2 * channels] += positions @ weight[: 2 * channels].T
    down_bias = layer.linear2.bias
    norms: list[tuple[nn.Module, Tensor]] = [(layer.norm1, down_bias), (layer.norm2, -carried), *last_norms]
    return Layer(
        place,
        half(weight.T),
        half(table),
        half(layer.self_attn.out_proj.weight.T),
        half(layer.linear1.weight.T),
        half(layer.linear1.bias - layer.linear1.weight @ down_bias),
        half(layer.linear2.weight.T),
        [(half(norm.get_parameter("weight")), half(norm.get_parameter("bias") + added)) for norm, added in norms],
    )
