"""Where teachers come from: the one that ships with the package, a path, or the Hub."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..settings import BUILTIN_TEACHER
from .devices import default_device
from .dtypes import cast_weights


__all__ = [
    "BUILTIN_TEACHER",
    "builtin_teacher_path",
    "load_config",
    "load_model",
    "load_placed",
    "load_tokenizer",
    "load_typed",
]


def builtin_teacher_path() -> Path:
    """Folder of the teacher that ships with the package: a small Llama-type model of Python source."""
    return Path(__file__).parents[1] / "builtin_teacher"


def load_model(name: str | Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """
    Load a causal language model, teacher or student.

    Args:
        name (`str` or `Path`):
            `"builtin"`, a folder, or a repository of the Hub. Remote code is not run.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Type of the weights in memory; `"auto"` takes the one they are stored in.

    Returns:
        `PreTrainedModel`: in evaluation mode.

    Raises:
        `FileNotFoundError`: there is no such folder or repository.
        `ValueError`: it is not a decoder language model.
    """
    config = load_config(name)
    if not isinstance(config, EchoAttConfig):
        check_base_family(config)
    return _loaded(name, lambda: AutoModelForCausalLM.from_pretrained(_resolve(name), dtype=dtype))


def load_placed(name: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
    """[`load_typed`], on the [`default_device`]."""
    model, saved = load_typed(name, dtype)
    return model.to(default_device()), saved


def load_typed(name: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, torch.dtype]:
    """
    Load a model in the type that it will run in on the [`default_device`], see [`load_model`].

    Args:
        name (`str` or `Path`):
            `"builtin"`, a folder, or a repository of the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of its weights, one of `DTYPES`. `"auto"` is the one of the checkpoint, but float32 on a CPU, where many
            have no arithmetic for half precision.

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
            `"builtin"`, a folder, or a repository of the Hub.

    Raises:
        `FileNotFoundError`: there is no such folder or repository.
    """
    return _loaded(name, lambda: AutoConfig.from_pretrained(_resolve(name)))


def load_tokenizer(name: str | Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer and check that it fits a model.

    Args:
        name (`str` or `Path`):
            `"builtin"`, a folder, or a repository of the Hub.
        model (`PreTrainedModel`):
            The model it is for.

    Raises:
        `FileNotFoundError`: there is no tokenizer of that name.
        `ValueError`: it has more tokens than the model.
    """
    tokenizer = _loaded(name, lambda: AutoTokenizer.from_pretrained(_resolve(name)))
    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer {str(name)!r} has {len(tokenizer)} tokens but the model only {vocab_size}: give the "
            "tokenizer the model was trained with."
        )
    return tokenizer


def _resolve(name: str | Path) -> str:
    if str(name) == BUILTIN_TEACHER:
        return str(builtin_teacher_path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "tokenizer_config.json").exists():
            raise FileNotFoundError(f"The folder {str(name)!r} holds no model: it has no config.json.")
        return str(path)
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {str(name)!r}: check the path.")
    return str(name)


def _loaded(name: str | Path, load):
    """Call `load`, and say in one line what could not be loaded."""
    try:
        return load()
    except Exception as error:  # damaged files raise errors of all kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, (OSError, ValueError)):
            reason = [f"{type(error).__name__}: {reason[0]}"]
        raise FileNotFoundError(
            f"{str(name)!r} cannot be loaded: {reason[0]} "
            f"Give a folder, a repository of the Hub, or {BUILTIN_TEACHER!r}."
        ) from error
