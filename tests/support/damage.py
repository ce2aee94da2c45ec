"""ONNX files and damaged variants of them: for test_hostile_files.py and tools/damage_fuzz.py.

`originals` are valid files: packed and dense, with and without external data, made ones and real
ones. `damaged` changes bytes, or fields of the protobuf message; `mutation` does the same for the
parts of packed files alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from mutation import INTEGERS, mutated, seeds
from networks import branches, convnet, custom, halves, int4, int8, mlp, scaled
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from random_graphs import graph

from prune2onnx.errors import Prune2OnnxError
from prune2onnx.graph.file import load, save
from prune2onnx.graph.outside import varint
from prune2onnx.graph.walk import bodies, in_model, nodes_in
from prune2onnx.packing.pack import pack

MODEL, DATA = "m.onnx", "m.data"

_REAL = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclass(frozen=True)
class Original:
    """A valid file.

    Attributes:
        name: what it is.
        files: the model, and its data file where it has one: name -> content.
    """

    name: str
    files: dict[str, bytes]


def originals(*, random_graphs: int = 40, every: int = 6, real: int = 60) -> Iterator[Original]:
    """Valid files.

    Args:
        random_graphs: how many graphs of `random_graphs`, each dense and packed.
        every: each so many of `mutation.seeds`, and of the files that come with onnx.
        real: the most of these.
    """
    made = [mlp(), mlp(opset=11, ir_version=6), convnet(), int8(), int4(), halves(), branches()]
    made += [scaled(), custom()]
    made += [onnx.shape_inference.infer_shapes(graph(seed)[0]) for seed in range(random_graphs)]
    for number, model in enumerate(made):
        for kind, content in (("dense", model), ("packed", pack(model).model)):
            yield Original(f"{kind} {number}", {MODEL: content.SerializeToString()})
            if number < 9 and (files := _with_data(content)):
                yield Original(f"{kind} {number} with data", files)
    for number, (name, model) in enumerate(seeds()):
        if number % every == 0:
            yield Original(f"packed {name}", {MODEL: model.SerializeToString()})
    paths = [path for folder in ("simple", "pytorch-converted", "pytorch-operator", "light")
             for path in sorted((_REAL / folder).rglob("*.onnx"))]  # fmt: skip
    for path in paths[::every][:real]:
        try:
            packed = pack(load(path)).model
        except Prune2OnnxError:  # an operator set that is too old
            continue
        yield Original(f"real {path.parent.name}", {MODEL: path.read_bytes()})
        yield Original(f"packed {path.parent.name}", {MODEL: packed.SerializeToString()})


def _with_data(model: ModelProto) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / MODEL, DATA)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files if files.get(DATA) else {}


def damaged(
    original: Original, random: Random, others: list[ModelProto]
) -> tuple[str, dict[str, bytes]]:
    """A variant of a file with one to four changes, and what kind of damage it is.

    Args:
        original: the file.
        random: decides.
        others: models whose parts may be put into it.
    """
    files = dict(original.files)
    if random.random() < 0.4:
        name = random.choice(sorted(files))
        content = bytearray(files[name])
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            _damage_bytes(content, random)
        files[name] = bytes(content)
        return f"bytes of {'the data' if name == DATA else 'the model'}", files
    model = ModelProto.FromString(files[MODEL])
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if random.random() < 0.35:
            model = mutated(model, random, others)
            continue
        try:
            random.choice(_CHANGES)(model, random)
        except (ValueError, IndexError, TypeError, OverflowError):
            continue  # does not fit the field
    files[MODEL] = model.SerializeToString()
    if random.random() < 0.05:
        content = bytearray(files[MODEL])
        _not_text(content, random)
        files[MODEL] = bytes(content)
    return "structure", files


# -- bytes -------------------------------------------------------------------------------------


def _damage_bytes(content: bytearray, random: Random) -> None:
    if not content:
        return
    at = random.randrange(len(content))
    length = min(random.choice((1, 2, 4, 16, 64, 1000)), len(content) - at)
    what = random.randrange(8)
    if what <= 1:
        content[at] ^= 1 << random.randrange(8)
    elif what == 2:
        del content[at:]
    elif what == 3:
        content[at:at] = random.randbytes(length)
    elif what == 4:
        content[at:at] = content[at : at + length]
    elif what == 5:
        del content[at : at + length]
    elif what == 6:
        content[at : at + length] = bytes([random.choice((0, 255))]) * length
    else:  # a varint: a length or a number
        content[at : at + 1] = varint(random.choice(INTEGERS) & (1 << 64) - 1)


def _not_text(content: bytearray, random: Random) -> None:
    """Replaces a letter by a byte that is no UTF-8, or by a control character."""
    letters = [at for at, byte in enumerate(content) if chr(byte).isalpha() and byte < 128]
    content[random.choice(letters)] = random.choice((0xFF, 0xC3, 0x1B, 0x0A, 0))


# -- structure ---------------------------------------------------------------------------------


def _any(random: Random, items: Iterable[Any]) -> Any:
    """One of the items; ValueError, which `damaged` ignores, if there is none."""
    found = list(items)
    if not found:
        raise ValueError("nothing to change")
    return random.choice(found)


def _graphs(model: ModelProto) -> list[GraphProto]:
    inside = [body for node in nodes_in(model.graph.node) for body in bodies(node)]
    return [model.graph, model.graph, *inside]


def _names(model: ModelProto) -> list[str]:
    found = {""}
    for node in model.graph.node:
        found.update((*node.input, *node.output))
    found.update(tensor.name for tensor in model.graph.initializer)
    return sorted(found)


def _node(model: ModelProto, random: Random) -> NodeProto:
    functions = [node for function in model.functions for node in nodes_in(function.node)]
    return _any(random, [*nodes_in(model.graph.node), *functions])


def _change_tensor(model: ModelProto, random: Random) -> None:
    tensor = _any(random, in_model(model))
    what = random.randrange(7)
    if what == 0:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(INTEGERS)
    elif what == 1:
        random.shuffle(tensor.dims)
    elif what == 2:
        tensor.data_type = random.choice((*range(30), 99, -1))
    elif what == 3:
        data = bytearray(tensor.raw_data)
        _damage_bytes(data, random)
        tensor.raw_data = bytes(data)
    elif what == 4:
        tensor.name = random.choice(_names(model))
    elif what == 5:
        tensor.float_data.append(1.0)
    else:
        tensor.raw_data, tensor.dims[:] = b"", [0, *tensor.dims[1:]]


def _change_external(model: ModelProto, random: Random) -> None:
    tensor = _any(random, in_model(model))
    if not tensor.external_data or random.random() < 0.2:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=random.choice((MODEL, DATA, "", "..", "/")))
        return
    entry = random.choice(tensor.external_data)
    if random.random() < 0.2:
        entry.key = random.choice(("location", "offset", "length", "checksum", "x"))
    numbers = [str(number) for number in INTEGERS]
    entry.value = random.choice(
        (*numbers, "", "x", MODEL, DATA, "nowhere", "../m.data", "1e3", "٣")
    )


def _change_initializers(model: ModelProto, random: Random) -> None:
    tensors = _any(random, _graphs(model)).initializer
    at = random.randrange(len(tensors))
    what = random.randrange(5)
    if what == 0:
        del tensors[at]
    elif what == 1:
        tensors.add().CopyFrom(tensors[at])
    elif what == 2:
        other = random.choice(tensors)
        tensors[at].raw_data, other.raw_data = other.raw_data, tensors[at].raw_data
    elif what == 3:
        value = helper.make_tensor_value_info(tensors[at].name, tensors[at].data_type, ["N"])
        model.graph.input.append(value)
    else:
        node = helper.make_node("Constant", [], [tensors[at].name], value=tensors[at])
        model.graph.node.insert(0, node)
        del tensors[at]


def _change_order(model: ModelProto, random: Random) -> None:
    nodes = _any(random, _graphs(model)).node
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    what = random.randrange(4)
    at = random.randrange(len(kept))
    if what == 0:
        random.shuffle(kept)
    elif what == 1:
        del kept[at]
    elif what == 2:
        kept.insert(random.randrange(len(kept)), kept[at])
    else:
        kept[at : at + 2] = kept[at : at + 2][::-1]
    del nodes[:]
    nodes.extend(kept)


def _change_node(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    what = random.randrange(8)
    if what == 0:
        node.op_type = _node(model, random).op_type
    elif what == 1:
        node.op_type = random.choice(("Relu", "Conv", "Gemm", "If", "Loop", "LSTM", "Nothing", ""))
    elif what == 2:
        node.domain = random.choice(("", "ai.onnx", "com.microsoft", "prune2onnx", "x"))
    elif what in (3, 4):
        names = random.choice((node.input, node.output))
        names[random.randrange(len(names))] = random.choice(_names(model))
    elif what == 5:
        names = random.choice((node.input, node.output))
        del names[random.randrange(len(names))]
    elif what == 6:
        random.choice((node.input, node.output)).append(random.choice(_names(model)))
    else:
        random.shuffle(node.input)


def _change_attribute(model: ModelProto, random: Random) -> None:
    node = _node(model, random)
    what = random.randrange(6)
    if what == 0:
        name = random.choice(("axis", "perm", "pads", "strides", "group", "epsilon", "to", "alpha"))
        value = random.choice((random.choice(INTEGERS), [1, 1], [0, -1, 2, 3], 0.5, "text"))
        node.attribute.append(helper.make_attribute(name, value))
        return
    attribute = _any(random, node.attribute)
    if what == 1:
        node.attribute.remove(attribute)
    elif what == 2:
        attribute.name = random.choice(("axis", "value", "x", ""))
    elif what == 3:
        attribute.type = random.choice(range(15))
    elif what == 4 and attribute.ints:
        attribute.ints[random.randrange(len(attribute.ints))] = random.choice(INTEGERS)
    elif what == 4 and attribute.HasField("f"):
        attribute.f = random.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    else:
        attribute.i = random.choice(INTEGERS)


def _change_values(model: ModelProto, random: Random) -> None:
    graph = _any(random, _graphs(model))
    group = random.choice((graph.input, graph.output, graph.value_info))
    what = random.randrange(6)
    value = _any(random, group)
    shape = value.type.tensor_type.shape
    if what == 0:
        value.type.tensor_type.elem_type = random.choice((*range(26), 99))
    elif what == 1:
        random.choice(shape.dim).dim_value = random.choice(INTEGERS)
    elif what == 2:
        random.choice(shape.dim).dim_param = random.choice(("N", "x + 1", "a b", "N", ""))
    elif what == 3:
        value.name = random.choice(_names(model))
    elif what == 4:
        group.remove(value)
    else:
        shape.dim.add(dim_value=random.choice(INTEGERS))


def _change_model(model: ModelProto, random: Random) -> None:
    what = random.randrange(6)
    if what == 0:
        model.ir_version = random.choice((*range(15), *INTEGERS))
    elif what == 1:
        _any(random, model.opset_import).version = random.choice((*range(27), *INTEGERS))
    elif what == 2:
        model.opset_import.add(domain=random.choice(("", "prune2onnx", "x")), version=1)
    elif what == 3:
        del model.opset_import[:]
    elif what == 4:
        entry = model.metadata_props.add(key=random.choice(("author", "prune2onnx", "")))
        entry.value = random.choice(("", "{}", "\x1b[2J", "x" * 1000))
    else:
        model.metadata_props.extend(list(model.metadata_props))


def _change_function(model: ModelProto, random: Random) -> None:
    function = _any(random, model.functions)
    what = random.randrange(4)
    if what == 0:
        model.functions.remove(function)
    elif what == 1:
        model.functions.add().CopyFrom(function)
    elif what == 2:
        del function.node[random.randrange(len(function.node))]
    else:
        names = random.choice((function.input, function.output, function.attribute))
        names[random.randrange(len(names))] = "x"


_CHANGES: tuple[Callable[[ModelProto, Random], None], ...] = (
    *(_change_tensor, _change_tensor, _change_initializers, _change_initializers),
    *(_change_order, _change_order, _change_node, _change_node, _change_node),
    *(_change_attribute, _change_attribute, _change_values, _change_values, _change_model),
    *(_change_function, _change_external),
)


def models_of(originals: Iterable[Original]) -> list[ModelProto]:
    """The models, to lend their parts."""
    found = []
    for each in originals:
        try:
            found.append(ModelProto.FromString(each.files[MODEL]))
        except DecodeError:
            continue
    return found
