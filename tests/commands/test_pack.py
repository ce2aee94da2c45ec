"""From file to file: what each option does, and that nothing is written before it is compared."""

import itertools
import json
import re

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from networks import custom, mlp, model, pruned, run, value, weights
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.cli.main import main
from prune2onnx.commands.pack import pack_file
from prune2onnx.errors import MismatchError, Prune2OnnxError, RecipeError
from prune2onnx.graph.file import load, save
from prune2onnx.graph.normalize import normalize
from prune2onnx.graph.tensors import array_of, replace
from prune2onnx.packing.inline import is_packed
from prune2onnx.packing.inspection import inspect
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.runs.defaults import InputOptions, PackOptions
from prune2onnx.runtime.compare import output_error
from prune2onnx.runtime.inputs import inputs_of, random_inputs
from prune2onnx.runtime.session import session


def stored(folder, made: ModelProto, name: str = "in.onnx", external: str | None = None):
    save(made, folder / name, external)
    return folder / name


def noise(shape=(40, 200)) -> ModelProto:
    """A layer of full precision."""
    rng = np.random.default_rng(1)
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": rng.normal(size=shape).astype(np.float32)},
        {"x": ["N", shape[0]]},
        {"y": ["N", shape[1]]},
    )


def old() -> ModelProto:
    """Opset 9: an operator has to be rewritten."""
    made = model(
        [
            helper.make_node("Unsqueeze", ["x"], ["u"], axes=[1]),
            helper.make_node("Squeeze", ["u"], ["s"], axes=[1]),
            helper.make_node("MatMul", ["s", "w"], ["y"]),
        ],
        {"w": pruned((60, 600), 0.2, 15)},
        {"x": ["N", 60]},
        {"y": ["N", 600]},
        opset=9,
        ir_version=4,
    )
    made.graph.doc_string = "an old one"
    return made


def test_a_file_is_packed(tmp_path):
    source, target = stored(tmp_path, mlp()), tmp_path / "new" / "folder" / "out.onnx"
    done = pack_file(source, target)
    assert done.files == (target,) and done.notes == ()
    assert done.nbytes_before == source.stat().st_size
    assert load(target) == pack(mlp()).model and done.rows == pack(mlp()).rows
    assert unpack(load(target)).SerializeToString() == source.read_bytes()


def test_a_packed_file_is_packed_again_and_may_replace_itself(tmp_path):
    source = stored(tmp_path, pack(mlp()).model)
    done = pack_file(source, source)
    assert load(source) == pack(mlp()).model
    assert done.notes == ()  # neither larger nor dense
    pack_file(source, source, PackOptions(load="fast"))
    assert load(source) == pack(mlp(), load="fast").model


def test_a_file_that_packing_would_not_make_smaller_stays_dense_and_says_so(tmp_path):
    small = noise((8, 8))
    done = pack_file(stored(tmp_path, small), tmp_path / "out.onnx")
    assert load(tmp_path / "out.onnx") == small
    assert done.notes == ("packing would not make the file smaller; its weights stay dense",)


def test_standard_sparse_tensors_are_written_on_request(tmp_path):
    thin = mlp()
    done = pack_file(
        stored(tmp_path, thin), tmp_path / "out.onnx", PackOptions(form="sparse-initializer")
    )
    made = load(tmp_path / "out.onnx")
    assert [s.values.name for s in made.graph.sparse_initializer] == ["fc1.weight"]
    assert {row.codec for row in done.rows} == {"sparse-initializer", "dense"}
    assert done.notes == () and not is_packed(made)
    np.testing.assert_array_equal(run(made)[0], run(thin)[0])
    # And back: a file of sparse tensors is packed like any other.
    pack_file(tmp_path / "out.onnx", tmp_path / "again.onnx")
    assert weights(unpack(load(tmp_path / "again.onnx"))).items() == weights(thin).items()


