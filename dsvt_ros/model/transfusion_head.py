"""TransFusionHead: the best cells of a heatmap become proposals, which attend to the map around them.

TransFusion (Bai et al., CVPR 2022) section 3, as DSVT trained it for nuScenes (``transfusion_head.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import PROPOSAL_BRANCHES, TransFusionHeadConfig
from dsvt_ros.model.set_attention import MASKED, AttentionProjections, normalize_sum
from dsvt_ros.structures import ProposalMaps

REACH = 20
"""A proposal attends to the cells up to so many rows and columns away."""
HIDDEN_CHANNELS = 64
"""Hidden width of the branches; both are constants of the published code."""


class CellEmbedding(nn.Module):
    """Learned embedding of a cell's position in the map: a function of the cell, so inference has it as a table."""

    def __init__(self, channels: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(2, channels, 1), nn.BatchNorm1d(channels), nn.ReLU(), nn.Conv1d(channels, channels, 1)
        )
        x, y = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
        centers = torch.stack([x.flatten(), y.flatten()], dim=1) + 0.5
        self.register_buffer("centers", centers, persistent=False)

    def forward(self, cells: Tensor) -> Tensor:
        """(N,) cells to (N, D) embeddings."""
        return self.table().index_select(0, cells)

    def table(self) -> Tensor:
        """(cells, D) embedding of every cell."""
        assert isinstance(self.centers, Tensor)
        part = self.position_embedding_head.get_parameter
        # Not as the convolutions that they are: on a GPU these round to TF32, and embeddings are in the hundreds.
        hidden = F.linear(self.centers, part("0.weight")[:, :, 0], part("0.bias"))
        hidden = F.relu(self.position_embedding_head[1](hidden))
        return F.linear(hidden, part("3.weight")[:, :, 0], part("3.bias"))


AttendAround = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def attend_around(query: Tensor, projected: Tensor, cells: Tensor, around: Tensor, num_heads: int) -> Tensor:
    """Attention of proposals to the cells around them.

    Cells are numbered through, as published: beyond the end of a row lies the start of the next one. Those before the
    first and beyond the last cell do not count.

    Args:
        query: (B, Q, D), scaled.
        projected: (B, cells, 2 D) key and value of every cell.
        cells: (B, Q) integer cell of each proposal.
        around: (K,) integers, what to add to a cell for each of those around it.
        num_heads: Heads, of D / num_heads channels each.

    Returns:
        (B, Q, D).
    """
    width = query.shape[-1] // num_heads
    # In single precision, which is exact for them: engines of TensorRT 8 limit and divide no integers.
    there = (cells[:, :, None] + around.to(cells.dtype)).float()
    keys = there.clamp(0, projected.shape[1] - 1)
    outside = (there != keys).float()
    gathered = rows_of_cells(projected, keys.to(cells.dtype)).view(-1, len(around), 2, num_heads, width)
    key, value = gathered.permute(2, 0, 3, 1, 4).unbind()
    scores = query.view(-1, num_heads, 1, width) @ key.transpose(-1, -2)
    scores = scores + outside.view(-1, 1, 1, len(around)) * MASKED
    return (torch.softmax(scores, dim=-1) @ value).reshape(query.shape)


