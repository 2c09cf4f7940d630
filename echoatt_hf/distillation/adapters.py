"""Adjust a student with adapters alone: low-rank updates (LoRA) beside inherited weights that stay frozen."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..modeling_echoatt import EchoAttForCausalLM


__all__ = ["add_lora", "merge_lora", "share_weights"]

_FAMILY_CODE = ("transformers.models.", "transformers_modules.")


def add_lora(student: EchoAttForCausalLM, rank: int) -> PeftModel:
    """
    Give every linear layer of a student but its head a trainable low-rank update, and freeze all else.

    With a student that shares the teacher's weights, as made by `convert(teacher, plan, share_weights=True)`,
    distillation holds one copy of the weights in memory and trains the updates alone.

    Args:
        student ([`EchoAttForCausalLM`]):
            The student; it is changed in place.
        rank (`int`):
            Rank of the updates. Raise it where the student does not come close enough to its teacher.

    Returns:
        `PeftModel`: the student with its adapters, for [`EchoAttTrainer`] and then for [`merge_lora`].

    Raises:
        `ValueError`: the rank is below 1, or heads of the student share weights.

    Example:

    ```python
    >>> student, report = convert(teacher, plan, share_weights=True)
    >>> adapted = add_lora(student, 16)
    >>> EchoAttTrainer(model=adapted, teacher=teacher, args=args, train_dataset=rows).train()
    >>> student = merge_lora(adapted)
    ```
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    if getattr(student.config, "shared_heads", None):
        raise ValueError(
            "Heads of the student share weights, which an update of one layer cannot be merged into: train all weights "
            "(lora_rank 0)."
        )
    # The scale of the updates is the same for every rank, so that one learning rate serves all of them.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=_own_linear_layers(student) or None,
    )
    with warnings.catch_warnings():
        # PEFT about what it does itself: asks for an attribute that transformers renamed, and adapts to Conv1D.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        return get_peft_model(student, config)


def merge_lora(adapted: PeftModel) -> PreTrainedModel:
    """
    Add the updates of [`add_lora`] to the weights they belong to.

    Args:
        adapted (`PeftModel`):
            A student with adapters; it is taken apart.

    Returns:
        `PreTrainedModel`: the student that `add_lora` was given, without adapters, trainable, with weights of its own:
        those of a teacher it shared them with stay as they are.
    """
    with torch.no_grad():
        for parameter in adapted.get_base_model().parameters():
            parameter.data = parameter.data.clone()
    return adapted.merge_and_unload().requires_grad_(True)


def share_weights(student: EchoAttForCausalLM, teacher: PreTrainedModel) -> int:
    """
    Give a student that was loaded by itself the teacher's own memory for every weight in which they are equal, frozen: as
    if it had been made by `convert(teacher, plan, share_weights=True)`.

    Args:
        student ([`EchoAttForCausalLM`]):
            The student, in place. What it shares is on the teacher's device afterwards: share before moving the student
            there, and it never needs memory for it.
        teacher (`PreTrainedModel`):
            The model it was made from, on its device and in its dtype.

    Returns:
        `int`: bytes that the student needs no more.
    """
    weights, shared = dict(teacher.named_parameters()), 0
    for name, parameter in student.language_model.named_parameters():
        weight = weights.get(name)
        if weight is None or (weight.shape, weight.dtype) != (parameter.shape, parameter.dtype):
            continue
        if torch.equal(parameter.to(weight.device), weight):
            parameter.requires_grad_(False).data = weight.data
            shared += weight.nbytes
    return shared


def _own_linear_layers(model: nn.Module) -> list[str]:
    """Linear layers of a class of the family's own, such as routers that return more than one tensor."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith(_FAMILY_CODE)
    ]
