"""Where teachers come from: the one that ships with the package, a path, or the Hub; as a folder or a GGUF file."""

import json
import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import (
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..settings import BUILTIN_TEACHER, GGUF_SUFFIX
from .devices import default_device, processes
from .dtypes import cast_weights


__all__ = [
    "BUILTIN_TEACHER",
    "builtin_teacher_path",
    "explain_hub_error",
    "find_origin",
    "load_config",
    "load_folder",
    "load_json",
    "load_model",
    "load_placed",
    "load_tokenizer",
    "load_typed",
]


logger = logging.getLogger(__name__)

GGUF_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Types of tensors in a GGUF file that are no blocks of integers; norms are F32 in all files, so it is the last."""


def builtin_teacher_path() -> Path:
    """Folder of the teacher that ships with the package: a small Llama-type model of Python source."""
    return Path(__file__).parents[1] / "builtin_teacher"


def load_model(name: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """
    Load a causal language model, teacher or student.

    Args:
        name (`str` or `Path`):
            `"builtin"`, a folder, or a repository of the Hub, of which `"owner/name@revision"` is a branch, tag or commit.
            Remote code is not run. Of GGUF files, `"folder/model.gguf"` or `"owner/name/model.gguf"`, also with
            `@revision`: such a model is loaded with plain weights, as if it had never been quantized. Needs the package
            `gguf`.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Type of the weights in memory; `"auto"` takes the one they are stored in. Of a quantized GGUF file that is
            bfloat16: blocks of integers have no such type, and models are trained in this one. It rounds less than the
            blocks did, takes half the memory of float32, and has its range, which float16 does not.

    Returns:
        `PreTrainedModel`: in evaluation mode; its `loaded_commit` is the commit it was loaded from, if it is on the Hub, and
        its `loaded_gguf_file` the file, if it was one.

    Raises:
        `FileNotFoundError`: there is no such folder, file or repository, or it cannot be read.
        `ValueError`: it is not a decoder language model, weights are missing in a GGUF file, or the package `gguf` is not
            installed.
    """
    config = load_config(name)
    if not isinstance(config, EchoAttConfig):
        check_base_family(config)
    source = _resolve(name)
    if source.gguf_file is None:
        model = _load(name, AutoModelForCausalLM.from_pretrained, dtype=dtype)
    else:
        model = _load_gguf(name, config, dtype)
    # transformers does not keep them, and what the name stands for changes.
    _, model.loaded_commit, model.loaded_gguf_file = find_origin(name)
    return model


def find_origin(name: str | Path) -> tuple[str, str | None, str | None]:
    """
    Where a model comes from, after its configuration was loaded.

    Args:
        name (`str` or `Path`): as for [`load_model`].

    Returns:
        `tuple`: its folder or repository, its commit if it is on the Hub, and its GGUF file if it is one.
    """
    source = _resolve(name)
    return source.path, _find_commit(source), source.gguf_file


def _load_gguf(name: str | Path, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    types, is_rope_scaled = _load(name, _read_gguf)
    is_known = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if is_rope_scaled and not is_known:
        logger.warning(
            f"{str(name)!r} scales its rotary frequencies, which transformers does not read from such a file: the model differs "
            "from the one that it was made from, most in long rows. The repository of that model has them in its config.json."
        )
    if dtype == "auto":
        is_quantized = not types <= set(GGUF_FLOATS)
        dtype = torch.bfloat16 if is_quantized else next(GGUF_FLOATS[each] for each in GGUF_FLOATS if each in types)
    # Else transformers keeps the blocks where it has a kernel for them, and takes the model for quantized where not.
    options = {"config": config, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    model, info = _load(name, AutoModelForCausalLM.from_pretrained, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{str(name)!r} lacks {len(missing)} of the model's weights, such as {missing[0]!r}: transformers does not read "
            "all of this file. Give the repository of the model that it was made from."
        )
    return model


def load_placed(name: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
    """[`load_typed`], on the device of this process, of several that were launched together each has its own."""
    model, saved = load_typed(name, dtype)
    return model.to(processes().device), saved


def load_typed(name: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
    """
    Load a model in the type that it will run in on the [`default_device`], see [`load_model`].

    Args:
        name (`str` or `Path`):
            As for [`load_model`].
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of its weights, one of `DTYPES`. `"auto"` is the one of the checkpoint, see [`load_model`], but float32 on
            a CPU, where many have no arithmetic for half precision.

    Returns:
        `tuple`: the model, and the type that a student of it is saved in: `dtype`, or the one of the checkpoint.
    """
    model = load_model(name, dtype if dtype == "auto" else getattr(torch, dtype))
    saved = model.dtype
    if dtype == "auto" and default_device() == "cpu" and not getattr(model, "is_quantized", False):
        cast_weights(model, torch.float32)
        model.config.dtype = torch.float32
    return model, saved


def load_config(name: str | Path) -> PreTrainedConfig:
    """
    Load the configuration of a model.

    Args:
        name (`str` or `Path`):
            As for [`load_model`].

    Raises:
        `FileNotFoundError`: there is no such folder or repository.
    """
    return _load(name, AutoConfig.from_pretrained)


def load_tokenizer(name: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer and check that it fits a model.

    Args:
        name (`str` or `Path`):
            As for [`load_model`].
        model (`PreTrainedModel`):
            The model it is for.

    Raises:
        `FileNotFoundError`: there is no tokenizer of that name.
        `ValueError`: it has more tokens than the model.
    """
    tokenizer = _load(name, AutoTokenizer.from_pretrained)
    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer {str(name)!r} has {len(tokenizer)} tokens but the model only {vocab_size}: give the "
            "tokenizer the model was trained with."
        )
    return tokenizer


