"""Who may import whom, and how large a module or a folder may be; the linter holds the walls to
other libraries."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "prune2onnx"

ORDER = (
    {"errors"},
    {"files", "callables"},
    {"graph"},
    {"shrinking"},
    {"packing"},
    {"tasks"},
    {"data"},
    {"pruning"},
    {"runs"},
    {"runtime", "training"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
)
"""A module imports from rows above its own, and from its own folder; nothing else."""

ROW = {name: number for number, row in enumerate(ORDER) for name in row}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """Modules of the project that one imports: at its top, in functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("prune2onnx."))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            if (
                node.module == "prune2onnx"
            ):  # the package itself has names, and no module of its own
                yield "prune2onnx.__init__"
            elif node.module and node.module.startswith("prune2onnx."):
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
                yield from inside or {node.module}


def unit_of(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_the_order(path):
    own = unit_of(name_of(path))
    for name in imports(path):
        other = unit_of(name)
        assert ROW[other] < ROW[own] or other == own, f"{own} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    above = {name_of(path): set(imports(path)) - {name_of(path)} for path in MODULES}
    while above:
        free = {name for name, others in above.items() if not others & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {name: others for name, others in above.items() if name not in free}


def test_the_root_tells_the_story_and_no_folder_is_crowded():
    entries = [entry for entry in PACKAGE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 16 and {entry.stem for entry in entries} == set(ROW)
    for folder in {path.parent for path in MODULES}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 15, folder
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 500, path


def test_models_are_written_as_a_user_would():
    for path in (PACKAGE.parent / "models").glob("*.py"):
        if path.name.startswith("own_loop"):  # programs that use it
            continue
        assert "prune2onnx" not in path.read_text()
