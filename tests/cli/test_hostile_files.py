"""Files made to do harm: one line, in bounded time, and nothing written where it should not be."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator

import damage
import damage_fuzz
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from finished import made_run, made_sweep
from networks import mlp, model
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prune2onnx.cli.main import main
from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import load
from prune2onnx.graph.normalize import normalize
from prune2onnx.packing.inline import outlined
from prune2onnx.packing.pack import pack
from prune2onnx.packing.unpack import unpack
from prune2onnx.shrinking.shrink import shrink as shrunk


def invoked(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    return result.exit_code, result.stderr


def laughing(levels: int, *, circle: bool = False) -> ModelProto:
    """Functions of which each calls the one before twice."""
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]

    def function(number: int, op: str, domain: str) -> onnx.FunctionProto:
        nodes = [
            helper.make_node(op, ["x"], ["a"], domain=domain),
            helper.make_node(op, ["a"], ["y"], domain=domain),
        ]
        return helper.make_function("f", f"f{number}", ["x"], ["y"], nodes, opset)

    functions = [function(0, f"f{levels - 1}" if circle else "Relu", "f" if circle else "")]
    functions += [function(n, f"f{n - 1}", "f") for n in range(1, levels)]
    made = model(
        [helper.make_node(f"f{levels - 1}", ["x"], ["y"], domain="f")], {}, {"x": [4]}, {"y": [4]}
    )
    made.functions.extend(functions)
    made.opset_import.append(helper.make_opsetid("f", 1))
    return made


@pytest.mark.parametrize("verb", ["validate", "shrink", "inspect", "pack", "unpack", "benchmark"])
def test_functions_that_double_at_each_call_are_refused_at_once(verb, tmp_path):
    onnx.save(laughing(40), tmp_path / "m.onnx")
    out = [] if verb in ("validate", "inspect", "benchmark") else [tmp_path / "o.onnx"]
    start = time.monotonic()
    code, text = invoked(verb, tmp_path / "m.onnx", *out)
    assert code == 1 and "nodes once its functions are inlined" in text
    assert time.monotonic() - start < 10


def test_functions_may_call_functions_but_not_themselves(tmp_path):
    onnx.save(laughing(6), tmp_path / "m.onnx")
    assert len(load(tmp_path / "m.onnx").functions) == 6
    onnx.save(laughing(3, circle=True), tmp_path / "m.onnx")
    with pytest.raises(Prune2OnnxError, match="calls itself"):
        load(tmp_path / "m.onnx")


def test_metadata_under_our_own_names_is_replaced(tmp_path):
    given = mlp()
    for key in ("prune2onnx", "prune2onnx.tensors"):
        given.metadata_props.add(key=key, value="theirs")
    given.metadata_props.add(key="author", value="someone")
    packed = pack(given).model
    keys = [entry.key for entry in packed.metadata_props]
    assert sorted(set(keys)) == sorted(keys) and "author" in keys
    onnx.checker.check_model(unpack(packed))
    packed.metadata_props.add(key="prune2onnx")  # as an earlier version wrote it
    onnx.save(packed, tmp_path / "m.onnx")
    code, text = invoked("unpack", tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert code == 0, text


def test_nothing_of_a_file_reaches_the_terminal_as_it_is(tmp_path):
    """onnxruntime writes its log to the process's stderr, names and all."""
    shape = numpy_helper.from_array(np.int64([7]), "s")
    made = model([helper.make_node("Reshape", ["x", "s"], ["y"])], {}, {"x": ["N"]}, {"y": ["M"]})
    made.graph.initializer.append(shape)
    made.graph.node[0].name = "\x1b[2J\x1b]0;gone\x07"
    onnx.save(made, tmp_path / "m.onnx")
    command = [sys.executable, "-m", "prune2onnx"]
    for verb in ("validate", "benchmark"):
        done = subprocess.run(
            [*command, verb, tmp_path / "m.onnx", "--input-shape", "x=5"],
            capture_output=True,
            env={**os.environ, "NO_COLOR": "1"},
        )
        assert b"\x1b" not in done.stdout + done.stderr and b"\x07" not in done.stderr


