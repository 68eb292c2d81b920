"""What the operator should hear of before anything else on its page.

    for alert in alerts(Facts(training, rounds, versions, disk=(free, total)), now=time.time()):
        print(alert.kind, alert.what, alert.values)

An alert names what is wrong; its sentence and its remedy are in the template `page-parts.html`, in each language. The
bounds are those of the alert rules for Prometheus, so that page and pager agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hanse_server.certificates import Notice, Severity
from hanse_server.page_data import RoundView, TrainingView

LATELY = 10
"""Dropouts are counted over so many rounds."""

DROPOUT_SHARE = 0.2
FREE_SHARE = 0.1
DIRECTORY_SECONDS = 14 * 86_400.0
SILENT_SECONDS = 3600.0
SILENT_ROUNDS = 3.0
"""A round may take so many times as long as the longest of late before it is missed."""

THROWN_AWAY = "It was thrown away."
"""What `hanse_server.plausibility` says of a sum that no honest merchants make."""

BEFORE = " Before: "
"""What stands before failed attempts in the event of a round."""


@dataclass(frozen=True)
class Alert:
    """Something that needs the operator. `kind` is that of a notice, `what` names the sentence, `values` are in it."""

    kind: Literal["bad", "warning"]
    what: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What alerts follow from. `rounds` are the last ones; `disk` is free and total bytes, or None if unknown.

    `lines` are the last events, as in `hanse_server.live.Snapshot`; `trouble` is why a certificate could not be read,
    "" if it could.
    """

    training: TrainingView
    rounds: Sequence[RoundView]
    lines: Sequence[tuple[float, str, str]] = ()
    notices: Sequence[Notice] = ()
    trouble: str = ""
    disk: tuple[int, int] | None = None


def alerts(facts: Facts, now: float) -> list[Alert]:
    """Return what is wrong at `now`, seconds since 1970, the worst first."""
    found = [
        *_run(facts, now),
        *_attempts(facts.lines),
        *_trust(facts, now),
        *_merchants(facts.rounds),
        *_disk(facts.disk),
    ]
    return sorted(found, key=lambda alert: alert.kind)


def _run(facts: Facts, now: float) -> list[Alert]:
    run = facts.training.run
    if run is None:
        return []
    if run.state == "failed":
        what = "implausible" if THROWN_AWAY in run.reason else "failed"
        return [Alert("bad", what, {"text": run.reason, "run": run.number})]
    if run.state == "lost":
        return [Alert("bad", "lost", {"run": run.number})]
    if run.state == "running":
        heard = max([run.begun, *(one.released for one in facts.rounds[-1:])])
        patience = max([SILENT_SECONDS, *(SILENT_ROUNDS * one.seconds for one in facts.rounds[-LATELY:])])
        if now - heard > patience:
            return [Alert("warning", "silent", {"minutes": int((now - heard) / 60)})]
    return []


def _attempts(lines: Sequence[tuple[float, str, str]]) -> list[Alert]:
    """Return the last attempt at a round that failed, and the last one whose sum was refused."""
    failed = [text.partition(BEFORE)[2] for _, kind, text in lines if kind == "round" and BEFORE in text]
    refused = [text for text in failed if THROWN_AWAY in text]
    others = [text for text in failed if THROWN_AWAY not in text]
    return [Alert("bad", "refused", {"text": text}) for text in refused[-1:]] + [
        Alert("warning", "attempts", {"text": text, "count": len(others)}) for text in others[-1:]
    ]


def _trust(facts: Facts, now: float) -> list[Alert]:
    found = [
        Alert("bad" if notice.severity is Severity.ERROR else "warning", "certificate", {"text": notice.text})
        for notice in facts.notices
    ]
    if facts.trouble:
        found.append(Alert("bad", "certificate", {"text": facts.trouble}))
    directory = facts.training.directory
    if directory is not None:
        left = directory.expires - now
        if left <= 0:
            found.append(Alert("bad", "directory-ended", {"version": directory.version}))
        elif left < DIRECTORY_SECONDS:
            days = max(1, int(left / 86_400))
            found.append(Alert("warning", "directory-ends", {"version": directory.version, "days": days}))
    return found


def _merchants(rounds: Sequence[RoundView]) -> list[Alert]:
    lately = rounds[-LATELY:]
    found = []
    blamed = {name: detail for one in lately for name, detail in one.roles["blamed"].items()}
    if blamed:
        found.append(Alert("warning", "blamed", {"merchants": sorted(blamed.items())}))
    dropped = sum(one.count("dropped") for one in lately)
    there = dropped + sum(one.count("uploaded") for one in lately)
    if dropped > DROPOUT_SHARE * there:
        values = {"percent": round(100 * dropped / there), "rounds": len(lately)}
        found.append(Alert("warning", "dropouts", values))
    return found


def _disk(disk: tuple[int, int] | None) -> list[Alert]:
    if disk is None or disk[0] >= FREE_SHARE * disk[1]:
        return []
    return [
        Alert("bad" if disk[0] < FREE_SHARE**2 * disk[1] else "warning", "disk", {"free": _size(disk[0])})
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
