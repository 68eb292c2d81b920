"""What shoppers search for: `trends`."""

import json
from typing import Annotated

import typer

from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, say, settings_of
from hanse_server.storage import State
from hanse_server.trends import TrendsReport
from hanse_server.trends import trends as all_trends


def trends(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print all reports as JSON.")] = False,
) -> None:
    """Show what shoppers searched for, as plans of mode trends counted it, and what of it grows; the latest last."""
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        found = all_trends(state)
    if as_json:
        say(json.dumps([report.model_dump(mode="json") for report in found]))
        return
    if not found:
        say(
            "Nothing was counted yet. Sign a plan of mode trends and run it: hanse-server sign, hanse-server run."
        )
    for report in found:
        for line in _lines(report):
            say(line)


def _lines(report: TrendsReport) -> list[str]:
    total = report.queries
    asked = f"{total.value:,.0f} queries ({total.low:,.0f} to {total.high:,.0f})"
    cost = f"{report.merchants} merchants, ε = {report.epsilon:.3g} a query"
    lines = [f"{report.days} days from {report.first_day} on, {cost}: {asked}"]
    for each in sorted(report.classes, key=lambda one: -one.queries.value):
        text = f"  {each.name:24} {each.queries.value:8,.0f} ({each.queries.low:,.0f} to {each.queries.high:,.0f})"
        text += ", or more" if each.may_be_more else ""
        if each.growth is not None:
            low, high = 100 * each.growth.low, 100 * each.growth.high
            text += f"  {100 * each.growth.value:+.0f} % ({low:+.0f} to {high:+.0f})"
        lines.append(text)
    if any(each.may_be_more for each in report.classes):
        lines.append(
            f"  Or more: a merchant contributes at most {report.most:,} queries of a class. In the next plan, say a "
            "larger expected_batch."
        )
    return lines
