"""When the daemon may take part: days and hours of the machine's own clock.

schedule = Schedule(days=("sat", "sun"), hours="22:00-06:00")
schedule.open_at(datetime.now())
"""

import re
from datetime import datetime, time, timedelta
from typing import Annotated, Literal

from pydantic import Field, field_validator

from hanse_common.config import Section

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_HOURS = re.compile(r"^([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])$")


class Schedule(Section):
    """The section `schedule` of `hanse-client.yaml`.

    Attributes:
        days: the days on which the daemon takes part.
        hours: from when until when, such as 22:00-06:00; hours that end in the next morning count to the day on which
            they begin. None is all day.
    """

    days: Annotated[tuple[Day, ...], Field(min_length=1, max_length=7)] = DAYS
    hours: str | None = None

    @field_validator("hours")
    @classmethod
    def _two_times(cls, hours: str | None) -> str | None:
        if hours is not None:
            found = _HOURS.fullmatch(hours)
            if found is None or found.group(1, 2) == found.group(3, 4):
                raise ValueError("expected two different times of day, such as 22:00-06:00")
        return hours

    def open_at(self, now: datetime) -> bool:
        """Return whether the daemon may take part at `now`, local time."""
        start, end = self._bounds()
        if start < end:
            return self._is_day(now) and start <= now.time() < end
        # Through midnight, or all day: the morning belongs to the day before.
        return (self._is_day(now) and now.time() >= start) or (
            self._is_day(now - timedelta(days=1)) and now.time() < end
        )

    def describe(self) -> str:
        """Return it in words."""
        days = (
            "every day" if set(self.days) == set(DAYS) else ", ".join(day for day in DAYS if day in self.days)
        )
        return f"{days}, {self.hours or 'at any hour'}"

    def _bounds(self) -> tuple[time, time]:
        if self.hours is None:
            return time.min, time.min
        start, _, end = self.hours.partition("-")
        return time.fromisoformat(start), time.fromisoformat(end)

    def _is_day(self, day: datetime) -> bool:
        return DAYS[day.weekday()] in self.days
