"""
Teacher and student side by side: text, tokens per second, and how similarly the teacher's layers attend to that text.

    pip install gradio
    python examples/app_gradio.py TEACHER STUDENT

On a Space of the Hub, where it is `app.py`, the variables TEACHER and STUDENT name the models.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread

import matplotlib.image
import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer, set_seed

from echoatt_hf import (
    SharingPlan,
    count_kv_bytes_per_token,
    load_model,
    load_tokenizer,
    measure_attention_similarity,
)


@dataclass(frozen=True)
class Pair:
    """A teacher and its student, and the tokenizer of both."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_pair(teacher: str, student: str) -> Pair:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load_model(name, dtype="auto").to(device) for name in (teacher, student)]
    return Pair(*models, load_tokenizer(student, models[1]))


def encode(pair: Pair, prompt: str, max_new_tokens: int) -> BatchEncoding:
    """
    The tokens of a prompt, as a user's message where the tokenizer has a chat template.

    Raises:
        `ValueError`: it is empty, or too long for the context of the models.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty: write something to continue.")
    if pair.tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = pair.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = pair.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    most = min(
        getattr(model.config, "max_position_embeddings", None) or length for model in (pair.teacher, pair.student)
    )
    if length + max_new_tokens > most:
        raise ValueError(
            f"The prompt has {length:,} tokens, which with {max_new_tokens} new ones do not fit into the context of {most:,}: "
            "shorten it, or ask for fewer."
        )
    return inputs.to(pair.teacher.device)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    max_new_tokens: int,
    temperature: float,
) -> Iterator[tuple[str, str]]:
    """The continuation as it grows, and its speed and the size of the model in words. A temperature of 0 is greedy."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    made = {}

    def run() -> None:
        try:
            set_seed(0)
            made["tokens"] = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)
        except Exception as error:  # raised below, where the page sees it
            made["error"] = error
            streamer.end()

    start, text = time.perf_counter(), ""
    thread = Thread(target=run)
    thread.start()
    for part in streamer:
        text += part
        yield text, "..."
    thread.join()
    if "error" in made:
        raise made["error"]
    speed = (made["tokens"].shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - start)
    yield (
        text,
        f"{speed:.1f} tokens/s, {model.num_parameters():,} parameters, "
        f"{count_kv_bytes_per_token(model):,} bytes of KV cache per token",
    )


def draw_similarity(pair: Pair, inputs: BatchEncoding) -> np.ndarray:
    """Heat map of how similarly the teacher's layers attend to a text, with the student's blocks marked, as an image."""
    similarity = measure_attention_similarity(pair.teacher, [dict(inputs)])
    with tempfile.TemporaryDirectory() as folder:  # nothing is left behind
        path = Path(folder) / "similarity.png"
        similarity.plot(path, SharingPlan(pair.student.config.plan))
        return (matplotlib.image.imread(path) * 255).astype(np.uint8)


def compare(pair: Pair, prompt: str, max_new_tokens: int, temperature: float) -> Iterator[tuple]:
    """
    What the page shows, as it grows: a message if something is wrong, texts of teacher and student, what is said of them,
    and the heat map.
    """
    try:
        inputs = encode(pair, prompt, int(max_new_tokens))
    except ValueError as error:
        yield str(error), "", "", "", "", None
        return
    shown = {"teacher": ("", ""), "student": ("", "")}

    def outputs(image: np.ndarray | None = None) -> tuple:
        (text, said), (other_text, other_said) = shown.values()
        return "", text, other_text, said, other_said, image

    for name in shown:
        model = getattr(pair, name)
        model.generate(
            **inputs, max_new_tokens=1, do_sample=False
        )  # the first call of all also allocates and compiles
        for shown[name] in generate(model, pair.tokenizer, inputs, int(max_new_tokens), temperature):
            yield outputs()
    yield outputs(draw_similarity(pair, inputs))


def build_app(pair: Pair):
    """The page, a `gradio.Blocks`."""
    import gradio

    with gradio.Blocks(title="EchoAtt") as app:
        gradio.Markdown(f"# EchoAtt\n\nThe student echoes attention: `{SharingPlan(pair.student.config.plan)}`")
        prompt = gradio.Textbox("def main(", label="Prompt", lines=3)
        with gradio.Row():
            max_new_tokens = gradio.Slider(8, 256, 64, step=8, label="New tokens")
            temperature = gradio.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
        button = gradio.Button("Compare", variant="primary")
        message = gradio.Markdown()
        with gradio.Row():
            columns = []
            for name in ("Teacher", "Student"):
                with gradio.Column():
                    columns.append((gradio.Textbox(label=name, lines=12), gradio.Markdown()))
        heat_map = gradio.Image(label="Similarity of the teacher's layers on this text")
        texts, speeds = zip(*columns, strict=True)
        button.click(
            partial(compare, pair), [prompt, max_new_tokens, temperature], [message, *texts, *speeds, heat_map]
        )
    return app


def main() -> None:
    names = sys.argv[1:] or [os.environ.get("TEACHER", ""), os.environ.get("STUDENT", "")]
    if len(names) != 2 or not all(names):
        raise SystemExit("app_gradio: name a teacher and a student, as arguments or by TEACHER and STUDENT")
    build_app(load_pair(*names)).launch()


if __name__ == "__main__":
    main()
