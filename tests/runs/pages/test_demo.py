"""The folder of `prune2onnx demo`: its files, what is refused, and writing all or nothing."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from prune2onnx.cli.main import main
from prune2onnx.data import load_data
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.pages import demo as module
from prune2onnx.runs.pages.demo import MODEL, PAGE, RUNTIME, write_demo
from prune2onnx.runtime.inputs import random_inputs
from prune2onnx.runtime.session import session


def classifier(
    shape=("batch", 1, 28, 28),
    classes=10,
    *,
    element_type=TensorProto.FLOAT,
    name="pixels",
    softmax=False,
):
    """A linear classifier of images."""
    pixels = int(np.prod([extent for extent in shape[1:] if isinstance(extent, int)]))
    weight = np.random.default_rng(0).standard_normal((classes, pixels)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", [name], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
        helper.make_node("Softmax" if softmax else "Identity", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, element_type, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], classes])],
        [numpy_helper.from_array(weight, "weight")],
    )
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.fixture
def ort_web(tmp_path):
    """The package as npm installs it, with other contents of the files."""
    dist = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in (*RUNTIME, "ort.all.min.mjs", "ort.wasm.min.mjs.map"):
        (dist / name).write_text(f"content of {name}")
    return dist.parent


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    return finished(tmp_path / "run", classifier(), "mnist")


def finished(folder, model, data, name="models/lenet.py:lenet5"):
    folder.mkdir()
    onnx.save(model, folder / MODEL)
    sides = {"dense": {"nbytes": 5000, "error": 0.5}, "compressed": {"nbytes": 50, "error": 0.75}}
    (folder / "report.json").write_text(json.dumps(sides))
    (folder / "recipe.yaml").write_text(json.dumps({"model": name, "data": data}))
    return folder


def setup_of(page: Path) -> dict:
    text = (page / "index.html").read_text()
    return json.loads(re.search(r'id="setup">(.*?)</script>', text, re.DOTALL).group(1))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_page_model_and_runtime_and_no_more(run, ort_web, tmp_path):
    done = write_demo(run, tmp_path / "page", ort_web=ort_web)
    found = contents(tmp_path / "page")
    assert set(found) == {*PAGE, MODEL, *RUNTIME}
    assert done.files == {name: len(content) for name, content in found.items()}
    assert done.nbytes == sum(map(len, found.values()))
    assert done.notes == ()
    assert found[MODEL] == (run / MODEL).read_bytes()
    for name in RUNTIME:
        assert found[name] == (ort_web / "dist" / name).read_bytes()


def test_the_page_knows_model_data_and_figures(run, ort_web, tmp_path):
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    setup = setup_of(tmp_path / "page")
    assert (setup["input"], setup["shape"], setup["output"]) == ("pixels", [1, 28, 28], "scores")
    assert setup["names"] == list("0123456789")
    assert setup["levels"] == 255
    assert setup["fit"] == {"box": 20, "by": "mass"}
    assert (setup["denseBytes"], setup["denseError"], setup["error"]) == (5000, 0.5, 0.75)
    assert not setup["probabilities"]
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<h1>lenet5</h1>" in text
    assert re.search('id="fit" checked', text)
    assert 'id="dark"' not in text


def test_the_digits_have_sixteen_levels(ort_web, tmp_path):
    run = finished(tmp_path / "run", classifier((1, 1, 8, 8)), "digits")
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    setup = setup_of(tmp_path / "page")
    assert setup["levels"] == 16
    x = load_data("digits").test[0][0]
    assert np.array_equal(x * 16, np.round(x * 16))


def test_a_file_alone_has_a_page_too(ort_web, tmp_path):
    onnx.save(classifier(), tmp_path / "net.onnx")
    done = write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)
    setup = setup_of(tmp_path / "page")
    assert setup["names"][:2] == ["class 0", "class 1"]
    assert "error" not in setup
    text = (tmp_path / "page" / "index.html").read_text()
    assert "<h1>net</h1>" in text
    assert 'id="dark"' in text  # it is not known whether ink is light or dark
    assert re.search(r'id="fit">', text)  # an option, off by default: the data may not be MNIST
    assert re.fullmatch(r".*net\.onnx: how its training data were scaled .*", done.notes[0])
    assert write_demo(tmp_path / "net.onnx", tmp_path / "page", data="mnist", ort_web=ort_web)
    assert setup_of(tmp_path / "page")["names"] == list("0123456789")


def test_images_in_colour_are_chosen_and_not_drawn(ort_web, tmp_path):
    onnx.save(classifier((1, 3, 6, 9), 3), tmp_path / "net.onnx")
    write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)
    text = (tmp_path / "page" / "index.html").read_text()
    assert 'id="board"' not in text
    assert 'id="drop"' in text
    assert "9&nbsp;&times;&nbsp;6&nbsp;pixels" in text


@pytest.mark.parametrize("sets", [("",), ("train", "test")])
def test_class_names_are_the_folders_in_the_order_of_training(sets, ort_web, tmp_path):
    shades = {"Zebra": 10, "apple": 200, "äpfel": 90, "10": 150}
    for part in sets:
        for name, shade in shades.items():
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(10):
                Image.new("RGB", (4, 4), (shade, 0, index)).save(folder / f"{index}.png")
    spec = f"folder:{tmp_path / 'images'}"
    run = finished(tmp_path / "run", classifier((1, 3, 4, 4), 4), spec)
    assert write_demo(run, tmp_path / "page", ort_web=ort_web).notes == ()
    names = setup_of(tmp_path / "page")["names"]
    for x, y in load_data(spec).train:
        assert shades[names[int(y)]] == round(float(x[0, 0, 0]) * 255)


def test_unknown_class_names_are_numbers_and_a_note_says_so(ort_web, tmp_path):
    run = finished(tmp_path / "run", classifier((1, 3, 4, 4), 4), f"folder:{tmp_path / 'gone'}")
    done = write_demo(run, tmp_path / "page", ort_web=ort_web)
    assert setup_of(tmp_path / "page")["names"] == [f"class {index}" for index in range(4)]
    assert "gone: No such file or directory; classes are shown as numbers" in done.notes[0]
    (tmp_path / "gone" / "one").mkdir(parents=True)
    done = write_demo(run, tmp_path / "page", ort_web=ort_web)
    assert "1 class folders, but the model has 4 classes" in done.notes[0]


def test_names_are_escaped(ort_web, tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    for name in (bad, "b&b", "'\"\u2028"):
        (tmp_path / "images" / name).mkdir(parents=True)
    model = classifier((1, 3, 4, 4), 3, name="</script><script>alert(1)</script>")
    run = finished(tmp_path / "run", model, f"folder:{tmp_path / 'images'}", f"net.py:{bad}")
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    text = (tmp_path / "page" / "index.html").read_text()
    assert bad not in text
    assert "<script>alert" not in text
    assert f"<h1>{html.escape(bad)}</h1>" in text
    setup = setup_of(tmp_path / "page")
    assert setup["names"] == sorted([bad, "b&b", "'\"\u2028"])
    assert setup["input"] == "</script><script>alert(1)</script>"


def test_a_folders_path_stays_out_of_the_page(ort_web, tmp_path):
    run = finished(
        tmp_path / "run",
        classifier(),
        f"mnist:{tmp_path / 'private'}",
        f"{tmp_path}/private/net.py:make",
    )
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    assert "private" not in (tmp_path / "page" / "index.html").read_text()


def test_the_page_knows_no_address_but_its_own(run, ort_web, tmp_path):
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    for name in PAGE:
        text = (tmp_path / "page" / name).read_text()
        assert not re.search(r"https?:|\burl\(|(?:src|href)\s*=\s*[\"']?//|@import", text), name


def test_scores_that_are_probabilities_are_left_alone(ort_web, tmp_path):
    onnx.save(classifier(softmax=True), tmp_path / "net.onnx")
    write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)
    assert setup_of(tmp_path / "page")["probabilities"]


def test_the_model_that_goes_first_runs(tmp_path):
    probe = onnx.load_model_from_string(module._probe())
    opened = session(probe)
    (x,) = random_inputs(probe)
    assert np.array_equal(opened.run(None, x)[0], x["x"])


@pytest.mark.parametrize("place", ["package", "dist", "above", "here"])
def test_onnxruntime_web_is_found(place, run, ort_web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"package": ort_web, "dist": ort_web / "dist", "above": tmp_path, "here": None}
    write_demo(run, tmp_path / "page", ort_web=places[place])
    assert (tmp_path / "page" / RUNTIME[0]).exists()


def two_inputs():
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return model


def weights_as_inputs():
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [10, 784]))
    return model


def no_classes(shape):
    model = classifier()
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    dims = [{"dim_value": e} if isinstance(e, int) else {"dim_param": e} for e in shape]
    for dim in dims:
        model.graph.output[0].type.tensor_type.shape.dim.add(**dim)
    return model


def test_weights_listed_as_inputs_are_none(ort_web, tmp_path):
    onnx.save(weights_as_inputs(), tmp_path / "net.onnx")
    write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)
    assert setup_of(tmp_path / "page")["input"] == "pixels"


IMAGES = r"expected float \[N, C, H, W\] with N dynamic or 1, C 1 or 3, H and W fixed"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (classifier((1, 784)), rf"input pixels is float \[1, 784\], {IMAGES}"),
        (classifier((1, 4, 8, 8)), rf"is float \[1, 4, 8, 8\], {IMAGES}"),
        (classifier((8, 3, 8, 8)), rf"is float \[8, 3, 8, 8\], {IMAGES}"),
        (classifier((1, 3, "h", 8)), rf"is float \[1, 3, h, 8\], {IMAGES}"),
        (classifier((1, 3, None, 8)), rf"is float \[1, 3, \?, 8\], {IMAGES}"),
        (classifier(element_type=TensorProto.DOUBLE), rf"is double \[batch, 1, 28, 28\], {IMAGES}"),
        (two_inputs(), "inputs: pixels, more; a demo needs a model with one input"),
        (classifier(classes=1), r"output scores has shape \[batch, 1\], expected \[N, classes\]"),
        (no_classes(["batch", "k"]), r"output scores has shape \[batch, k\], expected"),
        (no_classes(["batch", 5, 9]), r"output scores has shape \[batch, 5, 9\], expected"),
    ],
)
def test_a_model_that_is_no_classifier_of_images_is_refused(model, says, ort_web, tmp_path):
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(Prune2OnnxError, match=says):
        write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("lacking", [MODEL, "report.json", "recipe.yaml"])
def test_a_run_that_is_not_finished_is_refused(lacking, run, ort_web, tmp_path):
    (run / lacking).unlink()
    with pytest.raises(Prune2OnnxError, match=rf"run: no {lacking} in it, so it is no finished"):
        write_demo(run, tmp_path / "page", ort_web=ort_web)


@pytest.mark.parametrize("content", ["", "[]", '{"dense": {}, "compressed": {}}', "\x00"])
def test_a_report_that_is_none_is_refused(content, run, ort_web, tmp_path):
    (run / "report.json").write_text(content)
    with pytest.raises(Prune2OnnxError, match=r"report\.json: not a report of prune2onnx compress"):
        write_demo(run, tmp_path / "page", ort_web=ort_web)


def test_figures_that_are_no_numbers_are_left_out(run, ort_web, tmp_path):
    sides = {"dense": {"nbytes": 9, "error": None}, "compressed": {"nbytes": 9, "error": np.nan}}
    (run / "report.json").write_text(json.dumps(sides))
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    assert setup_of(tmp_path / "page")["error"] is None
    assert "Test error" not in (tmp_path / "page" / "index.html").read_text()


def test_what_is_no_model_is_refused(ort_web, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    for name in ("net.onnx", "missing.onnx"):
        with pytest.raises(Prune2OnnxError, match=name):
            write_demo(tmp_path / name, tmp_path / "page", ort_web=ort_web)


def test_weights_in_a_second_file_are_refused(ort_web, tmp_path):
    onnx.save(classifier(), tmp_path / "net.onnx", save_as_external_data=True, location="net.data")
    with pytest.raises(Prune2OnnxError, match=r"net\.onnx: its weights are in a second file"):
        write_demo(tmp_path / "net.onnx", tmp_path / "page", ort_web=ort_web)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("mnits", "data 'mnits': expected mnist, digits, idx:DIR"),
        ("digits", r"takes images of shape \[1, 28, 28\], those of digits are \[1, 8, 8\]"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, says, run, ort_web, tmp_path):
    with pytest.raises(RecipeError, match=says):
        write_demo(run, tmp_path / "page", data=data, ort_web=ort_web)


def test_without_onnxruntime_web_the_error_says_how_to_get_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = "get it with npm install onnxruntime-web, here or elsewhere, and name its folder with "
    for given in (None, tmp_path / "elsewhere"):
        with pytest.raises(Prune2OnnxError, match=advice + "--ort-web FOLDER"):
            write_demo(run, tmp_path / "page", ort_web=given)
    assert not (tmp_path / "page").exists()


def test_an_onnxruntime_web_that_is_too_old_is_refused(run, ort_web, tmp_path):
    (ort_web / "dist" / RUNTIME[0]).unlink()
    says = rf"no {RUNTIME[0]} in it, expected onnxruntime-web 1\.19 or newer"
    with pytest.raises(Prune2OnnxError, match=says):
        write_demo(run, tmp_path / "page", ort_web=ort_web)


def test_a_page_is_replaced_and_nothing_else_is(run, ort_web, tmp_path):
    page = tmp_path / "page"
    page.mkdir()  # empty
    write_demo(run, page, ort_web=ort_web)
    (page / "demo.js").write_text("old")
    write_demo(run, page, ort_web=ort_web)
    assert (page / "demo.js").read_text() != "old"
    (page / "thesis.tex").write_text("the only copy")
    before = contents(page)
    with pytest.raises(
        Prune2OnnxError, match=r"page: holds thesis\.tex, which is no file of a demo"
    ):
        write_demo(run, page, ort_web=ort_web)
    assert contents(page) == before
    with pytest.raises(Prune2OnnxError, match=r"thesis\.tex: a file, expected a folder"):
        write_demo(run, page / "thesis.tex", ort_web=ort_web)


def test_a_page_can_be_made_of_the_model_in_it(run, ort_web, tmp_path):
    page = tmp_path / "page"
    write_demo(run, page, ort_web=ort_web)
    write_demo(page / MODEL, page, data="mnist", ort_web=page)
    assert set(contents(page)) == {*PAGE, MODEL, *RUNTIME}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("fails", ["write", "rename"])
def test_where_writing_fails_all_is_as_before(exists, fails, run, ort_web, tmp_path, monkeypatch):
    page = tmp_path / "page"
    if exists:
        write_demo(run, page, ort_web=ort_web)
        (page / "demo.js").write_text("old")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    write, rename = module.write_whole, Path.replace

    def full(path, content):
        if path.name == MODEL:
            raise Prune2OnnxError("no space")
        write(path, content)

    def refused(self, target):
        if Path(target) == page and self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    if fails == "write":
        monkeypatch.setattr(module, "write_whole", full)
    else:
        monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(Prune2OnnxError, match=r"no space|be written: Permission denied"):
        write_demo(run, page, ort_web=ort_web)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_what_a_killed_run_left_is_cleared_away(run, ort_web, tmp_path):
    for name in (".page.partial", ".page.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("...")
    write_demo(run, tmp_path / "page", ort_web=ort_web)
    assert set(contents(tmp_path / "page")) == {*PAGE, MODEL, *RUNTIME}
    assert not list(tmp_path.glob(".page*"))


def test_the_command_says_how_to_look(run, ort_web, tmp_path):
    arguments = ["demo", str(run), "-o", str(tmp_path / "page"), "--ort-web", str(ort_web)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert f"view it with: python -m http.server -d {tmp_path / 'page'}" in done.stderr
    assert f"of which the model takes {(run / MODEL).stat().st_size:,}" in done.stderr
    done = CliRunner().invoke(main, [*arguments, "--data", "nothing"])
    assert done.exit_code == 2
    assert done.stderr.startswith("prune2onnx: data 'nothing'")


def test_torch_stays_out(run, ort_web, tmp_path):
    code = (
        "import sys; from pathlib import Path; from prune2onnx.runs.pages.demo import write_demo; "
        "write_demo(*map(Path, sys.argv[1:3]), ort_web=Path(sys.argv[3])); "
        "sys.exit('torch' in sys.modules)"
    )
    arguments = map(str, (run, tmp_path / "page", ort_web))
    assert subprocess.run([sys.executable, "-c", code, *arguments], check=False).returncode == 0