def test_many_initializers_and_nodes_take_time_in_proportion(tmp_path):
    def chain(count: int) -> ModelProto:
        nodes = [
            helper.make_node("Add", [f"v{n}" if n else "x", f"w{n}"], [f"v{n + 1}"])
            for n in range(count)
        ]
        nodes[-1].output[0] = "y"
        weights = {f"w{n}": np.float32([n]) for n in range(count)}
        return model(nodes, weights, {"x": [1]}, {"y": [1]})

    def seconds(count: int) -> float:
        onnx.save(chain(count), tmp_path / "m.onnx")
        start = time.process_time()
        for verb in (["inspect"], ["shrink"], ["pack"]):
            out = [] if verb == ["inspect"] else [tmp_path / "o.onnx"]
            assert invoked(*verb, tmp_path / "m.onnx", *out)[0] == 0
        return time.process_time() - start

    seconds(10)  # imports
    assert seconds(4000) < 10 * seconds(1000) + 1


EXPANDED = 1 << 27


def bomb(kind: str) -> ModelProto:
    """A file of about 500 bytes whose weights take 128 MiB."""
    call = helper.make_node("w", ["s"], ["w0"], domain="prune2onnx")
    read = helper.make_node("Gather", ["w0", "i"], ["y"])
    made = model([read], {"i": np.int64([3])}, {}, {"y": [1]})
    if kind == "sparse":
        sparse = made.graph.sparse_initializer.add(dims=[EXPANDED // 4])
        one = TensorProto(name="w0", data_type=1, dims=[1], float_data=[1])
        sparse.values.CopyFrom(one)
        sparse.indices.CopyFrom(TensorProto(data_type=7, dims=[1], int64_data=[5]))
        return made
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8
    weight = np.ones(EXPANDED, np.int8)
    checksum = zlib.crc32(weight.data, zlib.crc32(f"w0 3 [{EXPANDED}] ".encode()))
    facts = TensorProto(dims=[4], data_type=7, int64_data=[checksum, 0, 0, 9])
    call.attribute.add(name="i", type=onnx.AttributeProto.TENSOR).t.CopyFrom(facts)
    made.graph.node.insert(0, call)
    made.graph.initializer.append(numpy_helper.from_array(np.int64([EXPANDED]), "s"))
    fill = numpy_helper.from_array(np.ones(1, np.int8))
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["w"], value=fill)]
    opset = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("prune2onnx", "w", ["s"], ["w"], nodes, opset))
    made.opset_import.append(helper.make_opsetid("prune2onnx", 1))
    made.metadata_props.add(key="prune2onnx")
    return made


