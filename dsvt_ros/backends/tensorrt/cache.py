"""The engine cache: files that are loaded only where they are known to fit, and built once where they are not.

Each engine has a sidecar, its name with ``.json`` appended: what it was made from and for, its hash, and the precision
of its layers. The file name holds a hash of the former: engines for several GPUs, releases or profiles can lie side by
side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsvt_ros.backends.tensorrt.api import GpuError
from dsvt_ros.backends.tensorrt.child import Shape
from dsvt_ros.errors import EngineError

_LOG = logging.getLogger(__name__)

SCHEMA_VERSION = 1
LOCK_POLL_S = 0.2

T = TypeVar("T")


@dataclass(frozen=True)
class EngineSpec:
    """Everything that decides what a build gives.

    Attributes:
        model: Name of the model.
        network: ``sparse``, ``dense`` or ``dsvt``.
        model_sha256: Hash of the model's description.
        weights_sha256: Hash of the weights.
        onnx_sha256: Hash of the exported network.
        precision: ``fp16`` or ``fp32``.
        profile: Minimum, optimum and maximum shape of each input.
        tensorrt: Version.
        gpu: Name of the GPU.
        compute_capability: Of the GPU, such as 9.0.
        workspace_mib: As configured.
        optimization_level: As configured.
        tactic_sources: As configured.
    """

    model: str
    network: str
    model_sha256: str
    weights_sha256: str
    onnx_sha256: str
    precision: str
    profile: dict[str, tuple[Shape, Shape, Shape]]
    tensorrt: str
    gpu: str
    compute_capability: str
    workspace_mib: int
    optimization_level: int
    tactic_sources: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """What the sidecar says, in JSON's types."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    @property
    def file_name(self) -> str:
        """Name of the engine in a cache folder."""
        key = hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()
        return f"{self.model}-{self.network}-{key[:20]}.engine"


def read_engine(path: Path) -> tuple[bytes, dict[str, Any] | None]:
    """An engine and its sidecar; None for the latter where there is none.

    Raises:
        EngineError: There is no engine, or it is not the one that the sidecar describes.
    """
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from None
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        return plan, None
    try:
        content = json.loads(sidecar.read_text())
        version, spec, expected = content["schema_version"], content["spec"], content["engine_sha256"]
        size = content["size_bytes"]
        if not isinstance(spec, dict):
            raise TypeError("spec is no object")  # noqa: TRY301
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{sidecar} does not describe an engine ({error!r})") from None
    if version != SCHEMA_VERSION:
        raise EngineError(f"{sidecar} has schema_version {version}, expected {SCHEMA_VERSION}")
    if len(plan) != size:
        raise EngineError(f"{path} has {len(plan)} bytes, {size} were written: it is truncated or damaged")
    if hashlib.sha256(plan).hexdigest() != expected:
        raise EngineError(f"{path} is damaged: its SHA-256 is not the one in {sidecar.name}")
    return plan, content