def test_stripping_comes_before_packing(tmp_path):
    noted = mlp()
    noted.producer_name = "somebody"
    for number, node in enumerate(noted.graph.node):
        node.name = f"a_name_of_a_node_{number}"
    source = stored(tmp_path, noted)
    pack_file(source, tmp_path / "plain.onnx")
    pack_file(source, tmp_path / "small.onnx", PackOptions(strip=True))
    sizes = [(tmp_path / name).stat().st_size for name in ("plain.onnx", "small.onnx")]
    assert sizes[1] < sizes[0] - 5 * 15
    np.testing.assert_array_equal(run(load(tmp_path / "small.onnx"))[0], run(mlp())[0])


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (PackOptions(bits=4), 4),
        (PackOptions(prune=0.8), 2.5),
        (PackOptions(bits=4, prune=0.5), 4.5),
        (PackOptions(max_rel_error=0.1), 4),
        (PackOptions(max_rel_error=0.1, inputs=InputOptions("random")), 4),
    ],
)
def test_lossy_packing_reports_its_error(options, least, tmp_path):
    wide = noise((100, 600))
    source, target = stored(tmp_path, wide), tmp_path / "out.onnx"
    done = pack_file(source, target, options)
    assert done.nbytes_before > least * target.stat().st_size
    got, want = (
        numpy_helper.to_array(m.graph.initializer[0]) for m in (unpack(load(target)), wide)
    )
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < 0.6
    if options.max_rel_error is not None and options.inputs.data is None:
        assert error <= options.max_rel_error
    if options.inputs.data is not None:
        assert any(note.startswith("relative error of the outputs") for note in done.notes)
        assert output_error(wide, random_inputs(wide, range(4)))(load(target)) <= 0.1
    if options.prune is not None:
        assert done.rows[0].density == pytest.approx(1 - options.prune, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            PackOptions(inputs=InputOptions("random"), bits=4.0, max_rel_error=0.1),
            "give one of them",
        ),
        (PackOptions(bits=4.0, max_rel_error=0.1), "give one of them"),
        (PackOptions(bits=0.5), "expected 1 to 8"),
        (PackOptions(prune=1.5), "1.5"),
        (PackOptions(max_rel_error=0.0), "0"),
        (PackOptions(max_rel_error=0.1, inputs=InputOptions("nowhere:x")), "nowhere"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    source, target = stored(tmp_path, noise()), tmp_path / "out.onnx"
    with pytest.raises(RecipeError, match=message):
        pack_file(source, target, options)
    assert not target.exists()


def test_large_weights_may_go_beside(tmp_path):
    source, target = stored(tmp_path, mlp(), external="in.data"), tmp_path / "out.onnx"
    done = pack_file(source, target, PackOptions(external="out.data"))
    assert done.files == (target, tmp_path / "out.data")
    assert done.nbytes_before >= (tmp_path / "in.data").stat().st_size
    assert weights(unpack(load(target))) == weights(mlp())
    with pytest.raises(Prune2OnnxError, match="not a name for a data file"):
        pack_file(source, target, PackOptions(external="../out.data"))


def test_outputs_are_compared_before_an_upgraded_file_is_written(tmp_path, monkeypatch):
    source, target = stored(tmp_path, old()), tmp_path / "out.onnx"
    done = pack_file(source, target)
    assert "onnxruntime gives equal outputs before and after" in done.notes
    np.testing.assert_array_equal(run(load(target))[0], run(old())[0])
    target.unlink()

    def wrong(given, max_bytes):
        made = normalize(given, max_bytes)
        first = made.model.graph.initializer[0]
        replace(first, array_of(first) * 2)
        return made

    monkeypatch.setattr("prune2onnx.commands.source.normalize", wrong)
    with pytest.raises(MismatchError, match="outputs differ"):
        pack_file(source, target)
    assert not target.exists()


def test_a_network_that_onnxruntime_cannot_run_is_packed_without_being_run(tmp_path):
    source, target = stored(tmp_path, custom()), tmp_path / "out.onnx"
    done = pack_file(source, target, PackOptions(strip=True))
    assert done.rows[0].codec != "dense" and target.stat().st_size < source.stat().st_size / 5
    assert weights(unpack(load(target))) == weights(custom())
    assert inspect(load(target)).rows[0].codec == done.rows[0].codec
    aged = custom()
    next(e for e in aged.opset_import if not e.domain).version = 9
    aged.graph.node.insert(0, helper.make_node("Dropout", ["x"], ["x2"], ratio=0.5))
    aged.graph.node[1].input[0] = "x2"
    done = pack_file(stored(tmp_path, aged, "aged.onnx"), target)
    assert any(note.startswith("not run in onnxruntime") for note in done.notes)


def test_inputs_come_from_a_data_set_or_are_random():
    image = model(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        {"w": pruned((64, 10), 1.0, 15)},
        {"x": ["N", 1, 8, 8]},
        {"y": ["N", 10]},
    )
    digits = InputOptions("digits")
    found = inputs_of(image, session(image), digits, count=4, examples=100, batch=40)
    assert [each["x"].shape for each in found] == [(40, 1, 8, 8)] * 2
    random = inputs_of(image, session(image), InputOptions(), count=4, examples=100)
    assert len(random) == 4 and not np.array_equal(random[0]["x"], random[1]["x"])


def test_the_error_of_outputs_is_relative_and_the_worst_counts():
    pair = model(
        [helper.make_node("Mul", ["x", "a"], ["y"]), helper.make_node("Mul", ["x", "b"], ["z"])],
        {"a": np.array([1], np.float32), "b": np.array([10], np.float32)},
        {"x": [4]},
        {"y": [4], "z": [4]},
    )
    other = ModelProto()
    other.CopyFrom(pair)
    other.graph.initializer[1].raw_data = np.float32(11).tobytes()
    evaluate = output_error(pair, [{"x": np.ones(4, np.float32)}])
    assert evaluate(pair) == 0 and evaluate(other) == pytest.approx(0.1)
    counted = model(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)], {}, {"x": [4]}, {}
    )
    counted.graph.output.append(value("y", [4], TensorProto.INT64))
    onnx.checker.check_model(counted)
    assert output_error(counted, [{"x": np.ones(4, np.float32)}])(counted) == 0


