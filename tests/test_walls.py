"""Who may import whom inside the project; the linter holds the walls to other libraries."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "prune2onnx"
EVERYWHERE = {"errors", "files"}
MAY_IMPORT = {
    "callables": set(),
    "benchmark": {"running"},
    "budget": {"recipe", "report"},
    "codecs": {"codecs"},
    "data": {"callables", "data"},
    "demo": {"graphs", "onnxfile", "recipe", "runfolder", "tensors"},
    "deployment": {"exporter", "pack", "shrink", "structure"},
    "exporter": {"strip"},
    "features": {"data", "onnxfile", "pack", "running", "validate"},
    "front": set(),
    "graphs": {"tensors"},
    "history": set(),
    "hoist": {"codecs", "graphs", "tensors"},
    "inline": {"codecs", "graphs"},
    "inspection": {"codecs", "graphs", "inline", "pack", "report", "sparse", "tensors"},
    "int8": {"graphs", "intake", "pack", "quantize", "running"},
    "intake": {"graphs", "hoist", "opset", "tensors"},
    "layertimes": {"benchmark", "int8", "onnxfile", "shrink"},
    "lossy": {"codecs", "inline", "quantize", "roles", "ways"},
    "onnxfile": {"codecs", "graphs", "tensors"},
    "opset": {"graphs"},
    "pack": {
        "codecs",
        "graphs",
        "inline",
        "intake",
        "onnxfile",
        "quantize",
        "report",
        "strip",
        "tensors",
    },
    "packing": {
        "data",
        "graphs",
        "inline",
        "intake",
        "lossy",
        "onnxfile",
        "pack",
        "report",
        "running",
        "shrink",
        "sparse",
        "strip",
        "structure",
        "validate",
    },
    "page": {"front", "history", "pictures", "recipe", "report", "runfolder"},
    "pictures": {"front", "history"},
    "pruning": {"pruning", "structure"},
    "quantize": set(),
    "quantizing": {
        "benchmark",
        "data",
        "inline",
        "int8",
        "intake",
        "onnxfile",
        "pack",
        "running",
        "validate",
    },
    "recipe": {"structure"},
    "report": set(),
    "roles": {"graphs"},
    "shrink": {"graphs", "shrink", "structure", "tensors"},
    "runfolder": {"front", "history", "onnxfile", "pack", "recipe", "report", "tensors"},
    "running": {"report"},
    "shrinking": {
        "inline",
        "intake",
        "onnxfile",
        "pack",
        "running",
        "shrink",
        "structure",
        "validate",
    },
    "sparse": {"codecs", "graphs", "report", "tensors"},
    "structure": set(),
    "strip": {"codecs", "graphs"},
    "study": {"front", "recipe", "report"},
    "sweeping": {
        "data",
        "exporter",
        "front",
        "page",
        "pipeline",
        "recipe",
        "report",
        "runfolder",
        "study",
        "training",
    },
    "tensors": set(),
    "training": {"data", "history", "pruning", "recipe", "structure", "training"},
    "validate": {"inline", "inspection", "onnxfile", "pack", "report", "running"},
    "ways": {"quantize", "roles"},
}


def imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("prune2onnx.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_knows_only_the_rooms_it_may(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else []
    files += (PACKAGE / room).glob("*.py")
    assert files
    for path in files:
        assert imported(path) <= MAY_IMPORT[room] | EVERYWHERE, path


def test_models_are_written_as_a_user_would():
    for path in (PACKAGE.parent / "models").glob("*.py"):
        assert "prune2onnx" not in path.read_text()
