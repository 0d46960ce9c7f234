"""Which modules must stay in float because the model's own code reads their weight instead of calling them.

Many models ask a module for the dtype of its weight to cast an input (`x.to(self.patch_embedding.weight.dtype)`, or
`next(self.tower.parameters()).dtype`): with int8 codes the input would become int8. Others compute with the weight
themselves (`F.linear(x, self.proj.weight)`). All are found by reading the source of the model's classes, so that no
list of model names is needed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

ANY_CHILD = "*"
FIRST_PARAMETER = "next(parameters())"

_HARMLESS_ATTRIBUTES = frozenset(
    {"device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda"}
)
_HARMLESS_CALLS = frozenset({"isinstance", "getattr", "hasattr", "id"})
_WEIGHT_OF_ANOTHER = re.compile(r"""(?<!\bself)\.weight\b(?!["'])|\bnext\([^()]*\.parameters\(""")
_SET_UP_METHODS = ("__init__", "init_", "_init_", "reset_parameters", "_tie_weights", "tie_weights")
# Their methods concern any model, not the weights of one; and torch's own modules read only their own weight.
_GENERAL_PACKAGES = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
)


@dataclass(frozen=True)
class WeightRead:
    """One place where a method of a class reads the weight of a submodule, in a line of its file.

    `path` leads from the instance to the submodule, with `ANY_CHILD` for an index known only at run time, and ends with
    `FIRST_PARAMETER` where the module that holds the first parameter inside is meant.
    """

    path: tuple[str, ...]
    method: str
    reads_dtype: bool
    handles_int8: bool
    line: int

    def reason(self, class_name: str) -> str:
        what = "the dtype of its weight" if self.reads_dtype else "its weight"
        return f"{class_name}.{self.method} reads {what}"


def modules_whose_weight_is_read(model: nn.Module, weights: str) -> dict[str, str]:
    """`{module name: reason}` for the modules that cannot hold codes, by the source of the model's classes.

    Args:
        model: any module, also on the meta device.
        weights: `"int8"` or `"float16"`; code that excepts int8 by name is safe for the former only.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for read in _reads_of_class(type(module)):  # type: ignore[arg-type]  # classes hash
            if read.handles_int8 and weights == "int8":
                continue
            for target in filter(
                None, _resolve(module, read.path)
            ):  # a module's own weight is its own affair
                full_name = f"{name}.{target}" if name else target
                found.setdefault(full_name, read.reason(type(module).__name__))
    return found


def reads_in_source(source: str) -> dict[str, tuple[WeightRead, ...]]:
    """What the classes of a file read of the weights of their submodules, by qualified class name."""
    if not _WEIGHT_OF_ANOTHER.search(source):  # parsing takes longer than all the rest
        return {}
    return {name: tuple(_reads_of_methods(cls)) for name, cls in _definitions_in(ast.parse(source)).items()}


def _resolve(module: nn.Module, path: tuple[str, ...]) -> Iterator[str]:
    """Names of the submodules that a path leads to; none if the path is no submodule of this instance."""
    if not path:
        yield ""
        return
    first, rest = path[0], path[1:]
    if first == FIRST_PARAMETER:
        yield from _holder_of_first_parameter(module)
        return
    children = module._modules if first == ANY_CHILD else {first: module._modules.get(first)}
    for name, child in children.items():
        if child is not None:
            for tail in _resolve(child, rest):
                yield f"{name}.{tail}" if tail else name


def _holder_of_first_parameter(module: nn.Module) -> Iterator[str]:
    first = next(module.named_parameters(), None)
    if first is not None:
        holder = first[0].rpartition(".")[0]
        # A quantized table answers with the dtype of its vectors.
        if not isinstance(module.get_submodule(holder), nn.Embedding):
            yield holder


@functools.lru_cache(maxsize=4096)
def _reads_of_class(cls: type[nn.Module]) -> tuple[WeightRead, ...]:
    reads: list[WeightRead] = []
    for base in cls.__mro__:
        if base is object or f"{base.__module__}.".startswith(_GENERAL_PACKAGES):
            continue
        reads += _reads_of_file(base.__module__).get(base.__qualname__, ())
    return tuple(reads)


@functools.lru_cache(maxsize=512)
def _reads_of_file(module_name: str) -> dict[str, tuple[WeightRead, ...]]:
    """What the classes of a module's file read; empty where there is no source to read."""
    try:
        return reads_in_source(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}