_PEAK = """
import sys
from prune2onnx.cli.main import main

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

main([*sys.argv[1:3], *sys.argv[4:]], standalone_mode=False)  # everything is imported
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
main([sys.argv[1], *sys.argv[3:]], standalone_mode=False)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("kind", ["packed", "sparse"])
@pytest.mark.parametrize("verb", ["unpack", "inspect"])
def test_a_file_of_some_bytes_takes_no_more_memory_than_twice_its_weights(verb, kind, tmp_path):
    onnx.save(mlp(), tmp_path / "small.onnx")
    onnx.save(bomb(kind), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    out = [tmp_path / "o.onnx"] if verb == "unpack" else []
    command = [sys.executable, "-c", _PEAK, verb, tmp_path / "small.onnx", tmp_path / "m.onnx"]
    done = subprocess.run([*command, *out], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2.1 * EXPANDED
    code, text = invoked(verb, tmp_path / "m.onnx", *out, "--max-bytes", EXPANDED - 1)
    assert code == 1 and "--max-bytes" in text


def test_what_pack_writes_of_a_file_that_onnx_refuses_is_unpacked_again(tmp_path):
    """`pack` took what onnxruntime opens; `unpack` and `inspect` refused the result."""
    given = mlp()
    given.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(given)
    onnx.save(given, tmp_path / "m.onnx")
    for verb, *files in (
        ("pack", "m.onnx", "p.onnx"),
        ("inspect", "p.onnx"),
        ("unpack", "p.onnx", "u.onnx"),
    ):
        code, text = invoked(verb, *(tmp_path / name for name in files))
        assert code == 0, text
    assert onnx.load(tmp_path / "u.onnx").graph == given.graph


@pytest.mark.parametrize("verb", ["unpack", "inspect"])
def test_no_session_is_opened_of_a_file_from_a_stranger(verb, tmp_path, monkeypatch):
    """onnxruntime took a gigabyte for a file of 2 kB that onnx's checker refuses."""
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    given = mlp()
    given.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(given, tmp_path / "dense.onnx")
    onnx.save(pack(given).model, tmp_path / "packed.onnx")
    out = [tmp_path / "o.onnx"] if verb == "unpack" else []
    assert invoked(verb, tmp_path / "packed.onnx", *out)[0] == 0
    code, text = invoked(verb, tmp_path / "dense.onnx", *out)
    assert code == 1 and "not a valid ONNX model" in text


@pytest.mark.parametrize("way", ["initializer", "input", "node"])
def test_a_coded_weight_has_its_name_to_itself(way, tmp_path):
    packed = outlined(pack(mlp()).model)
    name = next(n for n in packed.graph.node if n.domain == "prune2onnx").output[0]
    if way == "initializer":
        packed.graph.initializer.append(numpy_helper.from_array(np.float32([1]), name))
    elif way == "input":
        packed.graph.input.append(helper.make_tensor_value_info(name, 1, [1]))
    else:
        packed.graph.node.append(helper.make_node("Relu", ["x"], [name]))
    with pytest.raises(Prune2OnnxError, match=f"{name}: a coded weight, and another value has"):
        unpack(packed)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("LogSoftmax", {"axis": -(2**63)}), ("Pad", {"pads": [1]}), ("Clip", {"min": "text"})],
)
def test_old_operators_that_contradict_themselves_are_named(op, attributes, tmp_path):
    node = helper.make_node(op, ["x"], ["y"], **attributes)
    made = model([node], {}, {"x": [2, 3]}, {"y": [2, 3]}, opset=6)
    with contextlib.suppress(Prune2OnnxError):
        normalize(made)
    if op == "LogSoftmax":
        with pytest.raises(Prune2OnnxError, match="y: LogSoftmax of opset 6 cannot be converted"):
            normalize(made)


