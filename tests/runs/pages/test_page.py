"""The page: it shows what the folder holds, escapes what it quotes, and needs nothing else."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from finished import HOSTILE, QUOTES, made_run, made_sweep, network
from onnx import TensorProto, helper, numpy_helper

from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.folder import read_run
from prune2onnx.runs.pages.page import page_of, write_page, write_pages
from prune2onnx.runs.report import Measured, Paired, Report

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Elements, ids, and the text outside of styles and scripts; tags have to match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [a["id"] for _, a in self.elements if "id" in a]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    return folder, made_run(folder)


@pytest.fixture(scope="module")
def page(run):
    return page_of(run[0])


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # as reported by Newcombe (1998) for method 10
        ((36, 12, 2, 0), 5.69, 34.04),
        ((18, 12, 2, 18), 5.62, 32.90),
        ((53, 0, 0, 1), -7.29, 7.29),
        # by hand: p1 = 19/41, p2 = 14/41; Wilson 0.3206 to 0.6125 and 0.2157 to 0.4945;
        # phi = (14 * 22 - 5 * 0 - 20.5) / sqrt(19 * 22 * 14 * 27) = 0.7233
        ((14, 5, 0, 22), 1.15, 22.65),
    ],
)
def test_the_interval_is_newcombes(cells, low, high):
    assert Paired(*cells).interval == pytest.approx((low, high), abs=0.01)


def test_the_interval_is_mirrored_with_the_networks_and_closes_in_with_examples():
    one = Paired(80, 9, 4, 7)
    low, high = one.interval
    other = replace(one, only_dense=4, only_compressed=9)
    assert other.interval == pytest.approx((-high, -low)) and other.added == -one.added == -5.0
    many = Paired(8000, 900, 400, 700).interval
    assert low < many[0] < one.added < many[1] < high
    assert many[1] - many[0] == pytest.approx((high - low) / 10, rel=0.1)


@pytest.mark.parametrize("cells", [(5, 0, 0, 0), (0, 0, 0, 5), (0, 5, 0, 0), (0, 0, 1, 0)])
def test_the_interval_stays_within_100_points(cells):
    low, high = Paired(*cells).interval
    assert -100 <= low <= Paired(*cells).added <= high <= 100 and low < high


def test_a_report_comes_back_from_its_file(run):
    folder, report = run
    assert read_run(folder).report == report


def test_the_page_shows_goal_and_result(run, page):
    text = Reader(page).text
    report = run[1]
    for part in (
        "my_net.py:make on folder:my images",
        "Fewest bytes",
        "100,000 bytes",
        "met",
        "missed by 1 %",
        f"{report.dense.nbytes:,} bytes",
        f"{report.compressed.nbytes:,} bytes",
        f"{report.ratio:.1f} times smaller",
        "+0.50 points (95 %: \N{MINUS SIGN}1.44 to +2.52)",
        "only the dense network gets 7 right, only the compressed one 5, both 385, neither 3",
        "this includes 0, so the examples show no significant difference",
        "+2.0 ms, once a session",
        "0.50 of dense",
        "1.25 of dense",  # CPU time of a load
        "+3.0 MB, 1.05 of dense; both hold the runtime",
        "Zeros alone save no time",
        "prune2onnx compress --recipe recipe.yaml -o again",
        "prune2onnx validate model.onnx --reference dense.onnx --data 'folder:my images'",
        "onnxruntime 1.99",
        "prune: 3 epochs in 4.5 s",
    ):
        assert part in text, part


def test_the_page_names_a_significant_difference(tmp_path):
    made_run(tmp_path, paired=Paired(900, 80, 10, 10))
    assert "the compressed network is worse" in page_of(tmp_path)
    made_run(tmp_path, paired=Paired(900, 10, 80, 10))
    assert "the compressed network is better" in page_of(tmp_path)


def test_each_weight_has_its_row_its_levels_and_its_histogram(run, page):
    rows = re.findall(r"<tr>\s*<th scope=\"row\" class=\"name\">(.*?)</th>(.*?)</tr>", page, re.S)
    assert [name for name, _ in rows] == [row.name for row in run[1].weights]
    for (_, cells), row, levels in zip(rows, run[1].weights, (4, 300, 4, 10), strict=True):
        values = re.findall(r"<td.*?>\s*(.*?)\s*</td>", cells, re.S)
        assert values[2] == f"{levels}" and values[3] == row.codec
        assert values[5] == f"{row.nbytes:,}" and values[6] == row.reason
        assert page.count(f"<h3>{row.name}</h3>") == 1
    assert "threshold ±0.0938" in page  # the last of the phase: 3 / 32
    assert "960 nonzeros on 4 levels" in page and "95.0 % zeros, not drawn" in page


def test_the_bytes_of_each_stage(run):
    report = run[1]
    text = Reader(page_of(run[0])).text
    nonzeros = [row.nnz for row in report.weights]
    assert nonzeros[0] == 960 and nonzeros[2] == 150
    pruned = 4 * sum(nonzeros) + 300 * 64 // 8 + 10 * 300 // 8
    assert f"pruned {pruned:,} bytes" in text
    # an index of four levels takes two bits; the biases have as many levels as elements
    nbytes = (960 + 150) // 4 + 2 * 4 * 4 + 300 * 64 // 8 + 10 * 300 // 8 + 4 * 310
    assert f"quantized {nbytes + 1:,} bytes" in text or f"quantized {nbytes:,} bytes" in text
    assert f"coded {sum(row.nbytes for row in report.weights):,} bytes" in text


def test_the_page_is_the_same_each_time_and_compact(run, page):
    assert page_of(run[0]) == page
    assert len(page.encode()) < 400_000
    assert write_page(run[0]).read_text() == page


def test_the_page_fetches_nothing(page, tmp_path):
    made_sweep(tmp_path)
    for text in (page, page_of(tmp_path), page_of(tmp_path / "runs" / "size-100000-seed7")):
        reader = Reader(text)
        for tag, attributes in reader.elements:
            assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
            for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                target = attributes.get(name) or ""
                assert re.match(r"$|#|\.\./\.\./report\.html$|runs/", target), (tag, target)
        assert not re.search(r"@import|url\((?!#)|//fonts|cdn", text)
        policies = [a["content"] for tag, a in reader.elements if a.get("http-equiv")]
        assert len(policies) == 1 and policies[0].startswith("default-src 'none'; ")


def test_pictures_share_no_id_and_find_their_own(page):
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    targets = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page))
    assert {one or other for one, other in targets} <= set(reader.ids)
    pictures = [attributes for tag, attributes in reader.elements if tag == "svg"]
    assert len(pictures) == 1 + 4 + 4
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)


def test_what_came_from_a_file_is_text_and_no_markup(tmp_path):
    made_run(tmp_path, hostile=True)
    text = page_of(tmp_path)
    assert HOSTILE not in text and text.count("<script") == 1
    reader = Reader(text)
    # in the table, in the legend of lines, among the bytes, above its histogram; as note; below
    assert reader.text.count(HOSTILE) >= 6 and QUOTES in reader.text
    assert text.count("<b>.py") == 0
    # the policy holds the digest of the one script; its text may hold nothing foreign
    assert "alert" not in re.search(r"<script>(.*?)</script>", text, re.S)[1]


def test_a_command_quotes_what_the_recipe_names(tmp_path):
    made_run(tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("folder:my images", "npz:a; rm -r b"))
    assert "--data 'npz:a; rm -r b'" in Reader(page_of(tmp_path)).text


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("history.json", "Learned thresholds"),
        ("recipe.yaml", "compress --recipe"),
        ("dense.onnx", "no such text"),
        ("model.onnx", "quantized 4"),
    ],
)
def test_a_page_says_what_is_missing(tmp_path, name, gone):
    made_run(tmp_path)
    (tmp_path / name).unlink()
    text = Reader(page_of(tmp_path)).text
    assert f"{name} is missing from the folder, so this page lacks" in text and gone not in text
    assert "times smaller" in text


def test_a_run_that_learned_no_threshold_has_its_other_curves(tmp_path):
    made_run(tmp_path)
    epochs = json.loads((tmp_path / "history.json").read_text())
    (tmp_path / "history.json").write_text(json.dumps(epochs[6:7]))
    page = page_of(tmp_path)
    assert page.count('class="picture"') == 1 + 3 + 4 and "quantize: 1 epoch in" in page
    (tmp_path / "history.json").write_text("[]")
    assert "No epoch was trained" in page_of(tmp_path)


def test_an_older_run_has_a_page_without_what_it_did_not_measure(page, tmp_path):
    report = made_run(tmp_path)
    content = report.to_dict()
    del content["paired"], content["notes"], content["dense"]["macs"], content["budget"]
    del content["unfolded"], content["dense"]["load_cpu_ms"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    for name in ("history.json", "recipe.yaml"):
        (tmp_path / name).unlink()
    text = Reader(page_of(tmp_path)).text
    assert "+0.50 points" in text and "95 %:" not in text and "has no confidence interval" in text
    assert "CPU time of a load" not in text and "CPU time of a load" in Reader(page).text


def test_a_network_without_data_has_a_page(tmp_path):
    made_run(
        tmp_path,
        dense=Measured(50_000),
        compressed=Measured(9_000),
        max_abs_diff=None,
        skipped="no such operator",
        validation=None,
        paired=None,
        folded=False,
        unfolded=("fc1.weight",),
        budget=(),
    )
    text = Reader(page_of(tmp_path)).text
    assert "the error was not measured" in text and "was not run: no such operator" in text
    assert "not folded onnxruntime decodes fc1.weight at every inference" in text
    assert "Test error" not in text


def test_weights_of_an_anonymous_file_are_found_by_shape_and_nonzeros(run, tmp_path):
    made_run(tmp_path)
    known = {"fc1.weight": "d", "fc1.bias": "b", "fc2.weight": "a", "fc2.bias": "c"}
    plain = {w.row.name: w.after for w in read_run(tmp_path).weights}
    renamed = {known[name]: array for name, array in plain.items()}
    (tmp_path / "model.onnx").write_bytes(network(renamed).SerializeToString())
    found = {w.row.name: w for w in read_run(tmp_path).weights}
    assert all(np.array_equal(found[name].after, plain[name]) for name in plain)
    assert found["fc2.weight"].levels == 4


def test_quantized_weights_are_shown_as_floats(tmp_path):
    report = made_run(tmp_path)
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["fc1.weight_quantized", "s"], ["w"], axis=0),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [
            numpy_helper.from_array(codes, "fc1.weight_quantized"),
            numpy_helper.from_array(np.array([0.5, 2], np.float32), "s"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    row = replace(
        report.weights[0], name="fc1.weight_quantized", shape=(2, 8), dtype="int8", nnz=15
    )
    (tmp_path / "report.json").write_text(replace(report, weights=(row,)).to_json())
    (weight,) = read_run(tmp_path).weights
    assert np.array_equal(weight.after, codes * np.array([[0.5], [2]]))
    assert weight.levels == 15 and weight.before.shape == (300, 64) and weight.threshold == 0.09375


def test_a_threshold_of_channels_is_not_drawn_on_their_weights(tmp_path):
    made_run(tmp_path)
    recipe = (tmp_path / "recipe.yaml").read_text()
    changed = recipe.replace("granularity: weight", "granularity: channel")
    (tmp_path / "recipe.yaml").write_text(changed)
    assert changed != recipe
    assert all(weight.threshold is None for weight in read_run(tmp_path).weights)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("report.json", "{", "not valid JSON"),
        ("report.json", "[]", "damaged"),
        ("report.json", '{"schema": 99}', "schema 99"),
        ("report.json", '{"schema": 1, "seed": 0}', "damaged: version: field required"),
        ("report.json", "[" * 100_000, "not valid JSON"),
        ("history.json", '[{"phase": "prune"}]', "damaged: 0.epoch: field required"),
        ("history.json", "[NaN]", "not finite"),
        ("history.json", b"\xff", "not valid JSON"),
        ("recipe.yaml", "a: [", "not valid YAML"),
        ("dense.onnx", b"\x00\x01", "dense.onnx"),
        ("model.onnx", b"", "model.onnx"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, says):
    made_run(tmp_path)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Prune2OnnxError) as caught:
        page_of(tmp_path)
    message = str(caught.value)
    assert name in message and says in message and "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"compressed": {"nbytes": 0}},
        {"dense": {"nbytes": 9, "latency_ms": {"p50": 1.0}}},
        {"validation": {"error": 1.0}},
        {"paired": {"both": 0, "only_dense": 0, "only_compressed": 0, "neither": 0}},
    ],
)
def test_impossible_figures_count_as_damage(tmp_path, change):
    report = made_run(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict() | change))
    with pytest.raises(Prune2OnnxError, match="damaged"):
        page_of(tmp_path)


def test_a_folder_without_a_run_says_what_was_expected(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        page_of(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"neither report\.json nor front\.json"):
        page_of(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: a:b")
    with pytest.raises(RecipeError, match="--resume"):
        page_of(tmp_path)


def test_a_sweep_has_a_page_that_leads_to_its_runs(tmp_path):
    made_sweep(tmp_path)
    name = "size-100000-seed7"
    written = write_pages(tmp_path)
    assert written == [tmp_path / "runs" / name / "report.html", tmp_path / "report.html"]
    page = written[1].read_text()
    assert f'href="runs/{name}/report.html"' in page and page.count('class="picture"') == 1
    text = Reader(page).text
    assert "3 runs: 1 done, 0 of them missed their budget; 1 failed" in text
    assert HOSTILE in text and HOSTILE not in page
    of_run = written[0].read_text()
    assert 'href="../../report.html"' in of_run and "this run" in of_run


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path):
    front = made_sweep(tmp_path)
    (tmp_path / "front.json").write_text(replace(front, points=front.points[1:]).to_json())
    assert "No run is done yet" in page_of(tmp_path)
    (tmp_path / "front.json").write_text('{"schema": 1, "points": [{"state": "done"}]}')
    with pytest.raises(Prune2OnnxError, match=r"front\.json: damaged"):
        page_of(tmp_path)


def test_the_command_makes_the_page_without_torch(tmp_path):
    made_run(tmp_path)
    code = (
        "import sys; from prune2onnx.cli.main import main; "
        f"main(['report', {str(tmp_path)!r}], standalone_mode=False); "
        "assert not {'torch', 'accelerate', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "report.html" in done.stderr
    assert (tmp_path / "report.html").read_text() == page_of(tmp_path)
    result = CliRunner().invoke(main, ["report", str(tmp_path / "none")])
    assert result.exit_code == 2 and "no such folder" in result.output


def test_many_weights_make_a_page_of_a_bounded_size(tmp_path):
    report = made_run(tmp_path)
    weights = {f"block{i}.conv.weight": np.full((8, i + 2), i, np.float32) for i in range(60)}
    first = numpy_helper.from_array(np.ones((1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [first, *(numpy_helper.from_array(array, name) for name, array in weights.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for name in ("dense.onnx", "model.onnx"):
        (tmp_path / name).write_bytes(model.SerializeToString())
    rows = tuple(
        replace(report.weights[0], name=name, shape=array.shape, nnz=int(np.count_nonzero(array)))
        for name, array in weights.items()
    )
    (tmp_path / "report.json").write_text(replace(report, weights=rows).to_json())
    page = page_of(tmp_path)
    assert "The 40 largest weights are shown, 20 smaller ones are not" in page
    assert len(page.encode()) < 1_000_000


def test_paired_counts_stand_in_the_report(run):
    content = json.loads((run[0] / "report.json").read_text())
    assert content["paired"] == {"both": 385, "only_dense": 7, "only_compressed": 5, "neither": 3}
    assert asdict(Report(**run[1].__dict__))["paired"] == content["paired"]
