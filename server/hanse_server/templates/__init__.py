"""The operator's HTML templates, their Chinese in `zh.yaml`, and its charts' style; see `hanse_common.web.pages`."""

from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = FOLDER / "operator.css"