def test_nodes_in_any_order_that_onnxruntime_runs_are_sorted_first(tmp_path):
    """`shrink` misread them, and refused its own result."""
    dead = np.ones((4, 4), np.float32)
    dead[:, 1:3] = 0
    given = model(
        [
            helper.make_node("MatMul", ["r", "b"], ["y"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["x", "a"], ["h"]),
        ],
        {"a": dead, "b": np.ones((4, 2), np.float32)},
        {"x": [1, 4]},
        {"y": [1, 2]},
    )
    onnx.save(given, tmp_path / "m.onnx")
    for verb, more in (("shrink", ["--multiple", "1"]), ("pack", ["--shrink"])):
        code, text = invoked(verb, tmp_path / "m.onnx", tmp_path / "o.onnx", *more)
        assert code == 0 and "sorted its nodes" in text, text
        onnx.checker.check_model(tmp_path / "o.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node[-3:]] == [
        *("MatMul", "Relu", "MatMul")
    ]
    circle = model([helper.make_node("Add", ["x", "y"], ["y"])], {}, {"x": [1]}, {"y": [1]})
    circle.graph.node.append(helper.make_node("Relu", ["y"], ["x"]))
    onnx.save(circle, tmp_path / "m.onnx")
    assert invoked("pack", tmp_path / "m.onnx", tmp_path / "o.onnx")[0] == 1


def test_streams_that_others_read_stay_and_no_input_is_left_of_the_others():
    packed = outlined(pack(mlp()).model)
    stream = next(n for n in packed.graph.node if n.domain == "prune2onnx").input[0]
    tensor = next(t for t in packed.graph.initializer if t.name == stream)
    shared = ModelProto.FromString(packed.SerializeToString())
    shared.graph.node.append(helper.make_node("Identity", [stream], ["also"]))
    shared.graph.output.append(helper.make_tensor_value_info("also", tensor.data_type, tensor.dims))
    dense = unpack(shared)
    onnx.checker.check_model(dense)
    assert tensor in dense.graph.initializer
    value = helper.make_tensor_value_info(stream, tensor.data_type, tensor.dims)
    packed.graph.input.append(value)
    dense = unpack(packed)
    assert [value.name for value in dense.graph.input] == ["x"]
    onnx.checker.check_model(dense)


def test_two_initializers_of_one_name_are_refused_in_every_graph(tmp_path):
    """onnxruntime opens them; `pack` crashed, `shrink` wrote what no other tool opens."""
    given = mlp()
    given.graph.initializer.add().CopyFrom(given.graph.initializer[0])
    body = model(
        [helper.make_node("Add", ["x", "c"], ["z"])], {"c": np.ones(1, np.float32)}, {}, {}
    )
    body.graph.output.append(helper.make_tensor_value_info("z", 1, [1]))
    body.graph.initializer.add().CopyFrom(body.graph.initializer[0])
    branch = {"then_branch": body.graph, "else_branch": body.graph}
    inside = model([helper.make_node("If", ["x"], ["y"], **branch)], {}, {"x": [1]}, {"y": [1]})
    for made, name in ((given, "fc1.weight"), (inside, "c")):
        onnx.save(made, tmp_path / "m.onnx")
        for verb, *out in (("unpack", "o"), ("pack", "o"), ("shrink", "o"), ("inspect",)):
            code, text = invoked(verb, tmp_path / "m.onnx", *(tmp_path / name for name in out))
            assert code == 1 and f"{name}: 2 initializers have this name" in text


def test_a_doc_string_that_is_not_text_is_kept(tmp_path):
    given = mlp()
    given.graph.doc_string, given.producer_name = "a long doc string", "the producer"
    content = given.SerializeToString()
    content = content.replace(b"a long", b"\xc3 long").replace(b"the pro", b"\xff\xfe. pro")
    (tmp_path / "m.onnx").write_bytes(content)
    for verb in ("pack", "unpack", "shrink"):
        code, text = invoked(verb, tmp_path / "m.onnx", tmp_path / "o.onnx")
        assert code == 0, text
        written = (tmp_path / "o.onnx").read_bytes()
        assert b"\xc3 long" in written and b"\xff\xfe. pro" in written
    invoked("pack", tmp_path / "m.onnx", tmp_path / "p.onnx", "--external", "p.data")
    code, text = invoked("unpack", tmp_path / "p.onnx", tmp_path / "o.onnx", "--external", "o.data")
    assert code == 0 and load(tmp_path / "o.onnx").graph.node == given.graph.node


@pytest.mark.parametrize("way", ["group", "flatten", "pad"])
def test_channels_that_a_file_only_states_take_no_memory(way, tmp_path):
    """A group of 2^60 was allocated; so are channels by shapes and pads."""
    kernel = np.zeros((4, 2, 1, 1), np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["h"])]
    weights = {"w": kernel, "w2": kernel[:, :1], "p": np.int64([0, 1 << 36, 0, 0, 0, 0, 0, 0])}
    if way == "group":
        nodes.append(helper.make_node("Conv", ["h", "w2"], ["y"], group=1 << 60))
    elif way == "flatten":
        nodes.append(helper.make_node("Flatten", ["h"], ["y"]))
    else:
        nodes.append(helper.make_node("Pad", ["h", "p"], ["y"]))
    made = model(nodes, weights, {"x": [1, 2, 1 << 20, 1 << 20]}, {"y": None})
    with limited(4 << 30):
        assert shrunk(made).model.graph.node


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """At most so much address space; what is allocated beyond is an error."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("inside", [False, True])
def test_an_operand_that_is_left_out_is_refused(inside, tmp_path):
    """onnxruntime crashes (SIGSEGV) when it runs this, and onnx's checker takes it."""
    lacking = helper.make_node("Max", ["x", ""], ["y"])
    made = model([lacking], {}, {"x": [1]}, {"y": [1]})
    if inside:
        opset = [helper.make_opsetid("", 18)]
        made.functions.append(helper.make_function("f", "f", ["x"], ["y"], [lacking], opset))
        made.graph.node[0].CopyFrom(helper.make_node("f", ["x"], ["y"], domain="f"))
        made.opset_import.append(helper.make_opsetid("f", 1))
    onnx.save(made, tmp_path / "m.onnx")
    for verb, *out in (("validate",), ("pack", "o"), ("benchmark",)):
        code, text = invoked(verb, tmp_path / "m.onnx", *(tmp_path / name for name in out))
        assert code == 1 and "Max 'y': its input 1 is left out, which it needs" in text
    made = model([helper.make_node("Clip", ["x", "", "m"], ["y"])], {}, {"x": [1]}, {"y": [1]})
    made.graph.initializer.append(numpy_helper.from_array(np.float32(1), "m"))
    onnx.save(made, tmp_path / "m.onnx")
    assert invoked("pack", tmp_path / "m.onnx", tmp_path / "o")[0] == 0


