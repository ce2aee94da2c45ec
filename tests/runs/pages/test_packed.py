"""The page of a packed file: what the command knows is on it, escaped, and nothing is fetched."""

import re

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from examples import convnet, images
from finished import HOSTILE

from prune2onnx.cli.main import main
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.pages.packed import Packed, packed_page
from prune2onnx.runs.report import CurvePoint, Goal


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    onnx.save(convnet(), folder / "in.onnx")
    np.savez(folder / "data.npz", x=images(96, 0))
    return folder


def packed(folder, *arguments: str):
    command = ["pack", str(folder / "in.onnx"), str(folder / "out.onnx"), *arguments]
    return CliRunner().invoke(main, command)


def test_the_page_has_what_the_command_knows(files):
    page = files / "out.html"
    given = ["--data", f"npz:{files / 'data.npz'}", "--max-error", "10%", "--curve"]
    result = packed(files, *given, "--report", str(page))
    assert result.exit_code == 0 and str(page) in result.output
    text = page.read_text()
    size = (files / "out.onnx").stat().st_size
    assert f">{size:,}<" in text and "c.w" in text and "calibrated grid" in text
    assert "error of the outputs" in text and text.count('<svg class="picture"') == 1
    shown = [int(n.replace(",", "")) for n in re.findall(r'row" class="number">([\d,]+)<', text)]
    assert shown == sorted(shown) and len(shown) == 6 and size in shown
    assert text.count("<script") == 1 and not re.search(r"https?://(?!www.w3.org)", text)


def test_without_loss_there_is_no_curve_and_no_change(files):
    page = files / "lossless.html"
    assert packed(files, "--report", str(page)).exit_code == 0
    text = page.read_text()
    assert "<svg" not in text and "0 of them changed" in text


def test_the_page_replaces_neither_file(files):
    before = (files / "in.onnx").read_bytes()
    for name in ("in.onnx", "out.onnx"):
        result = packed(files, "--report", str(files / name))
        assert result.exit_code == 1 and name in result.output
    assert (files / "in.onnx").read_bytes() == before


def test_names_are_text_and_no_markup():
    row = WeightRow(HOSTILE, (3, 4), "float32", 12, "dense", 48, HOSTILE)
    curve = (CurvePoint(100, 0.0, 1.0, False), CurvePoint(200, 0.0, -0.5, True))
    facts = Packed(
        HOSTILE,
        HOSTILE,
        300,
        200,
        [row],
        {HOSTILE: 0.5},
        {HOSTILE: HOSTILE},
        [Goal("size", 250.0, 300.0)],
        curve,
        [HOSTILE],
    )
    page = packed_page(facts)
    assert HOSTILE not in page and page.count("<script") == 1
    assert packed_page(facts) == page and "missed by 50 bytes" in page
