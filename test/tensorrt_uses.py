"""Which parts of TensorRT's Python interface our source uses, read from the source alone.

TensorRT's classes are only known at run time, so mypy sees nothing of them. The source therefore keeps to conventions,
and whatever departs from them is a problem, so that nothing escapes:

- the module is called ``trt``,
- what TensorRT hands out is annotated where it gets a name: ``config: trt.IBuilderConfig = ...``,
- what only some releases have stands behind ``hasattr`` or is asked for by ``getattr`` with a default. A guard covers
  the attribute it names and nothing else.

A place in the interface is written as the steps that lead there from the module: ``("Builder", "()", "create_network",
"()")`` is what ``create_network`` of a builder returns, ``"[]"`` is an element. An object that is annotated
``trt.Builder`` is ``("Builder", "()")``.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

Steps: TypeAlias = tuple[str, ...]
Guards: TypeAlias = frozenset[tuple[Steps, str]]


@dataclass(frozen=True)
class Many:
    """A container; all of its elements are taken for one kind."""

    of: Types


@dataclass(frozen=True)
class Row:
    """A tuple whose places are told apart."""

    of: tuple[Types, ...]


@dataclass(frozen=True)
class Own:
    """An object of a class of ours."""

    name: str


@dataclass(frozen=True)
class Words:
    """Texts that the source spells out."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Plain:
    """Something that is certainly not TensorRT's."""


Type: TypeAlias = "Steps | Many | Row | Own | Words | Plain"
Types: TypeAlias = tuple[Type, ...]  # alternatives; empty where nothing is known

PLAIN: Types = (Plain(),)
MODULE: Steps = ()


@dataclass(frozen=True)
class Use:
    """An attribute. ``guarded`` ones need not exist in every release."""

    where: str
    owner: Steps
    name: str
    guarded: bool
    store: bool = False


@dataclass(frozen=True)
class Call:
    """The arguments of a call; ``open`` where some are unpacked from a variable."""

    where: str
    callee: Steps
    positional: int
    keywords: tuple[str, ...]
    open: bool


@dataclass(frozen=True)
class Binding:
    """What a call returned gets a name. ``declared`` is empty for an annotation of something else, None without one."""

    where: str
    target: str
    value: Steps
    declared: tuple[Steps | Many, ...] | None


@dataclass
class Findings:
    """Everything that is to be compared with the releases, and what already breaks the conventions."""

    uses: set[Use] = field(default_factory=set)
    calls: set[Call] = field(default_factory=set)
    bindings: set[Binding] = field(default_factory=set)
    problems: set[tuple[str, str]] = field(default_factory=set)


def collect(sources: dict[str, str]) -> Findings:
    """Read the source of some modules (their text by file name), which may use each other's names."""
    index = _Index()
    trees = {file: ast.parse(text) for file, text in sources.items()}
    for _ in range(3):  # what is learnt in one file, or further down, serves in the others, or further up
        findings = Findings()
        for file, tree in trees.items():
            _Reader(file, index, findings).block(tree.body)
    return findings


def written(steps: Steps) -> str:
    """Steps as one would write them; an object goes by the name of its class."""
    shown = (*steps[:1], *steps[2:]) if steps[1:2] == ("()",) else steps
    return "trt" + "".join(step if step in ("()", "[]") else f".{step}" for step in shown)


@dataclass
class _Scope:
    inside: str = ""  # the class of ours whose body this is
    holds: dict[str, Types] = field(default_factory=dict)
    declared: dict[str, Types] = field(default_factory=dict)


@dataclass
class _Function:
    parameters: list[tuple[str, Types]]
    returns: Types


@dataclass
class _Class:
    bases: list[str] = field(default_factory=list)
    theirs: list[Steps] = field(default_factory=list)
    members: set[str] = field(default_factory=set)