class ProposalDecoder(nn.Module):
    """Self-attention, attention to the cells around, and a feed-forward network, post-norm.

    It stays in single precision whatever the rest is in: embeddings of positions up to hundreds of cells meet in its
    products, of which half precision would keep the size and lose what tells neighbours apart.
    """

    def __init__(self, config: TransFusionHeadConfig, shape: tuple[int, int]) -> None:
        super().__init__()
        channels = config.channels
        self.num_heads = config.num_heads
        self.self_attn = AttentionProjections(channels)
        self.multihead_attn = AttentionProjections(channels)
        self.linear1 = nn.Linear(channels, config.ffn_channels)
        self.linear2 = nn.Linear(config.ffn_channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)
        self.self_posembed: nn.Module = CellEmbedding(channels, shape)
        self.cross_posembed: nn.Module = CellEmbedding(channels, shape)
        reach = torch.arange(-REACH, REACH + 1)
        around = (reach[:, None] * shape[1] + reach).flatten()
        self.register_buffer("around", around, persistent=False)
        self.attend_around: AttendAround = attend_around

    def forward(self, proposals: Tensor, cells: Tensor, features: Tensor) -> Tensor:
        """Decode.

        Args:
            proposals: (B, Q, D) features.
            cells: (B, Q) integer cell of each proposal.
            features: (B, cells, D) map.

        Returns:
            (B, Q, D) features, in single precision.
        """
        proposals, features = proposals.float(), features.float()
        position = self.self_posembed(cells.reshape(-1)).view_as(proposals)
        # As published, every proposal is a sequence of its own: it attends to itself alone, with weight 1.
        own = proposals + position
        channels = own.shape[-1]
        weight, bias = self.self_attn.in_proj_weight[2 * channels :], self.self_attn.in_proj_bias[2 * channels :]
        x = normalize_sum(self.norm1, self.self_attn.out_proj(F.linear(own, weight, bias)), proposals)
        x = normalize_sum(self.norm2, self._attend(x + position, cells, features), x)
        return normalize_sum(self.norm3, self.linear2(F.relu(self.linear1(x))), x)

    def _attend(self, queries: Tensor, cells: Tensor, features: Tensor) -> Tensor:
        """(B, Q, D): attention of each proposal to the cells around it; all three parts carry positions."""
        assert isinstance(self.around, Tensor)
        attention = self.multihead_attn
        channels = queries.shape[-1]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        features = features + self.cross_posembed.table()  # type: ignore[operator]
        # Every cell is projected once and then gathered; published is the other order, for 1681 cells a proposal.
        projected = F.linear(features, weight[channels:], bias[channels:])
        query = F.linear(queries, weight[:channels], bias[:channels]) * (channels // self.num_heads) ** -0.5
        output: Tensor = attention.out_proj(self.attend_around(query, projected, cells, self.around, self.num_heads))
        return output


class TransFusionHead(nn.Module):
    """Heatmap, proposals, decoder and branches."""

    def __init__(
        self, config: TransFusionHeadConfig, in_channels: int, class_names: tuple[str, ...], shape: tuple[int, int]
    ) -> None:
        """Make a head with random weights.

        Args:
            config: Its sizes.
            in_channels: Channels of the BEV map.
            class_names: All classes.
            shape: Columns and rows of the map, along x and y.
        """
        super().__init__()
        self.config = config
        channels, num_classes = config.channels, len(class_names)
        # At the border there is no whole neighbourhood, and, as published, no peak; small objects need none.
        border = config.peak_size // 2
        inside = torch.zeros(num_classes, *shape)
        inside[:, border : shape[0] - border, border : shape[1] - border] = 1
        anywhere = torch.zeros(num_classes, 1, 1)
        for name in config.small_classes:
            inside[class_names.index(name)] = 0
            anywhere[class_names.index(name)] = 1
        self.register_buffer("inside", inside, persistent=False)
        self.register_buffer("anywhere", anywhere, persistent=False)
        self.shared_conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.heatmap_head = nn.Sequential(HeatmapBlock(channels), nn.Conv2d(channels, num_classes, 3, padding=1))
        self.class_encoding = nn.Conv1d(num_classes, channels, 1)
        self.decoder = ProposalDecoder(config, shape)
        self.prediction_head = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Sequential(nn.Conv1d(channels, HIDDEN_CHANNELS, 1), nn.BatchNorm1d(HIDDEN_CHANNELS), nn.ReLU()),
                    nn.Conv1d(HIDDEN_CHANNELS, PROPOSAL_BRANCHES.get(name, num_classes), 1),
                )
                for name in config.branches
            }
        )

    def forward(self, bev: Tensor) -> ProposalMaps:
        """(B, C, H, W) BEV features to proposals."""
        # As published, the head runs over [x, y], so that cells are numbered along y first.
        shared = self.shared_conv(bev.transpose(2, 3))
        label, cell, peak = self.find_proposals(self.heatmap_head(shared))
        features = shared.flatten(2).transpose(1, 2)
        proposals = rows_of_cells(features, cell)
        proposals = proposals + self.encodings().index_select(0, label.reshape(-1)).view_as(proposals)
        proposals = self.decoder(proposals, cell, features)
        proposals = proposals.to(shared.dtype).transpose(1, 2)
        branches = {name: branch(proposals) for name, branch in self.prediction_head.items()}
        return ProposalMaps(
            label=label,
            cell=cell,
            peak=peak,
            heatmap=branches["heatmap"],
            center=branches["center"],
            height=branches["height"],
            dim=branches["dim"],
            rot=branches["rot"],
            vel=branches.get("vel"),
            iou=branches.get("iou"),
        )

    def encodings(self) -> Tensor:
        """(classes, D) encoding of each class: the published convolution of a one-hot vector."""
        assert self.class_encoding.bias is not None
        return self.class_encoding.weight[:, :, 0].T + self.class_encoding.bias

    def find_proposals(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The highest peaks of (B, classes, X, Y) heatmaps: class, cell and score of each, (B, Q)."""
        assert isinstance(self.inside, Tensor)
        assert isinstance(self.anywhere, Tensor)
        scores = logits.float().sigmoid()
        size = self.config.peak_size
        highest = F.max_pool2d(scores, size, stride=1, padding=size // 2)
        peaks = scores * ((scores == highest).float() * self.inside.float() + self.anywhere.float())
        peak, index = torch.topk(peaks.flatten(1), self.config.num_proposals)
        num_cells = scores.shape[2] * scores.shape[3]
        label = torch.floor(index.float() / num_cells).to(index.dtype)
        return label, index - label * num_cells, peak


def rows_of_cells(values: Tensor, cells: Tensor) -> Tensor:
    """(B, cells, D) values of every cell to (B, ..., D) those of some (B, ...) cells."""
    batch_size, num_cells, channels = values.shape
    if batch_size > 1:
        first = torch.arange(batch_size, device=cells.device) * num_cells
        cells = cells + first.view(-1, *[1] * (cells.dim() - 1))
    return values.reshape(-1, channels).index_select(0, cells.reshape(-1)).view(*cells.shape, channels)


class HeatmapBlock(nn.Module):
    """A convolution with batch norm (upstream ``BasicBlock2D``)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.relu(self.bn(self.conv(x)), inplace=True)
