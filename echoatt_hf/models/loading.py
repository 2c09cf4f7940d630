"""Where teachers come from: the one that ships with the package, a path, or the Hub."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, get_token, hf_hub_download, is_offline_mode, try_to_load_from_cache
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..settings import BUILTIN_TEACHER


__all__ = [
    "BUILTIN_TEACHER",
    "builtin_teacher_path",
    "explain_hub_error",
    "load_config",
    "load_json",
    "load_model",
    "load_tokenizer",
]


def builtin_teacher_path() -> Path:
    """Folder of the teacher that ships with the package: a small Llama-type model of Python source."""
    return Path(__file__).parents[1] / "builtin_teacher"


def load_model(name: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """
    Load a causal language model, teacher or student.

    Args:
        name (`str` or `Path`):
            `"builtin"`, a folder, or a repository of the Hub, of which `"owner/name@revision"` is a branch, tag or commit.
            Remote code is not run.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Type of the weights in memory; `"auto"` takes the one they are stored in.

    Returns:
        `PreTrainedModel`: in evaluation mode; its `loaded_commit` is the commit it was loaded from, if it is on the Hub.

    Raises:
        `FileNotFoundError`: there is no such folder or repository.
        `ValueError`: it is not a decoder language model.
    """
    config = load_config(name)
    if not isinstance(config, EchoAttConfig):
        check_base_family(config)
    model = _load(name, AutoModelForCausalLM.from_pretrained, dtype=dtype)
    # transformers does not keep the commit, and what the name stands for changes.
    model.loaded_commit = _find_commit(*_resolve(name))
    return model


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

    def find(source: str, **options) -> Path | None:
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


def _load(name: str | Path, load: Callable, **options):
    """Call `load` with the folder or repository and the revision, and say in one line what could not be loaded."""
    source, revision = _resolve(name)
    try:
        return load(source, **options, **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        reason = explain_hub_error(error, source, revision)
        if reason is None:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"{lines[0]} Give a folder, a repository of the Hub, or {BUILTIN_TEACHER!r}."
        raise FileNotFoundError(f"{str(name)!r} cannot be loaded: {reason}") from error


def _find_commit(source: str, revision: str | None) -> str | None:
    """The commit of a repository that is in the cache as this revision."""
    cached = None if Path(source).is_dir() else try_to_load_from_cache(source, CONFIG_NAME, revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def _resolve(name: str | Path) -> tuple[str, str | None]:
    """The folder or the repository that a name stands for, and the revision that it asks for."""
    if str(name) == BUILTIN_TEACHER:
        return str(builtin_teacher_path()), None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
            raise FileNotFoundError(f"The folder {str(name)!r} holds no model: it has no config.json.")
        return str(path), None
    if "://" in str(name):
        raise FileNotFoundError(
            f"{str(name)!r} is an address: give the repository as owner/name, or owner/name@revision."
        )
    repository, at, revision = str(name).partition("@")  # which no name of a repository holds
    if path.exists() or path.is_absolute() or repository.startswith((".", "~")) or repository.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {str(name)!r}: check the path.")
    if at and not (repository and revision):
        raise FileNotFoundError(f"{str(name)!r} lacks the repository or the revision: give owner/name@revision.")
    return repository, revision or None


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
