"""Lines of text as a model's inputs: tokens, masks, positions, no past; and the verbs on them."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import numpy_helper, parser
from sentences import LENGTHS, VOCABULARY, WORDS, decoder, lines, text_file, tokenizer, transformer

from prune2onnx.cli.main import main
from prune2onnx.data import load_data
from prune2onnx.data.text import MOST_TOKENS, TextTokenizer, read_lines, tokenizer_beside
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.runs.defaults import InputOptions
from prune2onnx.runtime.calibration import calibration_data
from prune2onnx.runtime.session import run, session
from prune2onnx.runtime.texts import text_inputs


@pytest.fixture
def options(tmp_path):
    return InputOptions(
        f"text:{text_file(tmp_path / 'lines.txt')}",
        tokenizer=tokenizer(tmp_path / "tokenizer.json"),
    )


def test_a_line_is_fed_as_the_tokenizer_makes_it(options):
    made = text_inputs(session(transformer()), options, examples=3)
    assert len(made) == 3  # one by one, in the order of the file
    for given, line in zip(made, lines(3), strict=True):
        words = [VOCABULARY.index(word) for word in line.split()]
        assert given["input_ids"].tolist() == [[2, *words, 3]]
        assert given["input_ids"].dtype == np.int64
        assert (given["attention_mask"] == 1).all() and not given["token_type_ids"].any()


def test_batches_have_lines_of_one_length_and_no_padding(options):
    made = text_inputs(session(transformer()), options, examples=100, batch=8)
    assert sum(len(one["input_ids"]) for one in made) == 100
    assert max(len(one["input_ids"]) for one in made) <= 8
    assert all((one["attention_mask"] == 1).all() for one in made)
    assert len({one["input_ids"].shape[1] for one in made}) == 10  # 3 to 12 words


def test_one_batch_is_padded_to_its_longest_and_padding_changes_nothing(options):
    opened = session(transformer())
    (whole,) = text_inputs(opened, options, examples=8, batch=8)
    assert whole["input_ids"].shape == (8, whole["attention_mask"].sum(1).max())
    (states,) = run(opened, whole)
    for row, alone in enumerate(text_inputs(opened, options, examples=8)):
        length = alone["input_ids"].shape[1]
        assert np.array_equal(whole["input_ids"][row, :length], alone["input_ids"][0])
        assert not whole["attention_mask"][row, length:].any()
        np.testing.assert_allclose(states[row, :length], run(opened, alone)[0][0], atol=1e-5)


def test_fixed_batch_and_length_are_kept(options):
    made = text_inputs(session(transformer(batch=4, length=9)), options, examples=10)
    assert [one["input_ids"].shape for one in made] == [(4, 9)] * 3
    ids, mask = made[0]["input_ids"], made[0]["attention_mask"]
    assert ((ids == 0) == (mask == 0)).all() and (mask.sum(1) <= 9).all()
    assert (ids[mask.sum(1) == 9][:, -1] == 3).all()  # cut before [SEP], not after it
    assert np.array_equal(made[-1]["input_ids"][1], made[-1]["input_ids"][3])  # filled up


def test_a_decoder_gets_positions_and_an_empty_past(options):
    made = text_inputs(session(decoder()), options, examples=20, batch=4)
    for given in made:
        count, length = given["input_ids"].shape
        assert given["position_ids"].tolist() == [list(range(length))] * count
        assert given["past_key_values.0.key"].shape == (count, 2, 0, 4)
        assert given["use_cache_branch"].tolist() == [False]
        assert run(session(decoder()), given)[0].shape == (count, length, len(VOCABULARY))


def test_types_of_inputs_are_those_of_the_graph(options):
    model = transformer()
    for value, kind in zip(model.graph.input, (6, 6, 6), strict=True):
        value.type.tensor_type.elem_type = kind
    (given,) = text_inputs(session(model), options, examples=1)
    assert {array.dtype.name for array in given.values()} == {"int32"}


def test_the_only_input_of_integers_takes_the_tokens(options):
    table = np.random.default_rng(0).normal(size=(len(VOCABULARY), 3)).astype(np.float32)
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (int64[n,l] src) => (float[n,l,3] y)'
        "{ y = Gather(table, src) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    (given,) = text_inputs(session(model), options, examples=1)
    assert list(given) == ["src"]


def test_inputs_that_text_does_not_give_are_named(options):
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (int64[n,l] input_ids, '
        "float[n,l,3] encoder_hidden_states) => (float[n,l,3] y) "
        "{ y = Identity(encoder_hidden_states) }"
    )
    with pytest.raises(Prune2OnnxError, match=r"encoder_hidden_states cannot be made.*npz:FILE"):
        text_inputs(session(model), options, examples=1)


def test_calibration_holds_out_lines_that_it_does_not_see(options):
    found = calibration_data(transformer(), options, 100)
    assert 90 <= sum(len(one["input_ids"]) for one in found.batches) <= 110
    assert found.wrong is None and found.error(transformer()) == 0


def test_lines_are_read_once_each_and_blank_ones_not(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffOne line.\r\n\n  \nÜber.\nOne line.\nThree".encode())
    assert read_lines(str(path)) == ["One line.", "Über.", "Three"]
    assert read_lines(str(path), 2) == ["One line.", "Über."]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\n \n", "no text in it"), (b"caf\xe9\n", "not text in UTF-8")],
)
def test_a_file_without_text_is_an_error(tmp_path, content, message):
    path = tmp_path / "lines.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Prune2OnnxError, match=message):
        read_lines(str(path))


def test_a_line_is_cut_where_the_graph_the_tokenizer_or_its_config_says(tmp_path):
    path = tokenizer(tmp_path / "tokenizer.json")
    assert TextTokenizer(path).most == MOST_TOKENS
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"model_max_length": LENGTHS}))
    assert TextTokenizer(path).most == LENGTHS
    config.write_text(json.dumps({"model_max_length": 1e30}))
    assert TextTokenizer(path).most == MOST_TOKENS
    tokenizer(path, most=5)
    assert TextTokenizer(path).most == 5
    made = TextTokenizer(path, 7)
    (tokens,) = made([" ".join(WORDS)])
    assert len(tokens) == 7 and tokens.ids[0] == 2 and tokens.ids[-1] == 3


def test_tokenizers_are_found_in_the_models_folder_and_above(tmp_path):
    assert tokenizer_beside(tmp_path / "onnx" / "model.onnx") is None
    path = tokenizer(tmp_path / "tokenizer.json")
    for model in ("onnx/model.onnx", "model.onnx", ""):
        assert tokenizer_beside(tmp_path / model) == path


def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(Prune2OnnxError, match="no such file"):
        TextTokenizer(path)
    path.write_text("{}")
    with pytest.raises(Prune2OnnxError, match=r"not a tokenizer\.json"):
        TextTokenizer(path)


def test_a_line_that_cannot_be_tokenized_is_an_error(tmp_path):
    path = tokenizer(tmp_path / "tokenizer.json")
    path.write_text(path.read_text().replace('"unk_token": "[UNK]"', '"unk_token": "?"'))
    with pytest.raises(Prune2OnnxError, match="cannot tokenize a line"):
        TextTokenizer(path)(["a cat", "an unknown word"])


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Prune2OnnxError, match=r"pip install 'prune2onnx\[text\]'"):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_a_text_file_without_its_prefix_is_recognized(tmp_path):
    with pytest.raises(RecipeError, match="did you mean text:"):
        load_data(str(text_file(tmp_path / "lines.txt")))


def test_text_has_no_labels():
    with pytest.raises(RecipeError, match="have no labels"):
        load_data("text:lines.txt")


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def model(tmp_path, options):
    path = tmp_path / "onnx" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(transformer().SerializeToString())
    return path


def test_pack_calibrates_with_text(tmp_path, model, options):
    small = tmp_path / "small.onnx"
    status, text = invoke(
        "pack", model, small, "--data", options.data, "--max-error", "5%", "--examples", "120"
    )
    assert status == 0 and "error of the outputs" in text
    assert small.stat().st_size < 0.4 * model.stat().st_size
    status, text = invoke(
        "validate", small, "--data", options.data, "--tokenizer", options.tokenizer
    )
    assert status == 0
    status, text = invoke("benchmark", model, small, "--data", options.data, "--batch", "3",
                          "--seconds", "0.2", "--tokenizer", options.tokenizer)  # fmt: skip
    assert status == 0


def test_quantize_takes_text(tmp_path, model, options):
    made = tmp_path / "int8.onnx"
    status, text = invoke("quantize", model, made, "--data", options.data, "--examples", "40",
                          "--max-rel-error", "0.2")  # fmt: skip
    assert status == 0 and "relative error of the outputs" in text
    assert made.exists()


def test_without_a_tokenizer_the_option_is_named(tmp_path, model, options):
    options.tokenizer.unlink()
    arguments = ["pack", model, tmp_path / "out.onnx", "--data", options.data, "--bits", "4"]
    status, text = invoke(*arguments)
    assert status == 2 and "give --tokenizer FILE" in text
    assert not (tmp_path / "out.onnx").exists()
    status, text = invoke("validate", model, "--tokenizer", "tokenizer.json")
    assert status == 2 and "--tokenizer is for --data text:FILE" in text


def test_tokens_beyond_the_table_are_an_error(tmp_path, model, options):
    small = transformer()
    for tensor in small.graph.initializer:
        if tensor.name == "word":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:9], "word"))
    model.write_bytes(small.SerializeToString())
    status, text = invoke("pack", model, tmp_path / "out.onnx", "--data", options.data, "--bits", 4)
    assert status == 1 and "Traceback" not in text
    assert not (tmp_path / "out.onnx").exists()
