"""What `pack` and `inspect` say of a file that takes long to open."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from networks import model
from onnx import helper

from prune2onnx.cli.main import main
from prune2onnx.graph.file import save


def said_of(verb: str, *arguments: Path | str) -> Result:
    result = CliRunner().invoke(main, [verb, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_a_file_that_takes_long_to_open_is_warned_of_with_an_option_that_helps(tmp_path):
    source, packed = tmp_path / "in.onnx", tmp_path / "out.onnx"
    weight = np.rint(3 * np.random.default_rng(0).normal(size=(1100, 1000))).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    save(model([node], {"w": weight}, {"x": ["N", 1100]}, {"y": ["N", 1000]}), source)
    result = said_of("pack", source, packed, "--load", "small", "--json")
    (line,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert line.startswith(f"prune2onnx: {packed}: warning: a load takes about ")
    assert line.endswith("; --load balanced takes less")
    assert json.loads(result.stdout)["load_warning"] in line
    said = said_of("inspect", packed).stderr
    assert "prune2onnx pack with --load balanced makes one that takes less" in " ".join(
        said.split()
    )
    assert "warning" not in said_of("inspect", source).stderr
