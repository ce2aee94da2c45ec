"""The search page in a real browser, with transformers.js: its order is that of onnxruntime.

Skipped without Chromium, and without @huggingface/transformers in the folder that
PRUNE2ONNX_TRANSFORMERS_JS names or in ./node_modules.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, console_errors, served
from sentences import folder, lines

from prune2onnx.commands.folder import pack_folder
from prune2onnx.data.text import TextTokenizer
from prune2onnx.runs.defaults import PackOptions
from prune2onnx.runs.pages.search import write_search
from prune2onnx.runtime.session import run, session

SECONDS = 120  # for an answer, on a machine that is busy
QUERY = "the old dog sits on a red mat"
FOUND = """
const list = document.getElementById("found");
const rows = [...list.querySelectorAll("li")];
return [list.dataset.query, rows.map((i) => [i.firstChild.textContent, Number(i.dataset.score)])];
"""
ASK = """
const query = document.getElementById("query");
query.value = arguments[0];
query.dispatchEvent(new Event("input"));
"""
WRITE = """
const own = document.getElementById("sentences");
own.value = arguments[0];
own.dispatchEvent(new Event("input"));
"""


@pytest.fixture(scope="module")
def packages() -> Path:
    given = Path(os.environ.get("PRUNE2ONNX_TRANSFORMERS_JS", "node_modules"))
    places = (given / "node_modules/@huggingface/transformers", given / "@huggingface/transformers",
              given)  # fmt: skip
    found = [p for p in places if (p / "dist" / "transformers.min.js").is_file()]
    if not found:
        pytest.skip(
            "no transformers.js: npm install --ignore-scripts @huggingface/transformers, and "
            "PRUNE2ONNX_TRANSFORMERS_JS names its folder"
        )
    return found[0]


def embedded(path: Path, sentences: list[str]) -> np.ndarray:
    """Mean-pooled embeddings of length 1, by onnxruntime and the tokenizers library."""
    opened, made = session(path / "onnx" / "model.onnx"), []
    for tokens in TextTokenizer(path / "tokenizer.json")(sentences):
        ids = np.array([tokens.ids])
        given = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
        mean = run(opened, given)[0][0].mean(0)
        made.append(mean / np.linalg.norm(mean))
    return np.stack(made)


def until(driver, condition) -> None:
    begun = time.monotonic()
    while not condition():
        status = driver.execute_script("return document.getElementById('status').textContent")
        assert time.monotonic() - begun < SECONDS, status
        time.sleep(0.05)


def test_sentences_are_ordered_as_onnxruntime_orders_them(packages, tmp_path):
    pack_folder(folder(tmp_path / "model"), tmp_path / "small", PackOptions(bits=5, strip=True))
    texts = tmp_path / "lines.txt"
    texts.write_text("\n".join(lines(30)))
    page = tmp_path / "page"
    write_search(tmp_path / "small", page, data=f"text:{texts}", transformers_js=packages)
    with chromium() as driver, served(page) as address:
        driver.get(address)
        until(driver, lambda: driver.execute_script(
            "return document.documentElement.dataset.ready === 'yes'"))  # fmt: skip
        for sentences in (lines(30), lines(12, seed=1)):
            driver.execute_script(WRITE, "\n".join(sentences))
            driver.execute_script(ASK, QUERY)
            near = (
                embedded(tmp_path / "small", sentences) @ embedded(tmp_path / "small", [QUERY])[0]
            )
            order = [sentences[i] for i in np.argsort(-near)[:10]]
            until(driver, lambda: (driver.execute_script(FOUND)[1] or [[""]])[0][0] in sentences)  # noqa: B023
            asked, rows = driver.execute_script(FOUND)
            assert asked == QUERY
            assert [text for text, _ in rows] == order
            np.testing.assert_allclose([s for _, s in rows], np.sort(near)[::-1][:10], atol=1e-4)
        driver.execute_script(ASK, "")
        until(driver, lambda: not driver.execute_script(FOUND)[1])
        assert console_errors(driver) == []
        for figure in ("size", "load", "time"):
            text = driver.execute_script(f"return document.getElementById('{figure}').textContent")
            assert text[0].isdigit()
