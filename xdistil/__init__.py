"""xdistil: distil a big transformer encoder into a small fast one.

Letters in every docstring: B batch, S tokens (sub-words), N sentences or windows, L layers,
A attention heads, H_t and H_s teacher and student widths, C labels, V vocabulary.
Importing this package loads nothing heavy.
"""

import importlib.util
import sys

__version__ = "0.1.0"
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


class _BiLstmHook:
    """An import hook that lets the auto classes know of `xdistil.bilstm` as soon as they are imported themselves:
    transformers has no entry point for models, and to import it here would take seconds."""

    def find_spec(self, name, path=None, target=None):
        if name == _AUTO_CLASSES:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), importlib.import_module("xdistil.bilstm"))
            return spec


if _AUTO_CLASSES in sys.modules:
    importlib.import_module("xdistil.bilstm")
else:
    sys.meta_path.insert(0, _BiLstmHook())
