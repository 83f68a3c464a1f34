"""Imports point one way, and `import fastgen` costs nothing."""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import ROOT, run_python

PACKAGE = ROOT / "fastgen"
MODULES = sorted(PACKAGE.rglob("*.py"))
ANYTHING = None
# Layer -> the layers of the package that it may import. `errors` is open to all; `fastgen` itself is the lazy front.
LAYERS: dict[str, set[str] | None] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "_build": set(),
    "ops": {"_build"},
    "nn": {"ops"},
    "models": {"nn", "losses", "options"},
    "losses": {"ops"},
    "images": set(),
    "options": set(),
    "data": {"images"},
    "metrics": {"data"},
    "tasks": {"data", "models"},
    "training": {"_build", "options", "models", "losses", "data", "metrics", "inference"},
    "runtime": {"_build"},
    "inference": {"nn", "ops", "runtime"},
    "cli": ANYTHING,
}


def imports(file: Path, package: str) -> Iterator[tuple[str, int, bool]]:
    """Each module that a file imports: its dotted name, the line, and whether the import is inside a function."""
    nodes: list[tuple[ast.AST, bool]] = [(ast.parse(file.read_text()), False)]
    while nodes:
        node, inside = nodes.pop()
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        nodes += [(child, inside) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            whole = module == "fastgen"  # from fastgen import ops
            yield from ((f"{module}.{alias.name}" if whole else module, node.lineno, inside) for alias in node.names)


def violations(file: Path) -> list[str]:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    layer, allowed = parts[0], LAYERS[parts[0]]
    found = []
    for name, line, inside in imports(file, ".".join(("fastgen", *parts[:-1]))):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top in ("tests", "benchmarks"):
            found.append(f"{file.relative_to(ROOT)}:{line}: the package imports {name}")
        elif top == "fastgen" and allowed is not ANYTHING:
            lazy_kernel = layer == "ops" and target == "kernels" and inside
            if not lazy_kernel and target not in {layer, "errors", "__version__", *allowed}:
                found.append(f"{file.relative_to(ROOT)}:{line}: {layer} imports {name}")
    return found


def test_every_module_has_a_layer():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert modules <= set(LAYERS), "name the layer of a new module, and what it may import, in LAYERS"


def test_package_imports_point_one_way():
    assert [line for file in MODULES for line in violations(file)] == []


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "kernels", "__future__", *sys.stdlib_module_names}
    found = [
        f"{file.relative_to(ROOT)}:{line}: kernels imports {name}"
        for file in sorted((ROOT / "kernels").rglob("*.py"))
        for name, line, _ in imports(file, "kernels")
        if name.partition(".")[0] not in allowed and not name.startswith("fastgen.kernels")
    ]
    assert found == []


def test_native_kernels_include_no_torch():
    files = (file for folder in ("shared", "cpu", "cuda") for file in sorted((ROOT / "csrc" / folder).rglob("*.*")))
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2|pybind11|Python\.h)\b", line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import fastgen.training.loop", ["fastgen.training.loop"]),
        ("from fastgen import ops, __version__", ["fastgen.ops", "fastgen.__version__"]),
        ("from .. import training", ["fastgen.training"]),
        ("from ..training.loop import train", ["fastgen.training.loop"]),
        ("from . import sequential", ["fastgen.nn"]),
        ("def f():\n    from fastgen.kernels import norm_act", ["fastgen.kernels"]),
    ],
)
def test_imports_are_read_in_every_form(tmp_path, text, expected):
    (tmp_path / "module.py").write_text(text)
    assert [name for name, _, _ in imports(tmp_path / "module.py", "fastgen.nn")] == expected


def graph_of_imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, at its top or within functions."""
    files = {".".join(("fastgen", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in MODULES}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph = {}
    for name, file in files.items():
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = {target for target in imported_files(file, package, set(files)) if target != name}
    return graph


def imported_files(file: Path, package: str, modules: set[str]) -> Iterator[str]:
    """`from package import name` imports the module of this name, else the package, which defines it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else module for name in names if module in modules)


def test_there_are_no_import_cycles():
    list(graphlib.TopologicalSorter(graph_of_imports()).static_order())  # CycleError names the modules


def test_an_import_cycle_is_found(tmp_path):
    """Also through an import within a function, or a relative import."""
    (tmp_path / "a.py").write_text("def f():\n    from . import b\n")
    (tmp_path / "b.py").write_text("from fastgen.ops.a import f\n")
    modules = {"fastgen.ops.a", "fastgen.ops.b", "fastgen.ops"}
    assert list(imported_files(tmp_path / "a.py", "fastgen.ops", modules)) == ["fastgen.ops.b"]
    assert list(imported_files(tmp_path / "b.py", "fastgen.ops", modules)) == ["fastgen.ops.a"]


def test_import_loads_nothing_and_is_silent():
    """Import time depends on what is loaded: only the package's front and the parts of Python that it uses."""
    code = """
import sys
before = set(sys.modules)
import fastgen
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = run_python(code)
    assert set(done.stdout.split()) <= {"fastgen", "importlib", "warnings"} and done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert (
        run_python("import sys, fastgen; print(*(m for m in sys.modules if m.startswith('fastgen.')))").stdout == "\n"
    )


def test_all_of_it_imports_no_compiler():
    """torch._dynamo takes as long to import as torch; torch.compile imports it when it is needed."""
    code = """
import sys
import fastgen.cli, fastgen.inference, fastgen.models, fastgen.nn, fastgen.ops, fastgen.training
print(*(name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules))
"""
    done = run_python(code)
    assert done.stdout.strip() == done.stderr == ""
