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


def imports(file: Path, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, those within functions too."""
    package = list(file.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return found & modules - {name_of(file)}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def cycle(graph: dict[str, set[str]]) -> str:
    # A package's __init__ imports its files, which import their siblings by way of it: only files are compared.
    files = {
        name: {n for n in needed if n.count(".") > 1} for name, needed in graph.items() if name.count(".") > 1
    }
    try:
        list(TopologicalSorter(files).static_order())
    except CycleError as error:
        return " -> ".join(error.args[1])
    return "none"


def main() -> None:
    trees = {file: ast.parse(file.read_text("utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in trees}
    by_folder: Counter[str] = Counter()
    for file, count in lines.items():
        by_folder[file.relative_to(ROOT).parent.as_posix()] += count
    for folder, count in by_folder.items():
        print(f"{count:7,} lines  {folder}")
    print(f"{sum(lines.values()):7,} lines in {len(lines)} files")
    long_files = [f"{file.relative_to(ROOT)} ({count})" for file, count in lines.items() if count > 500]
    print("files over 500 lines:", ", ".join(long_files) or "none")
    functions = [
        (node, file)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for what, size in (
        ("longest function", lambda node: (node.end_lineno or 0) - node.lineno + 1),
        (
            "most parameters",
            lambda node: len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs),
        ),
    ):
        node, file = max(functions, key=lambda pair: size(pair[0]))
        print(f"{what}: {size(node)}, {node.name} in {file.relative_to(ROOT)}")
    modules = {name_of(file) for file in trees}
    print(
        "import cycle:", cycle({name_of(file): imports(file, tree, modules) for file, tree in trees.items()})
    )
    print(f"README.md: {(ROOT / 'README.md').stat().st_size / 1000:.1f} KB")
    start = time.perf_counter()
    helped = subprocess.run(
        [sys.executable, "-m", "mono_quant_hf", "--help"], cwd=ROOT, capture_output=True, check=False
    )
    said = f"{time.perf_counter() - start:.2f} s" if helped.returncode == 0 else "not run: not installed"
    print("mono-quant-hf --help:", said)


if __name__ == "__main__":
    main()
