"""
Every family with every feature, against the slow oracle: eager attention weights of the source, no cache. A student of each
family only echoes, another one has layers too that use keys and values of others.

By default a few representative families are tested, and the logits and refusals of all; `python -m pytest -m families` tests all of them and prints the
table, and with `--update-readme` writes it into FAMILIES.md.
"""

import copy
import functools
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import CHECKPOINTING, FP32_TOLERANCE, decode, make_batch, make_teacher, plan_of, positions_of
from families import REFUSED, SUPPORTED, Family
from oracle import make_oracle
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    __version__,
)

from echoatt_hf import EchoAttForCausalLM, convert, evaluate_model, search_plan
from echoatt_hf.conversion.student import _inherited_state
from echoatt_hf.models.families import find_attention_modules


pytestmark = pytest.mark.families


@dataclass
class Subject:
    """The models of one family: what is tested and what it must equal."""

    family: Family
    plan: list[int | str]
    teacher: nn.Module
    student: EchoAttForCausalLM

    @functools.cached_property
    def oracle(self) -> nn.Module:
        return make_oracle(self.teacher, self.plan)

    @functools.cached_property
    def teachers_oracle(self) -> nn.Module:
        return make_oracle(self.teacher, list(range(len(self.plan))))


def make_subject(family: Family, moves: str = "echo") -> Subject:
    if not family.is_known:
        pytest.skip(f"not in transformers {__version__}")
    teacher = make_teacher(family.name, family.attention)
    plan = plan_of(family.name)
    if moves == "kv":  # every second of the layers that share, so that a source may have both
        for layer in [layer for layer, source in enumerate(plan) if layer != source][::-2]:
            plan[layer] = f"kv {plan[layer]}"
    return Subject(family, plan, teacher, EchoAttForCausalLM.from_teacher(teacher, plan))


@pytest.fixture(scope="module", params=[pytest.param(family, id=family.name) for family in SUPPORTED])
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module", params=["echo", "kv"])
def subject(request, family) -> Subject:
    return make_subject(family, request.param)


@pytest.fixture
def feature(request) -> str:
    """Name of a feature: that of the test and of its variant."""
    variant = request.node.callspec.params.get("variant", "")
    return f"{request.node.originalname.removeprefix('test_')} {variant}".strip()


@pytest.fixture
def assert_like_oracle(subject, feature) -> Callable:
    """
    `assert_like_oracle(check)` runs `check(student, oracle)`. What the family is known to lack is not asked of its
    students, as long as `check(teacher, teacher's oracle)` fails too.
    """

    def run(check: Callable[[nn.Module, nn.Module], None]) -> None:
        try:
            check(subject.student, subject.oracle)
        except Exception as error:
            reason = subject.family.lacks.get(feature)
            if reason is None:
                raise
            try:
                check(subject.teacher, subject.teachers_oracle)
            except Exception:
                pytest.skip(reason)
            raise AssertionError(f"the student lacks what its teacher has: {reason}") from error

    return run


@contextmanager
def attending(model: nn.Module, implementation: str):
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def skip_unless_supported(subject: Subject, implementation: str) -> None:
    flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}.get(implementation)
    if flag and not getattr(subject.teacher, flag):
        pytest.skip(f"the family has no {implementation}")


