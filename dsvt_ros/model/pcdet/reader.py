"""An OpenPCDet YAML to a model of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvt_ros.config import DetectorConfig, ModelConfig, from_mapping
from dsvt_ros.errors import ConfigError
from dsvt_ros.model.pcdet.backbones import (
    check_sizes,
    translate_backbone_2d,
    translate_backbone_3d,
    translate_encoder,
)
from dsvt_ros.model.pcdet.data import translate_data
from dsvt_ros.model.pcdet.files import read_pcdet_yaml
from dsvt_ros.model.pcdet.heads import TURNING_NMS, translate_center_head, translate_transfusion_head
from dsvt_ros.model.pcdet.section import Section
from dsvt_ros.model.pcdet.translation import Row, Translation


@dataclass(frozen=True)
class PcdetModel:
    """What an OpenPCDet YAML describes.

    Attributes:
        file: Name of the YAML.
        model: The network and its data.
        defaults: Run-time options that repeat theirs.
        rows: Where every value comes from.
        remarks: Where detections may differ from theirs nevertheless.
        config: Their whole configuration, base files merged in.
    """

    file: str
    model: ModelConfig
    defaults: DetectorConfig
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    config: dict[str, Any]

    @property
    def turns_boxes(self) -> bool:
        """Whether their suppression turns every box by 90 degrees (the CenterHead of the DSVT release)."""
        nms = self.config["MODEL"]["DENSE_HEAD"]["POST_PROCESSING"]["NMS_CONFIG"]
        return bool(nms["NMS_TYPE"] == TURNING_NMS)


def read_pcdet(path: Path) -> PcdetModel:
    """Read an OpenPCDet YAML of a DSVT model.

    Raises:
        ConfigError: It describes something else, or something that is done differently here.
    """
    source = read_pcdet_yaml(path)
    root = Section(source)
    network = root.section("MODEL")
    network.only("NAME", "CenterPoint", "TransFusion")
    names = root.names("CLASS_NAMES")
    head = network.section("DENSE_HEAD")

    out = Translation(path.stem)
    out.take(root, {"CLASS_NAMES": "model.class_names"})
    translate_encoder(out, network.section("VFE"))
    translate_backbone_3d(out, network.section("BACKBONE_3D"))
    translate_backbone_2d(out, network.section("BACKBONE_2D"))
    if head.only("NAME", "CenterHead", "TransFusionHead") == "CenterHead":
        translate_center_head(out, head, names)
    else:
        translate_transfusion_head(out, head, names)
    translate_data(out, root.section("DATA_CONFIG"), network)

    model, defaults = _checked(out, path)
    check_sizes(model, network)
    network.skip("MAP_TO_BEV", "POST_PROCESSING")  # of the latter the head has its own
    network.close()
    return PcdetModel(path.name, model, defaults, tuple(out.rows), tuple(out.remarks), source.values)


def _checked(out: Translation, path: Path) -> tuple[ModelConfig, DetectorConfig]:
    try:
        model = from_mapping(ModelConfig, out.tree["model"], path="model.")
        defaults = from_mapping(DetectorConfig, out.tree["defaults"], path="defaults.")
        defaults.check_against(model)
        _ = model.grid_size
    except ConfigError as error:
        origins = [
            f" ({row.key} is their {row.from_key})" for row in out.rows if row.key.partition(".")[2] in str(error)
        ]
        raise ConfigError(f"{path}: {error}{origins[0] if origins else ''}") from None
    return model, defaults