def test_a_large_graph_is_pointed_out_with_what_strip_would_save(tmp_path):
    wordy = noise((8, 40))
    for node in wordy.graph.node:
        node.doc_string = "who needs to know " * 200
    done = pack_file(stored(tmp_path, wordy), tmp_path / "out.onnx")
    (note,) = [note for note in done.notes if "--strip would save" in note]
    assert int(note.split("save ")[1].split()[0].replace(",", "")) > 3000
    done = pack_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PackOptions(strip=True))
    assert not any("--strip" in note for note in done.notes)


# --- with examples ---


def with_examples(tmp_path, count: int = 600, classes: int = 5):
    """A trained-like classifier, and examples with its own answers as labels."""
    rng = np.random.default_rng(3)
    sizes = (24, 48, 40, classes)
    weights, nodes, at = {}, [], "x"
    for number, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{number}"] = rng.normal(0, inner**-0.5, (inner, outer)).astype(np.float32)
        weights[f"b{number}"] = rng.normal(0, 0.1, outer).astype(np.float32)
        nodes.append(helper.make_node("Gemm", [at, f"w{number}", f"b{number}"], [f"g{number}"]))
        at = f"g{number}"
        if number < 2:
            nodes.append(helper.make_node("Relu", [at], [f"r{number}"]))
            at = f"r{number}"
    made = model(nodes, weights, {"x": ["N", sizes[0]]}, {at: ["N", classes]})
    x = (rng.normal(size=(count, 6)) @ rng.normal(size=(6, 24))).astype(np.float32)
    (scores,) = session(made).run(None, {"x": x})
    source = stored(tmp_path, made)
    np.savez(tmp_path / "labelled.npz", x=x, y=scores.argmax(1))
    np.savez(tmp_path / "inputs.npz", x=x)
    return source, f"npz:{tmp_path / 'labelled.npz'}", f"npz:{tmp_path / 'inputs.npz'}"


def test_examples_give_a_smaller_file_for_an_error_of_the_outputs(tmp_path):
    source, _, inputs = with_examples(tmp_path)
    alone, calibrated = tmp_path / "alone.onnx", tmp_path / "calibrated.onnx"
    given = PackOptions(max_error=0.1, inputs=InputOptions(inputs), strip=True)
    done = pack_file(source, calibrated, given)
    (goal,) = done.goals
    assert goal.met and 0.05 < goal.reached <= 0.1 and not done.missed
    assert any("relative error of the outputs" in note for note in done.notes)
    dense = load(source)
    x = np.load(tmp_path / "inputs.npz")["x"]
    error = output_error(dense, [{"x": x}])
    pack_file(source, alone, PackOptions(max_rel_error=0.1, strip=True), evaluate=error)
    assert error(unpack(load(calibrated))) < 0.12
    assert calibrated.stat().st_size < 0.9 * alone.stat().st_size


