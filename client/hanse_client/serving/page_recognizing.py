"""The page's photos: one in, what it shows out, and what its owner says that it shows.

    routes = RecognizingPages(context).routes()

A photo that was looked at has an address by its digest, for as long as it is kept (`page_photos`). What the owner says
of it is a correction, kept for good, and may become a photo of a product.
"""

from collections.abc import Collection, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from hanse_client.duplicates import SAME
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.gallery.rejection import Rejection
from hanse_client.personal.corrections import MAX_CORRECTIONS, Correction
from hanse_client.recognition.answers import Found
from hanse_client.serving.page_context import PageContext, act, code_for, digest_of
from hanse_client.serving.page_forms import Form
from hanse_client.serving.page_view import bars, certainty, views
from hanse_client.serving.photos import decoded
from hanse_common.errors import PhotoError, PhotoTooLarge

CLASSES_SHOWN = 5
MATCHES_SHOWN = 6
CORRECTIONS_SHOWN = 100
SUGGESTIONS = 500
OFTEN = 0.25
"""From this share of false accepts on, the page does not say that a photo looks like a product of the shop's."""


class RecognizingPages:
    """The pages of photos and of what was said of them."""

    def __init__(self, context: PageContext) -> None:
        self._context = context
        self._recognition = context.recognition
        self._gallery = context.gallery
        self._corrections = context.corrections
        self._photos = context.photos
        self._limits = context.limits

    def routes(self) -> list[Route]:
        """Return the addresses of these pages."""
        return [
            Route("/", self._start),
            Route("/photo/{digest}", self._photo),
            Route("/picture/{digest}", self._picture),
            Route("/corrections", self._corrected),
            act("/photo/{digest}/product", self._is_product),
            act("/photo/{digest}/label", self._is_label),
            act("/photo/{digest}/reference", self._refer),
            act("/photo/{digest}/forget", self._forget),
            self._context.upload("/photo", self._look, 1, self._start),
        ]

    def _start(self, request: Request, trouble: str = "") -> Response:
        return self._context.render(
            request,
            "start",
            code_for(trouble),
            here="/",
            trouble=trouble,
            status=self._recognition.status(),
            photo=None,
            max_bytes=self._limits.max_bytes,
        )

    def _look(self, request: Request, form: Form) -> Response:
        """Take a photo that somebody chose."""
        if not form.files:
            return self._start(request, "missing")
        try:
            digest = self._photos.keep(Gallery.prepare(decoded(form.files[0], self._limits)))
        except PhotoTooLarge:
            return self._start(request, "large")
        except PhotoError:
            return self._start(request, "unreadable")
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _photo(self, request: Request) -> Response:
        digest, image = self._context.shown(request)
        status = self._recognition.status()
        found: Found | None = None
        if status.embedding:
            recognized = self._recognition.recognize(image, top=CLASSES_SHOWN, k=MATCHES_SHOWN)
            seen, found = recognized.classification, recognized.found
        else:
            seen = self._recognition.classify(image, top=CLASSES_SHOWN)
        said = self._corrections.of(digest)
        showing = self._gallery.showing(digest)
        classes = bars(seen.classes)
        return self._context.render(
            request,
            "start",
            trouble="",
            status=status,
            photo=digest.hex(),
            max_bytes=self._limits.max_bytes,
            classes=classes,
            personal=bars(seen.personal or ()),
            certainty=certainty(classes[0].share) if classes else None,
            searched=found is not None,
            matches=views(found.matches, found.threshold) if found else [],
            known=bool(found and found.known),
            doubtful=bool(found and _doubtful(found, status.rejection)),
            said=said,
            said_product=self._gallery.get(said.sku) if said and said.sku else None,
            reference=bool(said and any(each.sku == said.sku for each in showing)),
            others=[each for each in showing if said is None or each.sku != said.sku],
            labels=self._labels(status.classes),
        )

    def _picture(self, request: Request) -> Response:
        found = self._context.jpeg(digest_of(request.path_params["digest"]))
        if found is None:
            raise HTTPException(404)
        return Response(found, media_type="image/jpeg")

    def _is_product(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Write down that a photo shows a product of the catalog."""
        digest = self._context.digest_kept(request)
        with self._recognition.changing:
            product = self._context.existing(fields.get("sku", ""))
            self._corrections.add(self._context.kept(digest), sku=product.sku)
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _is_label(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Write down what a photo shows, in the owner's words."""
        digest = self._context.digest_kept(request)
        self._corrections.add(self._context.kept(digest), label=fields.get("label", ""))
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _refer(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Add a photo to those of a product. What was said of it goes on with the photo as it is kept there."""
        digest, image = self._context.shown(request)
        with self._recognition.changing:
            product = self._context.existing(fields.get("sku", ""))
            (kept,) = self._recognition.put(product, [image])
            self._corrections.add(self._context.kept(kept), sku=product.sku)
            if kept != digest:
                self._corrections.remove(digest)
        return RedirectResponse(f"/photo/{kept.hex()}", 303)

    def _forget(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Take back what was said of a photo, and the photo from the product if it is asked for.

        It can still be looked at.
        """
        digest = self._context.digest_kept(request)
        self._photos.keep(self._context.kept(digest))
        with self._recognition.changing:
            said = self._corrections.of(digest)
            if said and said.sku and fields.get("photo") == "remove":
                self._recognition.remove_photo(said.sku, digest)
            self._corrections.remove(digest)
        back = "/corrections" if fields.get("to") == "corrections" else f"/photo/{digest.hex()}"
        return RedirectResponse(back, 303)

    def _corrected(self, request: Request) -> Response:
        said = self._corrections.list(limit=MAX_CORRECTIONS)
        shown: list[tuple[Correction, Product | None, bool]] = [
            (
                each,
                self._gallery.get(each.sku) if each.sku else None,
                bool(each.sku) and each.photo in self._gallery.photos_of(each.sku or ""),
            )
            for each in reversed(said[-CORRECTIONS_SHOWN:])
        ]
        return self._context.render(
            request, "corrections", shown=shown, total=len(said), labels=self._corrections.labels()
        )

    def _labels(self, classes: Collection[str]) -> list[str]:
        """Return what a photo can be said to show: the owner's own words, then the league's classes."""
        return list(dict.fromkeys((*self._corrections.labels(), *classes)))[:SUGGESTIONS]


def _doubtful(found: Found, rejection: Rejection) -> bool:
    """Return whether other things than the shop's products are often as similar as what was found."""
    often = rejection.false_accept is not None and rejection.false_accept > OFTEN
    return often and not any(match.nearest >= SAME for match in found.matches)
