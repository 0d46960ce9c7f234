"""How a class computes with its own weights, read from its source: which axis has the output features.

`nn.functional.linear(x, self.w)` has them on the last axis but one of `w`, `x @ self.w` on the last; the same for one
expert of many, `self.w[i]`. Reading it, instead of knowing the classes by name, is what makes any model quantizable.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass

from torch import nn

_HARMLESS_ATTRIBUTES = frozenset({"device", "shape", "size", "ndim", "dim", "requires_grad"})
_TRANSPOSITIONS = frozenset({"transpose", "t", "T", "mT"})
_CASTS = frozenset({"float", "to", "contiguous"})
_PRODUCTS = frozenset({"bmm", "matmul", "mm"})
_SET_UP_METHODS = ("__init__", "init_", "_init_", "reset_parameters")


@dataclass(frozen=True)
class Usage:
    """What the source of a class says of one of its parameters.

    Attributes:
        out_last: True for `[..., in, out]`, False for `[..., out, in]`, None where it is not used as a weight.
        reason: why it cannot be quantized; empty where it can.
    """

    out_last: bool | None
    reason: str = ""


def usage_of(module: nn.Module, name: str) -> Usage:
    """How the class of `module` uses its parameter `name`, of two dimensions, or of three for experts."""
    indexable = module.get_parameter(name).dim() == 3
    usage = _usage_in_source(type(module), name, indexable)  # type: ignore[arg-type]  # classes are hashable
    if usage is not None:
        return usage
    # Without source, the flag that transformers' experts carry says it.
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return Usage(transposed)
    return Usage(None, f"there is no source that shows how its {name} is used")


@functools.lru_cache(maxsize=1024)
def other_use_of_table(cls: type[nn.Module]) -> str | None:
    """The code by which a class does more with its `weight` than look up rows and read its dtype; None for none."""
    for method in _all_methods(cls):
        parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(method):
            if not _is_own(node, "weight"):
                continue
            user = parents[node]
            reads = isinstance(user, ast.Attribute) and user.attr in _HARMLESS_ATTRIBUTES | {"dtype"}
            looks_up = isinstance(user, ast.Call) and len(user.args) > 1 and user.args[1] is node
            if not reads and not (looks_up and ast.unparse(user).partition("(")[0].endswith("embedding")):
                return f"{method.name} uses its weight in {ast.unparse(user)!r}"
    return None


@functools.lru_cache(maxsize=4096)
def _usage_in_source(cls: type[nn.Module], name: str, indexable: bool) -> Usage | None:
    """What all methods of the class and its bases say; None where there is no source, or none that names it."""
    found: set[bool] = set()
    for method in _all_methods(cls):
        try:
            found |= _orientations(method, name, indexable)
        except _OtherUse as use:
            return Usage(None, f"{cls.__name__}.{method.name} uses its {name} in {str(use)!r}")
    if len(found) > 1:
        return Usage(None, f"{cls.__name__} uses its {name} both as it is and transposed")
    return Usage(found.pop()) if found else None


def _all_methods(cls: type[nn.Module]) -> list[ast.FunctionDef]:
    """The methods that instances of a class have, but for those that set it up and those of torch."""
    methods: dict[str, ast.FunctionDef] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for method in _methods(base):
                methods.setdefault(method.name, method)
    return [method for name, method in methods.items() if not name.startswith(_SET_UP_METHODS)]


def _is_own(node: ast.AST, name: str) -> bool:
    """Whether an expression is `self.<name>`."""
    of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return of_self and isinstance(node, ast.Attribute) and node.attr == name


@functools.lru_cache(maxsize=1024)
def _methods(cls: type) -> tuple[ast.FunctionDef, ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return ()
    definition = tree.body[0]
    if not isinstance(definition, ast.ClassDef):
        return ()
    return tuple(node for node in definition.body if isinstance(node, ast.FunctionDef))


class _OtherUse(Exception):
    """The parameter is used otherwise than as the weight of a product; the message is the code that does."""


def _orientations(method: ast.FunctionDef, name: str, indexable: bool) -> set[bool]:
    """`Usage.out_last` by the products that a method makes with `self.<name>`."""
    trace = _Trace(method)
    found = set()
    for node in ast.walk(method):
        if _is_own(node, name):
            found |= trace.follow(node, indexable, transposed=False)
    return found


class _Trace:
    """Follows an expression of a weight, through casts, transpositions and local names, to the products it ends in."""

    def __init__(self, method: ast.FunctionDef):
        self.method = method
        self.parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        self.names: set[str] = set()

    def follow(self, node: ast.AST, indexable: bool, transposed: bool) -> set[bool]:
        user = self.parents[node]
        if isinstance(user, ast.Compare):
            return set()
        if isinstance(user, ast.Attribute) and user.attr in _HARMLESS_ATTRIBUTES:
            return set()
        if indexable and isinstance(user, ast.Subscript) and user.value is node:
            if not isinstance(user.slice, (ast.Slice, ast.Tuple)):
                return self.follow(user, False, transposed)
        elif isinstance(user, ast.Attribute) and user.attr in _TRANSPOSITIONS | _CASTS:
            call = self.parents[user]
            called = isinstance(call, ast.Call) and call.func is user
            flipped = transposed != (user.attr in _TRANSPOSITIONS)
            return self.follow(call if called else user, indexable, flipped)
        elif isinstance(user, ast.BinOp) and isinstance(user.op, ast.MatMult) and user.right is node:
            return {not transposed}
        elif isinstance(user, ast.Call) and len(user.args) > 1 and user.args[1] is node:
            function = ast.unparse(user.func).rpartition(".")[2]
            if function == "linear":
                return {transposed}
            if function in _PRODUCTS:
                return {not transposed}
        else:
            local = _assigned_name(node, user, self.parents)
            if local is not None and local not in self.names:
                self.names.add(local)
                found = [self.follow(load, indexable, transposed) for load in self._loads(local)]
                return set().union(*found)
        raise _OtherUse(ast.unparse(user))

    def _loads(self, local: str) -> list[ast.Name]:
        names = (node for node in ast.walk(self.method) if isinstance(node, ast.Name) and node.id == local)
        return [node for node in names if isinstance(node.ctx, ast.Load)]


def _assigned_name(node: ast.AST, user: ast.AST, parents: dict[ast.AST, ast.AST]) -> str | None:
    """The local name that an expression is assigned to, alone or as part of a tuple; None where it is to none."""
    assignment = parents.get(user) if isinstance(user, ast.Tuple) else user
    if not isinstance(assignment, ast.Assign) or len(assignment.targets) != 1:
        return None
    target: ast.AST = assignment.targets[0]
    if isinstance(user, ast.Tuple):
        if not isinstance(target, ast.Tuple) or len(target.elts) != len(user.elts):
            return None
        target = target.elts[next(i for i, element in enumerate(user.elts) if element is node)]
    return target.id if isinstance(target, ast.Name) else None
