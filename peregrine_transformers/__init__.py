"""Checkpoints of `peregrine quantize` in plain `transformers`.

transformers looks for no plugins: somebody has to register a quantization method. An installed Peregrine does
it by itself. `peregrine_transformers.pth` (see setup.py) calls `register_later` when Python starts, which
waits for transformers to load its table of methods and costs nothing where it never does. Where such files
are not read (an editable install, `python -S`), `import peregrine_transformers.quantizer` does the same.

A package of its own, not a module of `engine`, because every Python of the environment imports it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


def register_later() -> None:
    """Register the method when transformers has loaded its table. Does nothing the second time."""
    if _TABLE not in sys.modules and not any(isinstance(f, _AfterTable) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


class _AfterTable(MetaPathFinder):
    """Finds nothing itself; has the module that it waits for loaded by a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import peregrine_transformers.quantizer  # noqa: F401  registers as it is imported
