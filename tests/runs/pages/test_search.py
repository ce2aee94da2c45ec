"""The page that searches sentences: what is in its folder, and errors; no browser."""

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from sentences import LENGTHS, decoder, folder, lines, text_file

from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.pages.search import LIBRARY, PAGE, SENTENCES, WASM, write_search

MODEL_FILES = ["model/config.json", "model/onnx/model.onnx", "model/tokenizer.json",
               "model/tokenizer_config.json"]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    return folder(tmp_path / "small")


@pytest.fixture
def packages(tmp_path) -> Path:
    """A folder with node_modules, in which files have their names alone for content."""
    library = tmp_path / "npm" / "node_modules" / "@huggingface" / "transformers" / "dist"
    wasm = tmp_path / "npm" / "node_modules" / "onnxruntime-web" / "dist"
    for place, names in ((library, [LIBRARY]), (wasm, WASM)):
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_text(name)
    return tmp_path / "npm"


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def setup(page: Path) -> dict:
    text = (page / "index.html").read_text()
    return json.loads(text.partition('id="setup">')[2].partition("</script>")[0])


def test_a_page_has_all_that_it_needs(source, packages, tmp_path):
    page = tmp_path / "page"
    made = write_search(source, page, transformers_js=packages)
    assert names(page) == sorted([*PAGE, LIBRARY, *WASM, *MODEL_FILES])
    assert made.nbytes == sum((page / name).stat().st_size for name in names(page))
    for name in MODEL_FILES:
        assert (page / name).read_bytes() == (source / name.removeprefix("model/")).read_bytes()
    found = setup(page)
    assert found["sentences"] == list(SENTENCES)
    assert (found["dtype"], found["pooling"], found["model"]) == ("fp32", "mean", "model")
    assert found["modelBytes"] == (source / "onnx" / "model.onnx").stat().st_size
    for name in PAGE:
        assert "://" not in (page / name).read_text(), name


def test_the_package_may_be_named_itself(source, packages, tmp_path):
    package = packages / "node_modules" / "@huggingface" / "transformers"
    write_search(source, tmp_path / "page", transformers_js=package)
    assert LIBRARY in names(tmp_path / "page")


def test_sentences_pooling_and_dtype_are_those_of_the_user(source, packages, tmp_path):
    (source / "onnx" / "model.onnx").rename(source / "onnx" / "model_quantized.onnx")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    text = text_file(tmp_path / "lines.txt", 1100)
    page = tmp_path / "page"
    write_search(source, page, data=f"text:{text}", transformers_js=packages)
    found = setup(page)
    assert found["sentences"] == lines(1100)[:1000]
    assert (found["dtype"], found["pooling"]) == ("q8", "cls")
    config = {"transformers.js_config": {"dtype": "int8"}}
    (source / "config.json").write_text(json.dumps(config))
    write_search(source, page, transformers_js=packages)  # an earlier page is replaced
    assert setup(page)["dtype"] == "int8"


def test_text_that_looks_like_html_is_text(source, packages, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("</script><script>alert(1)</script>\n</textarea><b>\n")
    write_search(source, tmp_path / "page", data=f"text:{path}", transformers_js=packages)
    text = (tmp_path / "page" / "index.html").read_text()
    assert text.count("<script") == 2 and "<b>" not in text and text.count("</textarea>") == 1


def test_folders_without_what_a_page_needs_are_refused(source, packages, tmp_path):
    page = tmp_path / "page"
    (source / "onnx" / "other.onnx").write_bytes((source / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(Prune2OnnxError, match=r"model\.onnx, other\.onnx; a demo needs"):
        write_search(source, page, transformers_js=packages)
    (source / "onnx" / "other.onnx").unlink()
    for name in ("config.json", "tokenizer.json"):
        content = (source / name).read_bytes()
        (source / name).unlink()
        with pytest.raises(Prune2OnnxError, match=f"no {name} in it"):
            write_search(source, page, transformers_js=packages)
        (source / name).write_bytes(content)
    onnx.save(decoder(), source / "onnx" / "model.onnx")
    with pytest.raises(Prune2OnnxError, match=r"its outputs are logits, present\.0\.key"):
        write_search(source, page, transformers_js=packages)
    assert not page.exists()


def test_other_data_than_text_is_refused(source, packages, tmp_path):
    with pytest.raises(RecipeError, match="expected text:FILE"):
        write_search(source, tmp_path / "page", data="digits", transformers_js=packages)


def test_missing_packages_are_named_with_what_to_do(source, packages, tmp_path, monkeypatch):
    page = tmp_path / "page"
    with pytest.raises(Prune2OnnxError, match="npm install --ignore-scripts"):
        write_search(source, page, transformers_js=tmp_path)
    monkeypatch.chdir(packages)
    write_search(source, page)  # in ./node_modules
    (packages / "node_modules" / "onnxruntime-web" / "dist" / WASM[1]).unlink()
    with pytest.raises(Prune2OnnxError, match="no onnxruntime-web beside it"):
        write_search(source, page)


def test_a_folder_with_something_else_stays(source, packages, tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    (page / "notes.txt").write_text("mine")
    with pytest.raises(Prune2OnnxError, match=r"holds notes\.txt"):
        write_search(source, page, transformers_js=packages)
    assert names(page) == ["notes.txt"]


def test_the_command(source, packages, tmp_path):
    arguments = ["demo", str(source), "-o", str(tmp_path / "page")]
    done = CliRunner().invoke(main, arguments, env={"PRUNE2ONNX_TRANSFORMERS_JS": str(packages)})
    assert done.exit_code == 0, done.output
    nbytes = (source / "onnx" / "model.onnx").stat().st_size
    assert f"of which the model takes {nbytes:,}" in done.stderr
    assert json.loads((source / "tokenizer_config.json").read_text())["model_max_length"] == LENGTHS