@dataclass
class _Index:
    """Our own classes and functions, of all files."""

    classes: dict[str, _Class] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Types] = field(default_factory=dict)
    annotated: set[tuple[str, str]] = field(default_factory=set)
    methods: dict[tuple[str, str], _Function] = field(default_factory=dict)  # by class and name
    functions: dict[str, dict[str, _Function]] = field(default_factory=dict)  # by name and file
    shared: dict[str, Types] = field(default_factory=dict)  # annotated names of modules

    def lineage(self, name: str) -> Iterator[tuple[str, _Class]]:
        """A class and those of ours that it derives from."""
        for base in self.classes[name].bases if name in self.classes else []:
            yield from self.lineage(base)
        if name in self.classes:
            yield name, self.classes[name]

    def attribute(self, name: str, attribute: str) -> Types | None:
        """What an attribute of a class holds; None where neither it nor its bases of ours have it."""
        for each, entry in self.lineage(name):
            if attribute in entry.members or (each, attribute) in self.attributes:
                return self.attributes.get((each, attribute), ())
        return None

    def holders(self, attribute: str) -> Types:
        """What the attribute holds in any class of ours, if that is TensorRT's."""
        found = [types for (_, name), types in self.attributes.items() if name == attribute]
        return tuple(dict.fromkeys(t for types in found for t in types if isinstance(t, tuple)))

    def parents(self, name: str) -> list[Steps]:
        """TensorRT's classes that a class of ours derives from, as objects."""
        return [(*base, "()") for _, entry in self.lineage(name) for base in entry.theirs]

    def parameters(self, name: str) -> list[tuple[str, Types]]:
        """What a class of ours is made with."""
        initializer = self.method(name, "__init__")
        return initializer.parameters if initializer else []

    def method(self, name: str, method: str) -> _Function | None:
        """A method of a class or of its bases of ours."""
        found = [self.methods[key] for each, _ in self.lineage(name) if (key := (each, method)) in self.methods]
        return found[-1] if found else None

    def function(self, file: str | None, name: str) -> _Function | None:
        """The function of a name that this file sees; None for one of another origin, or if it is not clear which."""
        found = self.functions.get(name, {})
        return found[file] if file in found else next(iter(found.values())) if len(found) == 1 else None


def _unique(types: Iterable[Type]) -> Types:
    return tuple(dict.fromkeys(types))


def _elements(types: Types) -> Types:
    """What iterating or indexing gives."""
    found: list[Type] = []
    for one in types:
        if isinstance(one, tuple):
            found.append((*one, "[]"))
        elif isinstance(one, Many):
            found += one.of
        elif isinstance(one, Row):
            found += itertools.chain.from_iterable(one.of)
        elif not isinstance(one, Own):
            found.append(one)
    return _unique(found)


def _place(types: Types, index: int, length: int) -> Types:
    """What the target at one place of an unpacking gets."""
    rows = [one.of[index] for one in types if isinstance(one, Row) and len(one.of) == length]
    others = tuple(one for one in types if not isinstance(one, Row) or len(one.of) != length)
    return _unique(itertools.chain(*rows, _elements(others)))


def _key(owner: Steps, name: str) -> tuple[Steps, str]:
    """A guard on a class is one on its objects, and the other way round."""
    return (owner[:-1] if len(owner) > 1 and owner[-1] == "()" else owner), name