def kept(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Logits of tokens: those of padding are not defined."""
    return logits[batch["attention_mask"].bool()]


# Attention


@pytest.mark.families(always=True)
@pytest.mark.parametrize("variant", ["eager", "sdpa", "flex_attention"])
def test_logits(subject, assert_like_oracle, variant):
    skip_unless_supported(subject, variant)

    def check(model, oracle):
        # Flex attention without its compiler, which takes seconds for each family.
        with attending(model, variant), torch.compiler.set_stance("force_eager"), torch.no_grad():
            for batch in (make_batch(2, 14), make_batch(3, 14, padding=(4, 0, 1))):
                found, expected = (each(**batch, use_cache=False).logits for each in (model, oracle))
                torch.testing.assert_close(kept(found, batch), kept(expected, batch), **FP32_TOLERANCE)

    assert_like_oracle(check)
    batch = make_batch(2, 14)
    with torch.no_grad():
        difference = subject.teacher(**batch).logits - subject.oracle(**batch, use_cache=False).logits
    assert difference.abs().max() > 1e-3  # sharing does something


def test_bf16(subject, assert_like_oracle):
    """Within twice the error that the oracle makes itself in bfloat16; the median of tokens, as experts may change."""

    def check(model, oracle):
        batch = make_batch(3, 14, padding=(4, 0, 1))
        with torch.no_grad():
            exact = kept(oracle(**batch, use_cache=False).logits, batch)
            found, expected = (
                kept(copy.deepcopy(each).bfloat16()(**batch, use_cache=False).logits, batch)
                for each in (model, oracle)
            )
        assert found.dtype == expected.dtype == torch.bfloat16
        errors = [float((logits - exact).norm(dim=-1).median()) for logits in (found, expected)]
        assert 0 < errors[0] <= 2 * errors[1]

    assert_like_oracle(check)


# Training


def backward(model: nn.Module, batch: dict) -> None:
    """Gradients of a loss of the order of the number of tokens, so that they are not tiny."""
    logits = kept(model(**batch, use_cache=False).logits, batch)
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    (logits.log_softmax(-1) * weights).sum().backward()


def assert_same_gradients(model: nn.Module, oracle: nn.Module) -> None:
    """Some are nothing but rounding errors: without rotary embedding a bias of keys does not change the weights."""
    for parameter in oracle.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    # Gradients are inherited like weights: of a fused projection an echo layer has the part it keeps.
    language_model = getattr(model, "language_model", model)
    expected = oracle.state_dict() if language_model is model else _inherited_state(model, oracle)
    expected = {name: expected[name] for name, _ in language_model.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, parameter in language_model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error, size = (found - expected[name]).norm(), expected[name].norm()
        # Recurrent layers after the one that shares make more of what rounds otherwise.
        assert error <= 3e-5 * size + 1e-7 * total, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("variant", ["eager", "sdpa", "checkpointed"])
def test_gradients(subject, assert_like_oracle, variant):
    implementation = subject.student.config._attn_implementation if variant == "checkpointed" else variant
    skip_unless_supported(subject, implementation)

    def check(model, oracle):
        batch = make_batch(2, 14, padding=(4,))
        model, oracle = (copy.deepcopy(each).train() for each in (model, oracle))
        backward(oracle, batch)
        if variant == "checkpointed":
            getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}})
        with attending(model, implementation):
            backward(model, batch)
        assert_same_gradients(model, oracle)

    assert_like_oracle(check)


# Caches


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic-without-config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
}


@pytest.mark.parametrize("variant", CACHES)
def test_cache(subject, assert_like_oracle, variant):
    """Prompts within the sliding window and beyond it, then token by token; families without a window have none."""

    def check(model, oracle):
        batch = make_batch(3, 16, padding=(5, 0, 2))
        with torch.no_grad():
            expected = oracle(**batch, position_ids=positions_of(batch), use_cache=False).logits
            for prompt in (6, 12):
                cache = CACHES[variant](model.config)
                found = decode(model, batch, cache, prompt)
                assert int(cache.get_seq_length()) == 16
                torch.testing.assert_close(kept(found, batch), kept(expected, batch), rtol=1e-5, atol=3e-5)

    assert_like_oracle(check)


def test_cache_bytes(subject):
    """Measured in memory: what the teacher's cache holds, without the keys of echo layers, and without kv layers."""

    def bytes_of(states: torch.Tensor) -> int:
        return states.untyped_storage().nbytes() if states.numel() else 0

    for variant, make_cache in CACHES.items():
        if f"cache {variant}" in subject.family.lacks:
            continue
        caches = []
        for model in (subject.teacher, subject.student):
            caches.append(make_cache(model.config))
            with torch.no_grad():
                model(make_batch(2, 20)["input_ids"], past_key_values=caches[-1], use_cache=True)
        for layer in find_attention_modules(subject.teacher):
            before = caches[0].layers[layer]
            assert bytes_of(before.keys) == bytes_of(before.values) > 0
            if layer in subject.student.config.kv_sources:
                assert not any(slot.is_initialized for slot in caches[1].layers[layer : layer + 1])
                continue
            after = caches[1].layers[layer]
            saved = bytes_of(before.keys) if layer in subject.student.config.echo_layers else 0
            assert bytes_of(after.keys) + bytes_of(after.values) == 2 * bytes_of(before.values) - saved


# Generation

EIGHT_TOKENS = {"max_new_tokens": 8, "min_new_tokens": 8}
GREEDY = {"do_sample": False}
# The options the oracle generates with too, and those of the student alone, which must not change the result.
GENERATION = {
    "greedy": (GREEDY, {}),
    "sampling": ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {}),
    "beams": ({**GREEDY, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}, {}),
    "beam-sampling": ({"do_sample": True, "num_beams": 3}, {}),
    "prompt-lookup": (GREEDY, {"prompt_lookup_num_tokens": 3}),
    "assisted": (GREEDY, {"assistant_model": "teacher"}),
    "chunked-prefill": (GREEDY, {"prefill_chunk_size": 4}),
    "static": (GREEDY, {"cache_implementation": "static"}),
    "static-beams": ({**GREEDY, "num_beams": 3}, {"cache_implementation": "static"}),
    "offloaded": (GREEDY, {"cache_implementation": "offloaded"}),
    "offloaded-static": (GREEDY, {"cache_implementation": "offloaded_static"}),
}


