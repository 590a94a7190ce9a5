"""The engine cache: what cannot be used is built again, once, whoever asks and whatever ends a build."""

import dataclasses
import fcntl
import json
import logging
import re
import shutil
import signal
import sys
import tempfile

import pytest
from fakes.machine import assert_same, ends, engine_of, files_in, is_running
from tiny import tiny_points

from dsvt_ros.backends.tensorrt import cache as engine_cache
from dsvt_ros.backends.tensorrt.cache import EngineSpec
from dsvt_ros.errors import EngineError

pytest_plugins = ("fakes.fixtures",)


def edit(path, **entries):
    content = json.loads(path.read_text())
    content["spec"] |= entries
    path.write_text(json.dumps(content))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:1000]), "has 1000 bytes, .* were written: it is truncated"),
    "flipped": (lambda p: flip(p, 2000), "is damaged: its SHA-256 is not the one in"),
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "no sidecar": (lambda p: engine_cache.sidecar_of(p).unlink(), "has no sidecar"),
    "cut sidecar": (lambda p: engine_cache.sidecar_of(p).write_text('{"spec"'), "does not describe an engine"),
    "gpu": (lambda p: edit(engine_cache.sidecar_of(p), gpu="Old GPU"), "was built for GPU Old GPU, wanted Fake GPU"),
    "weights": (lambda p: edit(engine_cache.sidecar_of(p), weights_sha256="0" * 64), "was built for weights 0000"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_engines_are_built_again(machine, open_tiny, built, torch_boxes, caplog, kind):
    caplog.set_level(logging.INFO)
    damage, reason = DAMAGE[kind]
    engine = engine_of(built, "sparse")
    before = engine.read_bytes()
    damage(engine)
    assert_same(open_tiny().detect(tiny_points(400)), torch_boxes(400))
    assert machine.builds() == ["sparse"]
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert f"the cached engine is built again: {built}" in messages
    assert re.search(reason, messages)
    assert engine.read_bytes() == before
    open_tiny()
    assert machine.builds() == ["sparse"], "once"


def test_an_engine_that_tensorrt_refuses_is_built_again(machine, open_tiny, built, caplog):
    """As after an update of the driver; the sidecar finds no fault with it."""
    engine, dense = engine_of(built, "sparse"), engine_of(built, "dense")
    content = json.loads(engine_cache.sidecar_of(engine).read_text())
    other = json.loads(engine_cache.sidecar_of(dense).read_text())
    shutil.copy(dense, engine)
    engine_cache.sidecar_of(engine).write_text(json.dumps({**other, "spec": content["spec"]}))
    open_tiny()
    assert machine.builds() == ["sparse"]
    assert [r for r in caplog.records if "built again" in r.getMessage() and "another network" in r.getMessage()]


def test_engines_lie_side_by_side(machine, open_tiny, built):
    """Going back to the former GPU, release or options needs no build."""
    machine.gpu("Another GPU")
    open_tiny()
    assert machine.builds() == ["sparse", "dense"]
    machine.gpu()
    open_tiny()
    open_tiny(check_outputs=True)  # runs the same engines
    assert len(machine.builds()) == 2
    assert len(list((built / "tensorrt").glob("*.engine"))) == 4


SPEC = EngineSpec(
    model="tiny", network="sparse", model_sha256="1", weights_sha256="2", onnx_sha256="3", precision="fp16",
    profile={"x": ((1, 2), (3, 2), (4, 2))}, tensorrt="10.16.1", gpu="Fake GPU", compute_capability="9.0",
    workspace_mib=0, optimization_level=3, tactic_sources=(),
)  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineSpec)])
def test_whatever_decides_about_a_build_decides_about_the_file(name):
    different = {
        "profile": {"x": ((1, 2), (3, 2), (5, 2))}, "workspace_mib": 1, "optimization_level": 4,
        "tactic_sources": ("cublas",),
    }  # fmt: skip
    other = dataclasses.replace(SPEC, **{name: different.get(name, "another")})
    assert other.file_name != SPEC.file_name
    assert dataclasses.replace(SPEC).file_name == SPEC.file_name


def test_the_default_place(machine, open_tiny, built_once, tmp_path):
    machine.monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shutil.copytree(built_once, tmp_path / "xdg" / "dsvt_ros")
    detector = open_tiny(cache_dir="")
    assert not machine.builds()
    assert str(tmp_path / "xdg" / "dsvt_ros" / "tensorrt") in detector.backend_reason


# --------------------------------------------------------------------------------------- folders that cannot be written


def cannot_write(*arguments, **options):
    raise PermissionError(13, "Permission denied")


def test_a_file_in_the_place_of_the_cache(machine, open_tiny, exported, torch_boxes, caplog):
    (exported / "tensorrt").write_text("in the way")
    for number in (1, 2):
        detector = open_tiny()
        assert_same(detector.detect(tiny_points(400)), torch_boxes(400))
        assert machine.builds() == ["sparse", "dense"] * number, "there is nowhere to keep them"
        assert "this process" in detector.backend_reason
        machine.use_processes()
    assert [r for r in caplog.records if "cannot be written" in r.getMessage() and r.levelname == "WARNING"]