def _reads_of_methods(definition: ast.ClassDef) -> Iterator[WeightRead]:
    for method in definition.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith(_SET_UP_METHODS):
            yield from _reads_of_method(method)


def _definitions_in(tree: ast.Module) -> dict[str, ast.ClassDef]:
    found: dict[str, ast.ClassDef] = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
                collect(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                collect(child, f"{prefix}{child.name}.<locals>.")
            else:
                collect(child, prefix)

    collect(tree, "")
    return found


def _reads_of_method(method: ast.FunctionDef) -> Iterator[WeightRead]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    aliases = _aliases(method)
    for node in ast.walk(method):
        if not isinstance(node, ast.expr):
            continue
        path = _path_read(node, aliases)
        if not path:  # not a submodule of self, or self.weight
            continue
        user = parents[node]
        if isinstance(user, ast.Attribute) and user.attr in _HARMLESS_ATTRIBUTES:
            continue
        if isinstance(user, ast.Call) and isinstance(user.func, ast.Name) and user.func.id in _HARMLESS_CALLS:
            continue
        reads_dtype = isinstance(user, ast.Attribute) and user.attr == "dtype"
        handles_int8 = reads_dtype and _excepts_int8(method, path, aliases)
        yield WeightRead(path, method.name, reads_dtype, handles_int8, node.lineno)


def _path_read(node: ast.expr, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The path of `path.weight` and of `next(path.parameters())`; None if the node is neither."""
    match node:
        case ast.Attribute(value=module, attr="weight", ctx=ast.Load()):
            return _path(module, aliases)
        case ast.Call(func=ast.Name("next"), args=[ast.Call(func=ast.Attribute(module, "parameters")), *_]):
            path = _path(module, aliases)
            return None if path is None else (*path, FIRST_PARAMETER)
    return None


def _aliases(method: ast.FunctionDef) -> dict[str, tuple[str, ...]]:
    """Local names that stand for a submodule: `proj = self.proj`, `for layer in self.layers`."""
    aliases: dict[str, tuple[str, ...]] = {"self": ()}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            path = _path(node.value, aliases)
            if path:
                aliases[node.targets[0].id] = path
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            path = _path(node.iter, aliases)
            if path:
                aliases[node.target.id] = (*path, ANY_CHILD)
    return aliases


def _path(node: ast.expr, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """`self.a.b[0]` as `("a", "b", "0")`; None if the expression is no such chain."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        head = _path(node.value, aliases)
        return None if head is None else (*head, node.attr)
    if isinstance(node, ast.Subscript):
        head = _path(node.value, aliases)
        if head is None:
            return None
        known = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, (int, str))
        return (*head, str(node.slice.value) if known and isinstance(node.slice, ast.Constant) else ANY_CHILD)
    return None


def _excepts_int8(
    method: ast.FunctionDef, path: tuple[str, ...], aliases: dict[str, tuple[str, ...]]
) -> bool:
    """Whether the method compares the dtype of this very weight with torch.int8 before it acts on it."""
    for node in ast.walk(method):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        names_weight = any(
            isinstance(side, ast.Attribute)
            and side.attr == "dtype"
            and isinstance(side.value, ast.Attribute)
            and side.value.attr == "weight"
            and _path(side.value.value, aliases) == path
            for side in sides
        )
        if names_weight and any("torch.int8" in ast.unparse(side) for side in sides):
            return True
    return False
