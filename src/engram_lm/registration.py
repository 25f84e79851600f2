"""Makes transformers' Auto classes know ``engram_lm`` after ``import engram_lm``, without importing transformers.

transformers has no entry points, so somebody has to call ``AutoConfig.register``; doing that in ``import engram_lm``
would import transformers, seconds of work that hashing or planning never need. So this waits instead:

1. ``import engram_lm`` puts one finder into ``sys.meta_path``. It answers for a single module, the one that defines
   ``AutoConfig``, and leaves when it has answered. If that module is already loaded, step 2 happens at once.
2. When that module has run, a stand-in configuration is registered for ``engram_lm`` through the public
   ``AutoConfig.register``. Nothing of ours is imported: transformers may be in the middle of importing itself.
3. When a checkpoint or a caller asks for ``engram_lm``, the stand-in imports ``engram_lm.model``, has it register the
   real classes in its own place, and answers with the real configuration.

Importing ``engram_lm.model`` directly registers the real classes too, so all orders of import end in the same state.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "engram_lm"
"""What ``config.json`` says under ``model_type``."""

_AUTO_MODULE = "transformers.models.auto.configuration_auto"


def prepare() -> None:
    """Register the model type now if transformers' ``AutoConfig`` is loaded, else as soon as it is.

    Repeating the call changes nothing.
    """
    loaded = sys.modules.get(_AUTO_MODULE)
    if loaded is not None and hasattr(loaded, "AutoConfig"):
        _register_stand_in(loaded)
    elif not any(isinstance(finder, _AutoConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigFinder())


class _AutoConfigFinder:
    """Finds one module like the finders behind it do, and asks to be told when that module has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO_MODULE:
            return None
        # The other finders, in their order: the module may come from a wheel, a zip file or an editable install.
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _call_after_loading(spec.loader)
                sys.meta_path.remove(self)
                return spec
        return None


def _call_after_loading(loader: Any) -> None:
    """Let this one loader object, made for this one module, register the stand-in after running the module."""
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register_stand_in(module)

    loader.exec_module = execute_and_register


def _register_stand_in(auto: ModuleType) -> None:
    """Register, in the module of ``AutoConfig``, a class that turns into ``EngramLMConfig`` when it is used."""
    if MODEL_TYPE in auto.CONFIG_MAPPING:
        return

    class EngramLMConfigStandIn(auto.PreTrainedConfig):  # type: ignore[name-defined]
        """Gives way to ``engram_lm.EngramLMConfig`` on first use."""

        model_type = MODEL_TYPE

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return _real_config()(*args, **kwargs)

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return _real_config().from_dict(config_dict, **kwargs)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
            return _real_config().from_pretrained(pretrained_model_name_or_path, **kwargs)

    auto.AutoConfig.register(MODEL_TYPE, EngramLMConfigStandIn)


def _real_config() -> Any:
    """Import ``engram_lm.model``, register its classes in place of the stand-in, and return ``EngramLMConfig``."""
    model = importlib.import_module("engram_lm.model")
    model.register_auto_classes()
    return model.EngramLMConfig