@pytest.mark.parametrize("step", ["lock", "folder"])
def test_a_folder_that_became_read_only(machine, open_tiny, built, torch_boxes, caplog, step):
    """Root may write everywhere, so the refusal is feigned; the lock may be there from better days."""
    engine_of(built, "sparse").unlink()
    if step == "lock":
        machine.monkeypatch.setattr(fcntl, "flock", cannot_write)
    else:
        real = tempfile.mkdtemp
        machine.monkeypatch.setattr(
            tempfile,
            "mkdtemp",
            lambda *a, **o: cannot_write() if str(o.get("dir", "")).startswith(str(built)) else real(*a, **o),
        )
    before = sorted(path.name for path in (built / "tensorrt").iterdir())
    detector = open_tiny()
    assert_same(detector.detect(tiny_points(400)), torch_boxes(400))
    assert machine.builds() == ["sparse"]
    assert [
        r for r in caplog.records if f"{built / 'tensorrt'} cannot be written (Permission denied)" in r.getMessage()
    ]
    assert sorted(path.name for path in (built / "tensorrt").iterdir()) == before


def test_a_read_only_folder_with_engines_is_as_good_as_any(machine, open_tiny, built, caplog):
    for function in (fcntl, "flock"), (tempfile, "mkdtemp"):
        machine.monkeypatch.setattr(*function, cannot_write)
    open_tiny()
    assert not machine.builds()
    assert not caplog.records


def test_a_disk_that_is_full(machine, open_tiny, exported):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    machine.monkeypatch.setattr(engine_cache, "write_sidecar", full)
    with pytest.raises(EngineError, match=r"cannot build \S+\.engine: .*No space left on device"):
        open_tiny()
    assert not list(exported.rglob("*.engine")), "no engine without a sidecar"
    assert not list(exported.rglob("*.partial"))


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.alone
def test_processes_that_start_together_build_once(machine, exported, tiny_model):
    machine.slow(0.3)
    processes = [machine.start(exported, tiny_model) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "loaded\n"), errors
    assert machine.builds() == ["sparse", "dense"]
    assert len(list((exported / "tensorrt").glob("*.engine"))) == 2


def test_whoever_waits_says_so_and_can_stop(machine, open_tiny, built):
    engine = engine_of(built, "sparse")
    engine.unlink()
    told = []

    def progress(text, fraction):
        told.append((text, fraction))
        if len(told) == 3:
            raise InterruptedError("told to end")

    with engine.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InterruptedError, match="told to end"):
            open_tiny(progress=progress)
    assert told == [(f"waiting for another process that builds {engine}", None)] * 3
    assert not machine.builds()


def test_whoever_waited_takes_what_the_other_built(machine, open_tiny, built):
    """The lock is freed when the other process has built, or has died."""
    engine = engine_of(built, "sparse")
    hidden = engine.rename(built / "hidden")
    lock = engine.with_suffix(".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def progress(text, fraction):
        hidden.rename(engine)
        lock.close()

    detector = open_tiny(progress=progress)
    assert not machine.builds()
    assert str(engine) in detector.backend_reason


# ------------------------------------------------------------------------------------------------ builds that end early


def nothing_is_left(cache_dir, temporary):
    """No engine, no partial file, and nothing in the folder of temporary files."""
    engines = cache_dir / "tensorrt"
    return not [*engines.rglob("*.engine*"), *files_in(engines), *temporary.iterdir()]


@pytest.fixture
def temporary(machine, tmp_path):
    (tmp_path / "temporary").mkdir()
    machine.monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    machine.monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.alone
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_build_that_is_stopped(machine, open_tiny, exported, temporary, error):
    machine.use_processes()
    machine.slow(60)

    def progress(text, fraction):
        if "choosing kernels" in text:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        open_tiny(progress=progress)
    assert not is_running(machine.events("builder")[-1]["pid"])
    assert nothing_is_left(exported, temporary)
    machine.slow(0)
    open_tiny()
    assert len(list((exported / "tensorrt").glob("*.engine"))) == 2


@pytest.mark.alone
def test_control_c(machine, exported, tiny_model, temporary):
    machine.slow(60)
    process = machine.start(exported, tiny_model)
    child = machine.wait_for_build()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert not is_running(child)
    assert nothing_is_left(exported, temporary)


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child does not notice")
def test_a_killed_process_takes_its_child_along(machine, open_tiny, exported, tiny_model, torch_boxes):
    """What it leaves behind is of no use and goes with the next build."""
    machine.slow(600)  # it has nothing to tell for so long that it could not notice by itself
    process = machine.start(exported, tiny_model)
    child = machine.wait_for_build()
    process.kill()
    process.wait()
    assert ends(child)
    assert list((exported / "tensorrt").glob(".*.partial"))
    assert not list((exported / "tensorrt").glob("*.engine"))
    machine.slow(0)
    assert_same(open_tiny().detect(tiny_points(400)), torch_boxes(400))
    assert not list((exported / "tensorrt").glob(".*.partial"))
    process.stdout.close()
    process.stderr.close()


def test_leftovers_of_other_engines_stay(machine, open_tiny, built):
    """Another process may be building those."""
    engine = engine_of(built, "sparse")
    ours = engine.with_name(f".{engine.stem}.abc.partial")
    others = engine.with_name(".tiny-sparse-0123.abc.partial")
    for folder in (ours, others):
        folder.mkdir()
        (folder / "half.engine").write_bytes(b"half")
    engine.unlink()
    open_tiny()
    assert (others / "half.engine").is_file()
    assert not ours.exists()
