"""The original network: builds it with the package pcdet, runs it and collects what its modules compute.

It follows the interface that OpenPCDet and its fork, the DSVT release, share: ``pcdet.models.build_network``, modules
that hand a dictionary on, and the keys in there. pcdet itself is imported only here, and only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsvt_ros.config import CenterHeadConfig, ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.center_head import maps_from_branches
from dsvt_ros.model.checkpoint import load_weights
from dsvt_ros.structures import CenterMaps, HeadMaps, ProposalMaps

DEVICE_TYPE = "cuda"  # the operators of pcdet exist for nothing else


@dataclass(frozen=True)
class Computed:
    """What a network computes for one cloud.

    Attributes:
        discrete: Tensors that must be the same in every implementation: voxel coordinates, sets and their masks.
        features: Tensors that may differ by rounding.
        maps: What the head says.
        boxes: (M, 7) or (M, 9) boxes after suppression.
        scores: (M,) scores.
        labels: (M,) classes.
    """

    discrete: dict[str, Tensor]
    features: dict[str, Tensor]
    maps: HeadMaps
    boxes: Tensor
    scores: Tensor
    labels: Tensor


class PcdetReference:
    """The original network with its weights.

    Attributes:
        version: Version of pcdet.
    """

    def __init__(
        self, config: Mapping[str, Any], model: ModelConfig, weights: dict[str, Tensor], device: torch.device
    ) -> None:
        """Build it.

        Args:
            config: OpenPCDet's configuration, base files merged in.
            model: The same model as we describe it.
            weights: Its state dict.
            device: A CUDA device.

        Raises:
            EngineError: pcdet is not installed, or cannot build this model here.
            ModelError: The weights do not fit.
        """
        if device.type != DEVICE_TYPE:
            raise EngineError(f"--against pcdet needs --device cuda: its operators exist for CUDA alone; got {device}")
        try:
            import pcdet
            from easydict import EasyDict
            from pcdet.models import build_network
        except ImportError as error:
            raise EngineError(
                f"--against pcdet needs the original code in this Python, and it cannot be imported ({error}): install "
                f"pcdet from a checkout of Haiyang-W/DSVT or open-mmlab/OpenPCDet, with its CUDA operators built, and "
                f"torch_scatter, spconv and easydict as its instructions say"
            ) from None
        self.version = str(getattr(pcdet, "__version__", "unknown"))
        self._model, self._device = model, device
        try:
            # Parts of it go to the current device by themselves.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                network = build_network(
                    model_cfg=EasyDict(config["MODEL"]), num_class=len(model.class_names), dataset=_dataset(model)
                )
        except Exception as error:  # whatever foreign code raises
            raise EngineError(
                f"pcdet {self.version} cannot build {model.name} ({type(error).__name__}: {error}); YAML files of the "
                f"DSVT release need its own pcdet, and those of OpenPCDet that of OpenPCDet"
            ) from error
        load_weights(network, weights, f"pcdet {self.version}, {model.name}: the checkpoint")
        self._network: nn.Module = network.to(device).eval().requires_grad_(False)
        self._seen: dict[str, Any] = {}
        self._listen()

    def __call__(self, points: Tensor) -> Computed:
        """Run one cloud.

        Args:
            points: (N, C) points as the network sees them: scaled, in the model's frame.

        Raises:
            EngineError: The original code fails.
        """
        self._seen.clear()
        batch = {"points": torch.cat([points.new_zeros(len(points), 1), points], dim=1), "batch_size": 1}
        try:
            (found,), _ = self._network(batch)
        except Exception as error:  # whatever foreign code raises
            raise EngineError(f"the network of pcdet {self.version} fails ({type(error).__name__}: {error})") from error
        seen = self._seen
        names = (name for name in seen["input_layer"] if name.startswith(("set_voxel_inds_", "set_voxel_mask_")))
        return Computed(
            discrete={
                "voxel_coords": seen["vfe"]["voxel_coords"],
                **{name.removeprefix("set_voxel_"): seen["input_layer"][name] for name in names},
            },
            features={
                "voxel_features": seen["vfe"]["voxel_features"],
                "backbone_3d": seen["backbone_3d"]["pillar_features"],
                "backbone_2d": seen["backbone_2d"]["spatial_features_2d"],
            },
            maps=self._center_maps() if isinstance(self._model.head, CenterHeadConfig) else self._proposals(),
            boxes=found["pred_boxes"],
            scores=found["pred_scores"],
            labels=found["pred_labels"].long() - 1,
        )

    def _listen(self) -> None:
        """Keep copies of what modules give: later ones write into the same dictionary and tensors."""

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Mapping[str, Any]) -> None:
                tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
                self._seen[name] = {key: value.clone() for key, value in tensors.items()}

            return hook

        backbone, head = self._submodule("backbone_3d"), self._submodule("dense_head")
        for name in ("vfe", "backbone_3d", "backbone_2d"):
            self._submodule(name).register_forward_hook(keep(name))
        self._submodule("input_layer", backbone).register_forward_hook(keep("input_layer"))
        if isinstance(self._model.head, CenterHeadConfig):
            return

        # TransFusionHead decodes boxes in place: copies are made of what predict() returns, and of the positions that
        # go into the decoder.
        predict: Callable[[Tensor], dict[str, Tensor]] = head.predict  # type: ignore[assignment]

        def predict_and_keep(bev: Tensor) -> dict[str, Tensor]:
            output = predict(bev)
            keep("predict")(head, (), output)
            return output

        def keep_positions(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen["positions"] = inputs[2].clone()

        head.predict = predict_and_keep  # type: ignore[assignment]
        self._submodule("decoder", head).register_forward_pre_hook(keep_positions)

    def _submodule(self, name: str, parent: nn.Module | None = None) -> nn.Module:
        try:
            return (parent or self._network).get_submodule(name)
        except AttributeError:
            raise EngineError(f"the network of pcdet {self.version} has no module {name}") from None

    def _center_maps(self) -> CenterMaps:
        groups = self._submodule("dense_head").forward_ret_dict["pred_dicts"]  # type: ignore[index]
        return maps_from_branches({name: torch.cat([group[name] for group in groups], 1) for name in groups[0]})

    def _proposals(self) -> ProposalMaps:
        seen = self._seen["predict"]
        label = self._submodule("dense_head").query_labels
        assert isinstance(label, Tensor)
        # Positions are centres of cells; to the decoder each proposal is a batch of its own.
        position = self._seen["positions"].reshape(1, -1, 2)
        _, rows = self._model.map_size
        column, row = position.floor().long().unbind(-1)
        return ProposalMaps(
            label=label,
            cell=column * rows + row,
            peak=seen["query_heatmap_score"].gather(1, label[:, None])[:, 0],
            heatmap=seen["heatmap"],
            center=seen["center"] - position.transpose(1, 2),
            height=seen["height"],
            dim=seen["dim"],
            rot=seen["rot"],
            vel=seen.get("vel"),
            iou=seen.get("iou"),
        )


def _dataset(model: ModelConfig) -> SimpleNamespace:
    """What the network asks its data set for when it is built."""
    return SimpleNamespace(
        class_names=list(model.class_names),
        point_feature_encoder=SimpleNamespace(num_point_features=len(model.features)),
        grid_size=np.array(model.grid_size, np.int64),
        point_cloud_range=np.array(model.point_cloud_range, np.float32),
        voxel_size=list(model.voxel_size),
        depth_downsample_factor=None,
    )
