"""
Try a tiny random student of every family in vLLM, and print a table: the same tokens and log-probabilities as in transformers,
refused, failed and why, or wrong, which it exits with 1 for.

    python examples/serve_vllm/try_families.py [FAMILY ...]

Needs vLLM; takes about ten minutes on two cores.
"""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch  # noqa: E402
from families import SIZES, SUPPORTED, VOCAB_SIZE, Family  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from echoatt_hf import EchoAttForCausalLM  # noqa: E402
from echoatt_hf.serving.vllm import REFUSAL  # noqa: E402


# Larger than in the tests: vLLM's CPU kernels take heads of 32, and experts of 64.
LARGER = {"hidden_size": 128, "word_embed_proj_dim": 128} | dict.fromkeys(
    (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "ffn_dim",
    ),
    64,
)
TOLERANCE = 1e-3  # of log-probabilities in float32
NEW_TOKENS = 24
PROMPTS = [[3 + (11 * i * i + 7 * j + 5 * i * j) % (VOCAB_SIZE - 5) for i in range(5 + 4 * j)] for j in range(4)]


def make_teacher(family: Family) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: value for name, value in LARGER.items() if name in (*SIZES, *family.overrides)}
    overrides = family.overrides | sizes
    if "head_dim" in overrides:
        overrides["head_dim"] = 32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.config_type, **{**SIZES, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def generate(folder: Path, attention: str | None) -> list[tuple[list[int], torch.Tensor]]:
    """What transformers continues each prompt with, and its log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    found = []
    for prompt in PROMPTS:
        row = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[:, len(prompt) - 1 : -1]
        new = row[:, len(prompt) :]
        found.append((new[0].tolist(), logits.float().log_softmax(-1).gather(-1, new[..., None]).flatten()))
    return found


def generate_in_vllm(folder: Path, **options) -> list[tuple[list[int], torch.Tensor]]:
    """As [`generate`]."""
    engine = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=SIZES["max_position_embeddings"],
        max_num_seqs=len(PROMPTS),
        enforce_eager=True,
        **options,
    )
    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    found = []
    for output in engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], how, use_tqdm=False):
        tokens, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        found.append(
            (tokens, torch.tensor([each[token].logprob for token, each in zip(tokens, logprobs, strict=True)]))
        )
    return found


def compare(expected: list, found: list) -> str | None:
    """What differs, `None` if nothing does."""
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(expected, found, strict=True):
        if tokens != own_tokens:
            return "other tokens"
        difference = (logprobs - own_logprobs).abs().max().item()
        if not difference < TOLERANCE:
            return f"the same tokens, log-probabilities off by {difference:.2g}"
    return None


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:160]}"


def try_family(family: Family, folder: Path) -> str:
    if not family.is_known:
        return "not tried: this transformers does not have it"
    teacher = make_teacher(family)
    student = EchoAttForCausalLM.from_teacher(teacher, family.plan)
    student.save_pretrained(folder / "student")
    expected = generate(folder / "student", family.attention)
    try:
        difference = compare(expected, generate_in_vllm(folder / "student"))
    except Exception as error:
        line = next((line for line in str(error).splitlines() if REFUSAL in line), None)
        return f"refused: {line.partition(': ')[2].partition(' [type=')[0]}" if line else f"fails: {first_line(error)}"
    return "same" if difference is None else f"WRONG: {difference}"


def main() -> int:
    results = {}
    for family in SUPPORTED:
        if sys.argv[1:] and family.name not in sys.argv[1:]:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            results[family.name] = try_family(family, folder)
        finally:
            shutil.rmtree(folder)
            gc.collect()  # the engine
            cleanup_dist_env_and_memory()
        print(f"{family.name:40} {results[family.name]}", flush=True)
    print("\n| in vLLM | families |\n|---|---|")
    for result in sorted({*results.values()}, key="same".__ne__):
        print(f"| {result} | {', '.join(f'`{name}`' for name in results if results[name] == result)} |")
    return any(result.startswith("WRONG") for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
