"""Builds vision_msgs for Python with the rosidl generators of this environment.

``bootstrap.py`` copies this file, and the definitions from ``dsvt_ros/io/msg/vision_msgs`` as ``msg``, into an empty
folder.
The package index has rclpy and the common messages but not vision_msgs. Where ROS is installed, vision_msgs comes
with it and this package is never built.
"""

import json
import os
import sys
import sysconfig
from pathlib import Path

# The generators find their templates through the ament index, which lies in this environment.
os.environ["AMENT_PREFIX_PATH"] = sys.prefix

import numpy as np
from rosidl_cli.command.hash.api import generate_type_hashes
from rosidl_cli.command.translate.api import translate
from rosidl_generator_c.cli import GenerateC
from rosidl_generator_py.cli import GeneratePython
from rosidl_typesupport_c.cli import GenerateCTypesupport
from rosidl_typesupport_fastrtps_c.cli import GenerateFastRTPSCTypesupport
from rosidl_typesupport_introspection_c.cli import GenerateIntrospectionCTypesupport
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "vision_msgs"
TYPE_HASH = "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"
"""Of vision_msgs/msg/Detection3DArray as ROS distributes it. Nodes with another hash do not hear each other."""

PREFIX = Path(sys.prefix)
SHARE = str(PREFIX / "share")
OUTPUT = Path("generated")
SOURCES = OUTPUT / PACKAGE
MARKER = OUTPUT / "package_marker" / PACKAGE
LIBRARIES = OUTPUT / "lib"

TYPESUPPORTS = ("rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c")
"""What rmw_fastrtps asks of every message: the first to serialize it, the second to describe its type to others."""


def generate() -> None:
    """Writes IDL, type descriptions, C sources and Python classes below ``OUTPUT``.

    Raises:
        SystemExit: The messages are not those of vision_msgs.
    """
    messages = [f"{Path.cwd()}:msg/{path.name}" for path in sorted(Path("msg").glob("*.msg"))]
    translated = translate(
        package_name=PACKAGE, interface_files=messages, include_paths=[SHARE], output_format="idl", output_path=SOURCES
    )
    idl = [str(path) for path in translated]
    descriptions = generate_type_hashes(
        package_name=PACKAGE, interface_files=idl, include_paths=[SHARE], output_path=SOURCES
    )
    check_type_hash(next(Path(path) for path in descriptions if Path(path).stem == "Detection3DArray"))

    GenerateC("c").generate(PACKAGE, idl, [SHARE], SOURCES, descriptions)
    GenerateFastRTPSCTypesupport("fastrtps_c").generate(PACKAGE, idl, [SHARE], SOURCES)
    # This one replaces the __type_support.c of GenerateC, which has content for services and actions only.
    GenerateIntrospectionCTypesupport("introspection_c").generate(PACKAGE, idl, [SHARE], SOURCES)
    GenerateCTypesupport("c", typesupport_implementations=TYPESUPPORTS).generate(PACKAGE, idl, [SHARE], SOURCES)
    GeneratePython("py", typesupport_implementations=["rosidl_typesupport_c"]).generate(PACKAGE, idl, [SHARE], SOURCES)
    (SOURCES / "__init__.py").touch()
    MARKER.parent.mkdir()
    MARKER.touch()


def check_type_hash(description: Path) -> None:
    """Compares the hash in a type description with the one of the released vision_msgs."""
    hashes = {entry["type_name"]: entry["hash_string"] for entry in json.loads(description.read_text())["type_hashes"]}
    found = hashes[f"{PACKAGE}/msg/Detection3DArray"]
    if found != TYPE_HASH:
        sys.exit(
            f"The type hash of {PACKAGE}/msg/Detection3DArray is {found}, expected {TYPE_HASH}: the files in msg/ "
            "differ from vision_msgs 4, so other ROS nodes would not receive these messages."
        )


class BuildLibraries(build_ext):
    """Builds the plain libraries into ``LIBRARIES`` under the names that the linker and rosidl_typesupport_c expect."""

    def get_ext_fullpath(self, ext_name: str) -> str:
        """Where the library or Python module of this name goes."""
        if ext_name.startswith("lib"):
            return str(LIBRARIES / f"{ext_name}.so")
        return super().get_ext_fullpath(ext_name)


def extension(name: str, patterns: list[str], parts: list[str], libraries: list[str]) -> Extension:
    """One library, linked with libraries and with parts of the messages that those of this package contain."""
    includes = [*PREFIX.glob("include/*/"), OUTPUT, np.get_include(), sysconfig.get_path("include")]
    dependencies = ("std_msgs", "geometry_msgs", "builtin_interfaces")
    return Extension(
        name,
        sources=sorted(str(path) for pattern in patterns for path in SOURCES.glob(pattern)),
        include_dirs=[str(path) for path in includes],
        library_dirs=[str(LIBRARIES), str(PREFIX / "lib")],
        libraries=[*libraries, *(f"{message}__{part}" for message in dependencies for part in parts)],
        extra_compile_args=["-O1", "-g0", "-w"],
    )


def extensions() -> list[Extension]:
    """The libraries that message packages consist of, in the order in which they need each other.

    rosidl_typesupport_c opens the type supports by name at run time. What is needed only from Python is in the last
    one, under the name that rclpy looks for.
    """
    structs = f"{PACKAGE}__rosidl_generator_c"
    fastrtps, introspection = TYPESUPPORTS
    runtime = [structs, "rosidl_runtime_c", "rcutils"]
    return [
        extension(
            f"lib{structs}",
            ["msg/detail/*__functions.c", "msg/detail/*__description.c"],
            ["rosidl_generator_c"],
            ["rosidl_runtime_c", "rcutils"],
        ),
        extension(
            f"lib{PACKAGE}__{fastrtps}",
            ["msg/detail/*__type_support_c.cpp"],
            ["rosidl_generator_c", fastrtps],
            [*runtime, fastrtps, "rosidl_typesupport_fastrtps_cpp", "rmw", "fastcdr"],
        ),
        extension(
            f"lib{PACKAGE}__{introspection}",
            ["msg/detail/*__type_support.c"],
            ["rosidl_generator_c", introspection],
            [*runtime, introspection],
        ),
        extension(
            f"{PACKAGE}.{PACKAGE}_s__rosidl_typesupport_c",
            ["msg/*__type_support.cpp", "msg/*_s.c", "*.c"],
            ["rosidl_generator_c", "rosidl_typesupport_c", "rosidl_generator_py"],
            [*runtime, "rosidl_typesupport_c"],
        ),
    ]


def files(pattern: str) -> list[str]:
    """The generated and given files of one kind, for ``share/vision_msgs``."""
    return sorted(str(path) for folder in (SOURCES, Path()) for path in folder.glob(pattern))


# pip runs this file once for each step of a build, in one folder.
if not MARKER.exists():
    generate()
modules = extensions()
setup(
    name=PACKAGE,
    version="4.1.1",
    description="The 3D detection messages of vision_msgs, for machines without ROS",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": str(OUTPUT)},
    packages=[PACKAGE, f"{PACKAGE}.msg"],
    ext_modules=modules,
    cmdclass={"build_ext": BuildLibraries},
    data_files=[
        ("lib", [str(LIBRARIES / f"{module.name}.so") for module in modules if module.name.startswith("lib")]),
        ("share/ament_index/resource_index/packages", [str(MARKER)]),
        (f"share/{PACKAGE}/msg", files("msg/*.msg") + files("msg/*.idl") + files("msg/*.json")),
    ],
)
