"""Model folders: ``model.yaml`` and weights, embedded in the package or anywhere on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from dsvt_ros.config import DetectorConfig, ModelConfig, from_mapping
from dsvt_ros.errors import ConfigError, ModelError
from dsvt_ros.model.pcdet.files import is_pcdet
from dsvt_ros.model.pcdet.reader import PcdetModel, read_pcdet

_LOG = logging.getLogger(__name__)

DESCRIPTION = "model.yaml"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """A model's description and where its weights are.

    Attributes:
        path: The folder.
        model: The network and its data.
        defaults: Run-time options that suit this model.
        weights: Its weights file, or None if it comes without.
        pcdet: How it was described, if that is an OpenPCDet YAML.
    """

    path: Path
    model: ModelConfig
    defaults: DetectorConfig
    weights: Path | None
    pcdet: PcdetModel | None = None


def embedded_models() -> list[str]:
    """Names of the models inside the package."""
    root = _embedded_root()
    return sorted(path.name for path in root.iterdir() if (path / DESCRIPTION).is_file())


def open_model(model: str | Path) -> ModelFolder:
    """Read a model's description; weights are not touched.

    Args:
        model: The name of an embedded model, a model folder, a ``model.yaml``, or a model's YAML of OpenPCDet.

    Raises:
        ModelError: There is no such model.
        ConfigError: Its description is wrong.
    """
    path = _embedded_root() / model if str(model) in embedded_models() else Path(model)
    if path.is_dir():
        path = path / DESCRIPTION
    if not path.is_file():
        raise ModelError(
            f"no model {model}: expected one of {', '.join(embedded_models())}, a folder with a "
            f"{DESCRIPTION}, or a YAML file"
        )
    weights = path.parent / WEIGHTS
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if is_pcdet(content):
        found = read_pcdet(path)
        _LOG.info("%s is an OpenPCDet model; dsvt export shows what was taken from it", path)
        return ModelFolder(path.parent, found.model, found.defaults, weights if weights.is_file() else None, found)
    if not isinstance(content, dict) or "model" not in content:
        raise ConfigError(
            f"{path} describes no model: expected the keys model and defaults, or CLASS_NAMES and MODEL as in OpenPCDet"
        )
    unknown = set(content) - {"model", "defaults"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]}; expected model and defaults")
    try:
        config = from_mapping(ModelConfig, content["model"], path="model.")
        defaults = from_mapping(DetectorConfig, content.get("defaults", {}), path="defaults.")
        defaults.check_against(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return ModelFolder(path.parent, config, defaults, weights if weights.is_file() else None)


def _embedded_root() -> Path:
    # Installed packages are unpacked folders (setup.py sets zip_safe=False), so this is a real path.
    return Path(str(resources.files("dsvt_ros") / "models"))
