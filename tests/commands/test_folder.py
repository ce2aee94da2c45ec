"""Packing a folder as on the Hugging Face hub: which files, which names, the card, whole or not."""

import json
import shutil

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic
from sentences import decoder, folder, text_file, transformer

from prune2onnx.cli.main import main
from prune2onnx.commands import card
from prune2onnx.commands import folder as module
from prune2onnx.commands.compute.runtime_type import runtime_type
from prune2onnx.commands.folder import pack_folder
from prune2onnx.errors import Prune2OnnxError, RecipeError
from prune2onnx.graph.file import load, save
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.inputs import random_inputs
from prune2onnx.runtime.session import run, session

CHEAP = PackOptions(load="small", bits=4.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.05)


@pytest.fixture
def source(tmp_path):
    return folder(tmp_path / "model")


def names(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def contents(path):
    return {p: p.is_file() and p.read_bytes() for p in sorted(path.rglob("*"))}


def test_a_folder_is_packed_with_all_that_opens_it(source, tmp_path):
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "model.safetensors").write_bytes(b"x" * 100)
    (source / "LICENSE").write_text("mine")
    before = contents(source)
    result = pack_folder(source, tmp_path / "out", CHEAP)
    assert names(tmp_path / "out") == [
        "1_Pooling/config.json", "LICENSE", "README.md", "config.json", "onnx/model.onnx",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert contents(source) == before
    for name in ("tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    made = tmp_path / "out" / "onnx" / "model.onnx"
    assert is_packed(load(made))
    assert result.files[0].nbytes == made.stat().st_size < 100_000
    assert any("model.safetensors" in note and "100 bytes" in note for note in result.notes)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_packed_model_computes_as_the_unpacked_file(source, tmp_path):
    pack_folder(source, tmp_path / "out", CHEAP)
    made = load(tmp_path / "out" / "onnx" / "model.onnx")
    (given,) = random_inputs(transformer())
    got, want = (run(session(model), given)[0] for model in (made, unpack(made)))
    assert np.array_equal(got, want)


def test_a_model_in_the_root_goes_where_readers_look(tmp_path):
    source = folder(tmp_path / "model", model="model.onnx")
    pack_folder(source, tmp_path / "out", CHEAP)
    assert "onnx/model.onnx" in names(tmp_path / "out")
    assert "model.onnx" not in names(tmp_path / "out")


def test_external_data_are_read_and_gone(source, tmp_path):
    save(transformer(hidden=64), source / "onnx" / "model.onnx", "model.onnx_data")
    config = json.loads((source / "config.json").read_text())
    config["transformers.js_config"] = {"use_external_data_format": True, "kv_cache_dtype": "x"}
    (source / "config.json").write_text(json.dumps(config))
    pack_folder(source, tmp_path / "out", CHEAP)
    assert not [name for name in names(tmp_path / "out") if "data" in name]
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made.pop("transformers.js_config") == {"kv_cache_dtype": "x", "dtype": "fp32"}
    config.pop("transformers.js_config")
    assert made == config


def test_data_files_have_the_name_that_readers_ask_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.graph.file.MAX_NBYTES", 60_000)  # in place of 2 GB
    big = transformer(hidden=64)
    save(big, source / "onnx" / "model.onnx", "weights")
    pack_folder(source, tmp_path / "out", PackOptions(load="small"))
    out = tmp_path / "out"
    assert [n for n in names(out) if n.startswith("onnx")] == [
        "onnx/model.onnx", "onnx/model.onnx_data"
    ]  # fmt: skip
    own = json.loads((out / "config.json").read_text())["transformers.js_config"]
    assert own == {"use_external_data_format": {"model.onnx": 1}, "dtype": "fp32"}
    (given,) = random_inputs(big)
    monkeypatch.undo()
    got = run(session(out / "onnx" / "model.onnx"), given)[0]
    assert np.array_equal(got, run(session(big), given)[0])


def test_encoder_and_decoder_are_packed_each(source, tmp_path):
    onnx.save(transformer(), source / "onnx" / "encoder_model.onnx")
    onnx.save(decoder(heads=4, size=16), source / "onnx" / "decoder_model_merged.onnx")
    (source / "onnx" / "model.onnx").unlink()
    result = pack_folder(source, tmp_path / "out", PackOptions(load="small"))
    assert [str(file.name) for file in result.files] == [
        "onnx/decoder_model_merged.onnx", "onnx/encoder_model.onnx"
    ]  # fmt: skip
    assert all(file.error == 0 for file in result.files)
    with pytest.raises(RecipeError, match=r"--target-size is for one file.* has 2: onnx/decoder"):
        pack_folder(source, tmp_path / "out2", PackOptions(target_size=1000))


def test_other_forms_of_a_model_are_left_out_and_said(source, tmp_path):
    for name in ("model_fp16", "model_quantized"):
        shutil.copy(source / "onnx" / "model.onnx", source / "onnx" / f"{name}.onnx")
    shutil.copy(source / "onnx" / "model.onnx", source / "model.onnx")
    result = pack_folder(source, tmp_path / "out", CHEAP)
    assert [str(file.name) for file in result.files] == ["onnx/model.onnx"]
    assert len([note for note in result.notes if "another form of model.onnx" in note]) == 2
    assert any(note.startswith("model.onnx: left out") for note in result.notes)


def test_an_int8_file_alone_is_recoded_under_its_name(source, tmp_path):
    plain, quantized = source / "onnx" / "model.onnx", source / "onnx" / "model_quantized.onnx"
    quantize_dynamic(plain, quantized)
    plain.unlink()
    result = pack_folder(source, tmp_path / "out", PackOptions(load="small", strip=True))
    assert [str(file.name) for file in result.files] == ["onnx/model_quantized.onnx"]
    own = json.loads((tmp_path / "out" / "config.json").read_text())["transformers.js_config"]
    assert own == {"dtype": "q8"}
    assert result.files[0].error == 0


def test_a_file_that_computes_in_another_type_gets_its_name(source, tmp_path, monkeypatch):
    pack = module.pack_file

    def to_int8(before, after, options, progress):
        quantize_dynamic(before, before.parent / "int8.tmp")
        made = pack(before.parent / "int8.tmp", after, options, progress=progress)
        (before.parent / "int8.tmp").unlink()
        return made

    monkeypatch.setattr(module, "pack_file", to_int8)
    result = pack_folder(source, tmp_path / "out", PackOptions(load="small"))
    assert [str(file.name) for file in result.files] == ["onnx/model_quantized.onnx"]
    assert 0 < result.files[0].error < 0.2
    assert "move by" in (tmp_path / "out" / "README.md").read_text()


def test_two_models_do_not_become_one(source, tmp_path, monkeypatch):
    plain = source / "onnx" / "model.onnx"
    quantize_dynamic(plain, source / "onnx" / "model_int8.onnx")
    plain.rename(source / "onnx" / "model_fp16.onnx")
    assert len(pack_folder(source, tmp_path / "out", PackOptions(load="small")).files) == 2
    monkeypatch.setattr(module, "runtime_type", lambda path, rows=None: str(rows is None))
    monkeypatch.setattr(module, "_ENDINGS", {"False": "_quantized"})
    with pytest.raises(Prune2OnnxError, match=r"would become onnx/model_quantized\.onnx"):
        pack_folder(source, tmp_path / "out2", PackOptions(load="small"))


def test_types_at_run_time(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(transformer(), path)
    assert runtime_type(path) == "float32"
    quantize_dynamic(path, tmp_path / "int8.onnx")
    assert runtime_type(tmp_path / "int8.onnx") == "int8"
    pack_folder_file = tmp_path / "packed.onnx"
    module.pack_file(tmp_path / "int8.onnx", pack_folder_file, PackOptions(load="small"))
    assert runtime_type(pack_folder_file) == "int8"
    blocks = transformer(layers=0)
    blocks.graph.node.append(
        onnx.helper.make_node(
            "MatMulNBits",
            ["h0", "B", "scales"],
            ["q"],
            domain="com.microsoft",
            K=32,
            N=64,
            bits=4,
            block_size=32,
        )
    )
    blocks.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for name, shape, kind in (("B", (64, 1, 16), np.uint8), ("scales", (64,), np.float32)):
        blocks.graph.initializer.append(numpy_helper.from_array(np.ones(shape, kind), name))
    onnx.save(blocks, path)
    assert runtime_type(path) == "int4"  # though the embedding, float32, has more elements


def test_text_is_read_by_the_folders_tokenizer(source, tmp_path):
    data = f"text:{text_file(tmp_path / 'lines.txt')}"
    options = PackOptions(max_error=0.05, load="small", inputs=InputOptions(data), examples=60)
    result = pack_folder(source, tmp_path / "out", options)
    (goal,) = result.files[0].packed.goals
    assert goal.met and result.files[0].error == pytest.approx(goal.reached, rel=1e-3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "--max-error 0.05 --examples 60 --data text:lines.txt" in text
    assert str(tmp_path) not in text and "held out" in text


def test_the_card_keeps_the_users_own_text(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\n---\n# My model\n\nWords.\n")
    out = tmp_path / "out"
    pack_folder(source, out, CHEAP)
    first = (out / "README.md").read_text()
    assert first.startswith("---\nlicense: mit\n---\n# My model\n\nWords.\n\n<!-- prune2onnx")
    (out / "README.md").write_text(first.replace("Words.", "Other words.") + "\nMore.\n")
    pack_folder(source, out, PackOptions(load="small"))
    second = (out / "README.md").read_text()
    assert "Other words." in second and second.endswith("-->\n\nMore.\n")
    assert second.count("## Packed with prune2onnx") == 1
    assert "equal to those before, bit for bit" in second and "--bits" not in second


def test_a_new_card_has_front_matter(source, tmp_path):
    pack_folder(source, tmp_path / "small", CHEAP)
    text = (tmp_path / "small" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers.js\ntags:\n- onnx\n")
    assert "\n# small\n" in text and "`onnx/model.onnx`" in text
    nbytes = (tmp_path / "small" / "onnx" / "model.onnx").stat().st_size
    assert f"| {nbytes:,} |" in text and card.is_ours(text)


@pytest.mark.parametrize("name", ["notes.txt", "config.json", ".git"])
def test_a_folder_that_pack_did_not_write_stays(source, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(Prune2OnnxError, match=f"holds {name}, and pack did not write it"):
        pack_folder(source, out, CHEAP)
    assert names(out) == [name]


def test_a_folder_of_ours_is_replaced_unless_something_else_is_in_it(source, tmp_path):
    out = tmp_path / "out"
    pack_folder(source, out, PackOptions(load="small"))
    before = (out / "onnx" / "model.onnx").stat().st_size
    pack_folder(source, out, CHEAP)
    assert (out / "onnx" / "model.onnx").stat().st_size < before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(Prune2OnnxError, match=r"holds notes\.txt"):
        pack_folder(source, out, CHEAP)
    assert (out / "notes.txt").read_text() == "mine"


def test_where_packing_fails_all_is_as_before(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack_folder(source, out, CHEAP)
    before = contents(tmp_path)
    (source / "onnx" / "other.onnx").write_bytes(b"no model")
    with pytest.raises(Prune2OnnxError, match="not an ONNX model"):
        pack_folder(source, out, CHEAP)
    (source / "onnx" / "other.onnx").unlink()
    monkeypatch.setattr(card, "written", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_folder(source, out, CHEAP)
    assert contents(tmp_path) == before


def test_a_file_that_cannot_be_copied_is_named(source, tmp_path):
    (source / "LICENSE").symlink_to("nowhere")
    with pytest.raises(Prune2OnnxError, match="LICENSE: cannot be copied"):
        pack_folder(source, tmp_path / "out", CHEAP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "no JSON", '{"transformers.js_config": "odd"}'])
def test_other_settings_than_expected_do_no_harm(source, tmp_path, content):
    (source / "config.json").write_text(content)
    result = pack_folder(source, tmp_path / "out", CHEAP)
    made = (tmp_path / "out" / "config.json").read_text()
    if content.startswith("{"):
        assert json.loads(made) == {"transformers.js_config": {"dtype": "fp32"}}
    else:
        assert made == content and any("no config.json with settings" in n for n in result.notes)


@pytest.mark.parametrize("where", ["model", "model/out", "."])
def test_source_and_target_are_apart(source, tmp_path, where):
    with pytest.raises(Prune2OnnxError, match="the same folder as"):
        pack_folder(source, tmp_path / where, CHEAP)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Prune2OnnxError, match=r"no \.onnx file in it or in onnx/"):
        pack_folder(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command(source, tmp_path):
    done = invoke("pack", source, "-o", tmp_path / "a", "--bits", 4)
    assert done.exit_code == 0 and "1 model, 3 other files" in done.stderr
    done = invoke("pack", source, tmp_path / "b", "--bits", 4, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert [file["source"] for file in found["files"]] == ["onnx/model.onnx"]
    assert found["files"][0]["error"] > 0 and found["files"][0]["ratio"] > 0
    assert set(found["copied"]) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    text = text_file(tmp_path / "lines.txt")
    done = invoke("pack", source, tmp_path / "c", "--data", f"text:{text}", "--target-size", 3000,
                  "--examples", 40)  # fmt: skip
    assert done.exit_code == 3 and (tmp_path / "c" / "onnx" / "model.onnx").exists()


@pytest.mark.parametrize("arguments", [[], ["out", "-o", "out"]])
def test_the_target_is_given_once(source, arguments):
    done = invoke("pack", source, *arguments)
    assert done.exit_code == 2 and "give OUT once" in done.stderr


def test_a_data_file_of_a_folder_has_no_other_name(source, tmp_path):
    done = invoke("pack", source, tmp_path / "out", "--external", "weights")
    assert done.exit_code == 2 and "--external weights" in done.stderr


@pytest.mark.parametrize("verb", ["validate", "inspect", "benchmark"])
def test_verbs_on_files_name_the_model_of_a_folder(source, verb):
    done = invoke(verb, source)
    assert done.exit_code == 1
    assert f"give the .onnx file in it: {source}/onnx/model.onnx" in done.stderr
