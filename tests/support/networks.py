"""Small ONNX models that many tests share, and helpers to run and optimise them in onnxruntime."""

import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def pruned(shape: tuple[int, ...], density: float, levels: int, seed: int = 0) -> np.ndarray:
    """float32 with about so many levels, most of them near zero; a fraction 1 - density is +0."""
    rng = np.random.default_rng(seed)
    steps = np.clip(np.round(rng.normal(0, levels / 6, shape)), -levels // 2, levels // 2)
    array = steps.astype(np.float32) / np.float32(37)
    array[rng.random(shape) >= density] = 0
    return array


def value(name: str, shape, element_type: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def model(nodes, weights, inputs, outputs, opset=18, ir_version=8, **fields) -> ModelProto:
    """Weights are arrays or tensors; inputs and outputs name -> shape of floats."""
    values = [[value(*each) for each in group.items()] for group in (inputs, outputs)]
    tensors = [
        array if isinstance(array, TensorProto) else numpy_helper.from_array(array, name)
        for name, array in weights.items()
    ]
    graph = helper.make_graph(nodes, "net", *values, tensors, **fields)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def mlp(opset: int = 18, ir_version: int = 8) -> ModelProto:
    rng = np.random.default_rng(5)
    return model(
        [
            helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "fc2.weight", "fc2.bias"], ["l"], transB=1),
            helper.make_node("Relu", ["l"], ["q"]),
            helper.make_node("MatMul", ["q", "fc3"], ["y"]),
        ],
        {
            "fc1.weight": pruned((100, 300), 0.05, 31),
            "fc1.bias": (rng.integers(-30, 30, 100) / 64).astype(np.float32),
            "fc2.weight": pruned((80, 100), 0.9, 15, seed=1),
            "fc2.bias": rng.normal(size=80).astype(np.float32),
            "fc3": rng.normal(size=(80, 10)).astype(np.float32),
        },
        {"x": ["N", 300]},
        {"y": ["N", 10]},
        opset,
        ir_version,
    )


