"""Hugging Face models in Python and LangChain, in the process, without torch.

    Engine, ChatTemplate, Tokenizer, Completion, Delta   for Python programs
    quantize                                             model files in other types
    SentenceEncoder                                      texts to vectors
    ChatHuggingFace, HuggingFacePipeline,                for LangChain (langchain-core is needed)
    HuggingFaceEndpoint, HuggingFaceEmbeddings,
    HuggingFaceEndpointEmbeddings
    install_as_langchain_huggingface                     for programs that import that package
    hfcore.errors, hfcore.options, hfcore.testing        exceptions, option names, test helpers

Everything is imported at first use: `import hfcore` loads neither numpy nor LangChain.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import ChatTemplate, Tokenizer, __version__
    from .chat_models import ChatHuggingFace
    from .embeddings import HuggingFaceEmbeddings
    from .endpoint import HuggingFaceEndpoint
    from .endpoint_embeddings import HuggingFaceEndpointEmbeddings
    from .engine import Completion, Delta, Engine, TokenLogprob, Usage
    from .errors import (
        ContextOverflowError,
        EngineClosedError,
        EngineOverloadedError,
        HfcoreError,
        InternalError,
        InvalidRequestError,
        ModelFileError,
        ModelNotFoundError,
        ModelTooLargeError,
        NoChatTemplateError,
        PlacementError,
        RemoteAccessError,
        RemoteAuthenticationError,
        RemoteConnectionError,
        RemoteError,
        RemoteNotFoundError,
        RemoteRateLimitError,
        RemoteRequestError,
        RemoteResponseError,
        RemoteServerError,
        RemoteStreamError,
        RemoteTimeoutError,
        RequestTimeoutError,
        TemplateError,
        UnknownOptionError,
        UnsupportedModelError,
    )
    from .install import install_as_langchain_huggingface
    from .llms import HuggingFacePipeline
    from .quantization import Quantized, quantize
    from .sentences import SentenceEncoder

_HOMES = {
    "_core": ("ChatTemplate", "Tokenizer", "__version__"),
    "engine": ("Completion", "Delta", "Engine", "TokenLogprob", "Usage"),
    "errors": (
        "ContextOverflowError",
        "EngineClosedError",
        "EngineOverloadedError",
        "HfcoreError",
        "InternalError",
        "InvalidRequestError",
        "ModelFileError",
        "ModelNotFoundError",
        "ModelTooLargeError",
        "NoChatTemplateError",
        "PlacementError",
        "RemoteAccessError",
        "RemoteAuthenticationError",
        "RemoteConnectionError",
        "RemoteError",
        "RemoteNotFoundError",
        "RemoteRateLimitError",
        "RemoteRequestError",
        "RemoteResponseError",
        "RemoteServerError",
        "RemoteStreamError",
        "RemoteTimeoutError",
        "RequestTimeoutError",
        "TemplateError",
        "UnknownOptionError",
        "UnsupportedModelError",
    ),
    "chat_models": ("ChatHuggingFace",),
    "llms": ("HuggingFacePipeline",),
    "endpoint": ("HuggingFaceEndpoint",),
    "quantization": ("Quantized", "quantize"),
    "sentences": ("SentenceEncoder",),
    "embeddings": ("HuggingFaceEmbeddings",),
    "endpoint_embeddings": ("HuggingFaceEndpointEmbeddings",),
    "install": ("install_as_langchain_huggingface",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ChatHuggingFace",
    "ChatTemplate",
    "Completion",
    "ContextOverflowError",
    "Delta",
    "Engine",
    "EngineClosedError",
    "EngineOverloadedError",
    "HfcoreError",
    "HuggingFaceEmbeddings",
    "HuggingFaceEndpoint",
    "HuggingFaceEndpointEmbeddings",
    "HuggingFacePipeline",
    "InternalError",
    "InvalidRequestError",
    "ModelFileError",
    "ModelNotFoundError",
    "ModelTooLargeError",
    "NoChatTemplateError",
    "PlacementError",
    "Quantized",
    "RemoteAccessError",
    "RemoteAuthenticationError",
    "RemoteConnectionError",
    "RemoteError",
    "RemoteNotFoundError",
    "RemoteRateLimitError",
    "RemoteRequestError",
    "RemoteResponseError",
    "RemoteServerError",
    "RemoteStreamError",
    "RemoteTimeoutError",
    "RequestTimeoutError",
    "SentenceEncoder",
    "TemplateError",
    "TokenLogprob",
    "Tokenizer",
    "UnknownOptionError",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "install_as_langchain_huggingface",
    "quantize",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'hfcore' has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
