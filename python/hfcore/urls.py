"""What a URL says of a server, and who may see a token."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, urlsplit

from .errors import InvalidRequestError

TOKEN_VARIABLES = ("HUGGINGFACEHUB_API_TOKEN", "HF_TOKEN")
_HOSTS = ("huggingface.co", "hf.co", "endpoints.huggingface.cloud")

SECRET = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)
"""What the names of headers and parameters look like that hold one."""


def is_url(name: str | None) -> bool:
    """Whether a name can only be meant as a URL."""
    return name is not None and name.startswith(("http://", "https://"))


def checked_url(url: str) -> str:
    """A URL of http or https with a host and without a password, less the slash at its end.

    >>> checked_url("http://localhost:8080/v1/")
    'http://localhost:8080/v1'
    """
    parts = split(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequestError(f"endpoint_url must be http(s)://host, got {shown(url)!r}")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequestError(
            f"a password does not belong into endpoint_url ({shown(url)}); use headers"
        )
    for name, _ in parse_qsl(parts.query):
        if SECRET.search(name):
            raise InvalidRequestError(
                f"endpoint_url ({shown(url)}) must not hold a secret, got {name!r}; use headers"
            )
    return parts._replace(path=parts.path.rstrip("/"), fragment="").geturl()


def shown(url: str | None) -> str:
    """A URL as it may be printed: without user, password and query."""
    parts = split(url or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def split(url: str) -> SplitResult:
    """A URL's parts. Raises InvalidRequestError for none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InvalidRequestError(f"endpoint_url is no URL: {error!s:.100}") from None
    return parts


def is_hugging_face(url: str) -> bool:
    """Whether a URL is one of Hugging Face's own, which may see the environment's token.

    >>> is_hugging_face("https://router.huggingface.co/v1"), is_hugging_face("http://localhost")
    (True, False)
    """
    from huggingface_hub import constants

    parts, home = split(url), split(constants.ENDPOINT)
    host = parts.hostname or ""
    if (parts.scheme, parts.netloc) == (home.scheme, home.netloc):
        return True
    return parts.scheme == "https" and any(host == h or host.endswith(f".{h}") for h in _HOSTS)


def may_see_token(url: str | None) -> bool:
    """Whether a token that was given for the hub is meant for this URL too; None is the hub."""
    return url is None or is_hugging_face(checked_url(url))


def saved_token() -> str | None:
    """The environment's token, else that of the saved login."""
    for name in TOKEN_VARIABLES:
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    from huggingface_hub import get_token

    return get_token()


def open_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those headers that hold no secret, by their names.

    >>> open_headers({"Authorization": "Bearer x", "X-Team": "a"})
    {'X-Team': 'a'}
    """
    return {name: value for name, value in headers.items() if not SECRET.search(name)}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost.example.org")
    (True, True, False)
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
