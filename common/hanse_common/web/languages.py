"""Which language a served page is in: what its reader chose, by a cookie, else a default.

languages = Languages(templates.FOLDER, "en")
languages.of(request).render("overview.html", served=True, ...)
return languages.chosen(fields)          # for a form that chooses
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from hanse_common.web.pages import Language, Pages

COOKIE = "hanse-language"
"""Without a port: a browser sends it to every page of this machine, and so all are in one language."""

_YEAR = 365 * 86_400
_PATH = re.compile(r"/|(/[a-z0-9-]+)+")


class Languages:
    """The templates in `folder`, in each language. Raises `ConfigError` as `Pages` does."""

    def __init__(self, folder: Path, default: Language) -> None:
        self._default = default
        self._pages: dict[str, Pages] = {each: Pages(folder, each) for each in get_args(Language)}

    def of(self, request: Request) -> Pages:
        """Return the pages in the language of this request."""
        return self._pages.get(request.cookies.get(COOKIE, ""), self._pages[self._default])

    def chosen(self, fields: Mapping[str, str]) -> Response:
        """Return the answer to a form with the fields `language` and `to`, a page of ours to go back to.

        A language that we do not speak changes nothing.
        """
        to = fields.get("to", "")
        answer = RedirectResponse(to if _PATH.fullmatch(to) else "/", 303)
        language = fields.get("language", "")
        if language in self._pages:
            answer.set_cookie(COOKIE, language, max_age=_YEAR, httponly=True, samesite="strict")
        return answer
