"""A student that inherits the weights of its teacher."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import dispatch_model
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from ..configuration_echoatt import EchoAttConfig, read_layer_plan
from ..modeling_echoatt import (
    FUSED_MODULES,
    EchoAttForCausalLM,
    EchoAttPreTrainedModel,
    EchoRecords,
    OwnAttention,
    find_fused_modules,
)
from ..models.checks import check_no_nan, relative_error
from ..models.families import (
    check_same_heads,
    count_value_features,
    find_attention_modules,
    find_output_projection,
)
from ..models.inference import inference
from ..models.loading import load_model
from ..models.recording import recording
from ..planning.sharing import SharingPlan
from .dropping import cannot_drop, check_layers_of_config, drop_layers


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
        [`EchoAttForCausalLM`]: the student, in evaluation mode, each weight on the device and in the dtype that it has in
        the teacher.

    Raises:
        `TypeError`: the teacher is no model of transformers.
        `ValueError`: the teacher is not a plain decoder language model, or the plan does not fit it.
    """
    if isinstance(teacher, (str, Path)):
        teacher = load_model(teacher)
    _check_teacher(teacher)
    plan = SharingPlan(plan)
    has_all_layers = not plan.dropped_layers
    if not has_all_layers:
        teacher, plan = drop_layers(teacher, plan.dropped_layers, share_weights=True), plan.without_dropped()
        check_layers_of_config(teacher)
    student = _make_student(teacher, plan, share_weights)
    _check_conversion(student, teacher, has_all_layers)
    return student


def _make_student(teacher: PreTrainedModel, plan: Sequence[int | str], share_weights: bool) -> EchoAttForCausalLM:
    text_config = copy.deepcopy(teacher.config)
    text_config.architectures = None
    text_config.name_or_path = ""  # a path of this machine would end up in the student's config.json
    # Code of the teacher's repository, and what was said of the file its weights were read from: not the student's.
    for name in ("auto_map", "quantization_config", "_model_name_or_path"):
        if hasattr(text_config, name):
            delattr(text_config, name)
    # What is so, not what the configuration says: merged adapters of the head leave it untied, and users tie by hand.
    embeddings, head = teacher.get_input_embeddings(), teacher.get_output_embeddings()
    if teacher._tied_weights_keys and head is not None:
        text_config.tie_word_embeddings = head.weight is embeddings.weight
    config = EchoAttConfig(
        text_config=text_config,
        layer_plan=list(plan),
        attn_implementation=teacher.config._attn_implementation,
        dtype=teacher.dtype,
    )
    pairs = {layer: source for layer, (_, source) in enumerate(read_layer_plan(config.plan)) if source is not None}
    if pairs:
        check_same_heads(find_attention_modules(teacher, [*pairs, *pairs.values()]), pairs)
    with torch.device("meta"):
        student = EchoAttForCausalLM._from_config(config)
        _check_initialization(student)
    student.language_model.load_state_dict(_inherited_state(student, teacher, share_weights), strict=True, assign=True)
    buffers = dict(teacher.named_buffers(remove_duplicate=False))
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
    devices = getattr(teacher, "hf_device_map", {})
    if len({*devices.values()}) > 1:  # the student is spread as its teacher is
        devices = {f"language_model.{name}": device for name, device in devices.items()}
        dispatch_model(student, devices, skip_keys=list(student._skip_keys_device_placement))
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
    names, plan = {module: name for name, module in teacher.named_modules()}, SharingPlan(student.config.plan)
    attentions = find_attention_modules(teacher) if plan.changed_layers else {}
    for layer in (*plan.echo_layers, *plan.kv_layers):
        attention = attentions[layer]
        for fused in find_fused_modules(attention):
            what, kept = ("value", FUSED_MODULES[fused]) if layer in plan.echo_layers else ("query", "q_proj")
            if (what, fused) != ("query", "q_proj"):  # queries and gates are a layer's own
                for key, tensor in _kept_parameters(attention, fused, what).items():
                    tensor = tensor.detach() if share_weights else tensor.detach().clone()
                    state[f"{names[attention]}.{kept}.{key}"] = tensor.contiguous()
    for attention in (attentions[layer] for layer in plan.layers_without_attention):
        name = f"{names[attention]}.constant"
        state[name] = find_output_projection(attention).weight.new_zeros(inherited[name].shape)
    return state


