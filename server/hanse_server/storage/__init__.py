"""What the server must not forget: records in a database, large things beside it in content-addressed files.

server/DATA_MODEL.md describes each record and its states.
"""

from hanse_server.storage.database import Database
from hanse_server.storage.history import History
from hanse_server.storage.objects import Objects
from hanse_server.storage.progress import Beginning, Checkpoint, Progress
from hanse_server.storage.state import State
from hanse_server.storage.versions import Version, Versions

__all__ = [
    "Beginning",
    "Checkpoint",
    "Database",
    "History",
    "Objects",
    "Progress",
    "State",
    "Version",
    "Versions",
]