def load_folder(name: str | Path) -> Path:
    """
    The folder that holds all files of a model, in the cache if the model is on the Hub.

    Args:
        name (`str` or `Path`):
            As for [`load_model`], but no GGUF file.

    Raises:
        `FileNotFoundError`: there is no such folder or repository, or it cannot be read.
    """

    def find(source: str, **options) -> Path:
        return Path(source if Path(source).is_dir() else snapshot_download(source, **options))

    return _load(name, find)


def load_json(name: str | Path, file: str) -> dict:
    """
    Load a JSON file that lies beside a model.

    Args:
        name (`str` or `Path`):
            As for [`load_model`].
        file (`str`):
            Name of the file.

    Returns:
        `dict`: its content, empty if there is no such file.

    Raises:
        `FileNotFoundError`: there is no such folder or repository.
        `ValueError`: the file is not JSON.
    """

    def find(source: str, gguf_file: str | None = None, **options) -> Path | None:
        if Path(source).is_dir():
            return Path(source) / file
        try:
            return Path(hf_hub_download(source, file, **options))
        except EntryNotFoundError:
            return None

    path = _load(name, find)
    if path is None or not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} of {str(name)!r} is not JSON ({error}): delete it, or make it anew.") from error


class _Source(NamedTuple):
    """What a name stands for: a folder or a repository, its revision, and the GGUF file in it if it is one."""

    path: str
    revision: str | None = None
    gguf_file: str | None = None


def _load(name: str | Path, load: Callable, **options):
    """Call `load` with the folder or repository, revision and file, and say in one line what could not be loaded."""
    source = _resolve(name)
    options |= {key: value for key, value in source._asdict().items() if key != "path" and value}
    try:
        if source.gguf_file:
            _check_gguf(_find_gguf(**source._asdict()))
        return load(source.path, **options)
    except Exception as error:  # damaged files raise errors of all kinds
        reason = explain_hub_error(error, source.path, source.revision)
        if reason is None:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
            allowed = f"a folder, a repository of the Hub, or {BUILTIN_TEACHER!r}"
            if source.gguf_file:
                allowed = "a whole GGUF file that transformers reads, or the repository of the model it was made from"
            reason = f"{kind}{lines[0]} Give {allowed}."
        raise FileNotFoundError(f"{str(name)!r} cannot be loaded: {reason}") from error


