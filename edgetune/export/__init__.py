"""A model in, a bundle out. The only room that may know torch, and only inside functions."""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallableRoom(types.ModuleType):
    """Loading this room puts the module where ``edgetune.export``, the function, was; so it can be called like it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _export(*args, **kwargs)


from edgetune import export as _export  # noqa: E402  (bound before the import system replaces it)

sys.modules[__name__].__class__ = _CallableRoom
