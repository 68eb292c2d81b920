"""HTML pages from templates, in English or Chinese, in one theme.

    pages = Pages(Path(__file__).parent / "templates", "zh")
    file = pages.render("receipt.html", rounds=60)                # one file that needs nothing else
    page = pages.render("status.html", served=True, rounds=60)    # for a server that hands out STATIC

A template extends `base.html`, imports `macros.html`, and has its English text in `{% trans %}` blocks or `_("…")`.
Its Chinese is in the file `zh.yaml` of its folder: a flat mapping from English to Chinese, where a text with a
plural stands under the plural. Every value is escaped, and one that a template needs and does not get is an error.

No page has a script of its own, a style attribute, or anything from elsewhere: a page in a file says so in a
Content-Security-Policy of its own, and one that is served works under that of `hanse_common.web.security`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.yaml_document import Document

Language = Literal["en", "zh"]

STATIC = Path(__file__).parent / "static"
"""The folder that a server hands out under `/static`: the theme."""

TEMPLATES = Path(__file__).parent / "templates"
"""The templates that all pages share."""

CATALOG = "zh.yaml"

_TAGS: Mapping[Language, str] = {"en": "en", "zh": "zh-Hans"}
_PLACEHOLDER = re.compile(r"%\((\w+)\)s|%%")


class Pages:
    """The templates in `folder` and the shared ones, rendered in `language`.

    Raises `ConfigError` when a catalog of translations is no flat mapping of texts.
    """

    def __init__(self, folder: Path, language: Language = "en") -> None:
        self.language = language
        self.folder = folder
        folders = dict.fromkeys((folder, TEMPLATES))
        self._catalog: dict[str, str] = {}
        if language != "en":
            for each in reversed(folders):
                self._catalog |= read_catalog(each / CATALOG)
        self._environment = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            loader=ChoiceLoader([FileSystemLoader(each) for each in folders]),
            extensions=["jinja2.ext.i18n"],
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.policies["ext.i18n.trimmed"] = True
        self._environment.install_gettext_callables(  # type: ignore[attr-defined]
            self._text, self._plural, newstyle=True
        )
        theme = (STATIC / "theme.css").read_text(encoding="utf-8")
        self._environment.globals |= {"language": _TAGS[language], "theme": Markup(theme)}  # noqa: S704 (our own)

    def render(self, template: str, *, served: bool = False, **values: Any) -> str:
        """Return the page `template` with `values`; `served` pages link the theme, others hold it.

        Raises jinja2's `UndefinedError` for a value that is missing.
        """
        return self._environment.get_template(template).render(served=served, **values)

    def texts(self) -> Iterator[str]:
        """Yield every English text of the folder's own templates, as its catalog has to name it."""
        for path in sorted(self.folder.glob("*.html")):
            source = path.read_text(encoding="utf-8")
            for _, function, found in self._environment.extract_translations(source):  # type: ignore[attr-defined]
                yield found if isinstance(found, str) else found[function == "ngettext"]

    def _text(self, english: str) -> str:
        return self._catalog.get(english, english)

    def _plural(self, singular: str, plural: str, count: int) -> str:
        return self._catalog.get(plural, singular if count == 1 else plural)


def read_catalog(path: Path) -> dict[str, str]:
    """Return the translations in the file `path`. Raises `ConfigError` when it is no flat mapping of texts."""
    document = Document(path, path.read_text(encoding="utf-8"))
    faults = list(document.faults)
    if not isinstance(document.tree, dict):
        raise ConfigError(f"{path}: expected a mapping of English texts to Chinese ones.")
    faults += [
        document.fault((english,), f"found {type(text).__name__}, expected a text; put it in quotes.")
        for english, text in document.tree.items()
        if not isinstance(text, str)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return document.tree


def faults(folder: Path) -> list[str]:
    """Return what is wrong with the catalog in `folder`: texts without a line, lines without a text, placeholders."""
    texts, catalog = set(Pages(folder).texts()), read_catalog(folder / CATALOG)
    found = [f"no Chinese for: {text}" for text in sorted(texts - catalog.keys())]
    found += [f"no template has: {text}" for text in sorted(catalog.keys() - texts)]
    found += [
        f"other placeholders than its English: {text}"
        for text in sorted(texts & catalog.keys())
        if placeholders(text) != placeholders(catalog[text])
    ]
    return found


def placeholders(text: str) -> set[str]:
    """Return the names in `text` that values are put in for. Raises ValueError for a lone %."""
    if "%" in _PLACEHOLDER.sub("", text):
        raise ValueError(f"{text!r}: found a lone %, expected %% or %(name)s.")
    return {name for name in _PLACEHOLDER.findall(text) if name}


def save(path: Path, page: str) -> None:
    """Write `page` to the new file `path`, for its owner alone (mode 0600).

    Raises `ConfigError` when there is a file already, or none can be written.
    """
    require_new(path)
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place.") from None


def require_new(path: Path) -> None:
    """Return if there is nothing at `path` yet, to ask before much work. Raises `ConfigError` if there is."""
    if path.exists():
        raise ConfigError(f"{path}: there is a file already; choose another name, or move it away.")
