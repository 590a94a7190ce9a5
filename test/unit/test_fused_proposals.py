"""Attention of proposals to the cells around them: the kernel against torch."""

import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton

from dsvt_ros.fused.proposals import attend_around, heads_of_a_program
from dsvt_ros.model import transfusion_head

_interpreter = interpreted("proposal_attention")
pytestmark = needs_triton

ROWS, COLUMNS = 7, 11


def around(reach):
    offsets = torch.arange(-reach, reach + 1, device=DEVICE)
    return (offsets[:, None] * COLUMNS + offsets).flatten()


@pytest.mark.parametrize(
    ("num_heads", "channels", "reach", "clouds", "count"),
    [(8, 128, 4, 1, 3), (2, 16, 1, 2, 5), (3, 24, 2, 3, 2), (1, 64, 5, 1, 1)],
    ids=["published", "fewer neighbours than a block", "three heads", "wide head"],
)
def test_as_in_torch(num_heads, channels, reach, clouds, count):
    """Proposals in the corners and at random; most neighbourhoods reach beyond the map's ends."""
    torch.manual_seed(count)
    query = torch.randn(clouds, count, channels, device=DEVICE)
    projected = torch.randn(clouds, ROWS * COLUMNS, 2 * channels, device=DEVICE)
    cells = torch.randint(0, ROWS * COLUMNS, (clouds, count), device=DEVICE)
    cells[0, 0], cells[-1, -1] = 0, ROWS * COLUMNS - 1
    arguments = (query, projected, cells, around(reach), num_heads)
    found = attend_around(*arguments)
    torch.testing.assert_close(found, transfusion_head.attend_around(*arguments), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, attend_around(*arguments))


def test_scores_far_apart():
    """One cell takes all the weight, in the last block of keys."""
    neighbours = around(4)
    query = torch.full((1, 1, 16), 3.0, device=DEVICE)
    projected = torch.randn(1, ROWS * COLUMNS, 32, device=DEVICE)
    cell = torch.tensor([[ROWS // 2 * COLUMNS + COLUMNS // 2]], device=DEVICE)
    last = int(cell) + int(neighbours[neighbours <= ROWS * COLUMNS - 1 - int(cell)].max())
    projected[0, last, :16] = 40.0
    found = attend_around(query, projected, cell, neighbours, 1)
    torch.testing.assert_close(found[0, 0], projected[0, last, 16:])


@pytest.mark.parametrize(
    ("channels", "num_heads", "expected"), [(128, 8, 2), (64, 1, 1), (24, 3, 1), (16, 2, 2), (96, 4, 0)]
)
def test_heads_of_a_program(channels, num_heads, expected):
    assert heads_of_a_program(channels, num_heads) == expected
