"""A student that inherits the weights of its teacher."""

import copy
from collections.abc import Sequence

import torch
from transformers import (
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ..configuration_echoatt import EchoAttConfig
from ..modeling_echoatt import (
    FUSED_MODULES,
    EchoAttention,
    EchoAttForCausalLM,
    EchoAttPreTrainedModel,
    EchoRecords,
    _fused_modules,
    _kept_parameters,
    find_attention_modules,
)
from ..models.loading import load_model
from ..models.recording import recording


__all__ = ["make_student"]


def make_student(
    teacher: PreTrainedModel | str, plan: Sequence[int], share_weights: bool = False
) -> EchoAttForCausalLM:
    """
    Make a student that inherits every weight it has from a teacher. The teacher is left untouched.

    [`convert`] does the same, tunes the student to its teacher, and reports what was copied and dropped.

    Args:
        teacher (`PreTrainedModel` or `str`):
            A causal language model of a supported family, or the name or path of one.
        plan (`SharingPlan` or `list[int]`):
            For each layer the index of the layer whose attention weights it uses.
        share_weights (`bool`, *optional*, defaults to `False`):
            Give the student the teacher's own weights, frozen, in place of copies: for training adapters, with one
            copy of the weights in memory. Parts of fused projections are copied where they are no view. Have the
            teacher on its device before: who moves later makes a copy.

    Returns:
        [`EchoAttForCausalLM`]: the student, in evaluation mode, on the teacher's device and in its dtypes.

    Raises:
        `ValueError`: the teacher is not a plain decoder language model, or the plan does not fit it.
    """
    if not isinstance(teacher, PreTrainedModel):
        teacher = load_model(teacher)
    _check_teacher(teacher)
    text_config = copy.deepcopy(teacher.config)
    text_config.architectures = None
    text_config.name_or_path = ""  # a path of this machine would end up in the student's config.json
    config = EchoAttConfig(
        text_config=text_config,
        echo_sources=list(plan),
        attn_implementation=teacher.config._attn_implementation,
        dtype=teacher.dtype,
    )
    with torch.device("meta"):
        student = EchoAttForCausalLM._from_config(config)
        _check_initialization(student)
    student.language_model.load_state_dict(_inherited_state(student, teacher, share_weights), strict=True, assign=True)
    buffers = dict(teacher.named_buffers())
    for name, buffer in student.language_model.named_buffers():
        if buffer.is_meta:  # not part of the state, such as rotary frequencies
            parent, _, leaf = name.rpartition(".")
            module, original = (model.get_submodule(parent) for model in (student.language_model, teacher))
            setattr(module, leaf, buffers[name].detach().clone())
            # What goes with it, such as the length that dynamic rotary frequencies are for.
            for key, value in vars(original).items():
                if isinstance(value, (int, float, torch.Tensor)):
                    setattr(module, key, copy.deepcopy(value))
    student.tie_weights()
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    student.requires_grad_(not share_weights).eval()
    _check_conversion(student, teacher)
    return student


def _inherited_state(
    student: EchoAttForCausalLM, teacher: PreTrainedModel, share_weights: bool = False
) -> dict[str, torch.Tensor]:
    """The state of the student's language model: copies of the teacher's, or its parameters themselves."""
    inherited = student.language_model.state_dict()
    shared = {name for name, _ in teacher.named_parameters(remove_duplicate=False)} if share_weights else ()
    state = {
        name: tensor.detach() if name in shared else tensor.detach().clone()
        for name, tensor in teacher.state_dict().items()
        if name in inherited
    }
    names = {module: name for name, module in teacher.named_modules()}
    attentions = find_attention_modules(teacher) if student.config.echo_layers else {}
    for attention in (attentions[layer] for layer in student.config.echo_layers):
        for fused in _fused_modules(attention):
            for key, tensor in _kept_parameters(attention, fused).items():
                kept = tensor.detach() if share_weights else tensor.detach().clone()
                state[f"{names[attention]}.{FUSED_MODULES[fused][0]}.{key}"] = kept.contiguous()
    return state


def _check_initialization(student: EchoAttForCausalLM) -> None:
    """Check that the family can initialize echo layers, as it does with what a checkpoint lacks when it is loaded."""
    echoes = [module for module in student.modules() if isinstance(module, EchoAttention)]
    try:
        for echo in echoes:
            student.language_model._init_weights(echo)
    except AttributeError as error:
        raise ValueError(
            f"EchoAtt does not support the family {student.config.text_config.model_type!r} yet: it initializes what an "
            f"echo layer does without ({error})."
        ) from error


def _check_conversion(student: EchoAttForCausalLM, teacher: PreTrainedModel) -> None:
    """
    Check on a few random tokens that echo layers do what the family's do, whatever that is.

    Families differ in ways that their modules do not show. But an echo of a layer's own attention must give what the
    layer gives, in every family.
    """
    try:
        layer, error = _worst_echo(student, teacher) if student.config.echo_layers else (0, 0.0)
    except (RuntimeError, TypeError, ValueError) as exception:
        if _error_of_forward(teacher) is not None:  # a teacher that fails too fails for its own reasons
            return
        if isinstance(exception, ValueError):
            raise
        reason = str(exception).strip().splitlines()
        raise ValueError(
            f"EchoAtt does not support the family {student.config.text_config.model_type!r} yet: its converted model "
            f"fails ({type(exception).__name__}: {reason[0] if reason else 'no reason given'})."
        ) from exception
    if error > (1e-3 if torch.finfo(teacher.dtype).eps < 1e-6 else 5e-2):
        raise ValueError(
            f"EchoAtt does not support the family {student.config.text_config.model_type!r} yet: its attention does more "
            f"than an echo layer takes over. An echo of its own attention differs from layer {layer} by {error:.1%}."
        )


@torch.no_grad()
def _worst_echo(student: EchoAttForCausalLM, teacher: PreTrainedModel) -> tuple[int, float]:
    """The layer whose output an echo of its own attention misses by most, and by how much of the output's norm."""
    config = student.config
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, 4), generator=generator).to(teacher.device)
    student(input_ids=tokens, use_cache=False)

    calls = {}

    def remember(module, args, kwargs, output):
        calls[module.layer_idx] = (args, kwargs, output[0])

    attentions, echoes = (find_attention_modules(model) for model in (teacher, student.language_model))
    hooks = [attentions[layer].register_forward_hook(remember, with_kwargs=True) for layer in config.echo_layers]
    training = [module for module in teacher.modules() if module.training]
    records = EchoRecords()
    try:
        with recording(attentions.values()):
            teacher.eval()(input_ids=tokens, use_cache=False, echo_records=records)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True

    errors = {}
    for layer, (args, kwargs, expected) in calls.items():
        own = EchoRecords()
        own.keep(config.echo_sources[layer], records.get(layer, expected.device))
        found, _ = echoes[layer](*args, **{**kwargs, "echo_records": own})
        if not expected.is_meta and expected.isfinite().all():
            error = (found - expected).float().norm() / expected.float().norm().clamp_min(1e-12)
            errors[layer] = error.nan_to_num(nan=float("inf")).item()
    worst = max(errors, key=errors.get, default=config.echo_layers[0])
    return worst, errors.get(worst, 0.0)


@torch.no_grad()
def _error_of_forward(model: PreTrainedModel) -> Exception | None:
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def _check_teacher(teacher: PreTrainedModel) -> None:
    if isinstance(teacher, EchoAttPreTrainedModel):
        raise ValueError("The teacher is already an EchoAtt student: convert the model it was made from.")
    if not teacher.can_generate() or not hasattr(teacher, "lm_head") and teacher.get_output_embeddings() is None:
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, not a causal language model: load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if getattr(teacher, "is_quantized", False):
        raise ValueError(
            "The teacher is quantized: convert the unquantized model, and quantize the student afterwards."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed's ZeRO-3 is set up, which divides the weights of every new model among processes: convert in one "
            "process, before arguments for training are made, save the student, and load it where you train."
        )
    device_map = getattr(teacher, "hf_device_map", {})
    if len({*device_map.values()}) > 1:
        raise ValueError(
            f"The teacher is spread over several devices ({', '.join(sorted(map(str, {*device_map.values()})))}): load it "
            "on one, and spread the student afterwards."
        )
