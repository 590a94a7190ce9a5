"""Attention within sets whose voxels follow each other, by whatever PyTorch has for it here."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class SetAttention(Protocol):
    """Attention within the sets of a window shift."""

    def prepare(self, set_start: Tensor, rows: int) -> Any:
        """What `attend` has to know of the sets that begin, and where the last one ends, in (S + 1,) `set_start`."""
        ...

    def attend(self, qkv: Tensor, sets: Any) -> Tensor:
        """(V, 3, H, D / H) queries, keys and values of as many rows as it was prepared for to (V, D).

        Rows that are in no set get any values.
        """
        ...


class RaggedAttention:
    """One kernel for sets of any size, which reads their rows where they are: memory-efficient attention."""

    def __init__(self, set_size: int) -> None:
        self._set_size = set_size

    def prepare(self, set_start: Tensor, rows: int) -> Tensor:
        """See `SetAttention`."""
        return set_start

    def attend(self, qkv: Tensor, sets: Tensor) -> Tensor:
        """See `SetAttention`."""
        query, key, value = qkv[None].unbind(2)
        size = self._set_size
        # Arguments by position from the start to dropout, mask and whether to give logarithms too, neither of which
        # is wanted.
        attended: Tensor = torch.ops.aten._efficient_attention_forward(
            query, key, value, None, sets, sets, size, size, 0.0, 0, False
        )[0]
        return attended.reshape(len(qkv), -1)


class SlotAttention:
    """Sets gathered into as many slots each, for any kind of attention that PyTorch chooses."""

    def __init__(self, set_size: int) -> None:
        self._set_size = set_size

    def prepare(self, set_start: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `SetAttention`: the row in each slot, whether slots hold one, and the slot of each row."""
        slot = torch.arange(self._set_size, device=set_start.device)
        row = set_start[:-1, None] + slot
        holds = row < set_start[1:, None]
        holds |= slot == 0  # so that the softmax of an empty set is defined
        number = torch.arange(rows, dtype=torch.int32, device=set_start.device)
        own = (torch.searchsorted(set_start, number, right=True) - 1).clamp(0, len(set_start) - 2)
        in_set = (number - set_start.index_select(0, own)).clamp_max(self._set_size - 1)
        return row.clamp_max(rows - 1), holds[:, None, None], own * self._set_size + in_set

    def attend(self, qkv: Tensor, sets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See `SetAttention`."""
        row, holds, slot_of_row = sets
        in_slots = qkv.index_select(0, row.flatten()).view(*row.shape, *qkv.shape[1:])
        query, key, value = in_slots.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=holds)
        return attended.transpose(1, 2).reshape(row.numel(), -1).index_select(0, slot_of_row)


@torch.inference_mode()
def set_attention(device: torch.device, set_size: int, heads: int, width: int) -> SetAttention:
    """The quickest that works on a device, for sets of up to so many voxels and heads of so many channels."""
    slots, ragged = SlotAttention(set_size), RaggedAttention(set_size)
    if device.type != "cuda":
        return slots
    start = torch.tensor([0, 1, 1 + set_size, 2 + set_size, 2 + set_size], dtype=torch.int32, device=device)
    qkv = torch.randn(2 + set_size, 3, heads, width, device=device).half()
    expected = slots.attend(qkv, slots.prepare(start, len(qkv)))
    try:
        found = ragged.attend(qkv, ragged.prepare(start, len(qkv)))
        works = torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    except (AttributeError, RuntimeError, TypeError):  # a build of PyTorch without it, or with another signature
        works = False
    return ragged if works else slots
