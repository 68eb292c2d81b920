"""A report's JSON: the same report again, and nothing that is none."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_common.errors import WireError
from hanse_common.federated_report import (
    ClassReport,
    Count,
    FederatedReport,
    Figure,
    Rate,
    ReliabilityBin,
    RocPoint,
)

unit = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)
rates = unit.map(lambda x: Rate(low=x[0], value=x[1], high=x[2]))
some = st.none() | rates
counts = unit.map(lambda x: Count(low=1e4 * x[0], value=1e4 * x[1], high=1e4 * x[2]))
figures = unit.map(lambda x: Figure(low=x[0] - 1, value=x[1], high=x[2] + 1))
points = st.builds(RocPoint, threshold=st.floats(0, 1), false_positive_rate=rates, true_positive_rate=rates)
classes = st.builds(
    ClassReport,
    support=counts,
    precision=some,
    recall=some,
    f1=some,
    auc=some,
    roc=st.lists(points, max_size=2).map(tuple),
)
bins = st.builds(
    ReliabilityBin, low=st.floats(0, 1), high=st.floats(0, 1), photos=counts, confidence=some, accuracy=some
)
reports = st.builds(
    FederatedReport,
    unit=st.sampled_from(["photo", "product"]),
    merchants=st.integers(1, 300),
    photos=counts,
    accuracy=some,
    macro_precision=some,
    macro_recall=some,
    macro_f1=some,
    macro_auc=some,
    log_loss=st.none() | figures,
    expected_calibration_error=some,
    overconfidence=st.none() | figures,
    confusion=st.tuples(*[st.tuples(counts, counts)] * 2),
    per_class=st.tuples(classes, classes),
    reliability=st.lists(bins, max_size=2).map(tuple),
)


@given(reports)
def test_a_report_comes_back_from_json(report: FederatedReport) -> None:
    assert FederatedReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["photos"]["value"] == report.photos.value


def plain() -> dict[str, Any]:
    count, rate = {"value": 1.0, "low": 0.0, "high": 2.0}, {"value": 0.5, "low": 0.4, "high": 0.6}
    each: dict[str, Any] = {
        "support": count,
        "precision": rate,
        "recall": rate,
        "f1": rate,
        "auc": None,
        "roc": [],
    }
    return {
        "unit": "photo",
        "merchants": 3,
        "photos": count,
        "accuracy": rate,
        "macro_precision": rate,
        "macro_recall": rate,
        "macro_f1": rate,
        "macro_auc": None,
        "log_loss": {"value": 1.0, "low": 0.9, "high": 1.1},
        "expected_calibration_error": rate,
        "overconfidence": {"value": -0.1, "low": -0.2, "high": 0.0},
        "confusion": [[count, count], [count, count]],
        "per_class": [each, each],
        "reliability": [],
    }


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        ("accuracy", {"value": 0.7, "low": 0.4, "high": 0.6}, "accuracy.*outside of its interval"),
        ("accuracy", {"value": 1.0, "low": 0.4, "high": 1.6}, "accuracy.high"),
        ("photos", {"value": 1.0, "low": -1.0, "high": 2.0}, "photos.low"),
        ("photos", {"value": "1", "low": 0.0, "high": 2.0}, "photos.value"),
        ("photos", {"value": float("nan"), "low": 0.0, "high": 2.0}, "photos"),
        ("confusion", [], "confusion"),
        ("confusion", [[{"value": 1.0, "low": 0.0, "high": 2.0}]] * 2, "2 rows of 2 counts"),
        ("per_class", [], "per_class"),
        ("unit", "merchant", "unit"),
        ("format_version", 2, "format_version"),
        ("merchant", "alder", "merchant"),
    ],
)
def test_what_is_no_report_is_refused(where: str, value: Any, match: str) -> None:
    assert FederatedReport.from_json(json.dumps(plain())).merchants == 3
    with pytest.raises(WireError, match=match):
        FederatedReport.from_json(json.dumps(plain() | {where: value}))


def test_a_report_is_bounded() -> None:
    with pytest.raises(WireError, match="at most 16777216"):
        FederatedReport.from_json(b"[" * ((1 << 24) + 1))
    with pytest.raises(WireError):
        FederatedReport.from_json("{")
    assert np.isfinite(FederatedReport.from_json(json.dumps(plain())).photos.high)
