"""Zero-shot accuracy on choices, last words and minimal pairs, by the rules of EleutherAI's lm-evaluation-harness."""

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..models.devices import to_float64
from ..models.heads import HeadLogits, OutputHead, predict
from ..models.inference import inference
from ..outputs.tables import format_markdown
from ..text.readers import check_text


__all__ = [
    "ZeroShotItem",
    "ZeroShotTask",
    "evaluate_zero_shot",
    "format_zero_shot",
    "mean_and_stderr",
    "read_zero_shot_tasks",
]

CHOICE, PARTIAL, LAST_WORD, PAIR = "multiple choice", "partial scoring", "last word", "minimal pair"

KINDS = {
    CHOICE: ("query", "choices", "gold"),
    PARTIAL: ("context_options", "continuation", "gold"),
    LAST_WORD: ("context", "continuation"),
    PAIR: ("sentence_good", "sentence_bad"),
}
"""Kinds of tasks, and the fields by which a line of a file is recognised. It may have others, which are not read."""

DELIMITER = " "
"""What joins a context and a continuation. lm-eval puts it before the sentences of BLiMP as well."""

_DEFAULT_MAX_LENGTH = 2048
_UNKNOWN_LENGTH = int(1e30)  # `model_max_length` of a tokenizer that was saved without one


@dataclass(frozen=True)
class ZeroShotItem:
    """
    One question: texts to score, and which of them should score highest.

    Args:
        where (`str`): file and line, for messages.
        pairs (`tuple` of `tuple[str, str]`): contexts and the continuations that are scored after them.
        gold (`int`): index of the pair that is right.
        lengths (`tuple[int, ...]`): characters of each choice, for `acc_norm`; empty where there is none.
    """

    where: str
    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ZeroShotTask:
    """
    A file of questions.

    Args:
        kind (`str`): one of `KINDS`.
        items (`list[ZeroShotItem]`): the questions.
    """

    kind: str
    items: list[ZeroShotItem]


class _Request(NamedTuple):
    tokens: list[int]  # context and continuation, cut from the left to what the model can take
    scored: int  # how many of the last tokens are the continuation


class _Score(NamedTuple):
    log_likelihood: float  # of the continuation, in nats
    is_greedy: bool  # each of its tokens is the one that the model ranks first


def evaluate_zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, str | Path],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Evaluate a causal language model on tasks it was not tuned for, as lm-evaluation-harness does.

    A task is a file of JSON lines. Its kind is recognised from its fields:

    - multiple choice, `{"query", "choices", "gold"}` (PIQA, COPA, ARC): `acc`, the share of questions whose right
      choice has the highest log-likelihood after the query, and `acc_norm`, the same with the log-likelihood divided by
      the characters of the choice;
    - partial scoring, `{"context_options", "continuation", "gold"}` (WinoGrande, WSC): `acc`, the share of questions
      where the continuation has the highest log-likelihood after the right context;
    - last word, `{"context", "continuation"}` (LAMBADA): `acc`, the share of continuations whose tokens the model
      ranks first, and `perplexity`, the exponential of the mean negative log-likelihood of a continuation;
    - minimal pair, `{"sentence_good", "sentence_bad"}` (BLiMP): `acc`, the share of pairs whose good sentence has the
      higher log-likelihood.

    A folder is a group: each of its `.jsonl` files is a task, and the group's accuracy is the mean of theirs, whatever
    their sizes.

    Args:
        model (`PreTrainedModel`):
            Causal language model. A text is cut from the left to its context length.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        tasks (mapping of `str` to `str` or `Path`):
            Names of tasks, and the files or folders that hold them.
        batch_size (`int`, *optional*, defaults to 16):
            Texts in a forward pass. In float32 the results depend on it by less than 1e-4 of a log-likelihood.
        limit (`int`, *optional*):
            Take the first so many questions of each file.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar.

    Returns:
        `dict`: for each task its metrics, each with its standard error `..._stderr` (`None` with a single question),
        and `count`, the questions; for a group also `tasks`, the same for each file. The standard error of an accuracy
        is the sample standard deviation over questions / sqrt(count); that of a group the root of the sum of the
        squared errors of its tasks / their number; that of a perplexity is the perplexity x the standard error of the
        mean log-likelihood (the delta method, where lm-eval draws bootstrap samples; good where it is a small share).

    Raises:
        `FileNotFoundError`: there is no such file or folder.
        `ValueError`: a file or line is not of a known kind, or the tokenizer or the model cannot score it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    loaded = read_zero_shot_tasks(tasks, limit)
    items = [item for task in _each_task(loaded) for item in task.items]
    max_length = _max_length(model, tokenizer)
    requests = [_encode(tokenizer, item.where, *pair, max_length) for item in items for pair in item.pairs]
    scores = iter(_score(model, requests, batch_size, progress))
    return {
        name: _measure_group({file: _measure(part, scores) for file, part in task.items()})
        if isinstance(task, dict)
        else _measure(task, scores)
        for name, task in loaded.items()
    }