def test_each_budget_is_met_on_examples_that_are_held_out(tmp_path):
    source, labelled, inputs = with_examples(tmp_path)
    target = tmp_path / "out.onnx"
    for data in (labelled, inputs):
        given = PackOptions(target_size=3500, inputs=InputOptions(data), strip=True)
        done = pack_file(source, target, given)
        assert 3300 < target.stat().st_size <= 3500 and done.goals[0].met
    given = PackOptions(max_drop=2.0, inputs=InputOptions(labelled), strip=True)
    done = pack_file(source, target, given)
    assert done.goals[0].reached <= 2 and target.stat().st_size < 5000
    assert any("of which one is" in note for note in done.notes)
    given = PackOptions(bits=3, prune=0.5, inputs=InputOptions(inputs))
    notes = pack_file(source, target, given).notes
    bits = next(float(note.split()[1]) for note in notes if "bits per weight" in note)
    assert bits <= 3
    arrays = [array_of(t) for t in unpack(load(target)).graph.initializer if len(t.dims) > 1]
    assert sum((a == 0).sum() for a in arrays) > 0.48 * sum(a.size for a in arrays)


def test_a_budget_that_is_missed_is_told_and_the_best_file_written(tmp_path):
    source, _, inputs = with_examples(tmp_path)
    target = tmp_path / "out.onnx"
    given = PackOptions(target_size=300, max_error=0.01, inputs=InputOptions(inputs))
    done = pack_file(source, target, given)
    assert target.exists() and {goal.what for goal in done.missed} >= {"size"}
    found = CliRunner().invoke(
        main,
        ["pack", str(source), str(target), "--target-size", "300", "--data", inputs],
    )
    assert found.exit_code == 3 and "missed by" in found.output


def test_a_curve_shows_other_sizes(tmp_path):
    source, labelled, _ = with_examples(tmp_path)
    arguments = ["--max-error", "10%", "--data", labelled, "--curve", "--json"]
    found = CliRunner().invoke(main, ["pack", str(source), str(tmp_path / "o.onnx"), *arguments])
    assert found.exit_code == 0, found.output
    points = json.loads(found.stdout)["curve"]
    sizes, errors = ([point[name] for point in points] for name in ("nbytes", "error"))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert [point["is_chosen"] for point in points].count(True) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_size": 1000}, "--target-size needs examples; give --data"),
        ({"max_error": 0.1}, "--max-error needs examples"),
        ({"max_drop": 0.1}, "--max-drop needs examples"),
        ({"pattern": (2, 4)}, "--prune 2:4 needs examples"),
        ({"prune": 0.5, "blocks": (4, 1)}, "--prune 4x1:0.5 needs examples"),
        ({"channels": 0.3}, "--prune channels:0.3 needs examples"),
        ({"channels": 1.3, "data": "inputs"}, "expected 0 <= D < 1"),
        ({"max_drop": 0.1, "data": "inputs"}, "limit the error of the outputs by --max-error"),
        ({"bits": 3, "target_size": 9, "data": "inputs"}, "give one of them"),
        ({"bits": 9, "data": "inputs"}, "expected 1 to 8"),
        ({"prune": 1.5, "data": "inputs"}, "expected 0 <= D < 1"),
        ({"max_error": 0.0, "data": "inputs"}, "expected a number above 0"),
        ({"curve": True, "data": "inputs"}, "--curve shows what other sizes cost"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message, tmp_path):
    source, _, inputs = with_examples(tmp_path)
    if options.pop("data", None):
        options |= {"inputs": InputOptions(inputs)}
    with pytest.raises(RecipeError, match=re.escape(message)):
        pack_file(source, tmp_path / "out.onnx", PackOptions(**options))
    assert not (tmp_path / "out.onnx").exists()


def test_whole_neurons_go_on_the_command_line(tmp_path):
    source, labelled, _ = with_examples(tmp_path)
    target = tmp_path / "out.onnx"
    arguments = ["--prune", "channels:30%", "--data", labelled, "--json"]
    found = CliRunner().invoke(main, ["pack", str(source), str(target), *arguments])
    assert found.exit_code == 0, found.output
    assert any("neurons are gone" in note for note in json.loads(found.stdout)["notes"])
    left, before = (
        sum(array_of(tensor).size for tensor in one.graph.initializer)
        for one in (unpack(load(target)), load(source))
    )
    assert left < 0.75 * before
    wrong = CliRunner().invoke(main, ["pack", "a", "b", "--prune", "channels:2"])
    assert wrong.exit_code == 2 and "expected 0 < F < 1, such as channels:0.5" in wrong.output


def test_one_example_is_too_few(tmp_path):
    source, _, _ = with_examples(tmp_path)
    np.savez(tmp_path / "one.npz", x=np.zeros((1, 24), np.float32))
    given = PackOptions(bits=4, inputs=InputOptions(f"npz:{tmp_path / 'one.npz'}"))
    with pytest.raises(Prune2OnnxError, match="one example; calibration needs some"):
        pack_file(source, tmp_path / "out.onnx", given)