def _kept_parameters(attention: nn.Module, name: str, what: str) -> dict[str, torch.Tensor]:
    """
    Weight `(features, hidden size)` and bias of a part of the fused projection `name`: of what an echo layer keeps of it, or
    of the queries.
    """
    projection = getattr(attention, name)
    kept, is_query = {}, what == "query"
    for key, tensor in projection.named_parameters():
        rows = tensor.t() if isinstance(projection, Conv1D) else tensor  # (features, ...)
        if name in ("qkv_proj", "c_attn"):
            values = count_value_features(attention)
            kept[key] = rows[: len(rows) - 2 * values] if is_query else rows[-values:]
        else:  # for each head its query, key and value, or its query and gate
            head_dim = attention.head_dim if hasattr(attention, "head_dim") else attention.head_size
            parts = 3 if name == "query_key_value" else 2
            kept[key] = rows.unflatten(0, (-1, parts, head_dim))[:, 0 if is_query else -1].flatten(0, 1)
    return kept


def _check_initialization(student: EchoAttForCausalLM) -> None:
    """Check that the family can initialize changed layers, as it does with what a checkpoint lacks when it is loaded."""
    echoes = [module for module in student.modules() if isinstance(module, OwnAttention)]
    try:
        for echo in echoes:
            student.language_model._init_weights(echo)
    except AttributeError as error:
        raise ValueError(
            f"EchoAtt does not support the family {student.config.text_config.model_type!r} yet: it initializes what an "
            f"echo layer does without ({error})."
        ) from error


def _check_conversion(student: EchoAttForCausalLM, teacher: PreTrainedModel, has_all_layers: bool = True) -> None:
    """
    Check on a few random tokens that the student does what the family does, whatever that is.

    Families differ in ways that their modules do not show. But without echo layers a student must be its teacher, and an
    echo of a layer's own attention must give what the layer gives: for a prompt and for a token after it, by replay and by
    the attention weights.
    """
    family = student.config.text_config.model_type
    tolerance = 1e-3 if torch.finfo(teacher.dtype).eps < 1e-6 else 5e-2
    if any(parameter.is_meta for parameter in teacher.parameters()):
        return
    with inference(teacher):
        if _error_of_decoding(teacher) is not None:  # it fails for its own reasons
            return
        try:
            error = _error_of_logits(teacher)
            errors = dict(_errors_of_echoes(student, teacher)) if student.config.source_layers else {}
        except (RuntimeError, TypeError) as exception:
            reason = str(exception).strip().splitlines()
            raise ValueError(
                f"EchoAtt does not support the family {family!r} yet: its converted model fails "
                f"({type(exception).__name__}: {reason[0] if reason else 'no reason given'})."
            ) from exception
    if error > tolerance and not has_all_layers:
        raise cannot_drop(teacher)
    if error > tolerance:
        raise ValueError(
            f"The teacher is more than the family {family!r} and its weights: a student without echo layers has other "
            f"logits, by {error:.1%}. Give the model as it is loaded, without hooks and code of its own."
        )
    which = max(errors, key=errors.get, default=None)
    if which is not None and errors[which] > tolerance:
        layer, how = which
        raise ValueError(
            f"EchoAtt does not support the family {family!r} yet: its attention does more than an echo layer takes over. "
            f"An echo of its own attention, {how}, differs from layer {layer} by {errors[which]:.1%}."
        )


def _random_tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of four tokens and one to follow it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, 5), generator=generator)
    return tokens.to(model.get_input_embeddings().weight.device).split((4, 1), dim=1)


def _error_of_logits(teacher: PreTrainedModel) -> float:
    """How far the logits of a student without echo layers are from those of its teacher."""
    twin = _make_student(teacher, range(teacher.config.num_hidden_layers), share_weights=True)
    prompt, _ = _random_tokens(teacher)
    found, expected = (model(input_ids=prompt, use_cache=False).logits for model in (twin, teacher))
    return relative_error(found, expected)


