"""How a model goes on with a text by itself, which a mean over the tokens of a given text does not show."""

import html
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ..models.checks import check_same_tokenizer
from ..models.devices import explained_memory_errors
from ..models.inference import inference
from ..models.predictions import share_batches
from ..outputs.tables import format_markdown
from ..settings import check_continuation
from .zero_shot import mean_and_stderr


__all__ = [
    "evaluate_continuations",
    "format_continuations",
    "format_repeated",
    "format_side_by_side",
    "repeated_share",
]

WRITERS = {"text": "the text itself", "teacher": "teacher", "model": "model"}
"""Who goes on with a prompt, as the texts of [`evaluate_continuations`] call them and as a table does."""


def repeated_share(tokens: Sequence[Hashable], n: int = 4) -> float:
    """
    The share of n-grams in a text that were there before: 1 - different n-grams / n-grams.

    Args:
        tokens (sequence): tokens of the text.
        n (`int`, *optional*, defaults to 4): tokens of an n-gram.

    Returns:
        `float`: 0 if all n-grams are different, near 1 if the text says one thing again and again; 0 for a text with
        fewer than `n` tokens, which has none.

    Raises:
        `ValueError`: `n` is under 1.

    Source: seq-rep-n in Welleck et al. 2019, Neural Text Generation with Unlikelihood Training (arXiv:1908.04319).

    Example:

    ```python
    >>> from echoatt_hf import repeated_share

    >>> repeated_share("a b c a b c".split(), n=2)  # ab bc ca ab bc
    0.4
    ```
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1.")
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return (len(ngrams) - len(set(ngrams))) / len(ngrams) if ngrams else 0.0


def evaluate_continuations(
    model: PreTrainedModel,
    rows: Iterable[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    batch_size: int = 8,
    description: str | None = None,
    among_processes: bool = False,
) -> dict:
    """
    Let a model go on with prompts, greedily, and count how often it repeats itself.

    The beginning of each row is a prompt, and what follows there is the text that the model's is compared with. The most
    likely token is always taken, whatever the model's `generation_config` says: no penalty for repetition, and a token
    that ends a text is one like any other, as it is in packed rows. So all continuations are as long, and none looks good
    as it ended early.

    Args:
        model (`PreTrainedModel`):
            Causal language model.
        rows (iterable of `dict`):
            Rows of `prompt_tokens + new_tokens` tokens or more, as returned by [`pack_rows`].
        tokenizer (`PreTrainedTokenizerBase`):
            The model's, for the texts.
        teacher (`PreTrainedModel`, *optional*):
            Model with the same tokenizer, which goes on with the same prompts.
        prompt_tokens (`int`, *optional*, defaults to 64):
            Tokens of a prompt.
        new_tokens (`int`, *optional*, defaults to 128):
            Tokens of a continuation.
        batch_size (`int`, *optional*, defaults to 8):
            Prompts that are gone on with together.
        description (`str`, *optional*):
            Show a progress bar with this text.
        among_processes (`bool`, *optional*, defaults to `False`):
            Divide the prompts among the processes that `accelerate launch` started. All of them have to call this, and
            each gets all continuations.

    Returns:
        `dict`: `prompts`, their number, `prompt_tokens` and `new_tokens`; `repeated_4grams`, the mean over prompts of
        [`repeated_share`] of 4 tokens of a continuation, and its standard error `repeated_4grams_stderr` (`None` with a
        single prompt); the same as `text_repeated_4grams` of the rows themselves and `teacher_repeated_4grams`; and
        `texts`, for each row `prompt`, `text`, `teacher` and `model`, what each of them wrote.

    Raises:
        `ValueError`: there are no rows or one is too short, a number is out of range, or the teacher has another
            tokenizer, see [`check_same_tokenizer`].
    """
    check_continuation(prompt_tokens, new_tokens)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if teacher is not None:
        check_same_tokenizer(model, teacher, tokenizer)
    rows = list(rows)
    _check_rows(rows, prompt_tokens, new_tokens)
    ids = [list(map(int, row["input_ids"][: prompt_tokens + new_tokens])) for row in rows]
    prompts = [row[:prompt_tokens] for row in ids]
    written = {"text": [row[prompt_tokens:] for row in ids]}
    for name, each in (("teacher", teacher), ("model", model)):
        if each is not None:
            bar = None if description is None else f"{description}, {name}"
            written[name] = _continue(each, prompts, new_tokens, batch_size, bar, among_processes)
    found = {"prompts": len(rows), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name in reversed(written):  # the model's own first
        key = _key_of(name)
        found[key], found[f"{key}_stderr"] = mean_and_stderr([repeated_share(tokens) for tokens in written[name]])
    columns = {"prompt": prompts, **written}
    texts = {name: [_decode(tokenizer, tokens) for tokens in column] for name, column in columns.items()}
    return found | {"texts": [dict(zip(texts, line, strict=True)) for line in zip(*texts.values(), strict=True)]}


def _check_rows(rows: list[dict], prompt_tokens: int, new_tokens: int) -> None:
    if not rows:
        raise ValueError("There are no rows to take prompts from: give text that fills at least one row.")
    for number, row in enumerate(rows):
        if len(row["input_ids"]) < prompt_tokens + new_tokens:
            raise ValueError(
                f"Row {number} has {len(row['input_ids'])} tokens, but a prompt of {prompt_tokens} tokens and "
                f"{new_tokens} new ones need {prompt_tokens + new_tokens}: give longer rows, or ask for fewer tokens."
            )


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _continue(
    model: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    batch_size: int,
    description: str | None,
    among_processes: bool,
) -> list[list[int]]:
    """What a model writes after each prompt; all prompts are as long."""
    batches, together = share_batches(prompts, batch_size, among_processes)
    own = []
    remedy = f"{batch_size} prompts are gone on with together. Give a smaller batch_size, or ask for fewer tokens"
    bar = tqdm(total=len(prompts), desc=description, disable=description is None, leave=False)
    with explained_memory_errors(remedy), inference(model), _plain_generation(model), bar:
        for batch, counts in batches:
            ids = torch.tensor(batch, device=model.device)
            # Not a loop of our own: `generate` knows the caches of all families.
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
            if counts:
                own += output[:, ids.shape[1] :].tolist()
            bar.update(len(batch) * (1 if together is None else together.num_processes))
    if together is None:
        return own
    parts = gather_object([own])
    return [parts[index % len(parts)][index // len(parts)] for index in range(len(prompts))]


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """
    Set aside what a model says of how it is to be generated with, which `generate` takes wherever it is not told
    otherwise: penalties for repetition, which would hide what is counted, and tokens that end a text.
    """
    kept = [(module, module.generation_config) for module in model.modules() if isinstance(module, GenerationMixin)]
    for module, _ in kept:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in kept:
            module.generation_config = config


def format_continuations(found: dict) -> str:
    """
    How often each repeats itself, as a Markdown table.

    Args:
        found (`dict`): as returned by [`evaluate_continuations`].
    """
    lines = [[f"{found['prompts']:,} continuations of {found['new_tokens']:,} tokens", "repeated 4-grams"]]
    lines += [[title, format_repeated(found, name)] for name, title in WRITERS.items() if _key_of(name) in found]
    return format_markdown(lines, left=0)


def format_repeated(found: dict, writer: str = "model") -> str:
    """How often one of the writers repeats itself, with the standard error."""
    share, error = found[_key_of(writer)], found[f"{_key_of(writer)}_stderr"]
    return f"{share:.1%}" + ("" if error is None else f" ± {error:.1%}")


def _key_of(writer: str) -> str:
    return "repeated_4grams" if writer == "model" else f"{writer}_repeated_4grams"


def format_side_by_side(texts: list[dict[str, str]]) -> str:
    """
    Continuations as Markdown: for each prompt a table of what each wrote.

    Args:
        texts (`list` of `dict`): `texts` of [`evaluate_continuations`]; other names than its own are shown as they are.
    """
    parts = ["# Continuations", "Greedy. Line breaks are shown as ⏎."]
    for number, line in enumerate(texts, start=1):
        table = [f"|  | prompt {number}: {_escape(line['prompt'])} |", "|---|---|"]
        table += [
            f"| {WRITERS.get(name, name)} | {_escape(text)} |" for name, text in line.items() if name != "prompt"
        ]
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """A text that Markdown leaves as it is, in a cell."""
    text = re.sub(r"([\\`*_\[\]~$])", r"\\\1", html.escape(text, quote=False)).replace("|", "&#124;")
    return " ".join(re.sub(r"\s*\n\s*", " ⏎ ", text).split())
