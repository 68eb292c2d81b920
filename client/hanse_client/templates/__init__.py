"""The client's HTML templates, and their Chinese in `zh.yaml`; see `hanse_common.web.pages`."""

from pathlib import Path

FOLDER = Path(__file__).parent
