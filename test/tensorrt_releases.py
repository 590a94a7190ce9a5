"""What some releases of TensorRT's Python bindings hold, found out without TensorRT's libraries and without a GPU.

The bindings are small wheels of their own. They load as soon as libraries of the right names define the symbols that
they are linked against, and call none of them before they are used; so a compiler can make stand-ins for the libraries.
All wheels hold the same module, therefore each is looked at in a process of its own: this file, run as a program.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorrt_uses import Call, Findings, written

MODULE = "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")  # the last one up to TensorRT 8
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    # Parsers that TensorRT 8 still has, in C++.
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)

NEW_IN_8_6 = {
    "": "HardwareCompatibilityLevel ICastLayer INormalizationLayer IReverseSequenceLayer OnnxParserFlag "
    "TempfileControlFlag fp8",
    "Builder": "get_plugin_registry",
    "BuilderFlag": "EXCLUDE_LEAN_RUNTIME FP8 VERSION_COMPATIBLE",
    "DataType": "FP8",
    "IAlgorithmIOInfo": "components_per_element vectorized_dim",
    "IBuilderConfig": "builder_optimization_level hardware_compatibility_level max_aux_streams plugins_to_serialize",
    "ICudaEngine": "hardware_compatibility_level num_aux_streams",
    "IExecutionContext": "set_aux_streams",
    "ILayer": "metadata",
    "INetworkDefinition": "add_cast add_normalization add_reverse_sequence builder",
    "IPluginRegistry": "deregister_library load_library parent_search_enabled",
    "ITopKLayer": "set_input",
    "LayerType": "CAST NORMALIZATION REVERSE_SEQUENCE",
    "MemoryPoolType": "TACTIC_DRAM",
    "OnnxParser": "clear_flag flags get_flag get_used_vc_plugin_libraries set_flag",
    "PreviewFeature": "PROFILE_SHARING_0806",
    "Runtime": "engine_host_code_allowed get_plugin_registry load_runtime tempfile_control_flags temporary_directory",
    "TensorFormat": "DHWC",
    "UnaryOperation": "ISINF",
}
"""What 8.6 has and 8.5 has not, of which no wheel exists without the libraries: the difference between the sources of
both bindings, which NVIDIA publishes. The other way round there is none: 8.6 has everything that 8.5 has."""


# --- What a release says about steps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """What steps lead to in a release.

    Attributes:
        kind: ``module``, ``class``, ``object`` (of a class), ``many`` (a container), ``method``, ``plain`` (not
            TensorRT's), ``missing`` (a step does not exist) or ``unknown`` (the bindings do not say).
        name: The class.
        of: What a container holds, or what a method belongs to.
        method: The signatures of a method.
        bound: Whether a method has its object already.
    """

    kind: str
    name: str = ""
    of: Thing | None = None
    method: tuple[str, ...] = ()
    bound: bool = False


MISSING, UNKNOWN, PLAIN = Thing("missing"), Thing("unknown"), Thing("plain")


class Release:
    """A release of the bindings."""

    def __init__(self, name: str, content: dict[str, Any]) -> None:
        self.name = name
        self._names: dict[str, Any] = content["names"]
        self._classes: dict[str, Any] = content["classes"]

    def without(self, name: str, lacking: dict[str, str]) -> Release:
        """An earlier release, which lacks some names of the module ("") and of its classes."""
        content = {"names": dict(self._names), "classes": copy.deepcopy(self._classes)}
        for owner, names in lacking.items():
            members = content["classes"][owner]["members"] if owner else content["names"]
            for each in names.split():
                del members[each]
                if not owner:
                    content["classes"].pop(each, None)
        return Release(name, content)

    def member(self, thing: Thing, name: str) -> dict[str, Any] | None:
        """The description of an attribute; None where there is none."""
        members = self._names if thing.kind == "module" else self._classes[thing.name]["members"]
        found: dict[str, Any] | None = members.get(name)
        return found

    def follow(self, steps: Sequence[str]) -> Thing:
        """Go the steps, from the module on."""
        thing = Thing("module")
        for step in steps:
            if step == "()":
                thing = self._called(thing)
            elif step == "[]":
                thing = self._element(thing)
            elif thing.kind in ("module", "class", "object"):
                thing = self._attribute(thing, step)
            elif thing.kind in ("many", "method"):
                thing = PLAIN
        return thing

    def related(self, one: str, other: str) -> bool:
        """Whether two classes are the same, or one derives from the other."""
        return one == other or other in self._classes[one]["bases"] or one in self._classes[other]["bases"]

    def signatures(self, callee: Thing) -> list[ast.arguments] | None:
        """The parameters of something that is called, for each overload; None where the bindings do not say."""
        bound, texts = callee.bound, callee.method
        if callee.kind == "class":
            bound, texts = True, tuple(self._classes[callee.name]["members"]["__init__"].get("signatures", ()))
        found = []
        for text in texts:
            # Defaults are written as their repr, such as <DataType.FLOAT: 0>, and unnamed ones of C++ as std::nullopt.
            plain = re.sub(r"<[^<>]*>", "None", text.split(" -> ")[0]).replace("::", ".")
            try:
                (function,) = ast.parse(f"def {plain}: ...").body
            except SyntaxError:
                return None
            assert isinstance(function, ast.FunctionDef)
            arguments = function.args
            if bound:
                del (arguments.posonlyargs or arguments.args)[:1]
            found.append(arguments)
        return found or None

    def _attribute(self, thing: Thing, name: str) -> Thing:
        found = self.member(thing, name)
        if found is None:
            return MISSING
        if found["kind"] == "class":
            return Thing("class", found["type"]) if found["type"] in self._classes else PLAIN
        if found["kind"] == "method":
            bound = thing.kind == "object" and not found["static"]
            return Thing("method", name, thing, tuple(found["signatures"]), bound)
        if found["kind"] == "value":
            return Thing("object", found["type"]) if found["type"] in self._classes else PLAIN
        return self._typed(found["type"])

    def _called(self, thing: Thing) -> Thing:
        if thing.kind == "class":
            return Thing("object", thing.name)
        if thing.kind != "method":
            return thing if thing.kind in ("missing", "plain") else UNKNOWN
        returned = {self._typed(text.rpartition(" -> ")[2]) for text in thing.method if " -> " in text}
        if not returned and thing.of == Thing("module"):
            return PLAIN  # helpers written in Python: volume, nptype
        return returned.pop() if len(returned) == 1 else UNKNOWN

    def _element(self, thing: Thing) -> Thing:
        if thing.kind == "many":
            return thing.of or UNKNOWN
        if thing.kind == "object":
            found = self._attribute(thing, "__getitem__")
            return self._called(found) if found.kind == "method" else UNKNOWN
        return thing if thing.kind in ("missing", "plain") else UNKNOWN

    def _typed(self, text: str) -> Thing:
        """The type that a docstring names, by Python's name or, where that was not known yet, by that of C++."""
        text = re.sub(r"(\w+::)+", "", text.replace("tensorrt_bindings.tensorrt.", "")).strip()
        try:
            return self._type(ast.parse(text, mode="eval").body)
        except SyntaxError:
            return UNKNOWN

    def _type(self, node: ast.expr) -> Thing:
        if isinstance(node, ast.BinOp):
            return self._first([self._type(node.left), self._type(node.right)])
        if isinstance(node, ast.Subscript):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            held = self._first([self._type(one) for one in inner])
            return held if ast.unparse(node.value) in ("Optional", "Union") else Thing("many", of=held)
        name = ast.unparse(node)
        if name in self._classes:
            return Thing("object", name)
        if name.removeprefix("I") in self._classes:
            return Thing("object", name.removeprefix("I"))
        return UNKNOWN if name == "object" or name[:1] == "I" else PLAIN

    def _first(self, things: Sequence[Thing]) -> Thing:
        """The one that matters in a union or a tuple."""
        return next((one for kind in ("object", "many", "unknown") for one in things if one.kind == kind), PLAIN)


# --- Looking at one release ---------------------------------------------------------------------------------------


def make_stand_ins(folder: Path, major: int) -> None:
    """Compile libraries that satisfy the bindings of a major release and do nothing.

    Raises:
        RuntimeError: There is no compiler, or it fails.
    """
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++, clang++ or $CXX), and the stand-ins must be compiled")
    folder.mkdir(parents=True)
    source = folder / "stand_in.cpp"
    source.write_text("".join(f'extern "C" void *{name}() {{ return 0; }}\n' for name in SYMBOLS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")


def look_at(wheel: Path, stand_ins: Path) -> dict[str, Any]:
    """What the bindings in an unpacked wheel hold, by a process of its own.

    Raises:
        RuntimeError: They cannot be imported.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(wheel), str(stand_ins)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the bindings in {wheel} cannot be imported:\n{result.stderr}")
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def describe(wheel: Path, stand_ins: Path) -> dict[str, Any]:
    """Import the bindings in this process and list what they hold."""
    for library in stand_ins.glob("lib*.so.*"):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.modules["tensorrt_libs"] = None  # type: ignore[assignment]  # another wheel may have brought the real ones
    sys.path.insert(0, str(wheel))
    module = importlib.import_module(MODULE)
    classes: dict[str, dict[str, Any]] = {}

    def add(cls: type) -> None:
        if cls.__qualname__ in classes or not cls.__module__.startswith(MODULE):
            return
        members = {name: member(name, inspect.getattr_static(cls, name), getattr(cls, name, None)) for name in dir(cls)}
        bases = [base.__qualname__ for base in cls.__mro__[1:] if base.__module__.startswith(MODULE)]
        classes[cls.__qualname__] = {"bases": bases, "members": members}
        for value in vars(cls).values():
            if isinstance(value, type):
                add(value)

    for value in vars(module).values():
        if isinstance(value, type):
            add(value)
    names = {name: member(name, value, value) for name, value in vars(module).items()}
    return {"version": module.__version__, "names": names, "classes": classes}


def member(name: str, static: object, value: object) -> dict[str, Any]:
    """One attribute of a class or of the module."""
    if isinstance(static, type):
        return {"kind": "class", "type": static.__qualname__}
    if isinstance(static, property):
        returns = re.search(r"-> (.+)", static.fget.__doc__ or "")
        return {"kind": "property", "type": returns[1] if returns else "", "readonly": static.fset is None}
    if callable(value):
        # Overloads are numbered below a line that only says (*args, **kwargs).
        lines = [line.strip() for line in (value.__doc__ or "").splitlines()]
        found = [re.sub(r"^\d+\. ", "", line) for line in lines if re.match(rf"(\d+\. )?{re.escape(name)}\(", line)]
        signatures = [line for line in found if "(*args, **kwargs)" not in line]
        return {"kind": "method", "signatures": signatures, "static": isinstance(static, staticmethod)}
    return {"kind": "value", "type": type(value).__qualname__}


# --- Comparing ----------------------------------------------------------------------------------------------------


def faults(findings: Findings, releases: Sequence[Release], *, complete: bool = True) -> list[str]:
    """Everything that is wrong with what a source uses, one sentence each.

    Args:
        findings: What it uses.
        releases: What it is compared with.
        complete: Whether that is every release that is supported. Otherwise a guard may be there for another one.
    """
    found: dict[tuple[str, str], list[str]] = {problem: [] for problem in findings.problems}
    for release in releases:
        for where, text in (
            *_faults_of_uses(findings, release),
            *_faults_of_calls(findings, release),
            *_faults_of_bindings(findings, release),
        ):
            found.setdefault((where, text), []).append(release.name)
    for use in findings.uses:
        owners = [(release, thing) for release in releases if _has_attributes(thing := release.follow(use.owner))]
        missing = [release.member(thing, use.name) is None for release, thing in owners]
        if missing and all(missing) and (complete or not use.guarded):
            place = f"{written(use.owner)}.{use.name}"
            found.pop((use.where, _unguarded(place)), None)
            found[use.where, f"no release has {place}"] = []
    order = sorted(found, key=lambda fault: (fault[0].rpartition(":")[0], int(fault[0].rpartition(":")[2]), fault[1]))
    return [f"{w}: {t}" + (f" (TensorRT {', '.join(found[w, t])})" if found[w, t] else "") for w, t in order]


def _has_attributes(thing: Thing) -> bool:
    return thing.kind in ("module", "class", "object")


def _unguarded(place: str) -> str:
    return f"{place} does not exist in every release, and no hasattr with this name guards it"


def _faults_of_uses(findings: Findings, release: Release) -> Iterable[tuple[str, str]]:
    for use in findings.uses:
        owner, place = release.follow(use.owner), f"{written(use.owner)}.{use.name}"
        if owner.kind == "unknown":
            yield use.where, f"cannot tell what {written(use.owner)} is, so .{use.name} is not checked: annotate it"
        if not _has_attributes(owner):
            continue  # of what a release lacks there are no objects, and where it is asked for is a use of its own
        member = release.member(owner, use.name)
        if member is None and not use.guarded:
            yield use.where, _unguarded(place)
        if member is not None and use.store and (member["kind"] != "property" or member["readonly"]):
            yield use.where, f"{place} cannot be set"


def _faults_of_calls(findings: Findings, release: Release) -> Iterable[tuple[str, str]]:
    for call in findings.calls:
        signatures = release.signatures(release.follow(call.callee))
        if signatures is not None and not any(_takes(arguments, call) for arguments in signatures):
            given = f"{call.positional} positional" + "".join(f", {keyword}=" for keyword in call.keywords)
            yield call.where, f"{written(call.callee)} does not take these arguments: {given}"


def _takes(arguments: ast.arguments, call: Call) -> bool:
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    free, by_name = names[call.positional :], [one.arg for one in arguments.kwonlyargs]
    if call.positional > len(names) and arguments.vararg is None:
        return False
    if arguments.kwarg is None and not set(call.keywords) <= {*free, *by_name}:
        return False
    required = set(names[: len(names) - len(arguments.defaults)]) & set(free)
    required |= {name for name, default in zip(by_name, arguments.kw_defaults, strict=True) if default is None}
    return call.open or required <= set(call.keywords)


def _faults_of_bindings(findings: Findings, release: Release) -> Iterable[tuple[str, str]]:
    for binding in findings.bindings:
        value, place = release.follow(binding.value), written(binding.value)
        if value.kind not in ("object", "many", "unknown") or (value.kind == "many" and value.of == PLAIN):
            continue
        what = f"trt.{value.name}" if value.kind == "object" else "something of TensorRT's"
        if binding.declared is None:
            if len(binding.value) > 2:  # trt.Runtime(...) says by itself what it makes
                yield binding.where, f"{place} returns {what}: annotate {binding.target}"
        elif value.kind == "object":
            declared = [release.follow(one) for one in binding.declared if isinstance(one, tuple)]
            classes = [one.name for one in declared if one.kind == "object"]
            if not any(one.kind == "missing" for one in declared) and not any(
                release.related(value.name, name) for name in classes
            ):
                names = " or ".join(f"trt.{name}" for name in classes) or "something else"
                yield binding.where, f"{place} returns {what}, but {binding.target} is annotated as {names}"


if __name__ == "__main__":
    json.dump(describe(Path(sys.argv[1]), Path(sys.argv[2])), sys.stdout)
