"""The sparse network: set attention over voxels (DSVT section 3), with the published state-dict keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.structures import SetPartition, WindowShift

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

    def __init__(self, channels: int, window: tuple[int, int, int], *, flat: bool) -> None:
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


class SetAttention(nn.Module):
    """Multi-head attention inside each set; parameters as in `torch.nn.MultiheadAttention`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

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

    def forward(self, x: Tensor, position: Tensor, shift: WindowShift, order: int) -> Tensor:
        """(V, D) to (V, D), over the sets of `shift` in sort order `order`."""
        attended = self.win_attn(
            x,
            position,
            shift.set_indices[order],
            shift.set_mask[order],
            shift.slot_of_voxel[order],
        )
        return normalize_sum(self.norm, attended, x)


class SetAttentionBlock(nn.Module):
    """Two encoders: over the sets sorted by y, then over those sorted by x."""

    def __init__(self, config: Backbone3dConfig) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList(SetAttentionEncoder(config) for _ in range(2))

    def forward(self, x: Tensor, positions: list[Tensor], shift: WindowShift) -> Tensor:
        """(V, D) to (V, D)."""
        for order, (encoder, position) in enumerate(zip(self.encoder_list, positions, strict=True)):
            x = encoder(x, position, shift, order)
        return x


class InputLayer(nn.Module):
    """Holds the position embeddings under their published keys."""

    def __init__(self, config: Backbone3dConfig, *, flat: bool) -> None:
        super().__init__()
        stage = nn.ModuleList(
            nn.ModuleList(PositionEmbedding(config.channels, window, flat=flat) for window in config.windows)
            for _ in range(config.num_blocks)
        )
        self.posembed_layers = nn.ModuleList([stage])

    def forward(self, block: int, partition: SetPartition) -> list[Tensor]:
        """Embeddings of the two encoders of a block.

        Encoder i takes the coordinates of window shift i, whichever shift the block's sets come from. The release
        has it so (``dsvt.py``, "mismatch of pos_embed"), and its weights were trained with it.
        """
        embeddings = self.posembed_layers[0][block]  # type: ignore[index]
        return [embedding(shift.cell_of_voxel) for embedding, shift in zip(embeddings, partition.shifts, strict=True)]


class SetAttentionBackbone(nn.Module):
    """Blocks of set attention; consecutive blocks use alternating window shifts."""

    def __init__(self, config: Backbone3dConfig, *, flat: bool) -> None:
        super().__init__()
        self.input_layer = InputLayer(config, flat=flat)
        self.stage_0 = nn.ModuleList(SetAttentionBlock(config) for _ in range(config.num_blocks))
        self.residual_norm_stage_0 = nn.ModuleList(nn.LayerNorm(config.channels) for _ in range(config.num_blocks))

    def forward(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V, D)."""
        for index in range(len(self.stage_0)):
            features = self.run_block(index, features, self.input_layer(index, partition), partition)
        return features

    def run_block(self, index: int, features: Tensor, positions: list[Tensor], partition: SetPartition) -> Tensor:
        """(V, D) to (V, D): block `index` with its outer residual connection."""
        block, norm = self.stage_0[index], self.residual_norm_stage_0[index]
        return normalize_sum(norm, block(features, positions, partition.shifts[index % 2]), features)
