"""Every stage of every published model against what the published modules computed from the same weights and cloud."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import reference
import torch
from reference import NAMES, Comparison, load_reference, match_boxes

from dsvt_ros import Detector
from dsvt_ros.bev import scatter_bev
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.set_attention import AttentionPooling
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize


@functools.cache
def compare(name: str) -> Comparison:
    return reference.compare(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage(name):
    found = compare(name)
    assert not found.exceeded()
    stages = {text.partition(":")[0] for text in found.largest}
    assert stages >= {"voxels", "sets", "features of voxels", "positions", "attention layers", "sparse network"}
    assert stages >= {"bev backbone", "head", "boxes"}


@pytest.mark.parametrize("name", NAMES)
def test_same_state_dict(name):
    """Keys, their order, shapes and types."""
    published = reference.recipe.read_keys(reference.DATA / f"keys_{name}.txt")
    ours = DSVT(open_model(name).model).state_dict()
    assert {key: (tuple(value.shape), str(value.dtype)[6:]) for key, value in ours.items()} == published


@pytest.mark.parametrize("name", NAMES)
def test_boxes_of_the_release(name, tmp_path):
    """End to end, through a pcdet checkpoint, with the release's suppression."""
    published = load_reference(name)
    checkpoint = tmp_path / "checkpoint.pth"
    torch.save({"model_state": published.weights, "epoch": 12}, checkpoint)
    overrides = {"postprocess.nms_geometry": "dsvt_release", "preprocess.scale_features": False}
    detector = Detector.load(name, checkpoint, backend="torch", device="cpu", overrides=overrides)
    found = detector.detect(published.points)
    nearest, distance = match_boxes(found.boxes, found.labels, published.arrays)
    assert len(found) == len(published.arrays["boxes"])
    assert sorted(nearest) == list(range(len(found))), "every published box is matched by one of ours"
    assert distance.max() < 0.01
    np.testing.assert_allclose(found.scores[nearest], published.arrays["scores"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.boxes[nearest], published.arrays["boxes"], rtol=0, atol=1e-3)


# ------------------------------------------------------------------------ quirks that the published weights embody


@functools.cache
def published_network(name):
    published = load_reference(name)
    network = DSVT(open_model(name).model).eval()
    load_weights(network, published.weights, "recipe")
    return network, published


@torch.inference_mode()
def sparse_error(name, alter):
    """Largest difference of the sparse network's output once `alter` has changed the modules or the partition."""
    network, published = published_network(name)
    voxels = voxelize(torch.as_tensor(published.points), network.config)
    partition = partition_sets(voxels.coords, network.config)
    found = alter(network.backbone_3d, network.vfe(voxels), partition)
    picked = torch.as_tensor(published.arrays["backbone_pick"]).long()
    return np.abs(found[picked].numpy() - published.arrays["backbone_out_pick"]).max()


def test_position_embeddings_take_the_shift_of_their_encoder(monkeypatch):
    """The release mixes up shifts: encoder i uses shift i in every block, whichever shift its sets come from."""

    def put_right(backbone, features, partition):
        (stage,) = partition.stages
        for block in range(4):
            own = (stage.cells[block % 2],) * 2
            embeddings = backbone.input_layer.posembed_layers[0][block]
            cells = [embedding.offsets.shape[0] for embedding in embeddings]
            positions = [
                embedding(torch.remainder(cell, count))
                for embedding, cell, count in zip(embeddings, own, cells, strict=True)
            ]
            features = backbone.run_block(0, block, features, positions, stage)
        return features

    def published(backbone, features, partition):
        return backbone(features, partition)

    assert sparse_error("waymo_pillar", published) < 1e-4
    assert sparse_error("waymo_pillar", put_right) > 0.1


def test_pooling_attends_to_empty_slots(monkeypatch):
    """The release's mask of empty slots masks nothing; with one that does, the output is another."""

    def masked(self, x, pooling):
        channels = self.pos_embedding.shape[1]
        features = x[pooling.indices].masked_fill(pooling.mask[..., None], 0.0)
        attention = torch.nn.MultiheadAttention(channels, self.NUM_HEADS, batch_first=True)
        attention.load_state_dict(self.self_attn.state_dict())
        query = features.amax(1, keepdim=True)
        answer, _ = attention.eval()(query, features + self.pos_embedding, features, key_padding_mask=pooling.mask)
        return self.norm(answer + query)[:, 0]

    def run(backbone, features, partition):
        return backbone(features, partition)

    assert sparse_error("waymo_voxel", run) < 1e-4
    monkeypatch.setattr(AttentionPooling, "forward", masked)
    assert sparse_error("waymo_voxel", run) > 0.1


@torch.inference_mode()
def proposal_error(alter=lambda head: None):
    network, published = published_network("nuscenes_pillar")
    if not hasattr(network, "bev_of_test"):
        voxels = voxelize(torch.as_tensor(published.points), network.config)
        partition = partition_sets(voxels.coords, network.config)
        sparse = network.backbone_3d(network.vfe(voxels), partition)
        network.bev_of_test = network.backbone_2d(scatter_bev(sparse, partition.coords, (360, 360, 1), 1))
    head = network.dense_head
    around = head.decoder.around.clone()
    try:
        alter(head)
        maps = head(network.bev_of_test)
    finally:
        head.decoder.around = around
    return np.abs(maps.dim.numpy() - published.arrays["head__dim"]).max()


def test_proposals_attend_to_the_cells_around_and_no_others():
    def reach_of_19(head):
        reach = torch.arange(-19, 20)
        head.decoder.around = (reach[:, None] * 180 + reach).flatten()

    assert proposal_error() < 1e-4
    assert proposal_error(reach_of_19) > 1e-3


def test_proposals_attend_to_themselves_alone(monkeypatch):
    """Among each other they would come to something else: each is a sequence of its own in the release."""
    network, _ = published_network("nuscenes_pillar")
    decoder = network.dense_head.decoder
    real = type(decoder).forward

    def together(self, proposals, cells, features):
        own = proposals + self.self_posembed.table()[cells]
        attention = torch.nn.MultiheadAttention(own.shape[-1], self.num_heads, batch_first=True).eval()
        attention.load_state_dict(self.self_attn.state_dict())
        answer, _ = attention(own, own, own)
        # What the real one adds for its own attention is replaced by this answer.
        weight, bias = (
            part[2 * own.shape[-1] :] for part in (self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
        )
        alone = self.self_attn.out_proj(torch.nn.functional.linear(own, weight, bias))
        return real(self, proposals + (answer - alone), cells, features)

    assert proposal_error() < 1e-4
    monkeypatch.setattr(type(decoder), "forward", together)
    assert proposal_error() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_turned_boxes_are_a_quirk_of_the_suppression_of_center_head(name):
    kept = {geometry: boxes.keep for geometry, boxes in compare(name).found.items()}
    assert torch.equal(kept["exact"], kept["dsvt_release"]) == (name == "nuscenes_pillar")


def test_middle_upsampling_is_transposed():
    """Weights of a convolution by 1 have the same shape: taking one for the other is silent, and wrong."""
    network, published = published_network("nuscenes_pillar")
    layer = network.backbone_2d.deblocks[1][0]
    assert isinstance(layer, torch.nn.ConvTranspose2d)
    assert isinstance(network.backbone_2d.deblocks[0][0], torch.nn.Conv2d)
    weight = published.weights["backbone_2d.deblocks.1.0.weight"]
    assert weight.shape == (128, 128, 1, 1)
    assert math.isclose(float(layer.weight[3, 7]), float(weight[3, 7]))
