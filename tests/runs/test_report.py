"""The report: what follows from the measurements, and a table a person can read."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from prune2onnx.cli.output import must_fold
from prune2onnx.cli.tables import report_table, weights_table
from prune2onnx.errors import MismatchError
from prune2onnx.packing.rows import WeightRow
from prune2onnx.runs.report import Measured, Report
from prune2onnx.tasks.quantity import Quantity

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


def test_rows_count_bits_per_weight_and_per_nonzero():
    assert ROWS[0].bits_per_nonzero == 16.0 and ROWS[0].bits_per_weight == 1.6
    assert ROWS[2].bits_per_nonzero is None and ROWS[2].density == 0.0
    assert ROWS[2].bits_per_weight is None


def test_json_is_plain_and_the_table_names_what_matters():
    content = json.loads(report().to_json())
    assert content["weights"][0]["shape"] == [10, 20] and content["skipped"] == ""
    text = shown(report_table(report()))
    for part in ("10.0x smaller", "1.50 %", "+0.50", "10.00 %", "folded on load", "p95"):
        assert part in text
    assert "NOT folded" in shown(report_table(report(folded=False)))


def test_weights_that_are_decoded_at_every_inference_are_named():
    made = report(folded=False, unfolded=tuple("abcde"))
    assert made.left == "a, b, c and 2 more" and made.to_dict()["unfolded"] == list("abcde")
    said = " ".join(shown(report_table(made)).split())
    assert "NOT folded: a, b, c and 2 more decoded at every inference" in said
    with pytest.raises(MismatchError, match=r"fold the decoders of a, b, c and 2 more.* unpack"):
        must_fold(replace(made, environment={"onnxruntime": "1"}), Path("m.onnx"))
    other = replace(made, unfolded=(), environment={"onnxruntime": "1"})
    with pytest.raises(MismatchError, match="leaves other operators"):
        must_fold(other, Path("m.onnx"))
    must_fold(report(), Path("m.onnx"))


def test_the_cpu_time_of_a_load_stands_beside_that_of_the_dense_file():
    made = report(
        dense=replace(measured(1000, 1.5), load_cpu_ms=20.0),
        compressed=replace(measured(100, 2.0), load_cpu_ms=45.0),
    )
    text = shown(report_table(made))
    assert all(part in text for part in ("CPU time of a load", "20.0 ms", "45.0 ms", "2.25x"))
    assert "CPU time of a load" not in shown(report_table(report()))  # as in older reports


def test_a_network_that_was_not_run_says_so_and_why():
    made = report(
        dense=Measured(1000),
        compressed=Measured(100),
        max_abs_diff=None,
        skipped="no such operator",
    )
    content = json.loads(made.to_json())
    assert content["skipped"] == "no such operator" and content["max_abs_diff"] is None
    assert content["dense"] == {
        "nbytes": 1000, "error": None, "load_ms": None, "peak_rss_bytes": None, "latency_ms": None,
        "macs": None, "load_cpu_ms": None, "metrics": {},
    }  # fmt: skip
    text = shown(report_table(made))
    assert "10.0x smaller" in text and "folded on load" in text
    assert "the network was not run: no such operator" in " ".join(text.split())
    for part in ("latency", "memory", "error"):
        assert part not in text


def test_the_weights_table_accounts_for_every_byte():
    text = shown(weights_table(ROWS, 150))
    assert "graph and decoder" in text and "51" in text and "150" in text
    assert "40 bytes are too few" in text and "1.60" in text
    assert "entropy" not in text


def test_other_forms_stand_beside_where_they_are_known():
    row = WeightRow("w", (10, 20), "float32", 20, "raw", 400, "", 33.3, 120, 71)
    text = shown(weights_table((row, *ROWS), 600))
    for part in ("entropy", "sparse", "zipped", "33", "120", "71"):
        assert part in text
    assert row.to_dict()["entropy_nbytes"] == 33.3 and row.to_dict()["zipped_nbytes"] == 71
    assert "entropy_nbytes" not in ROWS[0].to_dict()


def test_a_report_shows_the_tasks_metric_in_its_unit_and_direction():
    made = report(
        dense=Measured(1000, metrics={"mIoU": 90.0, "pixel accuracy": 97.0}),
        compressed=Measured(100, metrics={"mIoU": 88.5, "pixel accuracy": 96.5}),
        task="segmentation",
        metric=Quantity("mIoU", "%", True),
        validation={"dense": 91.0, "compressed": 89.0},
        paired=None,
    )
    assert made.drop == pytest.approx(1.5) and made.others == ("pixel accuracy",)
    text = " ".join(shown(report_table(made)).split())
    for part in ("test mIoU", "90.00 %", "88.50 %", "-1.50", "test pixel accuracy", "89.00 %"):
        assert part in text
    assert "error" not in text
    content = json.loads(made.to_json())
    assert content["metric"] == {"name": "mIoU", "unit": "%", "higher_is_better": True}
    assert content["compressed"]["error"] is None
    assert content["compressed"]["metrics"]["mIoU"] == 88.5
