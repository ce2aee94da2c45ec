"""The demo page in a real browser, with onnxruntime-web: its scores are those of onnxruntime.

Skipped without Chromium, and without onnxruntime-web in the folder that PRUNE2ONNX_ORT_WEB names or
in ./node_modules.
"""

import base64
import io
import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from browser import chromium, console_errors, resize, served
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from prune2onnx import pack
from prune2onnx.data import load_data
from prune2onnx.runs.pages.demo import MODEL, RUNTIME, write_demo
from prune2onnx.runtime.session import session

SECONDS = 60  # for an answer, on a machine that is busy


@pytest.fixture(scope="module")
def ort_web() -> Path:
    """The npm package."""
    folder = Path(os.environ.get("PRUNE2ONNX_ORT_WEB", "node_modules/onnxruntime-web"))
    if not any((folder / part / RUNTIME[-1]).is_file() for part in ("dist", ".")):
        pytest.skip(
            "no onnxruntime-web: npm install onnxruntime-web, and PRUNE2ONNX_ORT_WEB names it"
        )
    return folder


@pytest.fixture(scope="module")
def driver():
    """One browser for all pages."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def digits(tmp_path_factory, ort_web):
    """A page for digits: MNIST if it is available, else scikit-learn's."""
    real = Path(os.environ.get("PRUNE2ONNX_DATA", "missing")) / "mnist"
    spec = f"mnist:{real}" if real.is_dir() else "digits"
    data = load_data(spec)
    folder = tmp_path_factory.mktemp("digits")
    train = [data.train[i] for i in range(1200)]
    x, y = (np.stack([example[part] for example in train]) for part in (0, 1))
    run_folder(folder / "run", pack(learned(x, y)).model, spec)
    write_demo(folder / "run", folder / "page", ort_web=ort_web)
    chosen = {int(data.test[i][1]): i for i in reversed(range(300))}
    return Page(folder / "page", np.stack([data.test[chosen[k]][0] for k in range(10)]))


@dataclass(frozen=True)
class Page:
    """A demo, and test images for it, float32 [n, channels, height, width]."""

    folder: Path
    images: np.ndarray

    def expected(self, x: np.ndarray) -> np.ndarray:
        """onnxruntime's probabilities for one image."""
        opened = session(self.folder / MODEL)
        scores = opened.run(None, {opened.get_inputs()[0].name: x[None]})[0][0].astype(np.float64)
        powers = np.exp(scores - scores.max())
        return powers / powers.sum()

    @property
    def setup(self) -> dict:
        text = (self.folder / "index.html").read_text()
        return json.loads(text.partition('id="setup">')[2].partition("</script>")[0])

    def bytes_of(self, x: np.ndarray) -> np.ndarray:
        """An image as it is shown: uint8."""
        return np.round(x * 255).astype(np.uint8)


def run_folder(folder: Path, model: onnx.ModelProto, data: str) -> None:
    folder.mkdir()
    onnx.save(model, folder / MODEL)
    sides = {side: {"nbytes": 10**6, "error": 5.0} for side in ("dense", "compressed")}
    (folder / "report.json").write_text(json.dumps(sides))
    (folder / "recipe.yaml").write_text(json.dumps({"model": "net.py:net", "data": data}))


