"""Print how large the package is and how it hangs together: information, not a test.

Usage: python .ci/counts.py
"""

import ast
import subprocess
import sys
import time
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mono_quant_hf"
FLOORS = ("core", "kernels", "modules", "calibration", "integration", "evaluation", "hub", "engines", "cli")
"""From the ground up: each imports only those before it, and the files beside the folders."""
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 500, 60, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, those within functions and under TYPE_CHECKING too."""
    package = list(file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            # Of `from . import a` it is a that is meant, where that is a module.
            found |= {
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in modules else origin
                for alias in node.names
            }
    return found & modules - {name_of(file)}


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One cycle after the other, each opened where it was found; an `__init__` counts as a module of its own."""
    left, found = {name: sorted(needed) for name, needed in graph.items()}, []
    while True:
        try:
            TopologicalSorter(left).prepare()
            return found
        except CycleError as error:
            # Each comes before the next, which therefore imports it: shown from the importer to the imported.
            round_trip = error.args[1][::-1]
            found.append(" -> ".join(name.removeprefix("mono_quant_hf.") for name in round_trip))
            left[round_trip[0]].remove(round_trip[1])


def upwards(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher floor."""
    heights = {floor: height for height, floor in enumerate(FLOORS)}

    def height(name: str) -> int | None:
        parts = name.split(".")
        return heights.get(parts[1]) if len(parts) > 1 else None

    pairs = [(name, other) for name, needed in graph.items() for other in sorted(needed)]
    heights_of = [(pair, height(pair[0]), height(pair[1])) for pair in pairs]
    return [
        " -> ".join(part.removeprefix("mono_quant_hf.") for part in pair)
        for pair, own, others in heights_of
        if own is not None and others is not None and others > own
    ]


def length(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: Function) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def is_for_a_compiler(file: Path) -> bool:
    """Whether Numba or Triton compiles what is in the file: its functions take no dataclass, and are inlined."""
    return any(part.startswith(("compiled", "triton_")) for part in file.relative_to(PACKAGE).parts)


def most(what: str, found: list[tuple[int, str]], limit: int) -> str:
    over = sum(size > limit for size, _ in found)
    size, where = max(found)
    return f"{what}: {size}, {where}; over {limit}: {over}"


def listed(what: str, found: list[str]) -> str:
    return (
        f"{what}: {', '.join(found) or 'none'}" if len(found) < 2 else f"{what}:\n    " + "\n    ".join(found)
    )


def help_seconds() -> str:
    start = time.perf_counter()
    command = [sys.executable, "-m", "mono_quant_hf", "--help"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    return f"{seconds:.2f} s" if asked.returncode == 0 else "not run: not installed"


def main() -> None:
    trees = {file: ast.parse(file.read_text("utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in trees}
    by_folder: Counter[str] = Counter()
    for file, count in lines.items():
        by_folder[file.relative_to(ROOT).parent.as_posix()] += count
    for folder, count in by_folder.items():
        print(f"{count:7,} lines  {folder}")
    print(f"{sum(lines.values()):7,} lines in {len(lines)} files")
    print(
        listed(
            f"files over {LINES_OF_A_FILE} lines",
            [
                f"{file.relative_to(ROOT)} ({count})"
                for file, count in lines.items()
                if count > LINES_OF_A_FILE
            ],
        )
    )
    functions = [
        (node, f"{node.name} in {file.relative_to(ROOT)}")
        for file, tree in trees.items()
        if not is_for_a_compiler(file)
        for node in ast.walk(tree)
        if isinstance(node, Function)
    ]
    print("without what Numba and Triton compile:")
    print(most("longest function", [(length(node), where) for node, where in functions], LINES_OF_A_FUNCTION))
    print(most("most parameters", [(parameters(node), where) for node, where in functions], PARAMETERS))
    modules = {name_of(file) for file in trees}
    graph = {name_of(file): imports(file, tree, modules) for file, tree in trees.items()}
    print(listed("import cycles, deferred imports counted", cycles(graph)))
    print(listed("imports of a higher floor", upwards(graph)))
    print(f"README.md: {(ROOT / 'README.md').stat().st_size / 1000:.1f} KB")
    print("mono-quant-hf --help:", help_seconds())


if __name__ == "__main__":
    main()
