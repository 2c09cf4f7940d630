"""The recipe of the EchoAtt paper, as a whole and part by part, against a plain reference; and recipes as sets of defaults."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_config, make_teacher
from datasets import Dataset
from families import FAMILIES, SIZES
from transformers import PreTrainedTokenizerFast

from echoatt_hf import (
    EchoAttForCausalLM,
    EchoAttTrainer,
    EchoAttTrainingArguments,
    StoredTeacher,
    write_stored_teacher,
)
from echoatt_hf.distillation.two_stages import make_training_arguments, train_two_stages
from echoatt_hf.models import heads
from echoatt_hf.settings import RECIPES, DistillationSettings, options_of
from echoatt_hf.text.rows import collate_rows


pytestmark = pytest.mark.once

PLAN = [0, 1, 1, 3, 3, 1, 6]  # the last layers of its blocks are 5 and 4
PAPER = {name: value for name, value in RECIPES["paper"].items() if not callable(value)} | {
    "stage2_learning_rate": 1e-4
}


@pytest.fixture(scope="module")
def pair():
    """A teacher with tokens that it prefers, and a student that is not the same."""
    teacher = make_teacher("llama", num_hidden_layers=7)
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(4.0)
    return teacher, EchoAttForCausalLM.from_teacher(teacher, PLAN)


def make_rows(count=8, length=12):
    return [{"input_ids": row.tolist()} for row in make_batch(count, length)["input_ids"]]


def make_trainer(student, teacher, folder, rows=None, **changes):
    values = {
        "output_dir": str(folder), "stage1_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    return EchoAttTrainer(
        model=student,
        teacher=teacher,
        args=EchoAttTrainingArguments(**{**values, **changes}),
        train_dataset=rows if rows is not None else Dataset.from_list(make_rows()),
        data_collator=collate_rows,
    )


def reference(student, teacher, rows, layers=(4, 5)):
    """The paper's three losses of stage 1, by name, in plain torch."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    found = student(ids, output_hidden_states=True)
    with torch.no_grad():
        expected = teacher(ids, output_hidden_states=True)
    distances = [
        F.mse_loss(found.hidden_states[layer + 1][:, :-1], expected.hidden_states[layer + 1][:, :-1])
        for layer in layers
    ]
    log_probs = F.log_softmax(found.logits[:, :-1], -1).flatten(0, 1)
    teacher_log_probs = F.log_softmax(expected.logits[:, :-1], -1).flatten(0, 1)
    return {
        "hidden": sum(distances) / len(distances),
        "kl": (log_probs.exp() * (log_probs - teacher_log_probs)).sum(-1).mean(),  # KL(student || teacher)
        "hard_label": F.nll_loss(log_probs, teacher_log_probs.argmax(-1)),
    }


@pytest.mark.parametrize("chunk", [2**26, 4 * 97 * 5], ids=["at-once", "in-chunks"])
def test_the_paper_s_recipe_equals_the_reference(pair, tmp_path, monkeypatch, chunk):
    """Loss, parts and every gradient of a step of stage 1."""
    monkeypatch.setattr(heads, "CHUNK_BYTES", chunk)
    teacher, student = copy.deepcopy(pair)
    expected = reference(student, teacher, make_rows())
    total = 0.25 * expected["hidden"] + 0.25 * expected["kl"] + 0.5 * expected["hard_label"]
    total.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    trainer = make_trainer(student, teacher, tmp_path, **PAPER)
    loss = trainer.compute_loss(student.train(), collate_rows(make_rows()))
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert trainer._parts.keys() == expected.keys()
    for name, value in expected.items():
        assert trainer._parts[name][0].item() == pytest.approx(value.item(), rel=1e-4)
        assert value.item() > 1e-2
    for name, value in student.named_parameters():
        torch.testing.assert_close(
            value.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_each_part_by_itself(pair, tmp_path):
    teacher, student = copy.deepcopy(pair)
    expected = reference(student, teacher, make_rows())
    for name, value in expected.items():
        weights = dict.fromkeys(("kl_weight", "hidden_weight", "hard_label_weight"), 0.0) | {f"{name}_weight": 2.0}
        trainer = make_trainer(student, teacher, tmp_path, **PAPER | weights)
        loss = trainer.compute_loss(student.train(), collate_rows(make_rows()))
        assert loss.item() == pytest.approx(2 * value.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "layers"), [("all", range(7)), ("blocks", (4, 5)), ("2", (2,)), ([0, 3, 6], (0, 3, 6))], ids=str
)
def test_hidden_layers(pair, tmp_path, given, layers):
    teacher, student = copy.deepcopy(pair)
    trainer = make_trainer(
        student, teacher, tmp_path, hidden_weight=1.0, kl_weight=0.0, hidden_layers=given, hidden_distance="squared"
    )
    loss = trainer.compute_loss(student.train(), collate_rows(make_rows()))
    assert loss.item() == pytest.approx(reference(student, teacher, make_rows(), layers)["hidden"].item(), rel=1e-4)


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    from tokenizers import Tokenizer, models

    vocabulary = {f"<{number}>": number for number in range(97)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")))
    write_stored_teacher(folder, pair[0], tokenizer, make_rows(), top_k=5)
    return folder


def test_hard_labels_of_a_stored_teacher(pair, store, tmp_path):
    """What the teacher finds likeliest is the first that is kept. Its hidden states are not."""
    teacher, student = copy.deepcopy(pair)
    rows = StoredTeacher(store)
    trainer = make_trainer(student, None, tmp_path, rows, kl_weight=0.0, hard_label_weight=1.0)
    loss = trainer.compute_loss(student.train(), collate_rows([rows[index] for index in range(8)]))
    assert loss.item() == pytest.approx(reference(student, teacher, make_rows())["hard_label"].item(), rel=1e-5)
    make_trainer(student, None, tmp_path, rows, **PAPER | {"hidden_weight": 0.0}).train()
    with pytest.raises(ValueError, match="hidden_weight is 0.25, but a stored teacher has log-probabilities alone"):
        make_trainer(student, None, tmp_path, rows, **PAPER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_layers": "last"}, "hidden_layers is 'last'; it must be 'all', 'blocks'"),
        ({"hidden_layers": [-1]}, "hidden_layers is '-1'; it must be"),
        ({"hidden_layers": []}, "hidden_layers is ''; it must be"),
        ({"hidden_distance": "cosine"}, "hidden_distance is 'cosine'; it must be one of 'relative', 'squared'"),
        ({"hard_label_weight": -1.0}, "hard_label_weight is -1.0; it must be 0 or more"),
        (
            {"hidden_weight": 1.0, "hidden_layers": "2,7"},
            "is '2,7', but the student has 7 layers: give indices up to 6",
        ),
    ],
)
def test_bad_values_are_refused(pair, tmp_path, changes, message):
    teacher, student = pair
    with pytest.raises(ValueError, match=message):
        make_trainer(student, teacher, tmp_path, **changes)