@pytest.mark.parametrize("variant", GENERATION)
def test_generation(subject, assert_like_oracle, variant):
    """A left-padded batch, but for drafted tokens, which transformers verifies for one row only."""
    options, own_options = GENERATION[variant]
    if variant.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("offloading needs an accelerator")
    if variant in ("prompt-lookup", "assisted"):
        tokens = make_batch(1, 5)["input_ids"].repeat(1, 3)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    else:
        batch = make_batch(3, 10, padding=(4, 0, 1))
    if "assistant_model" in own_options:
        own_options = {"assistant_model": subject.teacher}

    def check(model, oracle):
        results = []
        for each, more in ((model, own_options), (oracle, {"use_cache": False})):
            torch.manual_seed(3)
            results.append(each.generate(**batch, **EIGHT_TOKENS, **options, **more))
        assert results[0].shape[1] == batch["input_ids"].shape[1] + 8
        assert torch.equal(*results)

    assert_like_oracle(check)


def test_continuous_batching(subject, assert_like_oracle):
    """Generation with a paged cache, in which prompts of different lengths share a batch."""

    def check(model, oracle):
        config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [make_batch(1, length, seed=length)["input_ids"] for length in (5, 9)]
        found = model.generate_batch(
            inputs=[prompt[0].tolist() for prompt in prompts],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32),
            progress_bar=False,
        )
        assert [result.error for result in found.values()] == [None, None]
        found = {tuple(result.prompt_ids): result.generated_tokens for result in found.values()}
        for prompt in prompts:
            expected = oracle.generate(prompt, generation_config=config, use_cache=False)
            assert found[tuple(prompt[0].tolist())] == expected[0, prompt.shape[1] :].tolist()

    before = subject.student.config._attn_implementation
    try:
        assert_like_oracle(check)
        assert subject.student.config._attn_implementation == before
    finally:  # where it fails, for one that lacks it, transformers leaves the paged implementation behind
        for model in (subject.student, subject.teacher):
            model.set_attn_implementation(before)


# Outputs


