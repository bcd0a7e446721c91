"""The built-in backends, one folder each. Calling the package lists what is installed: ``attnhub.backends()``.

The package and the public function share a name; importing any backend binds the package to it, so the package is callable.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self) -> dict[str, dict[str, Any]]:
        from attnhub.api import backends

        return backends()


sys.modules[__name__].__class__ = _CallablePackage