def read_zero_shot_tasks(
    tasks: Mapping[str, str | Path], limit: int | None = None
) -> dict[str, ZeroShotTask | dict[str, ZeroShotTask]]:
    """
    Read tasks, and check every line of them.

    Args:
        tasks (mapping of `str` to `str` or `Path`):
            As in [`evaluate_zero_shot`].
        limit (`int`, *optional*):
            Keep the first so many questions of each file.

    Returns:
        `dict`: for each name the task; for a folder a `dict` of its files' names, without suffix, and tasks.

    Raises:
        `FileNotFoundError`: there is no such file or folder.
        `ValueError`: there is nothing to read, or a file or line is not of a known kind.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    if not tasks:
        raise ValueError("There are no tasks: give at least one name with a file of JSON lines or a folder of them.")
    loaded = {}
    for name, path in tasks.items():
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"The task {name!r} is to be read from {str(path)!r}, which does not exist.")
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"The folder {str(path)!r} of the task {name!r} holds no .jsonl files.")
        read = {file.stem: _read_task(file, limit) for file in files}
        loaded[name] = read if path.is_dir() else read[path.stem]
    return loaded


def format_zero_shot(results: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Results as a Markdown table, which also reads well in a terminal: each metric with its standard error.

    Args:
        results (mapping): as returned by [`evaluate_zero_shot`].

    Returns:
        `str`: lines of the table; the tasks of a group are below it, marked with `-`.
    """
    entries = []
    for name, result in results.items():
        entries += [(name, result), *((f"- {file}", part) for file, part in result.get("tasks", {}).items())]
    metrics = [name for name in ("acc", "acc_norm", "perplexity") if any(name in result for _, result in entries)]
    lines = [["task", "count", *metrics]]
    for name, result in entries:
        lines.append([name, f"{result['count']:,}", *(_format_metric(result, metric) for metric in metrics)])
    return format_markdown(lines)


def _format_metric(result: Mapping[str, Any], metric: str) -> str:
    if metric not in result:
        return ""
    digits = ".2f" if metric == "perplexity" else ".4f"
    stderr = result[f"{metric}_stderr"]
    return f"{result[metric]:{digits}}" + ("" if stderr is None else f" ± {stderr:{digits}}")


# Files.


def _read_task(path: Path, limit: int | None) -> ZeroShotTask:
    kind, items = None, []
    # In bytes: text would also be split at line breaks of other alphabets, which JSON may hold within a string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        record = _parse(line, where)
        found = _kind_of(record, where)
        if kind not in (None, found):
            raise ValueError(f"{where} is of the kind {found}, but the lines before it are of the kind {kind}.")
        kind = found
        items.append(_make_item(kind, record, where))
    if kind is None:
        raise ValueError(f"{str(path)!r} is empty: give a file of JSON lines, one question in each.")
    return ZeroShotTask(kind, items[:limit])


