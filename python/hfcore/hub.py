"""A model's name -> local files; a path that exists never leaves the machine.

Downloads go through huggingface_hub, so cache, token, offline switch (HF_HUB_OFFLINE) and progress
bars are everyone's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .errors import InvalidRequestError, ModelFileError, ModelNotFoundError

QUANTIZATIONS = (
    "Q4_K_M", "Q4_K_S", "Q4_K_L", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0", "MXFP4",
    "Q5_K_M", "Q5_K_S", "Q5_K_L", "Q5_K", "Q5_1", "Q5_0", "Q6_K", "Q6_K_L", "Q8_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q3_K", "Q2_K", "Q2_K_L", "Q2_K_S", "BF16", "F16", "F32",
)  # fmt: skip
"""Which file of a GGUF repository is taken when none is asked for: the first of these it has."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?::(?P<quant>[\w.-]+))?\Z")
_QUANT = re.compile(r"(?<![A-Za-z0-9])(I?Q\d+_\w+|Q\d+|MXFP4|BF16|F16|F32|FP16|FP32)", re.I)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z", re.I)
_NOT_WEIGHTS = re.compile(r"(?:^|[/._-])(?:mmproj|imatrix|lora|adapter)", re.I)
_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                "tokenizer.model", "chat_template.jinja", "chat_template.json",
                "response_template.json", "modules.json",
                "sentence_bert_config.json", "config_sentence_transformers.json")  # fmt: skip
_MODULE_FILE = re.compile(r"[0-9]+_\w+/(config\.json|model\.safetensors)")
"""What sentence-transformers' modules keep."""
_TEMPLATES = "additional_chat_templates/"


def resolve(
    model: str | os.PathLike[str],
    *,
    quantization: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: Any = None,
    local_files_only: bool | None = None,
) -> Path:
    """The local .gguf file or directory of a model, downloaded if it has to be.

    `model`: a .gguf path, a directory, "owner/name", or "owner/name:Q4_K_M". `quantization` says
    the same as the part after the colon; of safetensors there is nothing to choose by it, see
    `left_to_make`. `token` may be a SecretStr; it is never printed.

    Raises ModelNotFoundError when there is no such thing, or it may not be read.
    """
    name = os.fspath(model)
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequestError(f"model must be a path or owner/name, got {name!r}")
    path = Path(name).expanduser()
    if path.exists():
        return _choose_local(path, quantization)
    base, _, tail = name.rpartition(":")
    if base and Path(base).expanduser().is_dir():
        return _choose_local(Path(base).expanduser(), _one_quantization(quantization, tail))
    if looks_local(name):
        raise ModelNotFoundError(f"{name}: no such file or directory", path=name)
    match = _REPO.match(name)
    if match is None:
        raise ModelNotFoundError(
            f"{name}: no such file or directory, and not a model of the hub (owner/name)", path=name
        )
    quantization = _one_quantization(quantization, match["quant"])
    return _from_hub(
        name.partition(":")[0],
        quantization,
        revision=revision,
        cache_dir=cache_dir,
        token=_plain_token(token),
        offline=offline() if local_files_only is None else local_files_only,
    )


def bytes_to_fetch(
    model: str | os.PathLike[str],
    *,
    quantization: Any = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: Any = None,
    local_files_only: bool | None = None,
) -> int | None:
    """How large what `resolve` would fetch is; None where it fetches nothing, or nobody can say.

    0 for a checkpoint that is to be quantised as it is loaded: its size says little then.
    """
    name = os.fspath(model)
    match = None if looks_local(name) or Path(name).exists() else _REPO.match(name)
    if match is None or (offline() if local_files_only is None else local_files_only):
        return None
    import huggingface_hub as hub

    asked = quantization if isinstance(quantization, str) else None
    wanted = _one_quantization(asked, match["quant"])
    repo = name.partition(":")[0]
    with contextlib.suppress(OSError, ModelFileError, *_network_errors()):
        resolve(model, quantization=asked, revision=revision, cache_dir=cache_dir, token=token,
                local_files_only=True)  # fmt: skip
        return None
    with contextlib.suppress(OSError, ModelFileError, *_network_errors()):
        api = hub.HfApi(token=_plain_token(token))
        listing = api.model_info(repo, revision=revision, files_metadata=True).siblings or ()
        sizes = {file.rfilename: file.size or 0 for file in listing}
        chosen = choose(sizes, wanted, repo)
        made = (quantization or wanted) and not chosen[0].lower().endswith(".gguf")
        return 0 if made else sum(sizes[name] for name in chosen)
    return None


def fetch_config(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: Any = None,
    **_: Any,
) -> Path | None:
    """The config.json of a repository, without its weights; None where it has none."""
    import huggingface_hub as hub

    with contextlib.suppress(OSError, ValueError, *_network_errors()):
        repo = os.fspath(model).partition(":")[0]
        found = hub.hf_hub_download(
            repo,
            "config.json",
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            token=_plain_token(token),
        )
        return Path(found)
    return None


