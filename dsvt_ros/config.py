"""The configuration: frozen dataclasses that hold the only defaults, and the readers that check values against them.

`ModelConfig` describes a network and its data (a model folder's ``model.yaml``); `DetectorConfig` what a user may
change at run time. A model folder may bring its own defaults for the latter. ROS parameters, ``--set KEY=VALUE`` and
`Detector.load(overrides=...)` all go through `with_overrides`, so they accept the same keys and give the same errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dsvt_ros.errors import ConfigError

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    live: bool = False,
) -> Any:
    """A dataclass field with a description and a closed range; `live` marks what may change between two clouds."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "live": live}
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------ model.yaml

AGE = "time"
"""The feature of a point that tells the age of its sweep, s; never read from a cloud."""


@dataclass(frozen=True)
class PointFeature:
    """One input column of the network."""

    name: str = option(help="column name: x, y, z, intensity, elongation, time ...")
    scale: Literal["none", "tanh"] = option("none", help="how the network was trained to see it")
    fill: float = option(0.0, help="value where the cloud lacks the column or holds NaN")


@dataclass(frozen=True)
class EncoderConfig:
    """Pillar or voxel feature encoder (PointNet layers with a maximum per voxel)."""

    channels: tuple[int, ...] = option(help="output channels of each layer")


Cells = tuple[int, int, int]
"""Extents in x, y, z, voxels."""


@dataclass(frozen=True)
class StageConfig:
    """Blocks of set attention at one resolution; between two stages, attention pools voxels along z."""

    num_blocks: int = option(help="blocks of two set-attention layers", minimum=1)
    set_size: int = option(help="voxels that attend together", minimum=1)
    windows: tuple[Cells, Cells] = option(help="window of each shift, cells in x, y, z", minimum=1)
    offsets: tuple[Cells, Cells] = option(help="origin offset of each shift, cells", minimum=0)
    pool_z: int = option(1, help="voxels along z that are pooled after the stage; 1 for the last one", minimum=1)


@dataclass(frozen=True)
class Backbone3dConfig:
    """Set-attention backbone, DSVT section 3."""

    channels: int = option(help="width of a voxel's feature", minimum=1)
    ffn_channels: int = option(help="hidden width of the feed-forward layers", minimum=1)
    num_heads: int = option(help="attention heads", minimum=1)
    stages: tuple[StageConfig, ...] = option(help="one for pillars; several for voxels, pooled until they are pillars")

    @property
    def shifts(self) -> tuple[tuple[int, ...], ...]:
        """Window shift of each block of each stage; blocks are counted through all stages and alternate."""
        counts = itertools.count()
        return tuple(tuple(next(counts) % 2 for _ in range(stage.num_blocks)) for stage in self.stages)


@dataclass(frozen=True)
class Backbone2dConfig:
    """Residual BEV backbone."""

    blocks: tuple[int, ...] = option(help="residual blocks of each stage")
    strides: tuple[int, ...] = option(help="stride of each stage's first block")
    channels: tuple[int, ...] = option(help="channels of each stage")
    upsample_strides: tuple[float, ...] = option(help="upsampling of each stage's output; below 1: downsampling")
    upsample_channels: tuple[int, ...] = option(help="channels of each upsampled output")


CENTER_BRANCHES = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}
"""Branches of CenterHead beside the heatmap (``hm``), and their channels."""
PROPOSAL_BRANCHES = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}
"""Branches of TransFusionHead beside the class scores (``heatmap``), and their channels."""


@dataclass(frozen=True)
class CenterHeadConfig:
    """CenterHead: a heatmap a class and regression maps."""

    shared_channels: int = option(help="channels of the shared convolution", minimum=1)
    branches: tuple[str, ...] = option(
        ("center", "center_z", "dim", "rot", "iou", "hm"), help="output maps in state-dict order"
    )
    groups: tuple[tuple[str, ...], ...] = option((), help="classes of each set of branches; empty: one set for all")
    bias_before_norm: bool = option(False, help="whether convolutions before a batch norm have a bias")
    norm_eps: float = option(1e-3, help="epsilon of batch norms; OpenPCDet's default is 1e-5", minimum=0.0)
    type: Literal["center"] = option("center", help="kind of head")

    def __post_init__(self) -> None:
        _check_branches(self.branches, CENTER_BRANCHES, ("center", "center_z", "dim", "rot"), "hm")


