"""Creates the virtual environment ``.venv`` in which ``make demo`` and ``make test`` run.

Three kinds of machine, told apart by themselves:

- ROS 2 is sourced (``import rclpy`` works): ``.venv`` sees its packages and replaces none of them. Only what is missing
  is installed.
- Linux on x86-64 without ROS: pinned ROS 2 wheels, and vision_msgs generated from ``resource/vision_msgs``.
- Everything else: no ROS; detection, ``dsvt demo --no-ros`` and the tests that need no ROS work.

Only the standard library is used. Each step is skipped while what it was made from is unchanged.
Environment variables: ``DSVT_TORCH_INDEX_URL``, an additional package index for PyTorch builds, and
``DSVT_WITHOUT_TORCH=1`` for those who put their own PyTorch into ``.venv``.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python runs as far as this and learns why it stops
    sys.exit(
        "dsvt_ros needs Python 3.10 or later, and {} is {}.{}. Name another one: make PYTHON=python3.12 demo".format(
            sys.executable, *sys.version_info
        )
    )

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).resolve().parent / "requirements.lock"
MESSAGES = ROOT / "resource" / "vision_msgs"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bootstrap.json"
LOG = VENV / "bootstrap.log"

TORCH_INDEX = os.environ.get("DSVT_TORCH_INDEX_URL", "")
WITHOUT_TORCH = os.environ.get("DSVT_WITHOUT_TORCH", "") not in ("", "0")

NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Name or service not known|Temporary failure in name resolution"
    r"|Network is unreachable|Max retries exceeded|CERTIFICATE_VERIFY_FAILED|ProxyError|No matching distribution found"
)


class BootstrapError(Exception):
    """What went wrong and what to do about it."""


def say(text: str) -> None:
    """Prints a progress line at once, also into a pipe."""
    print(f"[dsvt] {text}", flush=True)


# --- What is asked for -------------------------------------------------------------------------------------------


def requirements(section: str) -> list[str]:
    """The pinned requirements below one ``# [section]`` comment of the lock file."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        header = re.match(r"# \[(\w+)\]", line)
        if header:
            current = header[1]
        elif line.strip() and not line.startswith("#"):
            found.setdefault(current, []).append(line.strip())
    return found[section]


