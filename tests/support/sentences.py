"""A small transformer with random weights, its tokenizer, and the folder that ships both."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, checker, numpy_helper, parser

WORDS = tuple(
    "a the cat dog bird fish sits runs sings swims on in under over mat house tree river old young "  # noqa: SIM905
    "red blue small large and or with without".split()
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = (*SPECIAL, *WORDS)
HIDDEN, HEADS, LENGTHS = 32, 2, 64


def tokenizer(path: Path, *, most: int | None = None) -> Path:
    """Writes a tokenizer.json: words, [CLS] before and [SEP] behind them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(pad_id=0, pad_token="[PAD]", length=40)  # as published ones often do
    if most:
        made.enable_truncation(most)
    made.add_special_tokens(list(SPECIAL))
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return path


def lines(count: int, seed: int = 0) -> list[str]:
    """Different lines of 3 to 12 words."""
    rng = np.random.default_rng(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(rng.choice(WORDS, rng.integers(3, 13)))] = None
    return list(made)


def text_file(path: Path, count: int = 200) -> Path:
    path.write_text("\n".join(lines(count)) + "\n")
    return path


def transformer(
    *, layers: int = 2, batch: int | str = "n", length: int | str = "l", hidden: int = HIDDEN
) -> ModelProto:
    """Ids, mask and types [n, l] -> last_hidden_state [n, l, hidden], in the manner of BERT."""
    rng = np.random.default_rng(7)
    weights = {
        name: rng.normal(size=shape).astype(np.float32) / np.float32(scale)
        for name, shape, scale in (
            ("word", (len(VOCABULARY), hidden), 1),
            ("position", (LENGTHS, hidden), 4),
            ("type", (2, hidden), 4),
        )
    }
    weights |= {"zero": np.int64(0), "one": np.int64(1), "axes": np.int64([1, 2])}
    weights |= {"unit": np.float32(1), "most": np.float32(-1e4)}
    weights |= {"split": np.int64([0, 0, HEADS, hidden // HEADS]), "join": np.int64([0, 0, hidden])}
    weights |= {"root": np.float32((hidden / HEADS) ** 0.5)}
    nodes = (
        "w = Gather(word, input_ids) t = Gather(type, token_type_ids) s = Shape(input_ids)"
        "len = Gather(s, one) r = Range(zero, len, one) p = Gather(position, r)"
        "wt = Add(w, t) h0 = Add(wt, p)"
        "m = Cast<to=1>(attention_mask) u = Unsqueeze(m, axes) v = Sub(unit, u) bias = Mul(v, most)"
    )
    for k in range(layers):
        for name, shape in (
            *((name, (hidden, hidden)) for name in "qkvo"),
            ("f", (hidden, 4 * hidden)),
            ("g", (4 * hidden, hidden)),
        ):
            weights[f"{name}{k}.weight"] = (rng.normal(size=shape) / shape[0] ** 0.5).astype(
                np.float32
            )
        weights |= {f"{n}{k}": np.ones(hidden, np.float32) for n in ("s1_", "s2_")}
        for name in "qkv":
            perm = "0,2,3,1" if name == "k" else "0,2,1,3"
            nodes += (
                f"{name}{k}m = MatMul(h{k}, {name}{k}_weight) "
                f"{name}{k}r = Reshape({name}{k}m, split) "
                f"{name}{k}t = Transpose<perm=[{perm}]>({name}{k}r) "
            )
        nodes += (
            f"a{k} = MatMul(q{k}t, k{k}t) b{k} = Div(a{k}, root) c{k} = Add(b{k}, bias) "
            f"d{k} = Softmax<axis=-1>(c{k}) e{k} = MatMul(d{k}, v{k}t) "
            f"i{k} = Transpose<perm=[0,2,1,3]>(e{k}) j{k} = Reshape(i{k}, join) "
            f"o{k} = MatMul(j{k}, o{k}_weight) x{k} = Add(o{k}, h{k}) "
            f"y{k} = LayerNormalization<axis=-1>(x{k}, s1_{k}) f{k} = MatMul(y{k}, f{k}_weight) "
            f"r{k} = Relu(f{k}) g{k} = MatMul(r{k}, g{k}_weight) z{k} = Add(g{k}, y{k}) "
            f"h{k + 1} = LayerNormalization<axis=-1>(z{k}, s2_{k}) "
        )
    nodes += f"last_hidden_state = Identity(h{layers})"
    shape = f"{batch},{length}"
    made = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g '
        f"(int64[{shape}] input_ids, int64[{shape}] attention_mask, int64[{shape}] token_type_ids)"
        f" => (float[{shape},{hidden}] last_hidden_state) {{{nodes}}}"
    )
    return _finished(made, weights, {"_weight": ".weight"})


def decoder(*, heads: int = 2, size: int = 4) -> ModelProto:
    """A decoder-only network that asks for positions, a mask, a past and whether there is one."""
    rng = np.random.default_rng(3)
    hidden = heads * size
    weights = {
        "word": rng.normal(size=(len(VOCABULARY), hidden)).astype(np.float32),
        "position": rng.normal(size=(LENGTHS, hidden)).astype(np.float32),
        "head": rng.normal(size=(hidden, len(VOCABULARY))).astype(np.float32),
        "split": np.int64([0, 0, heads, size]),
        "join": np.int64([0, -1, hidden]),
        "axis": np.int64([2]),
    }
    made = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (int64[b,s] input_ids, '
        "int64[b,t] attention_mask, int64[b,s] position_ids, "
        f"float[b,{heads},p,{size}] past_key_values_0_key, bool[1] use_cache_branch) => "
        f"(float[b,t,{len(VOCABULARY)}] logits, float[b,{heads},t,{size}] present_0_key) {{"
        "w = Gather(word, input_ids) q = Gather(position, position_ids) h = Add(w, q)"
        "r = Reshape(h, split) k = Transpose<perm=[0,2,1,3]>(r)"
        "present_0_key = Concat<axis=2>(past_key_values_0_key, k)"
        "y = Transpose<perm=[0,2,1,3]>(present_0_key) z = Reshape(y, join)"
        "m = Cast<to=1>(attention_mask) u = Unsqueeze(m, axis) v = Mul(z, u)"
        "c = Cast<to=1>(use_cache_branch) d = Add(v, c) logits = MatMul(d, head)}"
    )
    return _finished(made, weights, {"_0_key": ".0.key"})


def _finished(
    made: ModelProto, weights: Mapping[str, np.ndarray], dots: Mapping[str, str]
) -> ModelProto:
    """With weights, and with dots in names, which the parser does not take."""

    def renamed(name: str) -> str:
        for old, new in dots.items():
            name = name.replace(old, new)
        return name

    for node in made.graph.node:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    for value in (*made.graph.input, *made.graph.output):
        value.name = renamed(value.name)
    made.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    checker.check_model(made, full_check=True)
    return made


def folder(path: Path, *, model: str = "onnx/model.onnx", **options: object) -> Path:
    """A folder as on the Hugging Face hub: config, tokenizer, model."""
    (path / model).parent.mkdir(parents=True, exist_ok=True)
    (path / model).write_bytes(transformer(**options).SerializeToString())  # type: ignore[arg-type]
    tokenizer(path / "tokenizer.json")
    config = {"model_type": "bert", "vocab_size": len(VOCABULARY), "hidden_size": HIDDEN}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": LENGTHS})
    )
    return path
