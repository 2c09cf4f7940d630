"""
Let models answer prompts: one model writes conversations to learn from, several are shown side by side.

    python examples/chat/answer.py TEACHER --prompts prompts.txt --output chats.jsonl
    python examples/chat/answer.py TEACHER student --prompts ten.txt

Prompts are lines of a text file. Answers are the likeliest tokens, or drawn with --temperature and --seed.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from echoatt_hf import load_model


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 16,
) -> list[tuple[str, bool]]:
    """The model's answer to each prompt, and whether it came to an end."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = find_ends(model, tokenizer)
    answers = []
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for start in tqdm(range(0, len(prompts), batch_size), desc="answer"):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        ).to(model.device)
        made = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        for tokens in made[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in ends), None)
            answers.append((tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), end is not None))
    return answers


def find_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model, such as Gemma's `<end_of_turn>`."""
    of_model = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return sorted(ends - {None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or repositories of the Hub")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, a prompt a line")
    parser.add_argument("--output", type=Path, help="JSON lines of conversations, for one model")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output is not None and len(options.models) > 1:
        parser.error("--output is for the conversations of one model.")
    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = {}
    for name in options.models:
        set_seed(options.seed)
        model = load_model(name, dtype=getattr(torch, options.dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        found[name] = answer(
            model, tokenizer, prompts, options.max_new_tokens, options.temperature, options.batch_size
        )
    if options.output is None:
        for number, prompt in enumerate(prompts):
            print(f"\n{prompt}")
            for name, answers in found.items():
                print(f"  {Path(name).name}: {' '.join(answers[number][0].split())}")
        return
    (answers,) = found.values()
    # An answer that was cut has no end to learn.
    chats = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
        for prompt, (text, is_whole) in zip(prompts, answers, strict=True)
        if is_whole and text
    ]
    lines = [json.dumps(chat, ensure_ascii=False) for chat in chats]
    options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(chats)} conversations of {len(prompts)} prompts are written to {options.output}")


if __name__ == "__main__":
    main()