def canonical(requirement: str) -> str:
    """The normalized project name of a requirement (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=;\s]", requirement, maxsplit=1)[0]).lower()


def digest(*parts: object) -> str:
    """A hash of texts and of the files and folders that are given as paths."""
    sha = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            sha.update(f"{part}\0".encode())
            continue
        for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if path.is_file() and "__pycache__" not in path.parts:
                sha.update(f"{path.relative_to(ROOT)}\0".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


# --- The machine --------------------------------------------------------------------------------------------------


def base_python() -> str:
    """The interpreter below any activated virtual environment, ``.venv`` itself included."""
    return getattr(sys, "_base_executable", None) or sys.executable


def child_environment() -> dict[str, str]:
    """The environment without the traces of a Python that runs on ROS wheels.

    Such a Python sets LD_LIBRARY_PATH once and marks that; a child from another environment would inherit the mark and
    then not find its own libraries.
    """
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    if environment.pop("_ROS_WHEELS_BOOTSTRAP_COMPLETE", None):
        environment.pop("LD_LIBRARY_PATH", None)
    for name in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONHOME"):
        environment.pop(name, None)
    return environment


def sourced_ros() -> str:
    """Where rclpy comes from on this machine; empty without ROS.

    Raises:
        BootstrapError: An rclpy is found that this Python cannot load.
    """
    code = (
        "import importlib.util as u; s = u.find_spec('rclpy'); print(s.origin if s else '', flush=True)\n"
        "if s: import rclpy"
    )
    result = subprocess.run(
        [base_python(), "-c", code], env=child_environment(), capture_output=True, text=True, check=False
    )
    origin = result.stdout.strip()
    if result.returncode != 0 and origin:
        reason = result.stderr.strip().splitlines()[-1]
        raise BootstrapError(
            f"{origin} cannot be imported by {base_python()} ({platform.python_version()}): {reason}\n"
            "Use the Python for which this ROS was built (make PYTHON=/usr/bin/python3 ...), or a shell in which ROS "
            "is not sourced."
        )
    return origin


def ros_wheels_exist() -> bool:
    """Whether the pinned ROS wheels can be installed on this machine."""
    fits = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 14)
    return fits and platform.libc_ver()[0] == "glibc"


def check_compiler() -> None:
    """Finds out early what the build of vision_msgs would otherwise say in many lines.

    Raises:
        BootstrapError: No C++ compiler, or no Python headers.
    """
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        raise BootstrapError(
            "No C++ compiler found, and vision_msgs must be compiled. Install one (Debian, Ubuntu: "
            "sudo apt install g++; Fedora: sudo dnf install gcc-c++) and run the command again."
        )
    header = Path(sysconfig.get_path("include", vars={"installed_base": sys.base_prefix}), "Python.h")
    if not header.exists():
        raise BootstrapError(
            f"The headers of Python are missing ({header}), and vision_msgs must be compiled. Install them "
            "(Debian, Ubuntu: sudo apt install python3-dev; Fedora: sudo dnf install python3-devel)."
        )


# --- Commands -----------------------------------------------------------------------------------------------------


def run(command: list[str], hint: str = "", folder: Path = ROOT) -> None:
    """Runs a command with its output in the log.

    Raises:
        BootstrapError: The command failed; the end of its output is in the message.
    """
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        result = subprocess.run(
            command,
            cwd=folder,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if result.returncode != 0:
        output = LOG.read_bytes()[start:].decode(errors="replace")
        lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
        network = "Is there a network, and does pip reach a package index (proxy, PIP_INDEX_URL)?"
        hints = [network if NO_NETWORK.search(output) else "", hint, f"Everything it said: {LOG}"]
        tail = "\n".join(f"    {line}" for line in lines[-15:])
        raise BootstrapError(
            f"{' '.join(command)[:200]} failed:\n{tail}\n" + "\n".join(line for line in hints if line)
        )


def pip(*arguments: str) -> None:
    """Runs the pip of ``.venv``."""
    run([str(PYTHON), "-m", "pip", *arguments])


def in_venv(code: str) -> str:
    """What a line of Python prints in ``.venv``; empty when it fails."""
    command = [str(PYTHON), "-c", code]
    result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


# --- Steps --------------------------------------------------------------------------------------------------------


def create_venv(ros: str) -> None:
    """Makes an empty ``.venv``, with a view on the packages of the system where ROS is one of them."""
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    options = ["--system-site-packages"] if ros else []
    hint = "On Debian and Ubuntu the module is a package of its own: sudo apt install python3-venv"
    try:
        run([base_python(), "-m", "venv", *options, str(VENV)], hint)
    except BootstrapError as error:
        message = str(error)
        shutil.rmtree(VENV)  # half an environment would look like a whole one to the next run
        raise BootstrapError(message) from None


def install_pinned(sections: Iterable[str]) -> None:
    """Installs sections of the lock file as they are; the file is complete, so pip looks up nothing further."""
    pip("install", "--no-deps", *requirements("build"))
    pinned = [requirement for section in sections for requirement in requirements(section)]
    pip("install", "--no-deps", "--no-build-isolation", *pinned)


def install_torch() -> None:
    """Installs PyTorch with whatever its build needs on this platform, such as CUDA libraries."""
    index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
    pip("install", "--constraint", str(LOCK), *index, *requirements("torch"))


def install_missing() -> None:
    """Beside a sourced ROS: adds the packages that are missing and changes none that are there."""
    pip("install", "--no-deps", *requirements("build"))
    listing = in_venv(
        "from importlib.metadata import distributions as d\n"
        "for x in d(): print(x.metadata['Name'], x.version)"
    )
    installed = dict(line.split(" ")[:2] for line in listing.splitlines() if " " in line)
    present = {canonical(name) for name in installed}
    sections = ["core", "dev"] + ([] if WITHOUT_TORCH else ["torch"])
    missing = [r for section in sections for r in requirements(section) if canonical(r) not in present]
    if not missing:
        return
    keep = VENV / "installed-before.txt"
    versions = {name: version for name, version in installed.items() if re.fullmatch(r"\d[\w.+!-]*", str(version))}
    keep.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())), encoding="utf-8")
    index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
    try:
        pip("install", "--constraint", str(keep), *index, *missing)
    except BootstrapError:
        # The pinned versions need newer packages than this ROS has: take the newest ones that suit it.
        names = [re.sub(r"==[^;\s]+", "", requirement) for requirement in missing]
        pip("install", "--constraint", str(keep), *index, *names)


def build_messages() -> None:
    """Generates, compiles and installs vision_msgs, unless somebody else's is there."""
    origin = in_venv("import vision_msgs; print(vision_msgs.__file__)")
    if origin and not Path(origin).is_relative_to(VENV):
        say(f"      vision_msgs is there already: {origin}")
        return
    check_compiler()
    with tempfile.TemporaryDirectory(prefix="dsvt_vision_msgs_") as folder:
        source = Path(folder) / "source"
        shutil.copytree(MESSAGES, source, ignore=shutil.ignore_patterns("generated", "build", "*.egg-info"))
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(source))
        (wheel,) = Path(folder).glob("*.whl")
        pip("install", "--no-deps", "--force-reinstall", str(wheel))


