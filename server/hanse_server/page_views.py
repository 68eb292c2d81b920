"""From what records and server say to what the operator's page shows: texts, points, a matrix, pictures.

    told(2.4261)                          # "2.427": ε is never told as less than it is
    matrix(report, ["shirt", "shoe"])     # rounded counts, of the classes with the most photos

All of it is pure: from values to values.
"""

import base64
import json
import math
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from hanse_common.federated_report import FederatedReport
from hanse_common.plan import Plan
from hanse_server import pictures
from hanse_server.audit import AuditEntry
from hanse_server.charts import Point
from hanse_server.live import Seen
from hanse_server.page_data import Tried

CLASSES_SHOWN = 20
"""Rows and columns of the confusion matrix that is drawn."""

SUSPICION = 0.01


def told(epsilon: float | None) -> str | None:
    """Return ε with three decimals, never less than it is; None when there is none, or it is infinite."""
    if epsilon is None or not math.isfinite(epsilon):
        return None
    return f"{math.ceil(round(1000 * epsilon, 6)) / 1000:g}"


def moment(seconds: float) -> str:
    """Return a time, seconds since 1970, by this machine's clock."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


@lru_cache(maxsize=16)
def epsilon_of(plan: Plan) -> float:
    """Return what a merchant pays for the whole plan, infinite when nothing can be promised."""
    try:
        return plan.epsilon()
    except ValueError:
        return math.inf


def suspicion(epsilon: float) -> str | None:
    """Return what a suspicion of 1 % can become, in per cent, told upward: by Bayes' rule, odds times e^ε at most."""
    if not math.isfinite(epsilon):
        return None
    found = 100 / (1 + (1 / SUSPICION - 1) * math.exp(-epsilon))
    return f"{math.ceil(round(10 * found, 6)) / 10:g}"


def answers(trips: tuple[tuple[str, int, int], ...], kind: str) -> tuple[int, int]:
    """Return how many answered and how many were asked."""
    return next(((answered, asked) for name, answered, asked in trips if name == kind), (0, 0))


def points(tried: Sequence[Tried], name: str) -> list[Point]:
    """Return a figure of each model that has it, the last one where a model was tried twice."""
    found = {one.after: getattr(one, name) for one in tried}
    return [
        Point(after, figure.value, figure.low, figure.high)
        for after, figure in sorted(found.items())
        if figure is not None
    ]


def class_names(plan: Plan | None, report: FederatedReport | None) -> list[str]:
    """Return the classes' names; their numbers where the plan's are others."""
    if report is None:
        return []
    classes = list(plan.taxonomy.classes) if plan else []
    count = len(report.per_class)
    return classes if len(classes) == count else [str(number + 1) for number in range(count)]


def first_curve(report: FederatedReport | None) -> int | None:
    """Return the class whose ROC curve is shown at first: the first one that has a curve."""
    if report is None:
        return None
    return next((number for number, one in enumerate(report.per_class) if one.roc), None)


def matrix(report: FederatedReport | None, classes: Sequence[str]) -> dict[str, Any] | None:
    """Return the confusion matrix as it is drawn: the classes with the most photos, and a column for the others."""
    if report is None:
        return None
    by_support = sorted(range(len(classes)), key=lambda number: -report.per_class[number].support.value)
    shown = sorted(by_support[:CLASSES_SHOWN])
    rest = [number for number in range(len(classes)) if number not in set(shown)]
    cells = [[round(report.confusion[row][column].value) for column in shown] for row in shown]
    if rest:
        for row, counts in zip(shown, cells, strict=True):
            counts.append(round(sum(report.confusion[row][column].value for column in rest)))
    spreads = sorted(cell.high - cell.value for row in report.confusion for cell in row)
    return {
        "counts": cells,
        "rows": [classes[number] for number in shown],
        "others": len(rest),
        "spread": math.ceil(spreads[len(spreads) // 2]),
    }


def seen_pictures(seen: Seen) -> dict[str, Any] | None:
    """Return both pictures as data that a page can hold, and how random their bytes are."""
    if seen.upload is None or seen.total is None:
        return None
    return {
        "upload": _data(pictures.picture(pictures.mask(seen.upload))),
        "total": _data(pictures.picture(pictures.own_scale(seen.total))),
        "upload_bits": f"{math.floor(100 * pictures.randomness(seen.upload)) / 100:.2f}",
        "total_bits": f"{math.floor(100 * pictures.randomness(seen.total)) / 100:.2f}",
    }


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def facts_of(entry: AuditEntry) -> list[tuple[str, str]]:
    """Return an entry's facts, long ones cut; the audit log itself judges nothing that it holds."""
    try:
        found = json.loads(entry.facts)
    except ValueError:
        return [("facts", entry.facts[:80])]
    if not isinstance(found, dict):
        return [("facts", entry.facts[:80])]
    return [(str(name)[:40], _short(value)) for name, value in found.items()]


def _short(value: object) -> str:
    text = "–" if value is None else str(value)
    return text[:16] if len(text) == 64 else text[:120]
