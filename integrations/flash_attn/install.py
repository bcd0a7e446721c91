"""`import flash_attn` for code that is not ours: modules under flash-attn's names, and the metadata by which callers look for its version."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from email.message import Message
from types import ModuleType
from typing import Any, Optional

#: flash-attn's release whose functions these are. The part behind + tells from the real one, and counts in no comparison of releases.
VERSION = "2.8.3+attnhub"
DISTRIBUTION = "flash-attn"
_ROOT = "flash_attn"
#: Module -> where its contents are.
_MODULES = {
    _ROOT: "attnhub.integrations.flash_attn",
    f"{_ROOT}.flash_attn_interface": "attnhub.integrations.flash_attn",
    f"{_ROOT}.bert_padding": "attnhub.integrations.flash_attn.bert_padding",
}
_lock = threading.RLock()
_finder: Optional[_Finder] = None


class Installation:
    """What `install_as_flash_attn` returns. As a context manager it uninstalls at the end, if this call was the one that installed."""

    def __init__(self, owner: bool, version: str) -> None:
        self._owner = owner
        self.version = version

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._owner:
            uninstall_as_flash_attn()
            self._owner = False


def install_as_flash_attn(*, force: bool = False, version: str = VERSION) -> Installation:
    """Make ``import flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding`` give attnhub's functions.

    version: what ``flash_attn.__version__`` and ``importlib.metadata.version("flash-attn")`` say.
    force: do so though the real flash-attn is imported or installed; names that others took from it before stay theirs.

    Call it before importing what asks for flash-attn at import time. Installing twice changes nothing more. Raises RuntimeError
    if flash-attn is there and ``force`` is False.
    """
    global _finder
    with _lock:
        if _finder is not None:
            return Installation(False, _finder.version)
        if not force:
            real = sys.modules.get(_ROOT)
            if real is not None:
                raise RuntimeError(f"install_as_flash_attn: flash_attn {getattr(real, '__version__', '')} is imported already ({_home(real)}); force=True replaces it")
            spec = importlib.util.find_spec(_ROOT)
            if spec is not None:
                raise RuntimeError(f"install_as_flash_attn: flash_attn is installed ({spec.origin}); uninstall it, or force=True goes before it")
        _finder = _Finder(version)
        _finder.install()
        _forget_answers()
        return Installation(True, version)


def uninstall_as_flash_attn() -> bool:
    """Undo `install_as_flash_attn`; whether it was installed. Modules that it replaced are back; names imported from it go on working."""
    global _finder
    with _lock:
        if _finder is None:
            return False
        _finder.uninstall()
        _finder = None
        _forget_answers()
        return True


def _home(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "from no file"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules, and is where importlib.metadata finds the distribution."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._replaced: dict[str, ModuleType] = {}

    def install(self) -> None:
        for name in [n for n in sys.modules if n == _ROOT or n.startswith(_ROOT + ".")]:
            self._replaced[name] = sys.modules.pop(name)
        sys.meta_path.insert(0, self)
        importlib.import_module(_ROOT)

    def uninstall(self) -> None:
        sys.meta_path.remove(self)
        for name in [n for n in sys.modules if n == _ROOT or n.startswith(_ROOT + ".")]:
            del sys.modules[name]
        sys.modules.update(self._replaced)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if fullname not in _MODULES:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=fullname == _ROOT)
        # Callers tell a package from an empty folder by its file.
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(_MODULES[module.__name__])
        for name in source.__all__:
            if not name.endswith("install_as_flash_attn"):
                setattr(module, name, getattr(source, name))
        if module.__name__ == _ROOT:
            module.__dict__["__version__"] = self.version

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.lower().replace("_", "-") == DISTRIBUTION:
            yield _Distribution(self.version)


class _Distribution(importlib.metadata.Distribution):
    """Enough of one for version(), metadata() and packages_distributions()."""

    def __init__(self, version: str) -> None:
        message = Message()
        message["Metadata-Version"] = "2.1"
        message["Name"] = DISTRIBUTION
        message["Version"] = version
        message["Summary"] = "attnhub under flash-attn's names (attnhub.install_as_flash_attn)"
        self._files = {"METADATA": message.as_string(), "top_level.txt": _ROOT + "\n"}

    def read_text(self, filename: str) -> Optional[str]:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return os.path.join(os.path.dirname(__file__), path)


def _forget_answers() -> None:
    """Libraries ask once whether flash-attn is there and keep the answer. Those that are imported have to ask again."""
    for name in ("transformers.utils.import_utils", "diffusers.utils.import_utils"):
        for attribute, value in list(vars(sys.modules.get(name, ModuleType(name))).items()):
            if ("flash_attn" in attribute or attribute == "_package_distribution_mapping") and hasattr(value, "cache_clear"):
                value.cache_clear()