def install_package() -> None:
    """Installs dsvt_ros so that edits of the checkout take effect."""
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def check_imports(with_ros: bool) -> str:
    """Imports what was installed and names the versions.

    Raises:
        BootstrapError: A package does not import.
    """
    modules = ["numpy", "yaml", "safetensors", "rich"] + ([] if WITHOUT_TORCH else ["torch"])
    if with_ros:
        modules += ["rclpy", "sensor_msgs.msg", "visualization_msgs.msg", "diagnostic_msgs.msg", "vision_msgs.msg"]
    run(
        [str(PYTHON), "-c", "\n".join(f"import {name}" for name in modules)],
        "A package is installed but does not import. If it repeats: rm -r .venv and run the command again.",
        VENV,
    )
    return in_venv(
        "from importlib.metadata import version, PackageNotFoundError\n"
        "def v(n):\n"
        "    try: return version(n)\n"
        "    except PackageNotFoundError: return 'none'\n"
        "print(', '.join(f'{n} {v(n)}' for n in ('torch', 'numpy', 'rclpy')))"
    )


def bootstrap() -> None:
    """Brings ``.venv`` up to date.

    Raises:
        BootstrapError: A step failed.
    """
    begin = time.monotonic()
    try:
        done: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        done = {}

    # Asking for rclpy takes longer than everything else when nothing is to be done.
    environment = digest(base_python(), sys.version, *(os.environ.get(n, "") for n in ("PYTHONPATH", "ROS_DISTRO")))
    ros = done.get("ros", "") if done.get("environment") == environment else sourced_ros()
    wheels = not ros and ros_wheels_exist()
    torch = [TORCH_INDEX, WITHOUT_TORCH, "\n".join(requirements("torch"))]

    steps: list[tuple[str, str, str, Callable[[], None]]] = [
        ("venv", f"virtual environment .venv, Python {platform.python_version()}",
         digest(base_python(), sys.version, ros), lambda: create_venv(ros)),
    ]  # fmt: skip
    if ros:
        steps += [("packages", f"packages that are missing beside {ros}", digest(LOCK, *torch), install_missing)]
    else:
        sections = ["core", "dev", *(["ros"] if wheels else [])]
        number = sum(len(requirements(section)) for section in sections)
        steps += [("packages", f"{number} pinned packages{', ROS 2 Kilted among them' if wheels else ''}",
                   digest(LOCK, *sections), lambda: install_pinned(sections))]  # fmt: skip
        if not WITHOUT_TORCH:
            index = TORCH_INDEX or "DSVT_TORCH_INDEX_URL can name an index of smaller builds"
            steps += [("torch", f"PyTorch ({index})", digest(*torch), install_torch)]
    if wheels:
        steps += [("messages", "vision_msgs, generated and compiled", digest(LOCK, MESSAGES), build_messages)]
    package = [ROOT / name for name in ("setup.py", "setup.cfg", "package.xml", "pyproject.toml")]
    steps += [("package", "dsvt_ros itself", digest(*package), install_package)]

    if not PYTHON.exists():
        done = {}
    todo = [step for step in steps if done.get(step[0]) != step[2]]
    if not todo and done.get("environment") == environment:
        return
    if todo and todo[0][0] == "venv":
        done, todo = {}, steps
    if not ros and not wheels:
        say(
            f"No ROS here: rclpy is not installed, and there are no ROS wheels for {platform.machine()} "
            f"{platform.system()} with Python {platform.python_version()}. Everything else is set up; "
            "use `dsvt demo --no-ros`."
        )
    if wheels and any(step[0] == "messages" for step in todo):
        check_compiler()  # before minutes of downloads

    for number, (key, title, wanted, action) in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {title}")
        start = time.monotonic()
        action()
        say(f"      {time.monotonic() - start:.0f} s")
        done[key] = wanted
        STAMP.write_text(json.dumps(done, indent=1), encoding="utf-8")

    if ros and not in_venv("import vision_msgs; print(1)"):
        distro = os.environ.get("ROS_DISTRO", "$ROS_DISTRO")
        say(f"ROS is sourced but has no vision_msgs. The node needs it: sudo apt install ros-{distro}-vision-msgs")
        versions = check_imports(with_ros=False)
    else:
        versions = check_imports(with_ros=bool(ros) or wheels)
    done.update(environment=environment, ros=ros)
    STAMP.write_text(json.dumps(done, indent=1), encoding="utf-8")
    say(f".venv is ready after {time.monotonic() - begin:.0f} s: {versions}")


if __name__ == "__main__":
    try:
        bootstrap()
    except BootstrapError as error:
        sys.exit(f"[dsvt] {error}")
    except KeyboardInterrupt:
        sys.exit("[dsvt] interrupted; the next run goes on from here")
