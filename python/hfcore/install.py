"""`langchain_huggingface` by hfcore: programs that import that package get the classes of this one.

Names of modules and classes only; what the classes do is in their own files.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .errors import InvalidRequestError

ROOT = "langchain_huggingface"

_HOMES = {
    "ChatHuggingFace": "chat_models",
    "HuggingFaceEmbeddings": "embeddings",
    "HuggingFaceEndpoint": "endpoint",
    "HuggingFaceEndpointEmbeddings": "endpoint_embeddings",
    "HuggingFacePipeline": "llms",
    "__version__": "_core",
}
_MODULES: dict[str, tuple[str, ...]] = {
    "": tuple(_HOMES),
    "_version": ("__version__",),
    "chat_models": ("ChatHuggingFace",),
    "chat_models.huggingface": ("ChatHuggingFace", "HuggingFaceEndpoint", "HuggingFacePipeline"),
    "embeddings": ("HuggingFaceEmbeddings", "HuggingFaceEndpointEmbeddings"),
    "embeddings.huggingface": ("HuggingFaceEmbeddings",),
    "embeddings.huggingface_endpoint": ("HuggingFaceEndpointEmbeddings",),
    "llms": ("HuggingFaceEndpoint", "HuggingFacePipeline"),
    "llms.huggingface_endpoint": ("HuggingFaceEndpoint",),
    "llms.huggingface_pipeline": ("HuggingFacePipeline",),
    "utils": (),
    "utils.import_utils": (),
}
"""The modules that programs import, and what they find there."""

_LOCK = threading.Lock()


def install_as_langchain_huggingface() -> None:
    """Let `import langchain_huggingface`, whole or in parts, give hfcore's classes from now on.

    So does then `init_chat_model(..., model_provider="huggingface")` of LangChain. It holds for the
    whole process, whether that package is installed or not; a second call does nothing. What is
    private there is not here: to import it is an ImportError. `__version__` is hfcore's.

    Raises InvalidRequestError where the real package has been imported already: its classes are in
    somebody's hands then, and two kinds of them would meet. Call this first.

    >>> import subprocess, sys
    >>> program = '''
    ... import hfcore
    ... hfcore.install_as_langchain_huggingface()
    ... from langchain_huggingface.llms.huggingface_pipeline import HuggingFacePipeline
    ... print(HuggingFacePipeline is hfcore.HuggingFacePipeline)'''
    >>> command = [sys.executable, "-c", program]
    >>> subprocess.run(command, capture_output=True, text=True).stdout.strip()
    'True'
    """
    with _LOCK:
        if _installed():
            return
        modules = {_full(name): _module(name, names) for name, names in _MODULES.items()}
        for full, module in modules.items():
            parent, _, name = full.rpartition(".")
            if parent:
                setattr(modules[parent], name, module)
        sys.modules.update(modules)
        logging.getLogger("hfcore").info("%s is hfcore's in this process", ROOT)


def _installed() -> bool:
    """Whether the modules are ours already; raises where they are another's."""
    for name, module in list(sys.modules.items()):
        if module is None or (name != ROOT and not name.startswith(f"{ROOT}.")):
            continue
        if isinstance(module, _Alias):
            return True
        where = getattr(module, "__file__", None)
        raise InvalidRequestError(
            f"{ROOT} must not be imported before install_as_langchain_huggingface(), and was:"
            f" {name} of {where}"
        )
    return False


class _Alias(ModuleType):
    """A module whose names are looked up in hfcore when they are first used."""


def _module(name: str, names: tuple[str, ...]) -> _Alias:
    full = _full(name)
    module = _Alias(full, f"hfcore's, under the name of {full}.")
    package = any(other.startswith(f"{name}.") for other in _MODULES) or not name
    module.__spec__ = ModuleSpec(full, None, origin="hfcore", is_package=package)
    module.__package__ = full if package else full.rpartition(".")[0]
    if package:
        module.__path__ = []
    found: dict[str, Any] = {
        "__all__": sorted(names),
        "__getattr__": _finder(module, names),
        "__dir__": lambda: sorted({*vars(module), *names}),
    }
    vars(module).update(found)
    return module


def _finder(module: ModuleType, names: tuple[str, ...]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"{module.__name__}, which is hfcore's here, has no {name!r}")
        value = getattr(import_module(f".{_HOMES[name]}", __package__), name)
        setattr(module, name, value)
        return value

    return find


def _full(name: str) -> str:
    return f"{ROOT}.{name}" if name else ROOT
