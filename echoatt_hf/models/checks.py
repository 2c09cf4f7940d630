"""Whether models fit together, and whether they are those that they were: weights, vocabularies and tokenizers."""

import hashlib
import json
import logging

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


__all__ = [
    "check_no_nan",
    "check_same_tokenizer",
    "find_tokenizer",
    "hash_tokenizer",
    "hash_weights",
    "relative_error",
]

logger = logging.getLogger(__name__)


def check_no_nan(model: nn.Module, role: str) -> None:
    """
    Check that the weights of a model are numbers.

    Args:
        model (`nn.Module`): the model. What is not in memory, such as on the meta device, is not looked at.
        role (`str`): what the message calls it, such as `"teacher"`.

    Raises:
        `ValueError`: some are NaN; the message names a parameter.
    """
    for name, value in model.named_parameters():
        value = value.to_local() if isinstance(value, DTensor) else value
        if value.is_floating_point() and value.element_size() > 1 and not value.is_meta and value.isnan().any():
            raise ValueError(
                f"The {role} has weights that are NaN, in {name!r}: its checkpoint is damaged, or its training "
                "diverged. Give a sound one."
            )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """
    How far outputs are from those that are expected, such as logits, of which heads may give -inf.

    Args:
        found, expected (`torch.Tensor`): of one shape.

    Returns:
        `float`: their distance in units of the norm of what is expected; infinite where one is finite and the other is not,
        NaN where one is NaN.
    """
    found, expected = found.to(expected.device).float(), expected.float()
    distance = torch.where(found == expected, 0.0, found - expected).norm()
    return (distance / expected.masked_fill(expected.isinf(), 0.0).norm().clamp_min(1e-12)).item()


def find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer that was saved with a model, if it is known.

    Args:
        model (`PreTrainedModel`): a model; one that was made in memory has no name to look under. Of one that [`load_model`]
            loaded it is the tokenizer of the same commit.

    Returns:
        `PreTrainedTokenizerBase` or `None`.
    """
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    commit = getattr(model, "loaded_commit", None)
    revision = {"revision": commit} if commit is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=getattr(model, "loaded_gguf_file", None), **revision)
    except (OSError, ValueError, ImportError):
        return None
    # Of a folder without tokenizer files some families make an empty tokenizer.
    is_empty = set(tokenizer("Any text 1")["input_ids"]) <= set(tokenizer.all_special_ids)
    return None if is_empty else tokenizer


def check_same_tokenizer(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Check that token ids mean the same to two models, so that their predictions can be compared.

    The models may have vocabularies of different sizes, as those of one family often do, if both have room for all tokens
    of the tokenizer: the rest is padding, which nothing is compared on.

    Args:
        student, teacher (`PreTrainedModel`):
            The models.
        tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Their tokenizers; those that were saved with them if not given.

    Raises:
        `ValueError`: the tokenizers differ, or the vocabularies do and it is not known whether by padding alone.
    """
    if student is teacher:
        return
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(student)
    teacher_tokenizer = teacher_tokenizer if teacher_tokenizer is not None else find_tokenizer(teacher)
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if tokenizer is None or teacher_tokenizer is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The student has {sizes[0]} tokens and the teacher {sizes[1]}, and it is not known whether they have one "
                "tokenizer: give a teacher with the student's vocabulary, or load both from folders or repositories that "
                "have their tokenizers."
            )
        role, model = ("student", student) if tokenizer is None else ("teacher", teacher)
        one_is_known = tokenizer is not None or teacher_tokenizer is not None
        if one_is_known and model.name_or_path:  # one that was just made of the other, in memory, has no name
            logger.warning(
                "The tokenizer of the %s is not known, so that it was not compared with the other one: save it in the "
                "model's folder, or make sure that both models have the same.",
                role,
            )
        return
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if hash_tokenizer(tokenizer) != hash_tokenizer(teacher_tokenizer):
        differing = sum(theirs.get(token) != index for token, index in ours.items())
        raise ValueError(
            f"The teacher has another tokenizer than the student: {differing:,} of the student's {len(ours):,} tokens are "
            f"others to the teacher, which has {len(theirs):,}. Give the teacher the student was made from, or another one "
            "with the same tokenizer."
        )
    if len(tokenizer) > min(sizes):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the student knows {sizes[0]} and the teacher {sizes[1]}: give "
            "models that know all of them."
        )


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of a model's weights, in order of names; values as float32, little-endian."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value.cpu().numpy()).data)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what the token ids stand for: the vocabulary, as a JSON list of [id, token], in order of ids."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
