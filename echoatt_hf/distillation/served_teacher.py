"""A teacher that runs in a server: what it says of the tokens of a prompt, asked for over HTTP."""

import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..configuration_echoatt import EchoAttConfig, check_base_family
from ..models.loading import find_origin, load_config
from ..outputs.provenance import without_paths
from ..settings import check_server_url
from .losses import NO_PROBABILITY


__all__ = ["API_KEY", "ServedTeacher"]

logger = logging.getLogger(__name__)

API_KEY = "ECHOATT_SERVER_KEY"
"""Environment variable with the key of the server, if it wants one. It is sent, and neither kept nor shown."""

ATTEMPTS, FIRST_DELAY_S, MOST_DELAY_S = 6, 1.0, 30.0
"""How often a server that is busy, broken or away is asked, and after what pauses: each is twice the one before."""

TIMEOUT_S = 600
"""How long an answer may be silent."""

LEAST_REST = 2.0**-24
"""What float32 cannot tell from nothing beside 1."""

Answer = tuple[np.ndarray, np.ndarray]


class ServedTeacher:
    """
    A teacher in a server that gives log-probabilities of prompts, for [`write_stored_teacher`]. Its weights are not loaded
    here, so that it need not fit into the memory of this machine.

    The server has the completions of OpenAI's protocol with the field `prompt_logprobs`, as vLLM has. Prompts are token ids. It
    is asked over https, or over http, of which the loopback is safe. A key is taken from the environment variable
    `ECHOATT_SERVER_KEY`, and is not sent over http to another machine.

    Args:
        url (`str`):
            Address of the server, such as `"http://127.0.0.1:8000/v1"`.
        teacher (`str` or `Path`):
            Where the teacher's configuration is, as for [`load_model`].
        model (`str`, *optional*):
            What the server calls it; may be left out if the server has one model.

    Attributes:
        config (`PreTrainedConfig`): configuration of the teacher.
        about (`dict`): what the server said of the model: name, longest row, version of the server.

    Raises:
        `OSError`: no server answers there, or there is no such folder or repository.
        `ValueError`: the address is none, it has no such model, or it wants another key.
    """

    def __init__(self, url: str, teacher: str | Path, model: str | None = None):
        check_server_url(url)
        self.url, self.config = url.rstrip("/"), load_config(teacher)
        if not isinstance(self.config, EchoAttConfig):
            check_base_family(self.config)
        # As of a model that is loaded, see `load_model`.
        self.name_or_path, self.loaded_commit, self.loaded_gguf_file = find_origin(teacher)
        is_local = _is_loopback(self.url)
        self._key = _read_key(self.url, is_local)
        if self.url.startswith("http:") and not is_local:
            logger.warning(f"{self.url} is asked over http: who is on the way can read the text. https is safe.")
        self._opener = build_opener(_NoRedirects, *([ProxyHandler({})] if is_local else []))
        self._stopped = threading.Event()
        card = self._find_model(model)
        self.model, self.max_length = card["id"], card.get("max_model_len")
        said = {name: card.get(name) for name in ("id", "root", "owned_by", "max_model_len")}
        said["version"] = self._find_version()
        self.about = without_paths({name: value for name, value in said.items() if value is not None})

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    def check_length(self, row_length: int) -> None:
        """Check that the server takes rows of a length. Raises `ValueError` if not."""
        if self.max_length is not None and row_length + 1 > self.max_length:
            raise ValueError(
                f"A row has {row_length} tokens, but the server takes {self.max_length - 1} and one more (max_model_len "
                f"{self.max_length}): choose --row-length {self.max_length - 1}, or start the server with more."
            )

    def check_answers(self, tokenizer: PreTrainedTokenizerBase, row: dict, top_k: int) -> None:
        """
        Check with a first row that the server gives what a store needs, of the same tokens.

        Raises:
            `ValueError`: the row is too long, it gives too few log-probabilities or none, or has another tokenizer.
        """
        self.check_length(len(row["input_ids"]))
        same = other = 0
        for piece in _documents(row):
            self._ask_document(piece, top_k, found := [])
            for token, text in found:
                expected = tokenizer.decode([token]).strip()
                # Of parts of a character servers show what they make of them.
                if expected and "\ufffd" not in expected:
                    is_same = text.strip() == expected
                    same, other = same + is_same, other + (not is_same)
        if other > 0.1 * (same + other):
            raise ValueError(
                f"The server's model {self.model!r} has another tokenizer than the teacher: {other} of {same + other} tokens of "
                "the first row are others to it. Give the folder or repository of the model that is served."
            )

    @contextmanager
    def answering(self, top_k: int, requests: int) -> Iterator:
        """A function from columns `(R, T)` of rows to their answers, in order, with some requests at once."""
        pool = ThreadPoolExecutor(requests, "served-teacher")

        def ask(columns: dict[str, np.ndarray]) -> Iterator[Answer]:
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            for logprobs, ids in pool.map(partial(self._ask, top_k=top_k), rows):
                yield logprobs[None], ids[None]

        self._stopped.clear()
        try:
            yield ask
        except BaseException:
            self._stopped.set()  # ends the pauses of those that would try again
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, row: dict, top_k: int) -> Answer:
        """Log-probabilities `(T, k + 1)`, float16, and token ids `(T, k)`, the likeliest first, for a row `(T,)`."""
        answers = [self._ask_document(piece, top_k) for piece in _documents(row)]
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))

    def _ask_document(self, tokens: list[int], top_k: int, texts: list | None = None) -> Answer:
        # The next token of the whole is what the server generates. It is asked for the likeliest by their ids.
        body = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": top_k,
            "logprobs": top_k,
            "return_tokens_as_token_ids": True,
        }
        answer = self._call(f"{self.url}/completions", body)
        try:
            positions = self._read(answer["choices"][0], tokens, texts)
            kept = [_keep(found, top_k, self.vocab_size) for found in positions]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The server's answer is not as vLLM's ({type(error).__name__}: {error}): give a server with prompt_logprobs."
            ) from error
        logprobs, ids = zip(*kept, strict=True)
        return np.asarray(logprobs, np.float16), np.asarray(ids)

    def _read(self, choice: dict, tokens: list[int], texts: list | None) -> Iterator[list[tuple[float, int]]]:
        """The log-probabilities of next tokens and their ids, position by position."""
        prompt = choice.get("prompt_logprobs")
        if prompt is None:
            raise ValueError(
                f"The server gives no prompt_logprobs for {self.model!r}, from which a store is made: give one that does, as "
                "vLLM."
            )
        if len(prompt) != len(tokens):
            raise ValueError(
                f"The server was asked of {len(tokens)} tokens and answers of {len(prompt)}: it must take prompts as token ids "
                "and add none."
            )
        for token, found in zip(tokens[1:], prompt[1:], strict=True):
            if str(token) not in found:
                raise ValueError(
                    f"The server's answer lacks the token {token} of the prompt: it took it for another one."
                )
            if texts is not None and found[str(token)].get("decoded_token") is not None:
                texts.append((token, found[str(token)]["decoded_token"]))
            yield [(entry["logprob"], int(index)) for index, entry in found.items()]
        last = choice["logprobs"]["top_logprobs"][0]
        yield [(logprob, int(index.removeprefix("token_id:"))) for index, logprob in last.items()]

    def _find_model(self, name: str | None) -> dict:
        listed = self._call(f"{self.url}/models", attempts=1)
        try:
            cards = {card["id"]: card for card in listed["data"]}
        except (KeyError, TypeError):
            raise ValueError(f"{self.url}/models lists no models: give the address of a server as vLLM's.") from None
        if name is None and len(cards) == 1:
            return next(iter(cards.values()))
        if name not in cards:
            wrong = "The server has several models" if name is None else f"The server has no model {name!r}"
            raise ValueError(f"{wrong}: give one of {', '.join(map(repr, cards)) or 'none'} (--server-model).")
        return cards[name]

    def _find_version(self) -> str | None:
        try:
            version = self._call(f"{self.url.removesuffix('/v1')}/version", attempts=1)["version"]
        except (OSError, ValueError, KeyError, TypeError):  # which no protocol asks for
            return None
        return version if isinstance(version, str) else None

    def _call(self, url: str, body: dict | None = None, attempts: int = ATTEMPTS):
        """What the server answers, as JSON. What may pass is waited for."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(url, json.dumps(body).encode() if body is not None else None, headers)
        for attempt in range(attempts):
            delay = min(FIRST_DELAY_S * 2**attempt, MOST_DELAY_S)
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                    data = answer.read()
                break
            except HTTPError as error:
                with error:
                    wrong = f"{error.code}: {self._read_message(error)}"
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"The server {_explain(error.code, wrong, url)}") from None
                wanted = error.headers.get("Retry-After", "")
                delay = min(float(wanted), MOST_DELAY_S) if wanted.isdecimal() else delay
                wrong = f"answers {wrong}"
            except (OSError, HTTPException) as error:
                reason = error.reason if isinstance(error, URLError) else error
                wrong = f"does not answer ({getattr(reason, 'strerror', None) or reason or type(reason).__name__})"
            if attempt + 1 == attempts or self._stopped.wait(delay):
                tried = f", {attempt + 1} times" if attempt else ""
                raise ConnectionError(f"The server at {url} {wrong}{tried}: check that it runs, and the address.")
        try:
            return json.loads(data)
        except ValueError:
            raise ValueError(
                f"What {url} answers is not JSON: give the address of a server, such as .../v1."
            ) from None

    def _read_message(self, error: HTTPError) -> str:
        """The first words of what a server says is wrong, without the key, which some repeat."""
        try:
            text = error.read().decode(errors="replace")
            said = json.loads(text)
            said = said.get("error", said)
            text = str(said.get("message", said) if isinstance(said, dict) else said)
        except (OSError, HTTPException, ValueError, AttributeError):
            text = str(error.reason)
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:300].rstrip(".")


class _NoRedirects(HTTPRedirectHandler):
    """Elsewhere the key is nobody's business."""

    def redirect_request(self, *_):
        return None


