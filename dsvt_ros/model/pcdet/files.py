"""OpenPCDet's YAML files: a base file is merged in, and every value remembers the file that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsvt_ros.errors import ConfigError

BASE = "_BASE_CONFIG_"
ORIGIN = "pcdet.yaml"
"""File in an exported model folder with the YAML that the model comes from, in one piece."""
DATA_KEYS = (
    "DATASET", "POINT_CLOUD_RANGE", "POINTS_TANH_DIM", "MAX_SWEEPS", "SEQUENCE_CONFIG", "POINT_FEATURE_ENCODING",
    "DATA_PROCESSOR",
)  # fmt: skip
"""Of ``DATA_CONFIG``, what concerns a trained model."""

# What the stock data set files say about points, for those who have the model's YAML alone (the DSVT release itself
# comes without the one for nuScenes). Facts of OpenPCDet's tools/cfgs/dataset_configs.
KNOWN_BASES: dict[str, dict[str, Any]] = {
    name: {
        "DATASET": dataset,
        "POINT_FEATURE_ENCODING": {
            "encoding_type": "absolute_coordinates_encoding",
            "used_feature_list": ["x", "y", "z", *features],
            "src_feature_list": ["x", "y", "z", *features],
        },
        **more,
    }
    for name, dataset, features, more in (
        ("waymo_dataset.yaml", "WaymoDataset", ("intensity", "elongation"), {}),
        (
            "waymo_dataset_multiframe.yaml",
            "WaymoDataset",
            ("intensity", "elongation", "timestamp"),
            {"SEQUENCE_CONFIG": {"ENABLED": True, "SAMPLE_OFFSET": [-4, 0]}},
        ),
        ("nuscenes_dataset.yaml", "NuScenesDataset", ("intensity", "timestamp"), {"MAX_SWEEPS": 10}),
        ("kitti_dataset.yaml", "KittiDataset", ("intensity",), {}),
    )
}


@dataclass(frozen=True)
class PcdetYaml:
    """A model's YAML with its base files merged in.

    Attributes:
        path: The YAML.
        values: All values, as nested mappings and lists.
        files: Which file each value came from, by dotted key.
    """

    path: Path
    values: dict[str, Any]
    files: dict[str, str]


def is_pcdet(content: object) -> bool:
    """Whether the content of a YAML file is that of an OpenPCDet model."""
    return isinstance(content, Mapping) and "CLASS_NAMES" in content and "MODEL" in content


def read_pcdet_yaml(path: Path) -> PcdetYaml:
    """Read a model's YAML and the base files that it names.

    Raises:
        ConfigError: A file is no YAML, or a base file is neither found nor known.
    """
    merged = PcdetYaml(path, {}, {})
    _merge(merged, merged.values, _read(path), "", path.name)
    return merged


def write_origin(path: Path, values: dict[str, Any]) -> None:
    """Write what concerns a trained model, without paths and augmentation; `read_pcdet_yaml` takes it."""
    data = {key: value for key, value in values["DATA_CONFIG"].items() if key in DATA_KEYS}
    content = {"CLASS_NAMES": values["CLASS_NAMES"], "DATA_CONFIG": data, "MODEL": values["MODEL"]}
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")


def _merge(merged: PcdetYaml, values: dict[str, Any], new: Mapping[str, Any], prefix: str, file: str) -> None:
    """Put `new` over `values`, key by key; lists are replaced as a whole (upstream ``merge_new_config``)."""
    if BASE in new:
        base, base_file = _base(str(new[BASE]), merged.path)
        _merge(merged, values, base, prefix, base_file)
    for key, value in new.items():
        if key == BASE:
            continue
        if isinstance(value, Mapping):
            below = values.get(key)
            if not isinstance(below, dict):
                below = values[key] = {}
            _merge(merged, below, value, f"{prefix}{key}.", file)
        else:
            values[key] = value
        merged.files[f"{prefix}{key}"] = file


def _base(name: str, model: Path) -> tuple[Mapping[str, Any], str]:
    """The content of a base file without its own base, as upstream, and what to call the file."""
    found = _find_base(name, model)
    if found is not None:
        content = _read(found)
        return {key: value for key, value in content.items() if key != BASE}, found.name
    known = KNOWN_BASES.get(Path(name).name)
    if known is None:
        raise ConfigError(
            f"{model}: its base file {name} was looked for beside it and from every folder above it, in vain; put it "
            f"there (known without a file: {', '.join(KNOWN_BASES)})"
        )
    return known, f"{Path(name).name} (not found: known facts)"


def _find_base(name: str, model: Path) -> Path | None:
    """Upstream opens base files from its folder ``tools``; ours may lie anywhere around the model's YAML."""
    wanted = Path(name)
    if wanted.is_absolute():
        return wanted if wanted.is_file() else None
    parts = wanted.parts
    tails = [wanted, Path(*parts[parts.index("cfgs") :])] if "cfgs" in parts else [wanted]
    beside = model.resolve().parent
    candidates = [beside / wanted.name]
    for folder in (beside, *beside.parents):
        candidates += [folder / start / tail for start in ("", "tools") for tail in tails]
    return next((path for path in candidates if path.is_file()), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no readable YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is no mapping of keys to values")
    return content