def left_to_make(model: str | os.PathLike[str], path: Path, quantization: str | None) -> str | None:
    """The quantisation that was asked for, if it is not what the file at `path` was chosen by."""
    name = os.fspath(model)
    base, _, tail = name.rpartition(":")
    suffix = tail if base and not Path(name).expanduser().exists() and "/" not in tail else None
    asked = _one_quantization(quantization, suffix)
    chosen = path.is_file() and asked is not None and _quantization(path.name) == asked.upper()
    return None if chosen else asked


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path: such a name never goes to the hub.

    >>> looks_local("./model"), looks_local("a.gguf"), looks_local("owner/name")
    (True, True, False)
    """
    return name.startswith(("/", ".", "~", "\\")) or name.lower().endswith(".gguf")


def identity(path: Path) -> dict[str, Any]:
    """What tells this model's files from others without reading them: real path, size, mtime."""
    real = path.resolve()
    files = sorted(f for f in real.iterdir() if f.is_file()) if real.is_dir() else [real]
    stats = [f.stat() for f in files]
    return {
        "path": str(real),
        "bytes": sum(s.st_size for s in stats),
        "modified_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


def digest(path: Path) -> str:
    """SHA-256 of a model's weights and configuration, hexadecimal: all of them are read."""
    if path.is_dir():
        kinds = ("config.json", "*.safetensors")
        files = sorted(file for kind in kinds for file in path.glob(kind))
    else:
        files = [path.with_name(name) for name in _parts(path)]
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def digest_of(*parts: object) -> str:
    """SHA-256 of some values as they are written, hexadecimal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _parts(path: Path) -> list[str]:
    """The names of all parts of a split GGUF file; one that is not split is its only part."""
    split = _SPLIT.search(path.name)
    if split is None:
        return [path.name]
    start, count = path.name[: split.start()], int(split[2])
    return [f"{start}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def choose(files: Iterable[str], quantization: str | None, model: str) -> list[str]:
    """The files of a repository that are needed: one GGUF (all its parts), or the safetensors.

    >>> choose(["a-Q8_0.gguf", "a-Q4_K_M.gguf", "README.md"], None, "owner/a")
    ['a-Q4_K_M.gguf']
    """
    names = sorted(files)
    groups = _gguf_groups(names)
    if groups:
        return _whole(_choose_gguf(groups, quantization, model), model)
    weights = _safetensors(names)
    if not weights:
        seen = ", ".join(names[:8]) or "nothing"
        raise ModelNotFoundError(
            f"{model} has neither .gguf nor .safetensors weights; it holds {seen}", path=model
        )
    beside = [
        n for n in names
        if n in _MODEL_FILES or n.startswith(_TEMPLATES) or _MODULE_FILE.fullmatch(n)
    ]  # fmt: skip
    return beside + weights


def _choose_local(path: Path, quantization: str | None) -> Path:
    """A file as it is; of a directory its safetensors model, else the GGUF asked for."""
    if path.is_file():
        return path
    names = [f.name for f in path.iterdir() if f.is_file()]
    stated = {_quantization(name) for name in names if name.lower().endswith(".gguf")}
    asked = quantization is not None and quantization.upper() in stated
    if not asked and (path / "config.json").exists() and _safetensors(names):
        return path
    return _root(path, choose(names, quantization, str(path)))


def _root(folder: Path, chosen: list[str]) -> Path:
    """What the engine opens: the (first) GGUF file, or the directory of a safetensors model."""
    return folder / chosen[0] if chosen[0].lower().endswith(".gguf") else folder


def _gguf_groups(names: list[str]) -> dict[str, list[str]]:
    """GGUF files by what they are parts of: name without the part number -> files in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not _NOT_WEIGHTS.search(name):
            groups.setdefault(_SPLIT.sub(".gguf", name), []).append(name)
    return groups


def _choose_gguf(groups: dict[str, list[str]], quantization: str | None, model: str) -> list[str]:
    by_quantization: dict[str, list[str]] = {}
    for name, parts in groups.items():
        by_quantization.setdefault(_quantization(name), parts)
    if quantization is not None:
        wanted = quantization.upper()
        if wanted in by_quantization:
            return by_quantization[wanted]
        has = ", ".join(q for q in by_quantization if q) or "none that its names tell"
        raise ModelNotFoundError(f"{model} has no {quantization!r}; it has {has}", path=model)
    for known in QUANTIZATIONS:
        if known in by_quantization:
            return by_quantization[known]
    if len(groups) == 1:
        return next(iter(groups.values()))
    raise ModelNotFoundError(
        f"{model} has {len(groups)} models; name a file, or a quantization after a colon:"
        f" {', '.join(sorted(groups))}",
        path=model,
    )


def _quantization(name: str) -> str:
    """The quantisation that a file name states, in upper case; "" when it states none."""
    found = _QUANT.findall(name.removesuffix(".gguf").removesuffix(".GGUF"))
    return str(found[-1]).upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def _whole(parts: list[str], model: str) -> list[str]:
    """All parts of a split file, or an error that says how many are missing."""
    match = _SPLIT.search(parts[0])
    if match and len(parts) != int(match[2]):
        raise ModelFileError(
            f"{model}: {parts[0]} is one of {int(match[2])} parts, {len(parts)} are there",
            path=model,
        )
    return parts


def _safetensors(names: Iterable[str]) -> list[str]:
    """The weights at the top of a repository; Mistral's second copy (consolidated) is left out."""
    top = [n for n in names if "/" not in n]
    weights = [n for n in top if n.endswith((".safetensors", ".safetensors.index.json"))]
    model = [n for n in weights if n.startswith("model")]
    return model or weights


def _one_quantization(option: str | None, suffix: str | None) -> str | None:
    if option and suffix and option.upper() != suffix.upper():
        raise InvalidRequestError(
            f"quantization={option!r} and the model's {suffix!r} after the colon differ"
        )
    return option or suffix or None


def _plain_token(token: Any) -> str | None:
    if token is None or isinstance(token, str):
        return token
    secret = getattr(token, "get_secret_value", None)
    if secret is None:
        raise InvalidRequestError(f"token must be a str or SecretStr, got {type(token).__name__}")
    return str(secret())


def offline() -> bool:
    """Whether huggingface_hub was told to stay offline."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_hub(
    repo: str,
    quantization: str | None,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | None,
    offline: bool,
) -> Path:
    """The files of a hub repository: from the hub, or from the cache when it cannot be reached."""
    import huggingface_hub as hub

    place: dict[str, Any] = {"repo_id": repo, "revision": revision, "cache_dir": cache_dir}

    def cached() -> Path:
        folder = _snapshot(repo, revision, cache_dir)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        return _root(folder, choose(names, quantization, repo))

    def online() -> Path:
        # Not list_repo_files: that tries for 23 seconds before it says that nobody answers.
        listing = hub.HfApi(token=token).model_info(repo, revision=revision).siblings or ()
        chosen = choose((file.rfilename for file in listing), quantization, repo)
        folder = hub.snapshot_download(**place, token=token, allow_patterns=chosen)
        return _root(Path(folder), chosen)

    if offline:
        return _translated(cached, repo, " (offline: only the local cache was looked at)")
    return _translated(lambda: _online_or_cached(online, cached), repo, "")


def _snapshot(repo: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    """A repository's folder in the cache, complete or not; LocalEntryNotFoundError without one.

    huggingface_hub itself gives out complete snapshots only, and one GGUF of a repository is none.
    The layout is documented: models--owner--name/refs/REVISION names the folder under snapshots/.
    """
    from huggingface_hub import constants, errors

    wanted = revision or constants.DEFAULT_REVISION
    home = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = home / "refs" / wanted
    folder = home / "snapshots" / (ref.read_text("utf-8").strip() if ref.is_file() else wanted)
    if not folder.is_dir():
        raise errors.LocalEntryNotFoundError(f"{repo} at {wanted} is not in {home.parent}")
    return folder


def _online_or_cached(online: Callable[[], Path], cached: Callable[[], Path]) -> Path:
    """A hub that cannot be reached does not matter when the files are here."""
    from huggingface_hub import errors

    try:
        return online()
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ModelFileError):
        raise
    except _network_errors() as error:
        if not _unreachable(error):
            raise
        try:
            return cached()
        except (OSError, ModelFileError):
            raise error from None


def _unreachable(error: BaseException) -> bool:
    """No answer at all, or the server's own fault: then the cache may speak for the hub."""
    response = getattr(error, "response", None)
    return response is None or response.status_code >= 500


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failed download raises; HTTPError is that of huggingface_hub's HTTP client."""
    from huggingface_hub import errors

    return (OSError, errors.HfHubHTTPError, getattr(errors, "HTTPError", OSError))


def _translated(fetch: Callable[[], Path], repo: str, note: str) -> Path:
    """Call `fetch`, its errors in our words. Never the token: hub messages hold the URL only."""
    from huggingface_hub import errors

    try:
        return fetch()
    except ModelFileError:
        raise
    except errors.GatedRepoError as error:
        problem = (
            f"is gated: accept its terms at https://huggingface.co/{repo} and pass token="
            " (or log in with `hf auth login`)"
        )
        raise ModelNotFoundError(f"{repo} {problem}", path=repo) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo}: no such model on the hub, or it is private and needs token=", path=repo
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo}: no such revision on the hub", path=repo) from error
    except errors.LocalEntryNotFoundError as error:
        where = note or " (the hub could not be reached)"
        raise ModelNotFoundError(f"{repo}: not in the local cache{where}", path=repo) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{repo}: not a model of the hub: {error}", path=repo) from error
    except _network_errors() as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        raise ModelNotFoundError(
            f"{repo}: could not be fetched from the hub, and is not in the cache ({reason})",
            path=repo,
        ) from error