def _documents(row: dict) -> list[list[int]]:
    """Tokens of the documents of a row that are kept apart, else of the whole row."""
    tokens = np.asarray(row["input_ids"])
    positions = np.asarray(row.get("position_ids", range(len(tokens))))
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(np.diff(positions) != 1) + 1)]


def _keep(found: list[tuple[float, int]], top_k: int, vocab_size: int) -> tuple[list[float], list[int]]:
    """The k log-probabilities of most and that of the rest, and the k ids, as [`keep_top`] has them."""
    if len(found) < top_k:
        raise ValueError(
            f"The server gives {len(found)} log-probabilities where {top_k} were asked for: choose a smaller --top-k, or start "
            f"it with more (vLLM: --max-logprobs {top_k})."
        )
    if wrong := [index for _, index in found if not 0 <= index < vocab_size]:
        raise ValueError(
            f"The server answers with the token {wrong[0]}, but the teacher has {vocab_size}: give the folder or repository of "
            "the model that is served."
        )
    if wrong := [value for value, _ in found if not math.isfinite(value)]:
        raise ValueError(
            f"The server gives the log-probability {wrong[0]}: serve it in another dtype, or leave the text out."
        )
    found = sorted(found, key=lambda pair: (-pair[0], pair[1]))
    top, others = found[:top_k], found[top_k:]
    inside = math.fsum(math.exp(min(value, 1.0)) for value, _ in top)
    if inside > 1.001:
        raise ValueError(
            f"The server's probabilities of {top_k} tokens add up to {inside:.4g}, so they are none: let it give logarithms of "
            "the model's own probabilities (vLLM: --logprobs-mode raw_logprobs)."
        )
    # The rest is 1 less the others, which float32 rounds. Of its tokens none is likelier than the last of the top.
    most = (vocab_size - top_k) * math.exp(top[-1][0])
    least = max(min(most, LEAST_REST), math.fsum(math.exp(value) for value, _ in others))
    rest = min(max(1 - inside, least), most)
    last = math.log(rest) if rest > 0 else NO_PROBABILITY
    return [max(value, NO_PROBABILITY) for value in (*(value for value, _ in top), last)], [index for _, index in top]


def _explain(status: int, wrong: str, url: str) -> str:
    if status in (401, 403):
        return f"wants another key ({wrong}): set {API_KEY}."
    if status < 400:
        return f"sends requests for {url} elsewhere ({wrong}): give the address that it sends them to."
    if status == 404:
        return f"has no {url} ({wrong}): give an address such as http://127.0.0.1:8000/v1."
    if "logprobs" in wrong:
        return f"refuses ({wrong}): choose a smaller --top-k, or start it with more (vLLM: --max-logprobs)."
    return f"refuses a row ({wrong})."


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_key(url: str, is_local: bool) -> str:
    key = os.environ.get(API_KEY, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(f"The key in {API_KEY} has characters that no key has: set it anew.")
    if key and url.startswith("http:") and not is_local:
        raise ValueError(
            f"{API_KEY} is set, and {url} is asked over http, where others can read it: give an https address, or one of this "
            "machine, or unset it."
        )
    return key