def _parse(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object, but of type {type(record).__name__}: {line[:40]!r}")
    return record


def _kind_of(record: dict, where: str) -> str:
    kinds = [kind for kind, fields in KINDS.items() if set(fields) <= record.keys()]
    if len(kinds) != 1:
        known = "; ".join(f"{', '.join(fields)} ({kind})" for kind, fields in KINDS.items())
        fits = f"fits the kinds {' and '.join(kinds)}" if kinds else "is of no known kind"
        raise ValueError(f"{where} {fits}: it has the fields {', '.join(record) or 'none'}; known are {known}.")
    return kinds[0]


def _make_item(kind: str, record: dict, where: str) -> ZeroShotItem:
    if kind == LAST_WORD:
        # An empty context is legal, as it is an empty query: the first token is then predicted from the prefix token.
        context = _text(record, "context", where, may_be_empty=True)
        return ZeroShotItem(where, ((context, DELIMITER + _text(record, "continuation", where)),))
    if kind == PAIR:
        sentences = (_text(record, field, where) for field in KINDS[PAIR])
        return ZeroShotItem(where, tuple(("", DELIMITER + sentence) for sentence in sentences))
    options = _options(record, "choices" if kind == CHOICE else "context_options", where)
    gold = record["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"{where}: gold is {gold!r}; it must be an integer from 0 to {len(options) - 1}.")
    if kind == CHOICE:
        query = _text(record, "query", where, may_be_empty=True)
        pairs = tuple((query, DELIMITER + choice) for choice in options)
        return ZeroShotItem(where, pairs, gold, lengths=tuple(map(len, options)))
    continuation = DELIMITER + _text(record, "continuation", where)
    return ZeroShotItem(where, tuple((context, continuation) for context in options), gold)


def _text(record: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    text = record[field]
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        raise ValueError(
            f"{where}: {field} is {text!r}; it must be a text{'' if may_be_empty else ' that is not blank'}."
        )
    return check_text(text, f"{where}, {field}")


def _options(record: dict, field: str, where: str) -> list[str]:
    options = record[field]
    if (
        not isinstance(options, list)
        or len(options) < 2
        or not all(isinstance(text, str) and text.strip() for text in options)
    ):
        raise ValueError(f"{where}: {field} is {options!r}; it must be a list of at least 2 texts that are not blank.")
    return [check_text(text, f"{where}, {field}") for text in options]


def _each_task(tasks: Mapping[str, ZeroShotTask | dict[str, ZeroShotTask]]) -> Iterator[ZeroShotTask]:
    for task in tasks.values():
        yield from task.values() if isinstance(task, dict) else [task]


# Tokens. The rules are those of `HFLM` and `TemplateLM` in lm-eval 0.4.13.


def _encode(
    tokenizer: PreTrainedTokenizerBase, where: str, context: str, continuation: str, max_length: int
) -> _Request:
    before, scored = _encode_pair(tokenizer, context, continuation)
    if not before or not scored:
        part = "continuation" if before else "context"
        raise ValueError(
            f"{where}: the tokenizer makes no token of the {part} {(continuation if before else context)!r}."
        )
    if len(scored) > max_length:
        raise ValueError(
            f"{where}: the continuation has {len(scored)} tokens, more than the model's context of {max_length}."
        )
    return _Request((before + scored)[-(max_length + 1) :], len(scored))


def _encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("The tokenizer has neither a BOS nor an EOS token: give it one, which begins a text.")
    if not context:
        tokens = tokenizer.encode(continuation, add_special_tokens=False, verbose=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
    # Most tokenizers begin words with a space: one at the end of the context belongs to the first word that is scored.
    stripped = context.rstrip()
    texts = [stripped, context + continuation]
    begin = tokenizer.decode(prefix)
    # verbose=False: texts longer than the model's context are expected, they are cut.
    before, whole = (
        tokenizer.encode(text, add_special_tokens=not text.startswith(begin), verbose=False) for text in texts
    )
    # Cut by the number of tokens, also where tokens of the context and the continuation merge.
    return before, whole[len(before) :]


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config, name, None)) is not None:
            return length
    length = tokenizer.model_max_length
    return _DEFAULT_MAX_LENGTH if length in (None, _UNKNOWN_LENGTH) else length


# Log-likelihoods.


def _score(model: PreTrainedModel, requests: Sequence[_Request], batch_size: int, progress: bool) -> list[_Score]:
    # The longest first: little padding, and memory that does not suffice is found out at once.
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    head = OutputHead.find(model, among_processes=False) if can_keep else None
    scores: dict[int, _Score] = {}
    with inference(model), tqdm(total=len(order), desc="zero-shot", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores.update(zip(batch, _score_batch(model, [requests[i] for i in batch], can_keep, head), strict=True))
            bar.update(len(batch))
    if any(math.isnan(score.log_likelihood) for score in scores.values()):
        # Of log-likelihoods that are not numbers the first would count as the highest.
        raise ValueError("The model's logits are not numbers (NaN): load it in another dtype, or check its weights.")
    return [scores[index] for index in range(len(requests))]


def _score_batch(
    model: PreTrainedModel, batch: Sequence[_Request], can_keep: bool, head: OutputHead | None
) -> list[_Score]:
    lengths = [len(request.tokens) - 1 for request in batch]  # nothing is predicted from the last token
    input_ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (request, length) in enumerate(zip(batch, lengths, strict=True)):
        input_ids[row, :length] = torch.tensor(request.tokens[:-1])
        mask[row, :length] = 1
    first = min(length - request.scored for request, length in zip(batch, lengths, strict=True))
    options = {"logits_to_keep": max(lengths) - first} if can_keep else {}
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    logits = predict(model, head, BatchEncoding(inputs), **options)
    width = len(logits.states) // len(batch)
    # Below zero if the model puts tokens of its own before the text, as prompt tuning does.
    left_out = max(lengths) - width
    ends = [row * width + length - left_out for row, length in enumerate(lengths)]
    scored = [request.scored for request in batch]
    places = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, scored, strict=True)])
    targets = torch.tensor([token for request in batch for token in request.tokens[-request.scored :]])
    found = _score_tokens(replace(logits, states=logits.states[places.to(logits.states.device)]), targets)
    log_probs, are_first = (parts.split(scored) for parts in found)
    return [_Score(part.sum().item(), bool(first.all())) for part, first in zip(log_probs, are_first, strict=True)]


