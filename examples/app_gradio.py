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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from echoatt_hf import SharingPlan, load_model, load_tokenizer, measure_attention_similarity


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


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, temperature: float
) -> tuple[str, float]:
    """The continuation of a prompt, and the tokens per second it took, prompt included. A temperature of 0 is greedy."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt is empty: write something to continue.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    set_seed(0)
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0, inputs["input_ids"].shape[1] :]
    if tokens.is_cuda:
        torch.cuda.synchronize()
    elapsed_s = time.perf_counter() - start
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / elapsed_s


def draw_similarity(pair: Pair, text: str, path: str | Path) -> None:
    """Heat map of how similarly the teacher's layers attend to a text, with the student's blocks marked."""
    batch = pair.tokenizer(text, return_tensors="pt").to(pair.teacher.device)
    similarity = measure_attention_similarity(pair.teacher, [dict(batch)])
    similarity.plot(path, SharingPlan(pair.student.config.echo_sources))


def compare(pair: Pair, prompt: str, max_new_tokens: int, temperature: float) -> tuple[str, str, str, str, str]:
    """Texts of teacher and student, their speeds in words, and the file of the heat map."""
    texts, speeds = [], []
    for model in (pair.teacher, pair.student):
        generate(model, pair.tokenizer, prompt, 1, 0)  # the first call of all also allocates and compiles
        text, speed = generate(model, pair.tokenizer, prompt, int(max_new_tokens), temperature)
        texts.append(text)
        speeds.append(f"{speed:.1f} tokens/s, {model.num_parameters():,} parameters")
    with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
        draw_similarity(pair, prompt + texts[0], file.name)
    return *texts, *speeds, file.name


def build_app(pair: Pair):
    """The page, a `gradio.Blocks`."""
    import gradio

    with gradio.Blocks(title="EchoAtt") as app:
        gradio.Markdown(
            f"# EchoAtt\n\nThe student echoes attention: `{SharingPlan(pair.student.config.echo_sources)}`"
        )
        prompt = gradio.Textbox("def main(", label="Prompt", lines=3)
        with gradio.Row():
            max_new_tokens = gradio.Slider(8, 256, 64, step=8, label="New tokens")
            temperature = gradio.Slider(0, 1.5, 0, step=0.1, label="Temperature (0 is greedy)")
        button = gradio.Button("Compare", variant="primary")
        with gradio.Row():
            columns = []
            for name in ("Teacher", "Student"):
                with gradio.Column():
                    columns.append((gradio.Textbox(label=name, lines=12), gradio.Markdown()))
        heat_map = gradio.Image(label="Similarity of the teacher's layers on this text", type="filepath")
        texts, speeds = zip(*columns, strict=True)
        button.click(partial(compare, pair), [prompt, max_new_tokens, temperature], [*texts, *speeds, heat_map])
    return app


def main() -> None:
    names = sys.argv[1:] or [os.environ.get("TEACHER", ""), os.environ.get("STUDENT", "")]
    if len(names) != 2 or not all(names):
        raise SystemExit("app_gradio: name a teacher and a student, as arguments or by TEACHER and STUDENT")
    build_app(load_pair(*names)).launch()


if __name__ == "__main__":
    main()
