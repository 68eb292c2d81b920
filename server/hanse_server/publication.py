"""What becomes the league's recognizer: a version whose figures pass, by the operator's own signature.

    judge(settings, report, released, tried=True)           # raises ReleaseRefused
    signed = sign_release(version, versions, key, "textiles", reason="better shoes")

The server that merchants reach holds no key that signs. `hanse-server publish`, at the operator's desk, does.
"""

import time

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common.errors import ReleaseRefused
from hanse_common.federated_report import FederatedReport, Figure
from hanse_common.release import Release, ReleasedFile, SignedRelease
from hanse_server.config import Publication
from hanse_server.storage import Version, Versions


def judge(
    settings: Publication,
    report: FederatedReport | None,
    released: FederatedReport | None,
    *,
    tried: bool = False,
) -> list[str]:
    """Return what the figures in `report` say, a line each; `released` are those of the recognizer before.

    `tried` says that the league evaluates its models. Raises `ReleaseRefused` when the figures do not reach what
    `settings` ask for, or are missing though asked for, or though there are others': one merchant can make an
    evaluation fail, and a gate that then stood open would let through what that merchant ruined.
    """
    if report is None:
        if settings.minimum > 0 or released is not None or tried:
            raise ReleaseRefused(
                f"{settings.metric}: no figures, expected {settings.minimum:g} or more (publication.minimum). Sign "
                "an evaluation plan, or look into the log why the evaluation failed; or release with --without-figures."
            )
        return ["There are no figures of the league's own photos."]
    found: Figure | None = getattr(report, settings.metric)
    value = _counted(found, settings)
    said = [f"{settings.metric}: {_shown(found)}"]
    if value is None or value < settings.minimum:
        raise ReleaseRefused(
            f"{settings.metric}: found {_shown(found)}, expected at least {settings.minimum:g} (publication.minimum)."
        )
    if released is not None:
        before: Figure | None = getattr(released, settings.metric)
        least = None if before is None else before.value
        said.append(f"{settings.metric} of the released recognizer: {_shown(before)}")
        if least is not None and value < least - settings.tolerance:
            raise ReleaseRefused(
                f"{settings.metric}: found {_shown(found)}, the released recognizer has {_shown(before)}; expected at "
                f"most {settings.tolerance:g} less (publication.tolerance)."
            )
    return said


def sign_release(
    version: Version, versions: Versions, key: Ed25519PrivateKey, league: str, reason: str
) -> tuple[SignedRelease, int]:
    """Return the signed statement that `version` is the league's recognizer, and its number."""
    number = versions.next_release()
    release = Release(
        league=league,
        number=number,
        version=version.number,
        recognizer=bytes.fromhex(version.digest),
        files=_files(version, versions),
        made=int(time.time()),
        reason=reason,
    )
    return SignedRelease.sign(release, key), number


def _files(version: Version, versions: Versions) -> tuple[ReleasedFile, ...]:
    return tuple(
        ReleasedFile(name=name, digest=bytes.fromhex(digest), size=len(versions.file(digest)))
        for name, digest in sorted(version.files.items())
    )


def _counted(figure: Figure | None, settings: Publication) -> float | None:
    if figure is None:
        return None
    return figure.low if settings.certain else figure.value


def _shown(figure: Figure | None) -> str:
    return "none" if figure is None else f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"
