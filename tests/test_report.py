"""The report: what follows from the measurements, and a table a person can read."""

import io
import json

from rich.console import Console

from prune2onnx.report import Measured, Report, WeightRow, weights_table

ROWS = (
    WeightRow("fc1.weight", (10, 20), "float32", 20, "gap-codebook", 40),
    WeightRow("fc1.bias", (10,), "float32", 10, "dense", 50, "40 bytes are too few"),
    WeightRow("empty", (0, 3), "float32", 0, "dense", 9, "empty"),
)


def measured(nbytes: int, error: float | None) -> Measured:
    return Measured(nbytes, error, 2.0, 5_000_000, {"p50": 0.5, "p95": 1.0})


def report(**changes) -> Report:
    facts = {
        "version": "0",
        "seed": 0,
        "environment": {},
        "dense": measured(1000, 1.5),
        "compressed": measured(100, 2.0),
        "folded": True,
        "max_abs_diff": 1e-6,
        "density": 0.1,
        "weights": ROWS,
    }
    return Report(**{**facts, **changes})


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_ratio_and_drop_follow_from_the_files():
    made = report()
    assert (made.ratio, made.drop) == (10.0, 0.5)
    assert report(compressed=measured(100, None)).drop is None


def test_rows_count_bits_per_nonzero():
    assert ROWS[0].bits_per_nonzero == 16.0
    assert ROWS[2].bits_per_nonzero is None and ROWS[2].density == 0.0


def test_json_is_plain_and_the_table_names_what_matters():
    assert json.loads(report().to_json())["weights"][0]["shape"] == [10, 20]
    text = shown(report().table())
    for part in ("10.0x smaller", "1.50 %", "+0.50", "10.00 %", "folded away on load"):
        assert part in text
    assert "NOT folded" in shown(report(folded=False).table())


def test_the_weights_table_accounts_for_every_byte():
    text = shown(weights_table(ROWS, 150))
    assert "graph and decoders" in text and "51" in text and "150" in text
    assert "40 bytes are too few" in text
