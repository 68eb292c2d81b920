"""Import this before `hanse_client.participant`, which wants the type of trainers alone of a module that loads torch.

torch takes seconds to load, and milliseconds more of each fork.
"""

import sys
import types

_module = types.ModuleType("hanse_client.training")
_module.Trainer = object  # type: ignore[attr-defined]
sys.modules.setdefault(_module.__name__, _module)