@dataclass(frozen=True)
class TransFusionHeadConfig:
    """TransFusionHead: the best cells of a heatmap become proposals, which attend to the map around them."""

    channels: int = option(help="channels of the shared convolution and of a proposal", minimum=1)
    ffn_channels: int = option(help="hidden width of the decoder's feed-forward layer", minimum=1)
    num_heads: int = option(help="attention heads", minimum=1)
    num_proposals: int = option(help="proposals a cloud", minimum=1)
    branches: tuple[str, ...] = option(
        ("center", "height", "dim", "rot", "vel", "iou", "heatmap"), help="values of a proposal in state-dict order"
    )
    peak_size: int = option(3, help="a proposal is the highest of so many by so many cells; odd", minimum=1)
    small_classes: tuple[str, ...] = option((), help="classes of which every cell may be a proposal")
    type: Literal["transfusion"] = option("transfusion", help="kind of head")

    def __post_init__(self) -> None:
        _check_branches(self.branches, PROPOSAL_BRANCHES, ("center", "height", "dim", "rot"), "heatmap")
        if self.channels % self.num_heads:
            raise ConfigError(
                f"head.channels ({self.channels}) must be a multiple of head.num_heads ({self.num_heads})"
            )
        if self.peak_size % 2 == 0:
            raise ConfigError(f"head.peak_size must be odd, got {self.peak_size}")


def _check_branches(
    branches: tuple[str, ...], known: Mapping[str, int], required: tuple[str, ...], classes: str
) -> None:
    missing = [name for name in (*required, classes) if name not in branches]
    unknown = [name for name in branches if name not in known and name != classes]
    if missing or unknown or len(set(branches)) != len(branches):
        raise ConfigError(
            f"head.branches must name each of {', '.join((*required, classes))} once, and may name "
            f"{', '.join(sorted(set(known) - set(required)))}; got {', '.join(branches)}"
        )