@pytest.mark.parametrize("verb", ["validate", "shrink", "benchmark"])
def test_a_loop_without_end_is_not_waited_for(verb, tmp_path, monkeypatch):
    monkeypatch.setattr("prune2onnx.runtime.inputs._MOST_SECONDS", 0.3)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["more"]),
            helper.make_node("Relu", ["c"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("c", 1, [1, 4]),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", 1, [1, 4]),
        ],
    )
    dead = np.diag(np.float32([1, 0, 0, 1]))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["h", "b"], ["s"]),
        helper.make_node("Loop", ["trips", "", "s"], ["y"], body=body),
    ]
    weights = {"trips": np.int64(2**60), "a": dead, "b": dead}
    onnx.save(model(nodes, weights, {"x": [1, 4]}, {"y": [1, 4]}), tmp_path / "m.onnx")
    out = [tmp_path / "o.onnx", "--multiple", 1] if verb == "shrink" else []
    start = time.monotonic()
    code, text = invoked(verb, tmp_path / "m.onnx", *out)
    assert time.monotonic() - start < 15
    assert code == (1 if verb == "benchmark" else 0)
    assert "it runs for more than 0.3 s" in " ".join(text.replace("│", " ").split())


def test_a_sparse_initializer_of_an_old_file_is_unpacked_to_a_valid_one(tmp_path):
    made = model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [1]}, {"y": [1]}, opset=8)
    made.ir_version = 3
    sparse = made.graph.sparse_initializer.add(dims=[3])
    sparse.values.CopyFrom(TensorProto(name="s", data_type=1, dims=[0]))
    sparse.indices.CopyFrom(TensorProto(data_type=7, dims=[0]))
    onnx.save(made, tmp_path / "m.onnx")
    code, text = invoked("unpack", tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert code == 0, text
    onnx.checker.check_model(tmp_path / "o.onnx")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits, and /proc")
def test_damaged_files_are_refused_in_a_line_or_done_right(tmp_path):
    """More of them by hand: tools/damage_fuzz.py."""
    given = list(damage.originals(random_graphs=6, every=40))
    tally = damage_fuzz.fuzz(50, 0, 1, tmp_path, given, damage_fuzz.VERBS)
    assert not tally.bad, tally.kinds
    for ends in tally.ends.values():
        assert ends["refused"] > 5 and ends.total() - ends["refused"] > 5


def test_sparse_tensors_are_limited_in_all_verbs_and_the_advice_holds(tmp_path, monkeypatch):
    made = bomb("sparse")
    for number in range(1, 3):
        made.graph.sparse_initializer.add().CopyFrom(made.graph.sparse_initializer[0])
        made.graph.sparse_initializer[number].values.name = f"w{number}"
    for sparse in made.graph.sparse_initializer:
        sparse.dims[:] = [1 << 20]
    onnx.save(made, tmp_path / "m.onnx")
    monkeypatch.setattr("prune2onnx.commands.source.MAX_BYTES", 3 << 22)
    for verb, *more in (("pack",), ("shrink",), ("unpack", "--max-bytes", 3 << 22)):
        assert invoked(verb, tmp_path / "m.onnx", tmp_path / "o.onnx", *more)[0] == 0
    monkeypatch.setattr("prune2onnx.commands.source.MAX_BYTES", (3 << 22) - 1)
    for verb, *more in (("pack",), ("shrink",), ("unpack", "--max-bytes", (3 << 22) - 1)):
        code, text = invoked(verb, tmp_path / "m.onnx", tmp_path / "o.onnx", *more)
        assert code == 1 and "w2: a sparse tensor" in text, text
        assert "`prune2onnx unpack --max-bytes` allows more" in text


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives away")
def test_a_run_of_another_user_is_not_continued_without_trust(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: nowhere.py:make\ndata: digits\n")
    os.chown(tmp_path / "run", 12345, 12345)
    code, text = invoked("compress", "--resume", tmp_path / "run")
    assert code == 2 and "belongs to another user" in text and "--trust" in text
    code, text = invoked("compress", "--resume", tmp_path / "run", "--trust")
    assert "nowhere.py" in text


@pytest.mark.parametrize("way", ["name", "link", "page"])
def test_a_report_is_written_into_its_folder_and_nowhere_else(way, tmp_path):
    sweep, outside = tmp_path / "sweep", tmp_path / "outside"
    made_run(outside)
    made_sweep(sweep)
    front = json.loads((sweep / "front.json").read_text())
    point = front["points"][0]
    if way == "name":
        point["what"] = "../../outside"
        folder = sweep / "runs" / f"../../outside-{point['limit']}-seed{point['seed']}"
        outside.rename(tmp_path / folder.name)
    elif way == "link":
        folder = sweep / "runs" / f"{point['what']}-{point['limit']}-seed{point['seed']}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(outside)
    else:
        (tmp_path / "precious").write_text("mine")
        (sweep / "report.html").unlink(missing_ok=True)
        (sweep / "report.html").symlink_to(tmp_path / "precious")
    (sweep / "front.json").write_text(json.dumps(front))
    code, text = invoked("report", sweep)
    assert code == 1 and len(text.splitlines()) == 1
    assert not list(tmp_path.glob("outside*/report.html"))
    if way == "page":
        assert (tmp_path / "precious").read_text() == "mine"


def test_a_long_list_of_weights_is_cut_for_people_and_whole_in_json(tmp_path):
    weights = {f"w{n}": np.float32([n]) for n in range(1500)}
    nodes = [helper.make_node("Sum", ["x", *weights], ["y"])]
    onnx.save(model(nodes, weights, {"x": [1]}, {"y": [1]}), tmp_path / "m.onnx")
    shown = invoked("inspect", tmp_path / "m.onnx")[1]
    assert "1000 largest of 1,500 weights" in " ".join(shown.split())
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx"), "--json"])
    assert len(json.loads(result.stdout)["weights"]) == 1500


def test_an_interrupt_in_a_destructor_is_not_lost():
    """Python prints "Exception ignored in" and goes on; `compress` went on for hours."""
    program = """
import click, os, signal, time
from prune2onnx.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
@main.command()
def forever():
    slow = Slow()
    del slow
    time.sleep(60)
main(["forever"])
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 130 and b"interrupted" in done.stderr
    assert time.monotonic() - start < 30