def test_blocks_of_a_student_that_shares_nothing(pair, tmp_path):
    student = EchoAttForCausalLM.from_teacher(pair[0], list(range(7)))
    with pytest.raises(ValueError, match="hidden_layers is 'blocks', but the student has no layers that share"):
        make_trainer(student, pair[0], tmp_path, hidden_weight=1.0, hidden_layers="blocks")


# Recipes.


def test_recipe_of_the_paper(tmp_path):
    """Weights 0.25, 0.25 and 0.5; 1,764 and 441 steps at the same rate, 1e-4, cosine, warm-up 0.005 of each."""
    settings = DistillationSettings(recipe="paper", steps=2205)
    args = make_training_arguments(settings, tmp_path)
    assert (args.stage1_steps, args.stage2_steps) == (1764, 441)
    assert (args.learning_rate, args.stage2_learning_rate) == (1e-4, 1e-4)
    assert (args.hidden_weight, args.kl_weight, args.hard_label_weight, args.ce_weight) == (0.25, 0.25, 0.5, 0.0)
    assert (args.hidden_layers, args.hidden_distance, args.divergence) == ("blocks", "squared", "reverse")
    assert args.lr_scheduler_type == "cosine" and [args.get_warmup_steps(steps) for steps in (1764, 441)] == [9, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 3e-4},
        {"stage2_steps": 7},
        {"divergence": "forward"},
        {"hidden_weight": 0.0},
        {"warmup_steps": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_given_overrides_the_recipe(changes):
    usual, given = DistillationSettings(recipe="paper"), DistillationSettings(recipe="paper", **changes)
    differ = {name for name, value in vars(usual).items() if getattr(given, name) != value}
    follows = {"stage2_learning_rate"} if "learning_rate" in changes else set()
    assert differ == {*changes} | follows
    assert given.stage2_learning_rate == given.learning_rate


def test_default_recipe_is_what_it_was():
    settings = DistillationSettings().for_width(128)  # that of the built-in teacher
    assert (settings.learning_rate, settings.stage2_learning_rate, settings.stage2_steps) == (1e-3, None, 50)
    assert (settings.kl_weight, settings.hidden_weight, settings.hard_label_weight) == (1.0, 0.0, 0.0)
    assert (settings.divergence, settings.hidden_layers, settings.hidden_distance) == ("forward", "all", "relative")
    assert settings.warmup_steps == 20


@pytest.mark.parametrize(
    ("hidden_size", "rate"),
    [(64, 1e-3), (128, 1e-3), (256, 5e-4), (576, 2.2e-4), (2048, 6.3e-5), (8192, 1.6e-5)],
    ids=["stories260K", "built-in", "256", "SmolLM2-135M", "TinyLlama", "wide"],
)
def test_default_rate_goes_by_the_width(hidden_size, rate):
    """1e-3 up to the built-in teacher's width, from there 1e-3 · 128 / width, in two digits. All else stays."""
    unknown = DistillationSettings(steps=7, trainer_args=["adam_epsilon=1e-6"])
    known = unknown.for_width(hidden_size)
    assert unknown.learning_rate is None and known.learning_rate == rate
    assert known == dataclasses.replace(unknown, learning_rate=rate)


def test_adapters_have_five_times_the_rate():
    rates = [DistillationSettings(lora_rank=4).for_width(width).learning_rate for width in (64, 128, 512)]
    assert rates == [5e-3, 5e-3, 1.3e-3]
    assert DistillationSettings(lora_rank=4, recipe="paper").for_width(128).learning_rate == 1e-4
    # A rate that is the default need not be said, and that of the weights must.
    for rate, words in ((5e-3, []), (1e-3, ["--learning-rate", "0.001"])):
        given = vars(DistillationSettings(lora_rank=4, learning_rate=rate))
        assert options_of(DistillationSettings, given, 128) == [*words, "--lora-rank", "4"]


@pytest.mark.parametrize(
    ("given", "rate"), [({"learning_rate": 3e-3}, 3e-3), ({"recipe": "paper"}, 1e-4)], ids=["given", "paper"]
)
def test_a_rate_that_is_given_counts_for_every_width(given, rate):
    settings = DistillationSettings(**given)
    assert settings.for_width(4096) == settings and settings.learning_rate == rate


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_its_width(family):
    if not FAMILIES[family].is_known:
        pytest.skip("this transformers does not have the family")
    assert make_config(family).get_text_config().hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize("given", [None, 2e-3])
def test_a_student_is_trained_with_the_rate_of_its_width(tmp_path, given):
    teacher = make_teacher("gpt2", hidden_size=256)  # which its configuration calls n_embd
    student = EchoAttForCausalLM.from_teacher(teacher, [0, 1, 1, 3, 3, 5])
    settings = DistillationSettings(steps=1, stage2_steps=0, batch_size=4, warmup_steps=0, learning_rate=given)
    trainer = train_two_stages(student, teacher, Dataset.from_list(make_rows()), settings, tmp_path)
    assert trainer.args.learning_rate == (given or 5e-4)
    assert trainer.args.stage2_learning_rate == pytest.approx((given or 5e-4) / 10)


def test_weights_that_are_trained_are_in_float32(tmp_path):
    """Of steps of the usual size bfloat16 would lose most."""
    teacher = make_teacher(num_hidden_layers=7).to(torch.bfloat16)
    student, seen = EchoAttForCausalLM.from_teacher(teacher, PLAN), set()
    settings = DistillationSettings(steps=2, stage2_steps=0, batch_size=4, warmup_steps=0, learning_rate=1e-5)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    train_two_stages(
        student, teacher, Dataset.from_list(make_rows()), settings, tmp_path,
        evaluate=lambda _, model: seen.update(parameter.dtype for parameter in model.parameters()),
    )  # fmt: skip
    assert seen == {torch.float32} == {parameter.dtype for parameter in student.parameters()}
    pairs = zip(before, student.parameters(), strict=True)
    assert sum((old.float() != new).sum().item() for old, new in pairs) > 0.9 * student.num_parameters()


def test_a_stream_is_shuffled_by_the_seed(tmp_path, monkeypatch):
    teacher, rows, seen = make_teacher(num_hidden_layers=7), make_rows(), []
    student = EchoAttForCausalLM.from_teacher(teacher, PLAN)
    loss = EchoAttTrainer.compute_loss

    def remember(self, model, inputs, *args, **kwargs):
        seen[-1].extend(inputs["input_ids"].tolist())
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EchoAttTrainer, "compute_loss", remember)
    for number, seed in enumerate((0, 7, 7)):
        seen.append([])
        settings = DistillationSettings(steps=2, stage2_steps=0, batch_size=4, warmup_steps=0, seed=seed)
        stream = Dataset.from_list(rows).to_iterable_dataset()
        train_two_stages(student, teacher, stream, settings, tmp_path / str(number))
    first, second, again = seen
    assert first != second == again and [row["input_ids"] for row in rows][: len(first)] not in (first, second)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rates", [(None, None), (3e-4, None), (3e-4, 1e-4), (3e-4, 3e-4), (None, 3e-4), (1e-4, 1e-5)])
def test_options_give_back_both_rates(recipe, rates):
    """By both recipes the rate of stage 2 follows from that of stage 1, if it is not given."""
    given = dict(zip(("learning_rate", "stage2_learning_rate"), rates, strict=True))
    settings = DistillationSettings(recipe=recipe, **given).for_width(512)
    words = options_of(DistillationSettings, vars(settings), 512)
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert {*values} <= {"--recipe", "--learning-rate", "--stage2-learning-rate"}
    read = {name[2:].replace("-", "_"): float(value) for name, value in values.items() if name != "--recipe"}
    assert DistillationSettings(recipe=values.get("--recipe", "default"), **read).for_width(512) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "other"}, "recipe is 'other'; it must be one of 'default', 'paper'"),
        ({"hidden_layers": "1,x"}, "hidden_layers is '1,x'"),
        ({"hidden_distance": "x"}, "hidden_distance is 'x'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**changes)