@dataclass(frozen=True)
class ModelConfig:
    """A network and the data it was trained for; the content of ``model.yaml``.

    Lengths are metres in the model's frame, whose z points up.
    """

    name: str = option(help="model name")
    class_names: tuple[str, ...] = option(help="class names, in label order")
    point_cloud_range: tuple[float, float, float, float, float, float] = option(
        help="x, y, z minimum and x, y, z maximum"
    )
    voxel_size: tuple[float, float, float] = option(help="size of a voxel in x, y, z")
    features: tuple[PointFeature, ...] = option(help="input columns")
    ground_z: float = option(help="height of the ground in the model's frame")
    encoder: EncoderConfig = option(help="pillar encoder")
    backbone_3d: Backbone3dConfig = option(help="set-attention backbone")
    backbone_2d: Backbone2dConfig = option(help="BEV backbone")
    head: CenterHeadConfig | TransFusionHeadConfig = option(help="detection head")
    axes: Literal["x_forward", "x_right"] = option(
        "x_forward", help="axes of the model's frame: x forward, y left (REP 103), or x right, y forward (nuScenes)"
    )
    sweeps: int = option(
        1,
        help="sweeps that the network sees at once; with more than one, the feature time is their age, s (newest 0)",
        minimum=1,
    )

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        if names[:3] != ["x", "y", "z"]:
            raise ConfigError(f"features must start with x, y, z; got {', '.join(names)}")
        if self.sweeps > 1 and AGE not in names:
            raise ConfigError(f"a model of {self.sweeps} sweeps needs a feature {AGE}; it has {', '.join(names)}")
        backbone = self.backbone_3d
        if not self.encoder.channels or not self.backbone_2d.blocks:
            raise ConfigError("encoder.channels and the lists of backbone_2d must not be empty")
        if backbone.channels != self.encoder.channels[-1]:
            raise ConfigError(
                f"backbone_3d.channels ({backbone.channels}) must equal the encoder's last channels "
                f"({self.encoder.channels[-1]})"
            )
        if backbone.channels % backbone.num_heads:
            raise ConfigError(
                f"backbone_3d.channels ({backbone.channels}) must be a multiple of num_heads ({backbone.num_heads})"
            )
        if not backbone.stages:
            raise ConfigError("backbone_3d.stages must have at least one stage")
        heights = [cells for _, _, cells in self.stage_grids]
        last = backbone.stages[-1]
        if heights[-1] != 1 or last.pool_z != 1:
            raise ConfigError(
                f"the last of backbone_3d.stages must be one voxel high and have pool_z 1; the stages are "
                f"{', '.join(map(str, heights))} voxels high, and the last one has pool_z {last.pool_z}"
            )
        if isinstance(self.head, CenterHeadConfig):
            named = [name for group in self.head.groups for name in group]
            if named and sorted(named) != sorted(self.class_names):
                raise ConfigError(
                    f"head.groups must name each class once ({', '.join(self.class_names)}); got {', '.join(named)}"
                )
        else:
            cells = math.prod(self.map_size)
            if self.head.num_proposals > cells * len(self.class_names):
                raise ConfigError(
                    f"head.num_proposals ({self.head.num_proposals}) exceeds the map's {cells} cells a class"
                )
            for name in self.head.small_classes:
                if name not in self.class_names:
                    raise ConfigError(f"head.small_classes names {name}, which is none of the classes")
        stages = {len(getattr(self.backbone_2d, f.name)) for f in dataclasses.fields(self.backbone_2d)}
        if len(stages) != 1:
            raise ConfigError("the lists of backbone_2d must have one entry for each stage")
        outputs = {
            math.prod(self.backbone_2d.strides[: i + 1]) / up for i, up in enumerate(self.backbone_2d.upsample_strides)
        }
        if len(outputs) != 1 or next(iter(outputs)) % 1:
            raise ConfigError(
                f"strides and upsample_strides of backbone_2d must bring all stages to one resolution, a whole number "
                f"of voxels; they come to {', '.join(f'{stride:g}' for stride in sorted(outputs))} voxels"
            )

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Cells in x, y, z.

        Raises:
            ConfigError: The range is no multiple of the voxel size (up to 0.1 cell, as published configurations
                round: (74.88 + 74.88) / 0.32 truncates to 467, and KITTI's 467.925 cells stand for 468).
        """
        cells = []
        for axis, size in enumerate(self.voxel_size):
            extent = self.point_cloud_range[axis + 3] - self.point_cloud_range[axis]
            if size <= 0 or extent <= 0:
                raise ConfigError(f"voxel_size and point_cloud_range must be positive, got {size} and {extent}")
            count = round(extent / size)
            if abs(extent / size - count) > 0.1:
                raise ConfigError(
                    f"point_cloud_range ({extent:g} m along {'xyz'[axis]}) is no multiple of voxel_size ({size:g} m): "
                    f"{extent / size:.3f} cells"
                )
            cells.append(count)
        return cells[0], cells[1], cells[2]

    @property
    def stage_grids(self) -> tuple[Cells, ...]:
        """Cells in x, y, z of each stage of the set-attention backbone."""
        nx, ny, nz = self.grid_size
        grids = []
        for stage in self.backbone_3d.stages:
            grids.append((nx, ny, nz))
            nz = -(-nz // stage.pool_z)
        return tuple(grids)

    @property
    def map_size(self) -> tuple[int, int]:
        """Columns and rows of the head's maps, along x and y."""
        columns, rows, _ = self.grid_size
        stage = self.backbone_2d
        first = stage.upsample_strides[0]
        # A 3x3 convolution with padding rounds up, one that downsamples by its own size rounds down.
        return (
            math.floor(((columns - 1) // stage.strides[0] + 1) * first),
            math.floor(((rows - 1) // stage.strides[0] + 1) * first),
        )

    @property
    def box_size(self) -> int:
        """Columns of a box: 9 with a velocity, 7 without."""
        return 9 if "vel" in self.head.branches else 7

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the input columns, in order."""
        return tuple(feature.name for feature in self.features)

    @property
    def age_column(self) -> int | None:
        """Column of the feature `AGE`; None for models of single sweeps."""
        return self.feature_names.index(AGE) if AGE in self.feature_names else None

    @property
    def output_stride(self) -> int:
        """Voxels along one side of a cell of the head's maps."""
        return round(self.backbone_2d.strides[0] / self.backbone_2d.upsample_strides[0])


# ------------------------------------------------------------------------------------------- run-time options


@dataclass(frozen=True)
class PreprocessConfig:
    """From a cloud's points to the network's input."""

    min_range: float = option(
        0.1,
        help="points nearer to the sensor than this are dropped, m; drivers report missing returns as 0, 0, 0",
        minimum=0.0,
        maximum=100.0,
        live=True,
    )
    sensor_pose: tuple[float, ...] = option(
        (),
        help="pose of the sensor above the model's origin: x, y, z (m), roll, pitch, yaw (rad) in axes x forward, "
        "y left; empty: identity",
    )
    cloud_axes: Literal["model", "x_forward", "x_right"] = option(
        "model",
        help="axes of clouds: x forward, y left (REP 103), or x right, y forward; model: as the model's, but x forward "
        "for ROS messages",
    )
    model_frame: str = option(
        "",
        help="TF frame whose axes and ground are the model's; boxes are brought back to the cloud's frame",
    )
    find_ground: bool = option(
        False,
        help="estimate the ground's height in each cloud and lift it to the model's; off with a given pose",
        live=True,
    )
    scale_features: bool = option(
        True,
        help="apply the model's own rule (such as tanh); false: columns are already scaled",
        live=True,
    )
    intensity_scale: float = option(
        1.0,
        help="factor on the intensity column before the model's rule, such as 0.00392157 for 0..255",
        minimum=0.0,
        live=True,
    )
    sweeps: int = option(
        0,
        help="how many sweeps the network sees at once, for models with a feature time; 0: as it was trained",
        minimum=0,
        maximum=100,
        live=True,
    )
    max_sweep_age: float = option(
        0.5,
        help="sweeps older than this are left out, s; networks know no ages beyond those of their training",
        minimum=0.0,
        maximum=10.0,
        live=True,
    )
    motion_compensation: bool = option(
        False,
        help="move each point to where the sensor stood at the cloud's stamp, by the cloud's time of each point",
    )
    mounting: tuple[float, ...] = option(
        (),
        help="pose of the sensor in the odometry's child frame: x, y, z (m), roll, pitch, yaw (rad); empty: from "
        "static TF",
    )

    @property
    def finds_ground(self) -> bool:
        """Whether clouds that come without a pose are put onto the ground."""
        return self.find_ground and not self.sensor_pose

    def axes_of_clouds(self, model: ModelConfig) -> Literal["x_forward", "x_right"]:
        """What `cloud_axes` says, where `model` stands for those of the model."""
        return model.axes if self.cloud_axes == "model" else self.cloud_axes

    def __post_init__(self) -> None:
        for name in ("sensor_pose", "mounting"):
            if len(getattr(self, name)) not in (0, 6):
                raise ConfigError(
                    f"preprocess.{name} takes 6 numbers (x, y, z, roll, pitch, yaw) or none, "
                    f"got {len(getattr(self, name))}"
                )


@dataclass(frozen=True)
class PostprocessConfig:
    """From the head's maps to boxes. Per-class lists follow the model's class order."""

    score_threshold: float = option(
        0.1,
        help="boxes with a lower heatmap score are dropped",
        minimum=0.0,
        maximum=1.0,
        live=True,
    )
    max_candidates: int = option(500, help="peaks kept a class and overall before NMS", minimum=1, maximum=4096)
    iou_rectifier: tuple[float, ...] = option((), help="weight of the predicted IoU in the score, a class; empty: none")
    nms_iou: tuple[float, ...] = option(
        (0.7,), help="BEV IoU above which the lower-scored box of a class is dropped; 1: none is"
    )
    nms_classes: Literal["own", "group"] = option(
        "own", help="which classes a box may suppress: its own, or all of its group of head branches"
    )
    max_boxes: tuple[int, ...] = option((), help="boxes of a class that NMS leaves at most; empty: no limit", minimum=1)
    nms_geometry: Literal["exact", "dsvt_release"] = option(
        "exact",
        help="dsvt_release: every box turned by 90 degrees, as in the kernel that CenterHead was published with",
        live=True,
    )
    center_range: tuple[float, ...] = option((), help="x, y, z minimum and maximum of box centres, m; empty: no limit")


@dataclass(frozen=True)
class ProfileConfig:
    """For how many voxels there is room in TensorRT engines, and in whole frames on a GPU."""

    voxels: tuple[int, ...] = option(
        (),
        help="room for voxels of each engine: a cloud takes the smallest that fits, or loses its farthest voxels; "
        "whole frames on a GPU have the largest; empty: one, for 3/16 of the grid's columns (1/4 with several sweeps), "
        "twice as many where columns have several voxels",
        minimum=1,
    )
    dynamic: bool = option(
        False,
        help="one engine for any number from the first to the last of three voxel counts (minimum, optimum, maximum) "
        "in place of one for each; slower",
    )

    def __post_init__(self) -> None:
        if list(self.voxels) != sorted(set(self.voxels)):
            raise ConfigError(f"engine.profile.voxels must increase, got {', '.join(map(str, self.voxels))}")
        if self.dynamic and len(self.voxels) != 3:
            raise ConfigError(
                f"engine.profile.dynamic needs three numbers of voxels (minimum, optimum, maximum), "
                f"got {len(self.voxels)}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """How backends run the networks."""

    cache_dir: str = option(
        "",
        help="folder for exported networks and engines; empty: dsvt_ros in the user's cache folder (~/.cache)",
    )
    threads: int = option(0, help="CPU threads of ONNX Runtime; 0: as many as torch has", minimum=0, maximum=1024)
    sparse_path: str = option("", help="TensorRT engine of the sparse network to use as it is; empty: from the cache")
    dense_path: str = option("", help="TensorRT engine of the dense network to use as it is; empty: from the cache")
    precision: Literal["fp16", "fp32"] = option(
        "fp16", help="type of weights and features in TensorRT engines, and in torch on a GPU"
    )
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    workspace_mib: int = option(
        0, help="GPU memory that building an engine may use, MiB; 0: half of what is free", minimum=0, maximum=1 << 20
    )
    optimization_level: int = option(
        3, help="effort of building an engine, from 0 (quick) to 5; TensorRT 8.6 and later", minimum=0, maximum=5
    )
    tactic_sources: tuple[str, ...] = option(
        (),
        help="libraries that TensorRT may take kernels from, such as cublas, cublas_lt, edge_mask_convolutions; "
        "empty: its own choice",
    )
    check_outputs: bool = option(
        False, help="fill the outputs of TensorRT engines with NaN before each run and refuse results that hold any"
    )


@dataclass(frozen=True)
class DetectorConfig:
    """Everything about a `Detector` that can be set without changing the network."""

    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def check_against(self, model: ModelConfig) -> None:
        """Raise `ConfigError` where a per-class list does not fit the model's classes."""
        for name in ("iou_rectifier", "nms_iou", "max_boxes"):
            values = getattr(self.postprocess, name)
            if len(values) not in (0, 1, len(model.class_names)):
                raise ConfigError(
                    f"postprocess.{name} needs one value or one for each of {', '.join(model.class_names)}; "
                    f"got {len(values)}"
                )
        if self.preprocess.sweeps > 1 and model.age_column is None:
            raise ConfigError(
                f"preprocess.sweeps is {self.preprocess.sweeps}, but model {model.name} has no feature {AGE}: "
                "it takes single sweeps"
            )


# --------------------------------------------------------------------------------------------- reading values


def from_mapping(cls: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """Build a configuration dataclass from nested mappings (as YAML gives them).

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or lies outside its range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or cls.__name__} must be a mapping of {', '.join(fields)}; got {values!r}")
    for key in values:
        if key not in fields:
            raise ConfigError(_unknown_key(f"{path}{key}", [path + name for name in fields]))
    hints = typing.get_type_hints(cls)
    arguments = {key: _convert(hints[key], value, f"{path}{key}", fields[key]) for key, value in values.items()}
    required = [
        path + name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in arguments
    ]
    if required:
        raise ConfigError(f"missing {', '.join(required)}")
    return cls(**arguments)


def with_overrides(config: T, overrides: Mapping[str, Any]) -> T:
    """A copy of `config` with dotted keys replaced, such as ``{"postprocess.score_threshold": 0.3}``.

    Raises:
        ConfigError: As `from_mapping`; an unknown key is answered with the closest known one.
    """
    known = dict(flatten(config))
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in known:
            raise ConfigError(_unknown_key(key, list(known)))
        node = tree
        *groups, leaf = key.split(".")
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return _replace(config, tree, "")


def flatten(config: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of a configuration dataclass, in declaration order."""
    for key, _, value in leaves(config, path):
        yield key, value


def leaves(config: object, path: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted key, dataclass field, value) of every leaf of a configuration dataclass."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{f.name}.")
        else:
            yield path + f.name, f, value


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE`` of the command line; the value is read as YAML, so lists are written ``[1, 2]`` or ``1,2``.

    Raises:
        ConfigError: There is no ``=`` or the value is no YAML.
    """
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"expected KEY=VALUE, got {text!r}")
    try:
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str) and "," in parsed:
            parsed = yaml.safe_load(f"[{value}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value of {key}: {value!r}") from error
    return key, parsed


def _replace(config: T, tree: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(type(config))
    fields = {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes = {}
    for key, value in tree.items():
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _replace(current, value, f"{path}{key}.")
        else:
            changes[key] = _convert(hints[key], value, path + key, fields[key])
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _unknown_key(key: str, known: list[str]) -> str:
    prefixed = [name for name in known if name.startswith(key)]
    close = prefixed or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key}; did you mean {close[0]}? Known: {', '.join(known)}"


def _convert(hint: Any, value: Any, path: str, described: dataclasses.Field[Any]) -> Any:
    """Check `value` against a type hint and the field's range; lists become tuples, integers floats where asked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast("type[Any]", hint), value, path=f"{path}.")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} must be one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert(_of_type(arguments, value, path), value, path, described)
    if origin is tuple:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        items = list(value)
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise ConfigError(f"{path} needs {len(arguments)} values, got {len(items)}")
        hints = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(
            _convert(h, v, f"{path}[{i}]", described) for i, (h, v) in enumerate(zip(hints, items, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be a {hint.__name__}, got {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_range(value, path, described)
    return value


def _of_type(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    """Which of several dataclasses the key ``type`` of a mapping names; the first one if it names none."""
    kinds = {typing.get_args(typing.get_type_hints(choice)["type"])[0]: choice for choice in choices}
    kind = value.get("type", next(iter(kinds))) if isinstance(value, Mapping) else next(iter(kinds))
    if kind not in kinds:
        raise ConfigError(f"{path}.type must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind]


def _check_range(value: float, path: str, described: dataclasses.Field[Any]) -> None:
    minimum, maximum = described.metadata.get("minimum"), described.metadata.get("maximum")
    too_small = minimum is not None and value < minimum
    too_large = maximum is not None and value > maximum
    if not math.isfinite(value) or too_small or too_large:
        limits = " and ".join(
            text
            for text, limit in ((f"at least {minimum}", minimum), (f"at most {maximum}", maximum))
            if limit is not None
        )
        raise ConfigError(f"{path} must be {limits or 'finite'}, got {value}")