def _score_tokens(logits: HeadLogits, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The log-probabilities `(N,)` of tokens, and whether each is ranked first, `(N,)`. In float64, which not every device has:
    a sum of thousands of nats keeps four decimals.
    """
    found = []
    for tokens in logits.chunks():
        log_probs = F.log_softmax(logits(tokens).float(), dim=-1)
        expected = targets[tokens].to(log_probs.device)
        found.append((log_probs.gather(-1, expected[:, None])[:, 0].cpu(), (log_probs.argmax(-1) == expected).cpu()))
    log_probs, are_first = map(torch.cat, zip(*found, strict=True))
    return to_float64(log_probs), are_first


# Metrics.


def _measure(task: ZeroShotTask, scores: Iterator[_Score]) -> dict[str, Any]:
    """Metrics of a task. Takes the scores of its pairs, in their order."""
    values: dict[str, list[float]] = {}
    for item in task.items:
        taken = [next(scores) for _ in item.pairs]
        log_likelihoods = np.array([score.log_likelihood for score in taken])
        if task.kind == LAST_WORD:
            values.setdefault("log_likelihood", []).append(log_likelihoods[0])
            values.setdefault("acc", []).append(taken[0].is_greedy)
            continue
        values.setdefault("acc", []).append(np.argmax(log_likelihoods) == item.gold)
        if task.kind == CHOICE:
            is_right = np.argmax(log_likelihoods / np.array(item.lengths)) == item.gold
            values.setdefault("acc_norm", []).append(is_right)
    result: dict[str, Any] = {}
    for metric, each in values.items():
        mean, stderr = mean_and_stderr(each)
        if metric == "log_likelihood":
            metric, mean = "perplexity", math.exp(-mean) if mean > -700 else math.inf
            stderr = None if stderr is None else mean * stderr
        result |= {metric: mean, f"{metric}_stderr": stderr}
    return result | {"count": len(task.items)}


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: the sample standard deviation / sqrt(number), `None` of a single value."""
    values = np.array(values, dtype=np.float64)
    stderr = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), stderr


def _measure_group(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if all(metric in part for part in parts.values()):
            stderrs = [part[f"{metric}_stderr"] for part in parts.values()]
            result[metric] = float(np.mean([part[metric] for part in parts.values()]))
            result[f"{metric}_stderr"] = None if None in stderrs else math.hypot(*stderrs) / len(stderrs)
    return result | {"count": sum(part["count"] for part in parts.values()), "tasks": parts}
