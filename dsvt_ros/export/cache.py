"""Exported networks of a model: those of its folder, or else such as the cache holds."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsvt_ros.config import EngineConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import ExportOptions, export_networks, manifest_for, model_sha256, write_folder
from dsvt_ros.export.manifest import MANIFEST, Manifest, read_checked, read_manifest
from dsvt_ros.model.checkpoint import weights_sha256
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import ModelFolder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedModel:
    """Exported networks in memory.

    Attributes:
        manifest: What the files are.
        files: Their contents by name.
        where: Where they come from.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    where: str


def exported_model(
    network: DSVT,
    folder: ModelFolder,
    weights: Path,
    options: ExportOptions,
    config: EngineConfig,
    objection: Callable[[Manifest], str] = lambda _: "",
) -> ExportedModel:
    """What `find_export` finds; exported into the cache first if it finds nothing.

    Args:
        network: The model with its weights.
        folder: As for `find_export`, like all that follows.
        weights: The same.
        options: The same.
        config: The same.
        objection: The same.

    Raises:
        EngineError: The folder's files are damaged or do not belong together, or the export fails.
    """
    found = find_export(folder, weights, options, config, objection)
    if found is not None:
        return found
    _LOG.info("exporting %s to ONNX (%s), once for these weights", folder.model.name, options.precision)
    networks, files = export_networks(network, options)
    manifest = manifest_for(folder.model, options, networks, files, weights_sha256(weights))
    path = _cached(folder, weights, options, config)
    try:
        _publish(path, files, manifest)
    except OSError as error:
        _LOG.warning("cannot keep the export in %s (%s): the next start exports again", path, error)
        return ExportedModel(manifest, files, "this process")
    return ExportedModel(manifest, files, str(path))


def find_export(
    folder: ModelFolder,
    weights: Path,
    options: ExportOptions,
    config: EngineConfig,
    objection: Callable[[Manifest], str] = lambda _: "",
) -> ExportedModel | None:
    """The networks of a model folder where they suit, otherwise those of the cache; None without either.

    Args:
        folder: The model's folder.
        weights: Weights file.
        options: What is asked of the cache.
        config: Names the cache folder.
        objection: Why a folder's export of these weights is of no use; empty if it is.

    Raises:
        EngineError: The folder's files are damaged or do not belong together.
    """
    if (folder.path / MANIFEST).is_file():
        manifest = read_manifest(folder.path)
        reason = objection(manifest)
        if manifest.interface != "dsvt_ros":
            reason = f"they have the interface {manifest.interface}"
        if manifest.weights_sha256 != weights_sha256(weights):
            reason = "they were exported with other weights"
        if not reason and manifest.model_sha256 != model_sha256(folder.model):
            raise EngineError(
                f"{folder.path}: the model section of its model.yaml has changed since the export; export it again"
            )
        if not reason:
            return ExportedModel(manifest, read_networks(folder.path, manifest), str(folder.path))
        _LOG.info("the networks in %s are not used: %s", folder.path, reason)
    path = _cached(folder, weights, options, config)
    try:
        manifest = read_manifest(path)
        return ExportedModel(manifest, read_networks(path, manifest), str(path))
    except EngineError as error:
        if path.exists():
            _LOG.warning("the cached export is of no use: %s", error)
    return None


def read_networks(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The ONNX files of a model folder, checked against its manifest.

    Raises:
        EngineError: One is missing or damaged.
    """
    return {network.file: read_checked(folder, manifest, network.file) for network in manifest.networks.values()}


def cache_folder(config: EngineConfig) -> Path:
    """Where derived files are kept: ``engine.cache_dir``, or the user's cache folder (XDG base directories)."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsvt_ros"


def _cached(folder: ModelFolder, weights: Path, options: ExportOptions, config: EngineConfig) -> Path:
    """Where the cache keeps an export; its name follows from all that shapes the files."""
    wanted = manifest_for(folder.model, options, {}, {}, weights_sha256(weights))
    key = hashlib.sha256(wanted.to_json().encode()).hexdigest()[:20]
    return cache_folder(config) / "onnx" / f"{folder.model.name}-{key}"


def _publish(path: Path, files: Mapping[str, bytes], manifest: Manifest) -> None:
    """Write a cache entry so that nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write_folder(partial, files, manifest)
        partial.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        try:
            partial.rename(path)
        except OSError:
            if not (path / MANIFEST).is_file():  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