_WRAPPERS = ("Optional", "Union", "Final", "ClassVar", "Annotated", "Required", "NotRequired")


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _leaves(body: Sequence[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


class _Reader(ast.NodeVisitor):
    """Walks through one file, knowing at each place what the names hold and which guards are in force."""

    def __init__(self, file: str, index: _Index, findings: Findings) -> None:
        self.file, self.index, self.findings = file, index, findings
        self.scopes = [_Scope()]
        self.guards: Guards = frozenset()
        self.returns: list[Types | None] = []  # annotations of the functions around this place
        self.modules: set[str] = set()
        self.postponed = False  # whether annotations are left unevaluated

    # --- Places -----------------------------------------------------------------------------------------------------

    def where(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}"

    def problem(self, node: ast.AST, text: str) -> None:
        self.findings.problems.add((self.where(node), text))

    @contextmanager
    def scope(self, inside: str = "") -> Iterator[None]:
        self.scopes.append(_Scope(inside))
        guards = self.guards
        yield
        self.guards = guards
        self.scopes.pop()

    def block(self, body: Sequence[ast.stmt], guards: Iterable[tuple[Steps, str]] = ()) -> None:
        """Visit statements under further guards; what they guard by leaving early ends with them."""
        before = self.guards
        self.guards = before | frozenset(guards)
        for statement in body:
            self.visit(statement)
        self.guards = before

    def all(self, *nodes: ast.AST | None) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    # --- What an expression is ----------------------------------------------------------------------------------------

    def types(self, node: ast.expr | None) -> Types:
        """What an expression may be."""
        match node:
            case ast.Name(id="trt"):
                return (MODULE,)
            case ast.Name(id=name):
                scopes = [scope.holds[name] for scope in reversed(self.scopes) if name in scope.holds]
                return scopes[0] if scopes else self.index.shared.get(name, ()) if name in self.modules else ()
            case ast.Attribute():
                return self.attribute(node)
            case ast.Call():
                return self.called(node)
            case ast.Subscript():
                types = self.types(node.value)
                return types if isinstance(node.slice, ast.Slice) else _elements(types)
            case ast.IfExp():
                return _unique((*self.types(node.body), *self.types(node.orelse)))
            case ast.BoolOp():
                return _unique(one for value in node.values for one in self.types(value))
            case ast.NamedExpr() | ast.Await():
                return self.types(node.value)
            case ast.Constant(value=str(text)):
                return (Words((text,)),)
            case ast.BinOp():
                sides = _unique((*self.types(node.left), *self.types(node.right)))
                joined = tuple(one for one in sides if isinstance(one, Many | Row))
                return (Many(_elements(joined)),) if joined else PLAIN
            case ast.Constant() | ast.Compare() | ast.UnaryOp() | ast.JoinedStr():
                return PLAIN
            case ast.Tuple() if not any(isinstance(one, ast.Starred) for one in node.elts):
                return (Row(tuple(self.types(one) for one in node.elts)),)
            case ast.Tuple() | ast.List() | ast.Set():
                return (Many(_unique(one for element in node.elts for one in self.types(element))),)
            case ast.Starred():
                return _elements(self.types(node.value))
            case ast.Dict():
                return (Many(_unique(one for value in node.values for one in self.types(value))),)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                with self.scope():
                    for generator in node.generators:
                        self.bind(generator.target, _elements(self.types(generator.iter)))
                    return (Many(self.types(node.value if isinstance(node, ast.DictComp) else node.elt)),)
        return ()

    def attribute(self, node: ast.Attribute) -> Types:
        types = self.types(node.value)
        if not types:
            return self.index.holders(node.attr)  # better to take it for one of ours than to let it pass
        found: list[Type] = [(*owner, node.attr) for owner in self.owners(node)]
        for one in types:
            if isinstance(one, Own):
                found += self.index.attribute(one.name, node.attr) or ()
            elif not isinstance(one, tuple):
                found += PLAIN
        return _unique(found)

    def owners(self, node: ast.Attribute) -> list[Steps]:
        """The things of TensorRT whose attribute this is."""
        found: list[Steps] = []
        for one in self.types(node.value):
            if isinstance(one, tuple):
                found.append(one)
            elif isinstance(one, Own) and self.index.attribute(one.name, node.attr) is None:
                found += self.index.parents(one.name)
        return found

    def called(self, node: ast.Call) -> Types:
        """What a call returns."""
        function, name = node.func, _last_name(node.func)
        first = self.types(node.args[0]) if node.args else ()
        own = self.own(node)
        if name == "require_tensorrt" or (name == "import_module" and first == (Words(("tensorrt",)),)):
            return (MODULE,)
        if own is not None:
            return own.returns
        if name == "cast" and len(node.args) == 2:
            return self.annotation(node.args[0])
        if isinstance(function, ast.Attribute):
            containers = tuple(one for one in self.types(function.value) if isinstance(one, Many | Row))
            if containers and name in ("get", "pop", "popleft", "setdefault"):
                return _elements(containers)
            if containers and name in ("values", "copy"):
                return containers
            if containers and name == "items":
                return (Many((Row((PLAIN, _elements(containers))),)),)
        elif name == "getattr" and len(node.args) > 1:
            words = self.words(node.args[1]) or ()
            return _unique((*owner, word) for owner in first if isinstance(owner, tuple) for word in words)
        elif name == "super":
            return tuple(self.index.parents(next((one.inside for one in reversed(self.scopes) if one.inside), "")))
        elif name in ("list", "tuple", "set", "frozenset", "sorted", "reversed", "iter"):
            return (Many(_elements(first)),)
        elif name == "enumerate":
            return (Many((Row((PLAIN, _elements(first))),)),)
        elif name == "zip":
            return (Many((Row(tuple(_elements(self.types(one)) for one in node.args)),)),)
        elif name == "next":
            return _elements(first)
        types = (one for one in self.types(function) if isinstance(one, tuple | Plain))
        return _unique((*one, "()") if isinstance(one, tuple) else one for one in types)

    def own(self, node: ast.Call) -> _Function | None:
        """The function or class of ours that a call goes to."""
        match node.func:
            case ast.Name(id=name) if name in self.index.classes:
                return _Function(self.index.parameters(name), (Own(name),))
            case ast.Name(id=name) if not self.types(node.func):
                return self.index.function(self.file, name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in self.modules:
                return self.index.function(None, name)
            case ast.Attribute(value=value, attr=name):
                found = [self.index.method(one.name, name) for one in self.types(value) if isinstance(one, Own)]
                return found[0] if len(found) == 1 else None
        return None

    def words(self, node: ast.expr) -> tuple[str, ...] | None:
        """The texts that an expression may be; None where the source does not spell them out."""
        types = self.types(node)
        if not types or not all(isinstance(one, Words) for one in types):
            return None
        return tuple(word for one in types if isinstance(one, Words) for word in one.values)

    def annotation(self, node: ast.expr | None) -> Types:
        """What an annotation promises; PLAIN for everything that is neither TensorRT's nor ours."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp):
            types = _unique((*self.annotation(node.left), *self.annotation(node.right)))
            return tuple(one for one in types if one != Plain()) or types
        if isinstance(node, ast.Subscript):
            arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            inner = _unique(itertools.chain.from_iterable(self.annotation(one) for one in arguments))
            inner = tuple(one for one in inner if one != Plain()) or inner
            name = _last_name(node.value)
            if name in _WRAPPERS:
                return inner
            if name == "Callable":
                return PLAIN
            if name in ("type", "Type"):
                return _unique(one[:-1] if isinstance(one, tuple) else Plain() for one in inner)
            return (Many(inner),)
        if isinstance(node, ast.Attribute):
            steps = self.types(node)
            return _unique((*one, "()") for one in steps if isinstance(one, tuple)) or PLAIN
        if isinstance(node, ast.Name):
            return () if node.id == "Any" else (Own(node.id),) if node.id in self.index.classes else PLAIN
        return PLAIN if node is not None else ()

    # --- Names --------------------------------------------------------------------------------------------------------

    def bind(self, target: ast.expr, types: Types) -> None:
        """Let a target hold something from here on, unless its annotation says what it holds."""
        if isinstance(target, ast.Name):
            self.scopes[-1].holds[target.id] = self.declared_types(target) or types
        elif isinstance(target, ast.Starred):
            self.bind(target.value, (Many(types),))
        elif isinstance(target, ast.Tuple | ast.List):
            for index, one in enumerate(target.elts):
                self.bind(one, _place(types, index, len(target.elts)))
        elif isinstance(target, ast.Attribute):
            for owner in (one.name for one in self.types(target.value) if isinstance(one, Own)):
                key = (owner, target.attr)
                if key not in self.index.annotated:
                    self.index.attributes[key] = _unique((*self.index.attributes.get(key, ()), *types))

    def declared_types(self, target: ast.expr) -> Types | None:
        """What the annotation of a target says; None without one."""
        if isinstance(target, ast.Name):
            return self.scopes[-1].declared.get(target.id)
        if isinstance(target, ast.Attribute):
            for owner in (one.name for one in self.types(target.value) if isinstance(one, Own)):
                if (owner, target.attr) in self.index.annotated:
                    return self.index.attributes[owner, target.attr]
        return None

    def declare(self, target: ast.expr, types: Types) -> None:
        if isinstance(target, ast.Name):
            scope = self.scopes[-1]
            scope.holds[target.id] = scope.declared[target.id] = types
            if scope.inside:
                self.index.attributes[scope.inside, target.id] = types
                self.index.annotated.add((scope.inside, target.id))
            elif len(self.scopes) == 1:
                self.index.shared[target.id] = types
        elif isinstance(target, ast.Attribute):
            for owner in (one.name for one in self.types(target.value) if isinstance(one, Own)):
                self.index.attributes[owner, target.attr] = types
                self.index.annotated.add((owner, target.attr))

    def name(self, node: ast.AST, target: str, value: ast.expr | None, declared: Types | None) -> None:
        """Note that results of calls get a name or are handed on."""
        if isinstance(value, ast.IfExp):
            self.name(node, target, value.body, declared)
            self.name(node, target, value.orelse, declared)
        if isinstance(value, ast.NamedExpr | ast.Await):
            self.name(node, target, value.value, declared)
        if not isinstance(value, ast.Call) or self.own(value) is not None:
            return
        known = None if declared is None else tuple(one for one in declared if isinstance(one, tuple | Many))
        for one in self.called(value):
            if isinstance(one, tuple) and one != MODULE:
                self.findings.bindings.add(Binding(self.where(node), target, one, known))

    def annotate(self, node: ast.expr | None, *, evaluated: bool) -> None:
        """Note the classes in an annotation. One that is never evaluated may name what a release lacks."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            inner = ast.parse(node.value, mode="eval").body
            for child in ast.walk(inner):
                ast.copy_location(child, node)
            self.annotate(inner, evaluated=False)
            return
        for child in ast.walk(node) if node is not None else ():
            if isinstance(child, ast.Constant) and child is not node and isinstance(child.value, str):
                self.annotate(child, evaluated=False)
            if isinstance(child, ast.Attribute):
                for owner in self.owners(child):
                    guarded = not evaluated or self.postponed or _key(owner, child.attr) in self.guards
                    self.findings.uses.add(Use(self.where(child), owner, child.attr, guarded))

    # --- Guards -------------------------------------------------------------------------------------------------------

    def facts(self, test: ast.expr) -> tuple[Guards, Guards]:
        """What is known to exist where a test is true, and where it is false."""
        nothing: Guards = frozenset()
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            true, false = self.facts(test.operand)
            return false, true
        if isinstance(test, ast.BoolOp):
            known = [self.facts(value) for value in test.values]
            trues, falses = [one[0] for one in known], [one[1] for one in known]
            if isinstance(test.op, ast.And):
                return nothing.union(*trues), falses[0].intersection(*falses[1:])
            return trues[0].intersection(*trues[1:]), nothing.union(*falses)
        if isinstance(test, ast.Call) and _last_name(test.func) == "hasattr" and len(test.args) == 2:
            owners = [one for one in self.types(test.args[0]) if isinstance(one, tuple)]
            words = self.words(test.args[1]) or ()
            return frozenset(_key(owner, word) for owner in owners for word in words), nothing
        return nothing, nothing

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        true, false = self.facts(node.test)
        self.block(node.body, true)
        self.block(node.orelse, false)
        if _leaves(node.body):
            self.guards |= false
        if _leaves(node.orelse):
            self.guards |= true

    def visit_Assert(self, node: ast.Assert) -> None:
        self.all(node.test, node.msg)
        self.guards |= self.facts(node.test)[0]

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.block(node.body, self.facts(node.test)[0])
        self.block(node.orelse)

    def guarded(self, node: ast.AST, guards: Guards) -> None:
        before = self.guards
        self.guards |= guards
        self.visit(node)
        self.guards = before

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        true, false = self.facts(node.test)
        self.guarded(node.body, true)
        self.guarded(node.orelse, false)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        before = self.guards
        for value in node.values:
            self.visit(value)
            true, false = self.facts(value)
            self.guards |= true if isinstance(node.op, ast.And) else false
        self.guards = before

    # --- Statements ---------------------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "tensorrt" and (alias.name != "tensorrt" or alias.asname != "trt"):
                self.problem(node, "imports TensorRT under another name than trt, so its uses would not be seen")
            self.modules.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").split(".")[0] == "tensorrt" and not node.level:
            self.problem(node, "imports names out of TensorRT, so their uses would not be seen: import tensorrt as trt")
        self.postponed |= node.module == "__future__" and any(alias.name == "annotations" for alias in node.names)
        self.modules |= {alias.asname or alias.name for alias in node.names}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.all(*node.decorator_list, *node.bases, *node.keywords)
        entry = self.index.classes.setdefault(node.name, _Class())
        entry.bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        entry.theirs = [one for base in node.bases for one in self.types(base) if isinstance(one, tuple)]
        for child in ast.walk(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                entry.members.add(child.name)
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                entry.members |= {child.attr} if _last_name(child.value) == "self" else set()
        for child in node.body:
            targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
            entry.members |= {target.id for target in targets if isinstance(target, ast.Name)}
        with self.scope(node.name):
            self.block(node.body)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = node.args
        self.all(*node.decorator_list, *arguments.defaults, *arguments.kw_defaults)
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for one in [*named, arguments.vararg, arguments.kwarg]:
            self.annotate(one.annotation if one else None, evaluated=True)
        self.annotate(node.returns, evaluated=True)
        decorators = {_last_name(decorator) for decorator in node.decorator_list}
        owner = self.scopes[-1].inside  # empty unless this is a method
        skipped = named[:1] if owner and "staticmethod" not in decorators else []
        parameters = {one.arg: self.annotation(one.annotation) for one in named[len(skipped) :]}
        returns = self.annotation(node.returns) if node.returns is not None else None
        handed = returns or ()
        if decorators & {"contextmanager", "asynccontextmanager"}:
            handed = _elements(handed)
        function = _Function(list(parameters.items()), handed)
        if owner:
            self.index.methods[owner, node.name] = function
        else:
            self.index.functions.setdefault(node.name, {})[self.file] = function
        if owner and decorators & {"property", "cached_property"}:
            self.index.attributes[owner, node.name] = handed
            self.index.annotated.add((owner, node.name))
        with self.scope():
            self.scopes[-1].holds.update(parameters)
            self.scopes[-1].declared.update(
                (one.arg, parameters[one.arg]) for one in named[len(skipped) :] if one.annotation is not None
            )
            for one in skipped:
                self.scopes[-1].holds[one.arg] = (Own(owner),)
            if node.name == "__getattr__" and len(named) == 2:
                self.scopes[-1].holds[named[1].arg] = (Words(()),)  # whoever asks spells it out
            self.returns.append(returns)
            self.block(node.body)
            self.returns.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.all(*node.args.defaults, *node.args.kw_defaults)
        with self.scope():
            for one in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                self.scopes[-1].holds[one.arg] = ()
            self.visit(node.body)

    def visit_Return(self, node: ast.Return) -> None:
        self.all(node.value)
        if self.returns:
            self.name(node, "the result of this function", node.value, self.returns[-1])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.all(node.value, *node.targets)
        for target in node.targets:
            if isinstance(target, ast.Name | ast.Attribute):
                self.name(node, ast.unparse(target), node.value, self.declared_types(target))
            self.bind(target, self.types(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotate(node.annotation, evaluated=not self.returns or bool(self.scopes[-1].inside))
        self.all(node.value, node.target)
        declared = self.annotation(node.annotation)
        self.name(node, ast.unparse(node.target), node.value, declared)
        self.declare(node.target, declared)
        if node.value is not None:
            self.bind(node.target, self.types(node.value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.name(node, node.target.id, node.value, self.declared_types(node.target))
        self.bind(node.target, self.types(node.value))

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.all(node.iter, node.target)
        self.bind(node.target, _elements(self.types(node.iter)))
        self.block(node.body)
        self.block(node.orelse)

    visit_AsyncFor = visit_For  # noqa: N815

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.all(item.context_expr, item.optional_vars)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, self.types(item.context_expr))
        self.block(node.body)

    visit_AsyncWith = visit_With  # noqa: N815

    def visit_Try(self, node: ast.Try) -> None:
        self.block(node.body)
        for handler in node.handlers:
            self.all(handler.type)
            self.block(handler.body)
        self.block(node.orelse)
        self.block(node.finalbody)

    def visit_match_case(self, node: ast.match_case) -> None:
        self.all(node.pattern, node.guard)
        self.block(node.body)

    # --- Expressions --------------------------------------------------------------------------------------------------

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        with self.scope():
            for generator in node.generators:
                self.visit(generator.iter)
                self.bind(generator.target, _elements(self.types(generator.iter)))
                for condition in generator.ifs:
                    self.visit(condition)
                    self.guards |= self.facts(condition)[0]
            self.all(*([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]))

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # noqa: N815

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for owner in self.owners(node):
            self.use(node, owner, node.attr, store=not isinstance(node.ctx, ast.Load))
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("hasattr", "getattr", "setattr", "delattr") and len(node.args) > 1:
            words = self.words(node.args[1])
            for owner in (one for one in self.types(node.args[0]) if isinstance(one, tuple)):
                if words is None:
                    self.problem(node, f"{name} asks {written(owner)} for a name that the source does not spell out")
                optional = name == "hasattr" or (name == "getattr" and len(node.args) > 2)
                for word in words or ():
                    self.use(node, owner, word, store=name in ("setattr", "delattr"), guarded=optional)
        open_ = any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords)
        keywords = tuple(one.arg for one in node.keywords if one.arg is not None)
        own = self.own(node)
        if own is not None:
            self.hand_over(node, own)
        else:
            for one in self.types(node.func):
                if isinstance(one, tuple) and one != MODULE and name != "getattr":
                    positional = sum(not isinstance(argument, ast.Starred) for argument in node.args)
                    self.findings.calls.add(Call(self.where(node), one, positional, keywords, open_))
        self.generic_visit(node)

    def hand_over(self, node: ast.Call, function: _Function) -> None:
        """Compare what a function of ours is given with the annotations of its parameters."""
        given: dict[str, ast.expr] = {}
        for argument, (parameter, _) in zip(node.args, function.parameters, strict=False):
            if isinstance(argument, ast.Starred):
                break
            given[parameter] = argument
        given.update((one.arg, one.value) for one in node.keywords if one.arg is not None)
        for parameter, types in function.parameters:
            for one in self.types(given[parameter]) if parameter in given else ():
                if one == MODULE and parameter != "trt":
                    self.problem(node, f"hands over the module, which would be called {parameter} and not trt there")
                elif isinstance(one, tuple) and one != MODULE:
                    declared = tuple(each for each in types if isinstance(each, tuple | Many))
                    target = f"{parameter}, a parameter of {ast.unparse(node.func)},"
                    self.findings.bindings.add(Binding(self.where(node), target, one, declared))

    def use(self, node: ast.AST, owner: Steps, name: str, *, store: bool = False, guarded: bool = False) -> None:
        guarded = guarded or _key(owner, name) in self.guards
        self.findings.uses.add(Use(self.where(node), owner, name, guarded, store))