def _find_gguf(path: str, gguf_file: str, revision: str | None = None) -> Path:
    if Path(path).is_dir():
        return Path(path) / gguf_file
    try:
        return Path(hf_hub_download(path, gguf_file, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        raise FileNotFoundError(f"The repository has no file {gguf_file!r}.") from error


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("It is not a GGUF file: its first four bytes are not 'GGUF'.")


def _read_gguf(path: str, **source) -> tuple[set[str], bool]:
    """Types of the tensors of a GGUF file, and whether it scales rotary frequencies."""
    from gguf import GGUFReader

    reader = GGUFReader(_find_gguf(path, **source))
    scaling = [each.contents() for name, each in reader.fields.items() if name.endswith(".rope.scaling.type")]
    has_factors = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in reader.tensors)
    return {tensor.tensor_type.name for tensor in reader.tensors}, has_factors or scaling not in ([], ["none"])


def _find_commit(source: _Source) -> str | None:
    """The commit of a repository that is in the cache as this revision."""
    file = source.gguf_file or CONFIG_NAME
    cached = (
        None if Path(source.path).is_dir() else try_to_load_from_cache(source.path, file, revision=source.revision)
    )
    return Path(cached).parents[len(Path(file).parts) - 1].name if isinstance(cached, str) else None


def _resolve(name: str | Path) -> _Source:
    """What a name stands for. Raises if there is nothing of that name, as far as can be known without the Hub."""
    if str(name) == BUILTIN_TEACHER:
        return _Source(str(builtin_teacher_path()))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
            raise FileNotFoundError(
                f"The folder {str(name)!r} holds no model: it has no config.json.{_name_ggufs(path)}"
            )
        return _Source(str(path))
    if "://" in str(name):
        raise FileNotFoundError(
            f"{str(name)!r} is an address: give the repository as owner/name, or owner/name@revision."
        )
    repository, at, revision = str(name).partition("@")  # which no name of a repository holds
    gguf_file = None
    if path.is_file() and path.suffix == GGUF_SUFFIX:
        _check_gguf_package(name)
        return _Source(str(path.parent), None, path.name)
    if repository.endswith(GGUF_SUFFIX) and not path.exists():
        parts = repository.split("/")
        is_local = path.is_absolute() or repository.startswith((".", "~")) or Path(*parts[:-1][:2]).exists()
        if is_local or len(parts) == 1:
            raise FileNotFoundError(
                f"There is no file {str(name)!r}: check the path, or give owner/name/file{GGUF_SUFFIX} for a file on the "
                f"Hub.{_name_ggufs(path.parent)}"
            )
        if len(parts) > 2:  # else a repository whose name ends so
            _check_gguf_package(name)
            repository, gguf_file = "/".join(parts[:2]), "/".join(parts[2:])
    if path.exists() or path.is_absolute() or repository.startswith((".", "~")) or repository.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {str(name)!r}: check the path.")
    if at and not (repository and revision):
        raise FileNotFoundError(f"{str(name)!r} lacks the repository or the revision: give owner/name@revision.")
    return _Source(repository, revision or None, gguf_file)


def _check_gguf_package(name: str | Path) -> None:
    if find_spec("gguf") is None:
        raise ValueError(
            f"{str(name)!r} is a GGUF file, which the package gguf reads, and that is not installed: "
            '`pip install "echoatt-hf[gguf]"`.'
        )


def _name_ggufs(folder: Path) -> str:
    """A sentence that names the GGUF files of a folder, for an error; empty if it has none."""
    files = sorted(each.name for each in folder.glob(f"*{GGUF_SUFFIX}")) if folder.is_dir() else []
    return f" Its GGUF files are {', '.join(files)}: name one, as in {folder / files[0]}." if files else ""


def explain_hub_error(
    error: BaseException, repo_id: str, revision: str | None = None, token: str | None = None
) -> str | None:
    """
    What the Hub refused and what to do, in one sentence.

    Libraries wrap the errors of the Hub's client, and their first line often names another cause: the client's own error
    is looked for among the causes.

    Args:
        error (`BaseException`): what was raised.
        repo_id (`str`): the repository that was asked for.
        revision (`str`, *optional*): the revision that was asked for.
        token (`str`, *optional*): the token that was used; the stored one if not given.

    Returns:
        `str` or `None`: the sentence; `None` if the Hub did not refuse anything.
    """
    page, tokens = f"{constants.ENDPOINT}/{repo_id}", f"{constants.ENDPOINT}/settings/tokens"
    causes, is_known = list(_causes(error)), (token or get_token()) is not None
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            account = "the account of your token" if is_known else "your account, and log in with `hf auth login`"
            return f"the repository is gated. Accept its terms at {page} with {account}."
        if isinstance(cause, RevisionNotFoundError):
            return f"the repository has no branch, tag or commit {revision!r}. See {page}/tree/main."
        if isinstance(cause, RepositoryNotFoundError):
            if is_known:
                return (
                    f"there is no repository {repo_id!r} that your token may read. Check the spelling; a private one "
                    f"needs a token of an account that may read it, see {tokens}."
                )
            return (
                f"there is no public repository {repo_id!r}. Check the spelling; if it is private, log in with "
                "`hf auth login`."
            )
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            return _explain_status(cause, tokens, is_known)
    if any(isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)) for cause in causes):
        if is_offline_mode():
            return "it is not in the cache, and HF_HUB_OFFLINE keeps the Hub from being asked. Unset that variable."
        return f"it is not in the cache, and {constants.ENDPOINT} cannot be reached. Check the connection."
    return None


def _explain_status(error: HfHubHTTPError, tokens: str, is_known: bool) -> str:
    status, answer = error.response.status_code, error.server_message or "it gives no reason"
    if status == 401:
        if is_known:
            return f"the Hub does not know the token (401). Make one at {tokens} and log in with `hf auth login`."
        return "the Hub wants to know who asks (401). Log in with `hf auth login`."
    if status == 403:
        return f"the token has no right to that (403: {answer}). Give it the right at {tokens}."
    if status == 412:
        return "somebody else pushed to it meanwhile (412). Do it again."
    if status == 429:
        return f"the Hub takes no more requests for now (429: {answer}). Wait some minutes{'' if is_known else ', or log in'}."
    if status >= 500:
        return f"the Hub is in trouble ({status}: {answer}). Try again later."
    return f"the Hub answers {status}: {' '.join(answer.split())}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
