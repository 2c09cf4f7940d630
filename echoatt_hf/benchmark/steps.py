"""The steps that a benchmark times: functions of a model that do the work once."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..distillation.adapters import add_lora
from ..distillation.head_losses import compute_losses
from ..distillation.losses import LogitLosses, TeacherDivergence, TokenLoss, divergence_from_stored, keep_top
from ..models.heads import OutputHead
from ..settings import BenchmarkSettings
from .contenders import Contender


__all__ = []

DECODED_TOKENS = 4


ADAPTER_RANK = 16


STORED_TOKENS = 64


def prefill(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A forward pass that fills a cache, with the logits of all tokens."""
    model = contender.model.eval()

    @torch.inference_mode()
    def step():
        model(prompt, past_key_values=DynamicCache(config=model.config), use_cache=True)

    return step


@torch.inference_mode()
def decode(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A few tokens of each row after a context that is in the cache."""
    model, context = contender.model.eval(), prompt.shape[1]
    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        start = prompt[:1, : min(context, 128)]
        model(start, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            if layer.is_initialized:  # what is in it does not change the speed
                layer.keys, layer.values = (_repeat(each, prompt.shape) for each in (layer.keys, layer.values))
    else:
        model(prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, -1:]

    @torch.inference_mode()
    def step():
        for _ in range(DECODED_TOKENS):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def _repeat(states: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """States `(1, H, S, D)` repeated to as many rows and tokens as `shape`."""
    rows, tokens = shape
    times = -(-tokens // states.shape[2])
    return states.repeat(rows, 1, times, 1)[:, :, :tokens].contiguous()


def train(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """Forward, backward and optimizer step on the text alone."""
    return _make_training_step(
        settings, contender.model, lambda model: model(prompt, labels=prompt, use_cache=False).loss
    )


def distill(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A forward pass of the teacher, and a training step on the KL to it, as [`EchoAttTrainer`] computes it."""
    teacher_head = OutputHead(teacher)

    def ask() -> TokenLoss:
        with torch.no_grad(), teacher_head.last_states() as kept:
            teacher(prompt, use_cache=False, logits_to_keep=1)
        return TeacherDivergence("forward", teacher_head.logits(kept))

    return _make_distillation_step(settings, contender.model, prompt, ask)


def distill_adapters(
    settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor
):
    """As `distill`, of adapters beside weights that the models share."""
    weights = {id(each): each for each in contender.model.parameters()}
    adapted = add_lora(copy.deepcopy(contender.model, weights), ADAPTER_RANK)
    return distill(settings, replace(contender, model=adapted), teacher, prompt)


def distill_stored(settings: BenchmarkSettings, contender: Contender, teacher: PreTrainedModel, prompt: torch.Tensor):
    """A training step on the KL to what a stored teacher holds, in memory already."""
    with torch.no_grad():
        logits = teacher(prompt, use_cache=False).logits
        log_probs, ids = keep_top(logits, min(STORED_TOKENS, logits.shape[-1] - 1))
    divergence = divergence_from_stored("forward", ids, log_probs)
    return _make_distillation_step(settings, contender.model, prompt, lambda: divergence)


def _make_distillation_step(
    settings: BenchmarkSettings, model: PreTrainedModel, prompt: torch.Tensor, ask: Callable[[], TokenLoss]
) -> Callable[[], None]:
    head = OutputHead(model)

    def loss(model: PreTrainedModel) -> torch.Tensor:
        losses = LogitLosses({"kl": ask()}, {"kl": 1.0}, prompt, prompt.numel())
        with head.computes(partial(compute_losses, losses), nullcontext):
            return model(prompt, use_cache=False, logits_to_keep=1).loss

    return _make_training_step(settings, model, loss)


STEPS = {
    "prefill": prefill,
    "decode": decode,
    "training": train,
    "distillation": distill,
    "adapters": distill_adapters,
    "stored": distill_stored,
}


def _make_training_step(
    settings: BenchmarkSettings, model: PreTrainedModel, loss: Callable[[PreTrainedModel], torch.Tensor]
) -> Callable[[], None]:
    optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    adapters_alone = isinstance(model, PeftModel)
    trained = {id(each): each for name, each in model.named_parameters() if "lora_" in name or not adapters_alone}
    # So small a rate that weights, which the models share, stay what they are.
    optimizer = optimizers[settings.optimizer](trained.values(), lr=1e-12)

    def step():
        model.train()
        for parameter in model.parameters():  # which other models may share
            parameter.requires_grad_(id(parameter) in trained)
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()

    return step