def convnet() -> ModelProto:
    rng = np.random.default_rng(6)
    channels = {name: rng.random(64).astype(np.float32) + 0.5 for name in ("s", "b", "m", "v")}
    return model(
        [
            helper.make_node("Conv", ["x", "conv1.weight"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["r"]),
            helper.make_node("Conv", ["r", "conv2.weight"], ["d"], group=64),
            helper.make_node("Conv", ["d", "conv3.weight"], ["e"], strides=[2, 2]),
            helper.make_node("Add", ["e", "shift"], ["y"]),
        ],
        {
            "conv1.weight": pruned((64, 3, 3, 3), 0.5, 15),
            **channels,
            "conv2.weight": pruned((64, 1, 3, 3), 0.5, 15, seed=1),
            "conv3.weight": pruned((32, 64, 3, 3), 0.1, 15, seed=2),
            "shift": pruned((1, 32, 1, 1), 1.0, 15, seed=3),
        },
        {"x": ["N", 3, 12, 12]},
        {"y": ["N", 32, 4, 4]},
    )


def int8() -> ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear."""
    rng = np.random.default_rng(7)
    weight = np.clip(np.round(rng.normal(0, 9, (64, 16, 3, 3))), -127, 127).astype(np.int8)
    weight[rng.random(weight.shape) < 0.8] = 0
    return model(
        [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["weight", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"]),
            helper.make_node("QuantizeLinear", ["c", "xs", "xz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "xs", "xz"], ["y"]),
        ],
        {
            "xs": np.array(0.05, np.float32),
            "xz": np.array(3, np.int8),
            "weight": weight,
            "ws": (np.round(rng.random(64) * 16 + 1) / 512).astype(np.float32),
            "wz": np.zeros(64, np.int8),
        },
        {"x": ["N", 16, 9, 9]},
        {"y": ["N", 64, 7, 7]},
    )


def int4() -> ModelProto:
    """A product with a dequantized int4 weight."""
    rng = np.random.default_rng(8)
    weight = np.clip(np.round(rng.normal(0, 1.5, (160, 240))), -8, 7).astype(ml_dtypes.int4)
    return model(
        [
            helper.make_node("DequantizeLinear", ["weight", "ws"], ["wd"], axis=1),
            helper.make_node("MatMul", ["x", "wd"], ["y"]),
        ],
        {"weight": weight, "ws": (rng.random(240) / 8).astype(np.float32)},
        {"x": ["N", 160]},
        {"y": ["N", 240]},
        opset=21,
        ir_version=10,
    )


def halves(element_type: int = TensorProto.FLOAT16) -> ModelProto:
    """A network in float16 or bfloat16, its input and output float32."""
    dtype = np.float16 if element_type == TensorProto.FLOAT16 else ml_dtypes.bfloat16
    rng = np.random.default_rng(9)
    return model(
        [
            helper.make_node("Cast", ["a"], ["af"], to=FLOAT),
            helper.make_node("Cast", ["b"], ["bf"], to=FLOAT),
            helper.make_node("MatMul", ["x", "af"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "bf"], ["y"]),
        ],
        {
            "a": rng.normal(size=(70, 200)).astype(dtype),
            "b": pruned((200, 60), 0.2, 15).astype(dtype),
        },
        {"x": ["N", 70]},
        {"y": ["N", 60]},
    )


def branches() -> ModelProto:
    """Weights within the bodies of an If and of a Loop."""

    def body(name: str, seed: int) -> GraphProto:
        weight = numpy_helper.from_array(pruned((80, 80), 0.2, 15, seed), f"{name}.weight")
        node = helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}.out"])
        return helper.make_graph([node], name, [], [value(f"{name}.out", ["N", 80])], [weight])

    weight = numpy_helper.from_array(pruned((80, 80), 0.2, 15, seed=3), "loop.weight")
    loop = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("MatMul", ["state", "loop.weight"], ["next"]),
        ],
        "loop",
        [
            value("i", [], TensorProto.INT64),
            value("go", [], TensorProto.BOOL),
            value("state", None),
        ],
        [value("on", [], TensorProto.BOOL), value("next", None)],
        [weight],
    )
    return model(
        [
            helper.make_node("ReduceMax", ["x"], ["peak"], keepdims=0),
            helper.make_node("Greater", ["peak", "limit"], ["flag"]),
            helper.make_node(
                "If", ["flag"], ["h"], then_branch=body("then", 1), else_branch=body("else", 2)
            ),
            helper.make_node("Loop", ["trips", "", "h"], ["l"], body=loop),
            helper.make_node("MatMul", ["l", "last"], ["y"]),
        ],
        {
            "limit": np.array(2, np.float32),
            "trips": np.array(3, np.int64),
            "last": pruned((80, 50), 0.3, 15, seed=4),
        },
        {"x": ["N", 80]},
        {"y": ["N", 50]},
    )


def scaled() -> ModelProto:
    """Weights of full precision that compress by their exponents alone, and a depthwise family."""
    rng = np.random.default_rng(10)
    return model(
        [
            helper.make_node("Conv", ["x", "k1"], ["c"], group=48),
            helper.make_node("Conv", ["c", "k2"], ["d"], group=48),
            helper.make_node("ReduceMean", ["d", "axes"], ["e"], keepdims=0),
            helper.make_node("MatMul", ["e", "w"], ["y"]),
        ],
        {
            "k1": rng.normal(size=(48, 1, 3, 3)).astype(np.float32),
            "k2": rng.normal(size=(48, 1, 3, 3)).astype(np.float32),
            "axes": np.array([2, 3], np.int64),
            "w": rng.normal(size=(48, 300)).astype(np.float32),
        },
        {"x": ["N", 48, 8, 8]},
        {"y": ["N", 300]},
    )


def custom() -> ModelProto:
    """A model with an operator that onnxruntime does not have."""
    made = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Wavelet", ["h"], ["y"], domain="com.example"),
        ],
        {"w": pruned((60, 600), 0.2, 15)},
        {"x": ["N", 60]},
        {"y": ["N", 600]},
    )
    made.opset_import.add(domain="com.example", version=1)
    return made


MODELS = {
    "mlp": mlp,
    "convnet": convnet,
    "int8": int8,
    "int4": int4,
    "float16": halves,
    "bfloat16": lambda: halves(TensorProto.BFLOAT16),
    "branches": branches,
    "full precision": scaled,
}


def session(
    opened: ModelProto, level: str = "ORT_ENABLE_ALL", path: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if path is not None:
        options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(
        opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def optimised(opened: ModelProto, level: str = "ORT_ENABLE_BASIC") -> GraphProto:
    """The graph after onnxruntime has optimised it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session(opened, level, path)
        return onnx.load(path).graph


def operators(graph: GraphProto) -> list[tuple[str, str]]:
    """The operators, sorted: onnxruntime may reorder nodes that do not depend on each other."""
    return sorted((node.domain, node.op_type) for node in graph.node)


def run(opened: ModelProto, level: str = "ORT_ENABLE_ALL") -> list[np.ndarray]:
    """All outputs for random inputs, where a dynamic extent is 3."""
    running = session(opened, level)
    rng = np.random.default_rng(8)
    given = {}
    for one in running.get_inputs():
        shape = [extent if isinstance(extent, int) else 3 for extent in one.shape]
        given[one.name] = rng.normal(size=shape).astype(np.float32)
    return running.run(None, given)


def weights(m: ModelProto) -> dict[str, bytes]:
    """Name -> type, shape and bits of every initializer."""
    return {
        t.name: (t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes())
        for t in m.graph.initializer
    }


def tokens(count: int = 50, width: int = 70) -> ModelProto:
    """Rows of a table, three products of one value, and a product with the table itself."""
    rng = np.random.default_rng(0)
    matrices = {"table": rng.normal(0, 1, (count, width)).astype(np.float32)}
    for at in range(4):
        matrices[f"w{at}"] = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        *(helper.make_node("MatMul", ["e", f"w{at}"], [f"p{at}"]) for at in range(3)),
        helper.make_node("Sum", ["p0", "p1", "p2"], ["s"]),
        helper.make_node("MatMul", ["s", "w3"], ["t"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "turned"], ["y"]),
    ]
    made = model(nodes, matrices, {}, {"y": ["n", "length", count]})
    made.graph.input.append(value("ids", ["n", "length"], TensorProto.INT64))
    return made
