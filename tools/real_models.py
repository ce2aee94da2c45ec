"""Tries every ONNX file in a folder: packed, unpacked, validated, shrunk, at 4 bits, in int8.

    python tools/real_models.py FOLDER

FOLDER may hold whatever people ship, such as unpacked wheels. Each verb runs in a process of its
own. A cell of "packed" and "4 bits" is a size; "unpack" says whether all weights came back bit for
bit; the others hold what the verb proved, or its one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from prune2onnx.graph.walk import in_model


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and the last line of stderr of a verb."""
    command = [sys.executable, "-m", "prune2onnx", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return 124, "", "more than 600 s"
    lines = done.stderr.strip().splitlines() or [""]
    return done.returncode, done.stdout, lines[-1].removeprefix("prune2onnx: ")[:120]


def weights(path: Path) -> dict[str, bytes]:
    """Every tensor of a file, as it is stored."""
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor).tobytes()
        for tensor in in_model(onnx.load(path))
        if tensor.name and tensor.data_type != onnx.TensorProto.STRING
    }


def row(path: Path, folder: Path) -> list[str]:
    """The cells of one file."""
    packed, plain, small, few = (folder / f"{n}.onnx" for n in ("packed", "plain", "small", "few"))
    before = path.stat().st_size
    cells = [path.name, f"{before:,}"]
    code, out, said = run("pack", path, packed, "--json")
    if code:
        return [*cells, f"{code}: {said}"]
    cells.append(f"{json.loads(out)['nbytes']:,}")
    code, _, said = run("unpack", packed, plain)
    kept = set() if code else set(weights(plain).values())  # some move, and get other names
    lost = [value for value in weights(path).values() if value not in kept]
    cells.append(said if code else f"{len(lost)} are not there" if lost else "equal")
    code, out, said = run("validate", packed, "--json")
    if code:
        cells.append(f"{code}: {said}")
    else:
        report = json.loads(out)
        difference = report["max_abs_diff"]
        folded = "folds" if report["folded"] else "does not fold"
        proved = report["skipped"][:80] if difference is None else f"differs by {difference:.1g}"
        cells.append(f"{folded}, {proved}")
    code, out, said = run("shrink", path, small, "--json")
    if code:
        cells.append(f"{code}: {said}")
    else:
        made = json.loads(out)
        proved = [note for note in made["notes"] if "not run" in note]
        cells.append(f"{made['removed']} removed" + (f"; {proved[0][:80]}" if proved else ""))
    code, out, said = run("pack", path, few, "--bits", 4, "--json")
    if code:
        cells.append(f"{code}: {said}")
    else:
        facts = json.loads(out)
        stays = [note for note in facts["notes"] if "bytes stay" in note]
        cells.append("; ".join([f"{facts['nbytes']:,}", *stays[:2]]))
    options = ("--data", "random", "--max-rel-error", 1, "--json")
    code, out, said = run("quantize", path, folder / "int8.onnx", *options)
    if code:
        return [*cells, f"{code}: {said}"]
    made = json.loads(out)
    layers = made["layers"]
    count = sum(layer["is_int8"] for layer in layers)
    why = sorted({layer["reason"][:60] for layer in layers if not layer["is_int8"]})
    figures = f"{count} of {len(layers)} layers, error {made['error']:.2g}"
    return [*cells, "; ".join([figures, *why[:2]])]


def main(folder: Path) -> None:
    """Prints the table."""
    print("| file | bytes | packed | unpack | validate | shrink | 4 bits | int8 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(folder.rglob("*.onnx")):
        with tempfile.TemporaryDirectory() as scratch:
            print("| " + " | ".join(row(path, Path(scratch))) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
