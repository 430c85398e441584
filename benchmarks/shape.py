"""The shape of the source: long files, long functions, string keys, parameters of any type.

    python benchmarks/shape.py                     # of this tree
    python benchmarks/shape.py --against REVISION  # beside that of a commit

Signs, not laws: where one stays, it should read better so. Counted are the packages that are installed, not tests,
examples and benchmarks.

files       lines above 400
functions   lines above 60, from ``def`` to the last statement
keys        subscripts with a string, x["key"], per 1,000 lines: data without a type
any         share of parameters whose annotation says Any
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hallucination_guard", "policies", "integrations")
LONG_FILE, LONG_FUNCTION = 400, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What was counted.

    Args:
        files: those above the limit, with their lines.
        functions: those above the limit, with their lines.
        longest: lines of the longest function.
        lines: of all files.
        keys: subscripts with a string.
        parameters: of all functions, without ``self`` and ``cls``.
        untyped: those whose annotation says Any.
    """

    files: dict[str, int]
    functions: dict[str, int]
    longest: int
    lines: int
    keys: int
    parameters: int
    untyped: int


def measured(root: Path) -> Shape:
    """The shape of the packages below a folder."""
    files: dict[str, int] = {}
    functions: dict[str, int] = {}
    lines = keys = parameters = untyped = 0
    for path in sorted(each for package in PACKAGES for each in (root / package).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = str(path.relative_to(root))
        files[name] = source.count("\n")
        lines += files[name]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{name}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
                for parameter in _parameters(node.args):
                    parameters += 1
                    untyped += parameter.annotation is not None and "Any" in ast.unparse(parameter.annotation)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                keys += isinstance(node.slice.value, str)
    return Shape(
        files={name: count for name, count in files.items() if count > LONG_FILE},
        functions={name: count for name, count in functions.items() if count > LONG_FUNCTION},
        longest=max(functions.values()),
        lines=lines,
        keys=keys,
        parameters=parameters,
        untyped=untyped,
    )


def _parameters(arguments: ast.arguments) -> Iterator[ast.arg]:
    rest = (each for each in (arguments.vararg, arguments.kwarg) if each is not None)
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest):
        if each.arg not in ("self", "cls"):
            yield each


def at_revision(revision: str) -> Shape:
    """The shape at a commit of this repository."""
    packed = subprocess.run(["git", "archive", revision, *PACKAGES], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        return measured(Path(folder))


def row(shape: Shape) -> list[str]:
    """The figures of a table."""
    return [
        str(shape.lines),
        str(len(shape.files)),
        f"{len(shape.functions)} (longest {shape.longest})",
        f"{1000 * shape.keys / shape.lines:.1f}",
        f"{shape.untyped / shape.parameters:.1%} ({shape.untyped} of {shape.parameters})",
    ]


def main() -> None:
    """Print the table, and what is above the limits now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="a commit to stand beside this tree")
    arguments = parser.parse_args()
    now = measured(ROOT)
    columns = {"now": row(now)}
    if arguments.against:
        columns = {arguments.against[:12]: row(at_revision(arguments.against)), **columns}
    names = ["lines", "files above 400", "functions above 60", "string keys per 1,000", "parameters with Any"]
    print(f"{'':24}" + "".join(f"{name:>26}" for name in columns))
    for at, name in enumerate(names):
        print(f"{name:24}" + "".join(f"{cells[at]:>26}" for cells in columns.values()))
    for name, count in {**now.files, **now.functions}.items():
        print(f"  {count:4}  {name}")


if __name__ == "__main__":
    main()