def network(filters: np.ndarray, readout: np.ndarray, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Convolution, ReLU, pooling, and a linear layer."""
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["c"], ["flat"]),
        helper.make_node("MatMul", ["flat", "fc"], ["y"]),
    ]
    weights = [numpy_helper.from_array(filters, "conv"), numpy_helper.from_array(readout, "fc")]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", readout.shape[1]]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def learned(x: np.ndarray, y: np.ndarray) -> onnx.ModelProto:
    """A network with random filters; its linear layer is fitted, and half of it pruned."""
    generator = np.random.default_rng(0)
    filters = generator.standard_normal((8, x.shape[1], 3, 3)).astype(np.float32)
    inner = 8 * (x.shape[2] // 2) * (x.shape[3] // 2)
    model = network(filters, np.zeros((inner, 10), np.float32), x.shape[1:])
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, None))
    features = session(model).run(["flat"], {"x": x})[0].astype(np.float64)
    square = features.T @ features + 30 * np.eye(inner)
    readout = np.linalg.solve(square, features.T @ (10 * np.eye(10)[y] - 1))
    readout = np.round(readout / readout.std() * 4) / 4 * readout.std()  # few values: coded
    return network(filters, readout.astype(np.float32), x.shape[1:])


@contextmanager
def opened(driver, page: Page):
    """The page, ready; afterwards the console must have no errors."""
    console_errors(driver)  # those of the page before
    with served(page.folder) as address:
        driver.get(address)
        until(driver, "return document.documentElement.dataset.ready === 'yes'")
        yield address
        assert console_errors(driver) == []
        driver.get("about:blank")  # it asks for nothing more


def until(driver, condition: str) -> None:
    begun = time.monotonic()
    while not driver.execute_script(condition):
        status = driver.execute_script("return document.getElementById('status').textContent")
        assert time.monotonic() - begun < SECONDS, status
        time.sleep(0.02)


COUNT = "return Number(document.getElementById('answer').dataset.count ?? 0)"
SCORES = "return [...document.querySelectorAll('#scores li')].map((i) => [i.innerText, i.dataset])"

PAINT = """
const [bytes, width, height] = arguments;
const small = new OffscreenCanvas(width, height);
const grey = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
const image = new ImageData(width, height);
grey.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
small.getContext("2d").putImageData(image, 0, 0);
const board = document.getElementById("board");
const context = board.getContext("2d");
context.imageSmoothingEnabled = false;
context.drawImage(small, 0, 0, board.width, board.height);
board.dispatchEvent(new Event("change"));
"""


def answered(driver, action) -> np.ndarray:
    """Acts on the page, and returns the probabilities that it shows afterwards."""
    before = driver.execute_script(COUNT)
    action()
    until(driver, f"{COUNT} > {before}")
    found = driver.execute_script(SCORES)
    return np.array([float(data["score"]) for _, data in found])


def paint(driver, pixels: np.ndarray) -> None:
    height, width = pixels.shape
    driver.execute_script(PAINT, base64.b64encode(pixels.tobytes()).decode(), width, height)


def seen(driver) -> np.ndarray:
    """The model's input that the page shows: [height, width], 0 ... 255."""
    code = """
    const seen = document.getElementById("seen");
    const copy = new OffscreenCanvas(seen.width, seen.height).getContext("2d");
    copy.drawImage(seen, 0, 0);
    return [Array.from(copy.getImageData(0, 0, seen.width, seen.height).data), seen.width];
    """
    data, width = driver.execute_script(code)
    return np.array(data).reshape(-1, width, 4)[:, :, 0]


def test_ten_digits_painted_on_the_board_are_answered_as_onnxruntime_does(driver, digits):
    with opened(driver, digits):
        for x in digits.images:
            pixels = digits.bytes_of(x[0])
            found = answered(driver, lambda pixels=pixels: paint(driver, pixels))
            expected = digits.expected(x)
            assert found.argmax() == expected.argmax()
            assert np.abs(found - expected).max() < 1e-4
            assert np.array_equal(seen(driver), pixels)
            best = driver.execute_script("return document.querySelector('#scores .best').innerText")
            assert best.startswith(str(expected.argmax()))
        assert driver.find_element("id", "name").text == str(expected.argmax())


def test_the_page_shows_its_figures_and_asks_nobody_else(driver, digits):
    with opened(driver, digits) as address:
        texts = {name: driver.find_element("id", name).text for name in ("load", "time", "size")}
        assert texts["load"].endswith(" ms")
        assert texts["time"].endswith(" ms")
        nbytes = (digits.folder / MODEL).stat().st_size
        assert texts["size"] == f"{nbytes / 1000:.1f} kB"
        assert f"{nbytes:,} bytes" in driver.find_element("id", "size-note").text
        code = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        asked = driver.execute_script(code)
        assert len(asked) >= 6
        assert all(name.startswith(address) for name in asked)
        assert not driver.find_element("id", "status").is_displayed()


def test_an_image_file_of_the_models_size_is_taken_as_it_is(driver, digits, tmp_path):
    with opened(driver, digits):
        for index, x in enumerate(digits.images[:3]):
            file = tmp_path / f"{index}.png"
            Image.fromarray(digits.bytes_of(x[0])).save(file)
            choose = driver.find_element("id", "file").send_keys
            found = answered(driver, lambda file=file, choose=choose: choose(str(file)))
            assert np.abs(found - digits.expected(x)).max() < 1e-4


def test_a_drawing_is_brought_to_the_size_and_place_of_the_data(driver, digits):
    from selenium.webdriver.common.action_chains import ActionChains

    with opened(driver, digits):
        board = driver.find_element("id", "board")
        chain = ActionChains(driver, duration=10)
        chain.move_to_element_with_offset(board, -120, -100).click_and_hold()
        for step in (60, 30):
            chain.move_by_offset(step // 6, step)
        answered(driver, chain.release().perform)
        image = seen(driver)
        fit, (height, width) = digits.setup["fit"], image.shape
        rows, columns = (np.flatnonzero(image.max(axis) > 127) for axis in (1, 0))
        assert abs(rows[-1] - rows[0] + 1 - fit["box"]) <= 1
        middle = (image.sum(1) @ np.arange(height) + 0.5 * image.sum()) / image.sum()
        assert abs(middle - height / 2) < 0.5
        assert abs((columns[0] + columns[-1] + 1) / 2 - width / 2) <= 1
        before = seen(driver)
        answered(driver, driver.find_element("id", "fit").click)  # as drawn, then
        assert not np.array_equal(seen(driver), before)
        driver.find_element("id", "clear").click()
        assert seen(driver).max() == 0
        assert driver.find_element("id", "sure").text == ""


def test_the_keyboard_draws_too(driver, digits):
    from selenium.webdriver.common.keys import Keys

    with opened(driver, digits):
        board = driver.find_element("id", "board")
        keys = Keys.SPACE + 5 * Keys.ARROW_DOWN + Keys.SPACE
        answered(driver, lambda: board.send_keys(keys))
        assert seen(driver).max() > 127
        board.send_keys(Keys.DELETE)
        assert seen(driver).max() == 0


def test_a_finger_draws_and_does_not_scroll(driver, digits):
    with opened(driver, digits):
        board = driver.find_element("id", "board").rect

        def touch(kind, *points):
            given = {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]}
            driver.execute_cdp_cmd("Input.dispatchTouchEvent", given)

        x, y = board["x"] + board["width"] / 2, board["y"] + 60
        touch("touchStart", (x, y))
        for step in range(1, 8):
            touch("touchMove", (x, y + 25 * step))
        answered(driver, lambda: touch("touchEnd"))
        rows = np.flatnonzero(seen(driver).max(1) > 127)
        assert abs(len(rows) - digits.setup["fit"]["box"]) <= 1
        assert driver.execute_script("return scrollY") == 0


def test_it_fits_a_phone(driver, digits):
    with opened(driver, digits):
        try:
            resize(driver, 400)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 400
        finally:
            resize(driver, 1400)


@pytest.fixture
def coloured(tmp_path, ort_web):
    """A page for [3, 6, 9] images of 24 classes with hostile names; one image of noise."""
    generator = np.random.default_rng(1)
    filters = generator.standard_normal((4, 3, 3, 3)).astype(np.float32)
    readout = generator.standard_normal((4 * 3 * 4, 24)).astype(np.float32)
    for index in range(23):
        (tmp_path / "images" / f"class {index:02}").mkdir(parents=True)
    (tmp_path / "images" / "<img src=x onerror=alert(1)>").mkdir()
    model = network(filters, readout, (3, 6, 9))
    run_folder(tmp_path / "run", model, f"folder:{tmp_path / 'images'}")
    write_demo(tmp_path / "run", tmp_path / "page", ort_web=ort_web)
    x = generator.integers(0, 256, (1, 3, 6, 9)).astype(np.float32) * np.float32(1 / 255)
    return Page(tmp_path / "page", x)


def test_images_in_colour_are_chosen_or_dropped(driver, coloured, tmp_path):
    x = coloured.images[0]
    expected = coloured.expected(x)
    noise = Image.fromarray(coloured.bytes_of(x).transpose(1, 2, 0))
    noise.save(tmp_path / "noise.png")
    stream = io.BytesIO()
    # 3 x larger, with a margin left and right: the middle is taken, and reduced
    wide = Image.new("RGB", (9 * 3 + 20, 6 * 3), "red")
    wide.paste(noise.resize((27, 18), Image.Resampling.NEAREST), (10, 0))
    wide.save(stream, "PNG")
    drop = """
    const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], "wide.png", { type: "image/png" }));
    const how = { dataTransfer, bubbles: true, cancelable: true };
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", how));
    """
    encoded = base64.b64encode(stream.getvalue()).decode()
    chosen = str(tmp_path / "noise.png")
    with opened(driver, coloured):
        for action in (
            lambda: driver.find_element("id", "file").send_keys(chosen),
            lambda: driver.execute_script(drop, encoded),
        ):
            # more than twenty classes stand by score, and names are text
            found = answered(driver, action)
            order = np.argsort(-expected)
            assert np.abs(found - expected[order]).max() < 1e-4
            names = [text.splitlines()[0] for text, _ in driver.execute_script(SCORES)]
            assert names == [coloured.setup["names"][index] for index in order]
        assert driver.find_elements("css selector", "#scores img") == []


def test_a_file_that_is_no_image_is_an_error(driver, coloured, tmp_path):
    (tmp_path / "<b>.png").write_text("no image")
    with opened(driver, coloured):
        driver.find_element("id", "file").send_keys(str(tmp_path / "<b>.png"))
        until(driver, "return !document.getElementById('status').hidden")
        status = driver.find_element("id", "status").text
        assert status == "<b>.png: not an image that this browser can read"


def test_opened_as_a_file_it_says_how_to_serve_it(driver, digits):
    driver.get((digits.folder / "index.html").as_uri())
    assert "python -m http.server -d FOLDER" in driver.find_element("id", "status").text
    driver.get("about:blank")
    console_errors(driver)


def test_a_model_that_cannot_be_loaded_is_an_error(driver, digits, tmp_path):
    for file in digits.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / MODEL).unlink()
    with served(tmp_path) as address:
        driver.get(address)
        until(driver, "return document.getElementById('status').className === 'alarm'")
        assert "the server says 404" in driver.find_element("id", "status").text
        driver.get("about:blank")
    console_errors(driver)