def check_spec(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what an engine was made for with what it is wanted for.

    Args:
        path: The engine.
        found: ``spec`` of its sidecar.
        wanted: The entries that matter.

    Raises:
        EngineError: They differ; the first difference is named.
    """
    names = {
        "model": "model",
        "network": "network",
        "model_sha256": "model description",
        "weights_sha256": "weights",
        "tensorrt": "TensorRT",
        "gpu": "GPU",
        "compute_capability": "compute capability",
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            title = names.get(key, key)
            ours, theirs = (_short(key, entry) for entry in (value, found.get(key)))
            raise EngineError(f"{path} was built for {title} {theirs}, wanted {ours}")


def load_or_build(
    spec: EngineSpec,
    folder: Path,
    load: Callable[[bytes, str], T],
    build: Callable[[Path], dict[str, Any]],
    waiting: Callable[[str], None],
) -> tuple[T, str]:
    """Load a cached engine; build it first if there is none that can be used.

    Of several processes that want the same engine at once, one builds it and the others wait.

    Args:
        spec: The engine.
        folder: Cache folder; made where there is none. Where it cannot be written, the engine is built for this
            process alone.
        load: Makes ready what is in a file of that name; raises `EngineError` for a file that cannot be used, and
            `GpuError` where no other file could be.
        build: Writes the engine to a path and reports on it.
        waiting: Called several times a second while another process builds; may raise to stop waiting.

    Returns:
        What `load` gave, and where it comes from.

    Raises:
        EngineError: The engine cannot be built, or not be loaded when just built.
    """
    path = folder / spec.file_name
    loaded, reason = _load(path, spec, load)
    if loaded is not None:
        return loaded, str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        return _build_alone(spec, folder, load, build, error)
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            except OSError as error:  # a file system without locks
                return _build_alone(spec, folder, load, build, error)
            waiting(f"waiting for another process that builds {path}")
            time.sleep(LOCK_POLL_S)
        loaded, reason = _load(path, spec, load)
        if loaded is not None:
            return loaded, str(path)
        try:
            partial = _partial_folder(path)
        except OSError as error:  # the lock is from better days
            return _build_alone(spec, folder, load, build, error)
        _LOG.info("building %s: %s", path, reason)
        _build(path, partial, spec, build)
        return load(path.read_bytes(), str(path)), f"{path}, built now"


def specs_in(folder: Path) -> list[dict[str, Any]]:
    """What the sidecars of a cache folder say their engines were made from and for; unreadable ones are left out."""
    specs = []
    for path in sorted(folder.glob("*.engine")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            spec = json.loads(sidecar_of(path).read_text())["spec"]
            if isinstance(spec, dict):
                specs.append(spec)
    return specs


def sidecar_of(path: Path) -> Path:
    """The JSON file beside an engine."""
    return path.with_name(f"{path.name}.json")


def _load(path: Path, spec: EngineSpec, load: Callable[[bytes, str], T]) -> tuple[T | None, str]:
    """What `load` gives, or None and why there is nothing to load."""
    if not path.exists():
        return None, "there is none for this model, profile, GPU and TensorRT yet"
    try:
        plan, sidecar = read_engine(path)
        if sidecar is None:
            raise EngineError(f"{path} has no sidecar")  # noqa: TRY301
        check_spec(path, sidecar["spec"], spec.content())
        return load(plan, str(path)), ""
    except GpuError:
        raise
    except EngineError as error:
        _LOG.warning("the cached engine is built again: %s", error)
        return None, str(error)


def _partial_folder(path: Path) -> Path:
    """A new folder beside the target to build in; the lock must be held."""
    for stale in path.parent.glob(f".{path.stem}.*.partial"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{path.stem}.", suffix=".partial", dir=path.parent))


def _build(path: Path, partial: Path, spec: EngineSpec, build: Callable[[Path], dict[str, Any]]) -> None:
    """Build in the folder `partial`, which goes, and move both files to the target; the lock must be held.

    Whoever reads while they are moved finds a sidecar that does not fit the engine, and waits for the lock.
    """
    try:
        engine = partial / path.name
        report = build(engine)
        write_sidecar(engine, path, spec, report)
        engine.replace(path)
    except OSError as error:  # such as a disk that is full
        raise EngineError(f"cannot build {path}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_sidecar(written: Path, engine: Path, spec: EngineSpec, report: dict[str, Any]) -> None:
    """Describe the engine in `written` by the sidecar of `engine`, its name to be."""
    plan = written.read_bytes()
    content = {
        "schema_version": SCHEMA_VERSION,
        "spec": spec.content(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
        "size_bytes": len(plan),
        **report,
    }
    partial = written.with_name(f"{written.name}.json")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(sidecar_of(engine))
    finally:
        partial.unlink(missing_ok=True)


def _build_alone(
    spec: EngineSpec,
    folder: Path,
    load: Callable[[bytes, str], T],
    build: Callable[[Path], dict[str, Any]],
    error: OSError,
) -> tuple[T, str]:
    """An engine for this process alone, where the cache folder cannot be written."""
    _LOG.warning("%s cannot be written (%s): the engine is built again at the next start", folder, error.strerror)
    try:
        with tempfile.TemporaryDirectory(prefix="dsvt_engine_") as temporary:
            private = Path(temporary) / spec.file_name
            build(private)
            plan = private.read_bytes()
    except OSError as failure:
        raise EngineError(f"cannot build {spec.file_name}: {failure}") from None
    return load(plan, spec.file_name), "this process"


def _short(key: str, value: Any) -> str:
    return f"{value[:12]}..." if key.endswith("sha256") and isinstance(value, str) else str(value)