def _errors_of_echoes(
    student: EchoAttForCausalLM, teacher: PreTrainedModel
) -> Iterator[tuple[tuple[int, str], float]]:
    """By layer and way of decoding how far an echo of the layer's own attention is from the layer."""
    config = student.config
    prompt, token = _random_tokens(teacher)
    attentions, changed = (find_attention_modules(model) for model in (teacher, student.language_model))
    student(input_ids=prompt, use_cache=False)
    calls, cache = [], None

    def remember(module, args, kwargs, output):
        calls.append((module, args, kwargs, output[0]))

    caches = {how: DynamicCache(config=config) for how in ("replay", "weights", "keys and values")}
    for tokens, step in ((prompt, "a prompt"), (token, "a token")):
        calls.clear()
        layers = [*config.echo_layers, *config.kv_sources]
        hooks = [attentions[layer].register_forward_hook(remember, with_kwargs=True) for layer in layers]
        records, by_weights = EchoRecords("replay"), EchoRecords("auto")
        try:
            with recording(attentions.values()):
                cache = teacher(
                    input_ids=tokens, past_key_values=cache, use_cache=True, echo_records=records
                ).past_key_values
                for attention in attentions.values():
                    call = records.get(attention.layer_idx, next(attention.parameters()).device)
                    by_weights.record(call, attention, call.key)  # the values do not matter
        finally:
            for hook in hooks:
                hook.remove()
        for attention, args, kwargs, expected in calls:
            layer, ways = attention.layer_idx, {}
            if layer in config.kv_sources:
                own = ways["keys and values"] = EchoRecords()
                own.keys_values[config.kv_sources[layer]] = records.get_keys_values(layer, expected.device)
            else:
                for how, found_in in (("replay", records), ("weights", by_weights)):
                    own = ways[how] = EchoRecords()
                    own.by_layer[config.echo_sources[layer]] = found_in.get(layer, expected.device)
            for how, own in ways.items():
                kwargs = {name: caches[how] if isinstance(value, Cache) else value for name, value in kwargs.items()}
                found, _ = changed[layer](*args, **(kwargs | {"echo_records": own}))
                yield (layer, f"{step} by {how}"), relative_error(found, expected)


def _error_of_decoding(model: PreTrainedModel) -> Exception | None:
    """What a model raises in a prompt and a token after it."""
    prompt, token = _random_tokens(model)
    try:
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        model(input_ids=token, past_key_values=cache, use_cache=True)
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def _check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse by name what is no plain model in memory: its weights could be missing, divided or something else."""
    if isinstance(teacher, EchoAttPreTrainedModel):
        raise ValueError("The teacher is already an EchoAtt student: convert the model it was made from.")
    if isinstance(teacher, PeftModel):
        raise ValueError("The teacher is a PeftModel: give `teacher.merge_and_unload()`.")
    if not isinstance(teacher, PreTrainedModel):
        inner = next((name for name in ("_orig_mod", "module", "model") if hasattr(teacher, name)), None)
        raise TypeError(
            f"The teacher is a {type(teacher).__name__}: give a causal language model of transformers, or the name or path "
            f"of one{f', here `teacher.{inner}`' if inner else ''}."
        )
    if not teacher.can_generate() or not hasattr(teacher, "lm_head") and teacher.get_output_embeddings() is None:
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, not a causal language model: load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    if any(isinstance(module, BaseTunerLayer) for module in teacher.modules()):
        raise ValueError("The teacher has adapters in it: merge them into its weights, or load it without them.")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed's ZeRO-3 is set up, which divides the weights of every new model among processes: convert in one "
            "process, before arguments for training are made, save the student, and load it where you train."
        )
    # transformers says so of every model of a GGUF file, also of one with plain weights.
    is_quantized = getattr(teacher, "is_quantized", False) and getattr(teacher, "quantization_method", None) != "gguf"
    for name, parameter in teacher.named_parameters():
        kind = type(parameter.data)
        if kind.__name__ == "DTensor":
            raise ValueError(
                "The teacher is sharded over processes: convert in one process, with a teacher loaded whole."
            )
        if is_quantized or kind is not torch.Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"The teacher is quantized ({name} is a {kind.__name__} of {parameter.dtype}): convert the unquantized "
                "model, and quantize the student afterwards."
            )
    if any(
        hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False))
        for module in teacher.modules()
    ):
        raise ValueError(
            "The weights of the teacher are offloaded, to the CPU or a disk: load it on devices that hold it."
        )
    check_no_nan(teacher, "teacher")
