import copy

import pytest
import torch
from torch import nn

from dsvt_ros.model.center_head import CenterHead, MergedHead
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import fold_batch_norms, tabulate_positions
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.set_attention import PositionEmbedding


@pytest.fixture(scope="module")
def network():
    """The demo network with batch norms that do something."""
    torch.manual_seed(0)
    network = DSVT(open_model("demo").model)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval().requires_grad_(False)


def test_folding_keeps_the_function(network):
    bev = torch.randn(1, 64, 64, 64)
    folded = copy.deepcopy(network.backbone_2d)
    fold_batch_norms(folded)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(bev), network.backbone_2d(bev), atol=1e-3, rtol=1e-3)


def test_folding_leaves_the_original_alone(network):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fold_batch_norms(copy.deepcopy(network))
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_merged_head_gives_the_same_maps(network):
    head: CenterHead = copy.deepcopy(network.dense_head)
    features = torch.randn(2, 96, 20, 24)
    expected = head(features)
    fold_batch_norms(head)
    merged = MergedHead(head)(features)
    for name in ("heatmap", "center", "center_z", "dim", "rot", "iou"):
        torch.testing.assert_close(getattr(merged, name), getattr(expected, name), atol=1e-3, rtol=1e-3)


def test_position_tables_are_exact(network):
    backbone = copy.deepcopy(network.backbone_3d)
    tabulate_positions(backbone)
    assert not any(isinstance(module, PositionEmbedding) for module in backbone.modules())
    cells = torch.arange(144)
    for block in range(2):
        original = network.backbone_3d.input_layer.posembed_layers[0][block][0]
        table = backbone.input_layer.posembed_layers[0][block][0]
        torch.testing.assert_close(table(cells), original.position_embedding_head(original.offsets)[cells])
