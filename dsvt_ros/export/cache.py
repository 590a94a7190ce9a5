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
    """The networks of a model folder where they suit; otherwise those of the cache, exported first if need be.

    Args:
        network: The model, for an export.
        folder: Its folder.
        weights: Weights file.
        options: How to export what the folder does not have.
        config: Names the cache folder.
        objection: Why a folder's export of these weights is of no use; empty if it is.

    Raises:
        EngineError: The folder's files are damaged or do not belong together, or the export fails.
    """
    model_hash, weights_hash = model_sha256(folder.model), weights_sha256(weights)
    if (folder.path / MANIFEST).is_file():
        manifest = read_manifest(folder.path)
        reason = objection(manifest)
        if manifest.interface != "dsvt_ros":
            reason = f"they have the interface {manifest.interface}"
        if manifest.weights_sha256 != weights_hash:
            reason = "they were exported with other weights"
        if not reason and manifest.model_sha256 != model_hash:
            raise EngineError(
                f"{folder.path}: the model section of its model.yaml has changed since the export; export it again"
            )
        if not reason:
            return ExportedModel(manifest, read_networks(folder.path, manifest), str(folder.path))
        _LOG.info("the networks in %s are not used: %s", folder.path, reason)
    return _from_cache(network, folder, options, weights_hash, config)


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


def _from_cache(
    network: DSVT, folder: ModelFolder, options: ExportOptions, weights_hash: str, config: EngineConfig
) -> ExportedModel:
    """Networks from the cache; exported first if they are missing or damaged."""
    wanted = manifest_for(folder.model, options, {}, {}, weights_hash)
    key = hashlib.sha256(wanted.to_json().encode()).hexdigest()[:20]
    path = cache_folder(config) / "onnx" / f"{folder.model.name}-{key}"
    try:
        manifest = read_manifest(path)
        return ExportedModel(manifest, read_networks(path, manifest), str(path))
    except EngineError as error:
        if path.exists():
            _LOG.warning("the cached export is exported again: %s", error)
    _LOG.info("exporting %s to ONNX (%s), once for these weights", folder.model.name, options.precision)
    networks, files = export_networks(network, options)
    manifest = manifest_for(folder.model, options, networks, files, weights_hash)
    try:
        _publish(path, files, manifest)
    except OSError as error:
        _LOG.warning("cannot keep the export in %s (%s): the next start exports again", path, error)
        return ExportedModel(manifest, files, "this process")
    return ExportedModel(manifest, files, str(path))


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