def test_packed_rows(subject, assert_like_oracle):
    """Positions that start again mark rows packed into one, as the data collators of transformers make them."""

    def check(model, oracle):
        first, second = make_batch(1, 5, seed=1)["input_ids"], make_batch(1, 7, seed=2)["input_ids"]
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        with torch.no_grad():
            packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
            expected = torch.cat([oracle(row, use_cache=False).logits for row in (first, second)], dim=1)
        torch.testing.assert_close(packed, expected, **FP32_TOLERANCE)

    assert_like_oracle(check)


@pytest.mark.parametrize("variant", ["attentions", "hidden_states"])
def test_output(subject, assert_like_oracle, variant):
    """One of each layer, and of the embeddings; an echo's attention is its source's."""

    def check(model, oracle):
        batch = make_batch(2, 12)
        with attending(model, "eager"), torch.no_grad():
            found, expected = (
                each(**batch, use_cache=False, **{f"output_{variant}": True})[variant] for each in (model, oracle)
            )
        attentions = find_attention_modules(subject.teacher)
        assert len(found) == len(expected) == (len(attentions) if variant == "attentions" else 7)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, **FP32_TOLERANCE)
        if variant == "attentions" and model is subject.student:
            of_layer = dict(zip(attentions, found, strict=True))
            for layer, weights in of_layer.items():
                assert weights.shape == (2, 4, 12, 12)
                assert torch.equal(weights, of_layer[subject.student.config.echo_sources[layer]])

    assert_like_oracle(check)


def test_save_and_load(subject, tmp_path):
    subject.student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=subject.student.config._attn_implementation, output_loading_info=True
    )
    assert type(loaded) is EchoAttForCausalLM
    assert not any(info.values()), info
    assert loaded.config.plan == subject.plan
    batch = make_batch(2, 12, padding=(3,))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, subject.student(**batch).logits, **FP32_TOLERANCE)


def test_tuning(subject):
    """Heads are aligned, outputs refitted and plans searched whatever the attention is made of."""
    rows = [{"input_ids": row.tolist()} for row in make_batch(32, 12)["input_ids"]]
    before = {name: value.clone() for name, value in subject.teacher.state_dict().items()}
    modules = list(subject.teacher.modules())
    student, report = convert(subject.teacher, subject.plan, rows)
    kl = evaluate_model(student, rows[24:], teacher=subject.teacher)["kl"]
    assert kl == pytest.approx(min(report.kl.values()), rel=1e-3, abs=1e-6)
    assert report.kl.keys() == {"copied", "tuned"}
    found = search_plan(subject.teacher, rows, ratio=1 / 6, search_rows=2)
    assert len(found.plan.echo_layers) == 1
    copied = EchoAttForCausalLM.from_teacher(subject.teacher, found.plan)
    untuned = evaluate_model(copied, rows[24:26], teacher=subject.teacher)["kl"]
    assert found.rounds[0]["kl"] == found.kl["effect"] < 1.5 * untuned
    assert list(subject.teacher.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in subject.teacher.state_dict().items())


# Families that are refused


@pytest.mark.families(always=True)
@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in REFUSED])
def test_refused(family, record_property):
    """With the reason, at conversion; one that is not refused any more has to be right."""
    try:
        subject = make_subject(family)
    except ValueError as error:
        assert re.search(family.refused, str(error))
        record_property("refused", str(error))
    else:
        batch = make_batch(3, 14, padding=(4, 0, 1))
        with torch.no_grad():
            found, expected = (each(**batch, use_cache=False).logits for each in (subject.student, subject.oracle))
        torch.testing.assert_close(kept(found, batch), kept(expected, batch), **FP32_TOLERANCE)
        warnings.warn(f"{family.name} is supported now: it should not be listed as refused", stacklevel=1)


def test_table_in_families_md(request, family_table):
    """FAMILIES.md says what a run of everything with the newest transformers found."""
    reason = family_table.why_not_for_the_file()
    if reason:
        pytest.skip(reason)
    family_table.check_file(update=request.config.option.update_readme)
