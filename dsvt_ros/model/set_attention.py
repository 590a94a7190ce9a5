"""The sparse network: set attention over voxels (DSVT section 3), with the published state-dict keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import Backbone3dConfig, Cells, ModelConfig
from dsvt_ros.structures import Pooling, SetPartition, StagePartition, VoxelSets

# Finite, so that a half-precision softmax of a masked slot is 0 and never NaN.
MASKED = -1e4


def normalize_sum(norm: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A residual sum and its layer norm, in single precision at least whatever the type of `x` and `y`.

    Half-precision features need it: the sum and its squares leave their range first. `norm` holds single-precision
    parameters then.
    """
    output: Tensor = norm(x.float() + y.float())
    return output.to(x.dtype)


class PositionEmbedding(nn.Module):
    """Learned embedding of a voxel's offset from its window's centre.

    The offset takes only as many values as a window has cells, so inference looks rows up in a table, whereas the
    published code evaluates the layers for every voxel.
    """

    def __init__(self, channels: int, window: Cells, *, flat: bool) -> None:
        super().__init__()
        wx, wy, wz = window
        dimensions = 2 if flat else 3
        self.position_embedding_head = nn.Sequential(
            nn.Linear(dimensions, channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )
        z, y, x = torch.meshgrid(torch.arange(wz), torch.arange(wy), torch.arange(wx), indexing="ij")
        offsets = torch.stack([x - wx / 2, y - wy / 2, z - wz / 2], dim=-1).reshape(-1, 3)
        self.register_buffer("offsets", offsets[:, :dimensions].contiguous(), persistent=False)

    def forward(self, cell_of_voxel: Tensor) -> Tensor:
        """(V,) in-window cells to (V, D) embeddings."""
        assert isinstance(self.offsets, Tensor)
        if self.training:  # the batch norm must see the voxels as they are distributed
            embedding: Tensor = self.position_embedding_head(self.offsets.index_select(0, cell_of_voxel))
            return embedding
        return self.table().index_select(0, cell_of_voxel)

    def table(self) -> Tensor:
        """(cells, D) embedding of every cell of a window."""
        table: Tensor = self.position_embedding_head(self.offsets)
        return table


class AttentionProjections(nn.Module):
    """Parameters of `torch.nn.MultiheadAttention`, under its keys."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class SetAttention(AttentionProjections):
    """Multi-head attention inside each set."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels)
        self.num_heads = num_heads

    def forward(self, x: Tensor, position: Tensor, indices: Tensor, mask: Tensor, slot_of_voxel: Tensor) -> Tensor:
        """Attend within sets.

        Queries, keys and values are projected once a voxel and then gathered into slots; gathering first, as
        published, projects repeated slots again.

        Args:
            x: (V, D) features.
            position: (V, D) position embedding, added to queries and keys.
            indices: (S, L) voxel in each slot.
            mask: (S, L) bool, True where a slot repeats its predecessor.
            slot_of_voxel: (V,) flat slot whose result each voxel takes.

        Returns:
            (V, D) features.
        """
        num_sets, set_size = indices.shape
        channels = self.out_proj.in_features
        voxel_of_slot = indices.reshape(-1)

        def heads_in_slots(features: Tensor, first: int, last: int) -> Tensor:
            """(parts, S, H, L, D / H): parts `first` to `last` of the projection (query, key, value)."""
            rows = slice(first * channels, (last + 1) * channels)
            projected = F.linear(features, self.in_proj_weight[rows], self.in_proj_bias[rows])
            slots = projected.index_select(0, voxel_of_slot)
            return slots.view(num_sets, set_size, last - first + 1, self.num_heads, -1).permute(2, 0, 3, 1, 4)

        query, key = heads_in_slots(x + position, 0, 1).unbind()
        (value,) = heads_in_slots(x, 2, 2).unbind()
        # Written out: library attention plans anew for every number of sets, and no two clouds have the same.
        scale = (channels // self.num_heads) ** -0.5
        # The cast, and not an argument of softmax: exported, that would become a cast of the result.
        scores = ((query * scale) @ key.transpose(-1, -2)).float()
        scores += mask[:, None, None, :].float() * MASKED
        attended = torch.softmax(scores, dim=-1).to(value.dtype) @ value
        attended = attended.transpose(1, 2).reshape(num_sets * set_size, channels)
        output: Tensor = self.out_proj(attended.index_select(0, slot_of_voxel))
        return output


class SetAttentionLayer(nn.Module):
    """Set attention and feed-forward network, post-norm (DSVT ``SetAttention``)."""

    def __init__(self, config: Backbone3dConfig) -> None:
        super().__init__()
        self.self_attn = SetAttention(config.channels, config.num_heads)
        self.linear1 = nn.Linear(config.channels, config.ffn_channels)
        self.linear2 = nn.Linear(config.ffn_channels, config.channels)
        self.norm1 = nn.LayerNorm(config.channels)
        self.norm2 = nn.LayerNorm(config.channels)

    def forward(self, x: Tensor, position: Tensor, indices: Tensor, mask: Tensor, slot_of_voxel: Tensor) -> Tensor:
        """(V, D) to (V, D); arguments as `SetAttention.forward`."""
        x = normalize_sum(self.norm1, x, self.self_attn(x, position, indices, mask, slot_of_voxel))
        return normalize_sum(self.norm2, x, self.linear2(F.gelu(self.linear1(x))))


class SetAttentionEncoder(nn.Module):
    """A layer with an outer residual connection (DSVT ``DSVT_EncoderLayer``)."""

    def __init__(self, config: Backbone3dConfig) -> None:
        super().__init__()
        self.win_attn = SetAttentionLayer(config)
        self.norm = nn.LayerNorm(config.channels)

    def forward(self, x: Tensor, position: Tensor, sets: VoxelSets, order: int) -> Tensor:
        """(V, D) to (V, D), over `sets` in sort order `order`."""
        attended = self.win_attn(x, position, sets.indices[order], sets.mask[order], sets.slot_of_voxel[order])
        return normalize_sum(self.norm, attended, x)


class SetAttentionBlock(nn.Module):
    """Two encoders: over the sets sorted by y, then over those sorted by x."""

    def __init__(self, config: Backbone3dConfig) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList(SetAttentionEncoder(config) for _ in range(2))

    def forward(self, x: Tensor, positions: list[Tensor], sets: VoxelSets) -> Tensor:
        """(V, D) to (V, D)."""
        for order, (encoder, position) in enumerate(zip(self.encoder_list, positions, strict=True)):
            x = encoder(x, position, sets, order)
        return x


class AttentionPooling(nn.Module):
    """Voxels on top of each other to one: their maximum asks, they answer (DSVT section 3.3).

    Empty slots take part as zeros, as published: the mask that the release builds there masks nothing, and its
    weights were trained with it.
    """

    NUM_HEADS = 8

    def __init__(self, channels: int, slots: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(slots, channels) * 0.01)
        self.self_attn = AttentionProjections(channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, pooling: Pooling) -> Tensor:
        """(V, D) to (V', D)."""
        slots, channels = self.pos_embedding.shape
        weight, bias = self.self_attn.in_proj_weight, self.self_attn.in_proj_bias
        # Keys and values are projected once a voxel and then gathered; an empty slot's projection is the bias alone.
        rows = torch.cat([x, F.linear(x, weight[channels:])], dim=1)
        in_slots = rows.index_select(0, pooling.indices.reshape(-1)).view(-1, slots, 3 * channels)
        in_slots = in_slots.masked_fill(pooling.mask[:, :, None], 0.0)
        features, key, value = torch.split(in_slots, [channels] * 3, dim=-1)
        maximum = features.amax(1)
        query = F.linear(maximum, weight[:channels], bias[:channels])[:, None]
        key = key + F.linear(self.pos_embedding, weight[channels : 2 * channels], bias[channels : 2 * channels])
        value = value + bias[2 * channels :]

        heads = (slots, self.NUM_HEADS, channels // self.NUM_HEADS)
        scores = (query.float() * key.float()).view(-1, *heads).sum(-1, keepdim=True) * heads[-1] ** -0.5
        attended = (torch.softmax(scores, dim=1) * value.float().view(-1, *heads)).sum(1).view(-1, channels)
        return normalize_sum(self.norm, self.self_attn.out_proj(attended.to(x.dtype)), maximum)


class InputLayer(nn.Module):
    """Holds the position embeddings under their published keys."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        channels = model.backbone_3d.channels
        self.posembed_layers = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(PositionEmbedding(channels, window, flat=grid[2] == 1) for window in stage.windows)
                for _ in range(stage.num_blocks)
            )
            for stage, grid in zip(model.backbone_3d.stages, model.stage_grids, strict=True)
        )

    def forward(self, stage: int, block: int, partition: StagePartition) -> list[Tensor]:
        """Embeddings of the two encoders of a block.

        Encoder i takes the coordinates of window shift i, whichever shift the block's sets come from. The release
        has it so (``dsvt.py``, "mismatch of pos_embed"), and its weights were trained with it.
        """
        embeddings = self.posembed_layers[stage][block]  # type: ignore[index]
        return [embedding(cells) for embedding, cells in zip(embeddings, partition.cells, strict=True)]


class SetAttentionBackbone(nn.Module):
    """Stages of set attention; consecutive blocks use alternating window shifts, and pooling joins the stages."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        config = model.backbone_3d
        self.shifts = config.shifts
        self.input_layer = InputLayer(model)
        for number, stage in enumerate(config.stages):
            norms = (nn.LayerNorm(config.channels) for _ in range(stage.num_blocks))
            blocks = (SetAttentionBlock(config) for _ in range(stage.num_blocks))
            self.add_module(f"stage_{number}", nn.ModuleList(blocks))
            self.add_module(f"residual_norm_stage_{number}", nn.ModuleList(norms))
            if number < len(config.stages) - 1:
                self.add_module(f"stage_{number}_reduction", AttentionPooling(config.channels, stage.pool_z))

    def forward(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D), those of the last stage."""
        for number, stage in enumerate(partition.stages):
            for block in range(len(self.shifts[number])):
                positions = self.input_layer(number, block, stage)
                features = self.run_block(number, block, features, positions, stage)
            if stage.pooling is not None:
                features = self.get_submodule(f"stage_{number}_reduction")(features, stage.pooling)
        return features

    def run_block(
        self, stage: int, block: int, features: Tensor, positions: list[Tensor], partition: StagePartition
    ) -> Tensor:
        """(V, D) to (V, D): a block with its outer residual connection."""
        attention = self.get_submodule(f"stage_{stage}.{block}")
        norm = self.get_submodule(f"residual_norm_stage_{stage}.{block}")
        sets = partition.sets[self.shifts[stage][block]]
        return normalize_sum(norm, attention(features, positions, sets), features)
