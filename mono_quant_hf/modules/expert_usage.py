"""How a class computes with its 3-D parameters, read from its source: where the output features of an expert are.

`nn.functional.linear(x, self.w[i])` has them on axis 1 of `w`, `x @ self.w[i]` and `torch.bmm(x, self.w)` on axis 2.
Reading it, instead of knowing the classes by name, is what makes experts of any model quantizable.
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
        out_axis: 1 or 2, the axis of the output features; None where it is not used as the weight of experts.
        reason: why it cannot be quantized; empty where it can.
    """

    out_axis: int | None
    reason: str = ""


def usage_of(module: nn.Module, name: str) -> Usage:
    """How the class of `module` uses its 3-D parameter `name`."""
    usage = _usage_in_source(type(module), name)  # type: ignore[arg-type]  # classes are hashable
    if usage is not None:
        return usage
    # Without source, the flag that transformers' experts carry says it.
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return Usage(2 if transposed else 1)
    return Usage(None, f"there is no source that shows how its {name} is used")


@functools.lru_cache(maxsize=4096)
def _usage_in_source(cls: type[nn.Module], name: str) -> Usage | None:
    """What all methods of the class and its bases say; None where there is no source, or none that names it."""
    axes: set[int] = set()
    seen: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for method in _methods(base):
            if method.name in seen or method.name.startswith(_SET_UP_METHODS):
                continue
            seen.add(method.name)
            try:
                axes |= _out_axes(method, name)
            except _OtherUse as use:
                return Usage(None, f"{cls.__name__}.{method.name} uses its {name} in {str(use)!r}")
    if len(axes) > 1:
        return Usage(None, f"{cls.__name__} uses its {name} both as it is and transposed")
    return Usage(axes.pop()) if axes else None


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
    """The parameter is used otherwise than as the weight of experts; the message is the code that does."""


def _out_axes(method: ast.FunctionDef, name: str) -> set[int]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    axes = set()
    for node in ast.walk(method):
        is_parameter = (
            isinstance(node, ast.Attribute)
            and node.attr == name
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
        if is_parameter:
            axes |= _follow(node, method, parents, transposed=False)
    return axes


def _follow(
    node: ast.AST, method: ast.FunctionDef, parents: dict[ast.AST, ast.AST], transposed: bool
) -> set[int]:
    """Axes of the output features by the product that an expression of the weight ends in; empty for none."""
    user = parents[node]
    if isinstance(user, ast.Compare) or (
        isinstance(user, ast.Attribute) and user.attr in _HARMLESS_ATTRIBUTES
    ):
        return set()
    if (
        isinstance(user, ast.Subscript)
        and user.value is node
        and not isinstance(user.slice, (ast.Slice, ast.Tuple))
    ):
        return _follow(user, method, parents, transposed)
    if isinstance(user, ast.Attribute) and user.attr in _TRANSPOSITIONS | _CASTS:
        flipped = transposed != (user.attr in _TRANSPOSITIONS)
        call = parents[user]
        called = isinstance(call, ast.Call) and call.func is user
        return _follow(call if called else user, method, parents, flipped)
    local = _assigned_name(node, user, parents)
    if local is not None:
        loads = [
            other
            for other in ast.walk(method)
            if isinstance(other, ast.Name) and other.id == local and isinstance(other.ctx, ast.Load)
        ]
        return set().union(*(_follow(load, method, parents, transposed) for load in loads))
    if isinstance(user, ast.BinOp) and isinstance(user.op, ast.MatMult) and user.right is node:
        return {1 if transposed else 2}
    if isinstance(user, ast.Call) and len(user.args) > 1 and user.args[1] is node:
        function = ast.unparse(user.func).rpartition(".")[2]
        if function == "linear":
            return {2 if transposed else 1}
        if function in _PRODUCTS:
            return {1 if transposed else 2}
    raise _OtherUse(ast.unparse(user))


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
