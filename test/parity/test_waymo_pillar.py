"""Every stage against what the published modules computed from the same weights and cloud."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsvt_ros import Detector
from dsvt_ros.bev import scatter_bev
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.voxelization import voxelize


@pytest.fixture(scope="module")
def stages(waymo_weights, waymo_points):
    """Outputs of every stage, and of every encoder inside the sparse network."""
    model = open_model("waymo_pillar").model
    network = DSVT(model).eval()
    load_weights(network, waymo_weights, "recipe")
    inside = {}
    for name, module in network.backbone_3d.named_modules():
        if (".encoder_list." in name and name.count(".") == 3) or name.startswith("residual_norm_stage_0."):
            module.register_forward_hook(lambda _m, _i, output, name=name: inside.update({name: output}))
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(waymo_points), model)
        features = network.vfe(voxels)
        partition = partition_sets(voxels.coords, model.grid_size, model.backbone_3d)
        positions = [network.backbone_3d.input_layer(block, partition) for block in range(4)]
        sparse = network.backbone_3d(features, partition)
        bev = network.backbone_2d(scatter_bev(sparse, voxels.coords, model.grid_size, 1))
        maps = network.dense_head(bev)
    return {
        "voxels": voxels,
        "features": features.numpy(),
        "partition": partition,
        "positions": positions,
        "inside": inside,
        "sparse": sparse.numpy(),
        "bev": bev[0].numpy(),
        "maps": maps,
    }


def test_voxels_are_identical(stages, waymo_reference):
    np.testing.assert_array_equal(stages["voxels"].coords.numpy(), waymo_reference["voxel_coords"])


def test_pillar_features(stages, waymo_reference):
    picked = stages["features"][waymo_reference["voxel_pick"]]
    np.testing.assert_allclose(picked, waymo_reference["voxel_features_pick"], rtol=0, atol=1e-4)
    mean = stages["features"].mean(0, dtype=np.float64)
    np.testing.assert_allclose(mean, waymo_reference["voxel_features_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1])
def test_sets_are_identical(stages, waymo_reference, shift):
    ours = stages["partition"].shifts[shift]
    name = f"partition__set_voxel_{{}}_stage0_shift{shift}"
    mask = np.unpackbits(waymo_reference[name.format("mask")], axis=-1)[..., :36].astype(bool)
    np.testing.assert_array_equal(ours.set_indices.numpy(), waymo_reference[name.format("inds")])
    np.testing.assert_array_equal(ours.set_mask.numpy(), mask)


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("shift", [0, 1])
def test_position_embeddings_take_the_shift_of_their_encoder(stages, waymo_reference, block, shift):
    """The release mixes up shifts here, and its weights embody that: encoder i uses shift i in every block."""
    expected = waymo_reference[f"partition__pos_embed_stage0_block{block}_shift{shift}_pick"]
    picked = stages["positions"][block][shift][waymo_reference["voxel_pick"][: len(expected)]]
    np.testing.assert_allclose(picked.numpy(), expected, rtol=0, atol=1e-5)


def test_every_encoder_and_norm(stages, waymo_reference):
    names = [name for name in waymo_reference if name.startswith("backbone_3d__") and name.endswith("__mean")]
    assert len(names) == 12
    for name in names:
        _, layer, _ = name.split("__")
        output = stages["inside"][layer].numpy()
        np.testing.assert_allclose(output.mean(0), waymo_reference[name], rtol=0, atol=1e-4, err_msg=layer)
        first = waymo_reference[f"backbone_3d__{layer}__first4"]
        np.testing.assert_allclose(output[:4], first, rtol=0, atol=1e-4, err_msg=layer)


def test_sparse_network(stages, waymo_reference):
    picked = stages["sparse"][waymo_reference["backbone_pick"]]
    np.testing.assert_allclose(picked, waymo_reference["backbone_out_pick"], rtol=0, atol=1e-4)
    mean, std = stages["sparse"].mean(0, dtype=np.float64), stages["sparse"].std(0, dtype=np.float64, ddof=1)
    np.testing.assert_allclose(mean, waymo_reference["backbone_out_mean"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(std, waymo_reference["backbone_out_std"], rtol=0, atol=1e-4)


def test_bev_backbone(stages, waymo_reference):
    crop = stages["bev"][:, 230:238, 230:238]
    np.testing.assert_allclose(crop, waymo_reference["bev_crop"], rtol=0, atol=1e-4)
    mean = stages["bev"].mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(mean, waymo_reference["bev_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("branch", ["center", "center_z", "dim", "rot", "iou", "heatmap"])
def test_head_maps(stages, waymo_reference, branch):
    published = "hm" if branch == "heatmap" else branch
    ours = getattr(stages["maps"], branch)[0].numpy()
    expected = waymo_reference[f"head__{published}__crop_centre16"]
    np.testing.assert_allclose(ours[:, 226:242, 226:242], expected, rtol=0, atol=1e-3)
    mean = ours.mean((1, 2), dtype=np.float64)
    np.testing.assert_allclose(mean, waymo_reference[f"head__{published}__mean"], rtol=0, atol=1e-3)


def test_boxes_of_the_release(waymo_checkpoint, waymo_points, waymo_reference):
    """End to end, through a pcdet checkpoint, with the release's turned boxes in the suppression."""
    detector = Detector.load(
        "waymo_pillar",
        waymo_checkpoint,
        device="cpu",
        overrides={"postprocess.nms_geometry": "dsvt_release", "preprocess.scale_features": False},
    )
    found = detector.detect(waymo_points)
    boxes, scores = waymo_reference["boxes"], waymo_reference["scores"]
    labels = waymo_reference["labels"].astype(np.int64) - 1
    assert len(found) == len(boxes) == 261
    distance = np.linalg.norm(found.boxes[:, None, :3] - boxes[None, :, :3], axis=-1)
    distance[found.labels[:, None] != labels[None]] = np.inf
    nearest = distance.argmin(0)
    assert sorted(nearest) == list(range(261)), "every published box is matched by one of ours"
    assert distance.min(0).max() < 0.01
    np.testing.assert_allclose(found.scores[nearest], scores, rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.boxes[nearest], boxes, rtol=0, atol=1e-3)

    exact = Detector.load(
        "waymo_pillar", waymo_checkpoint, device="cpu", overrides={"preprocess.scale_features": False}
    ).detect(waymo_points)
    assert len(exact) != len(found), "the cloud has boxes on which the two geometries differ"
