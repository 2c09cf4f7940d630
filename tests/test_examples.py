"""The scripts in `examples/` run, on very little."""

import copy
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher, process_environment, train_byte_level_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


ROOT = Path(__file__).parents[1]
TINY = [
    "--layers", "2", "--hidden-size", "16", "--intermediate-size", "24", "--heads", "2", "--kv-heads", "1",
    "--vocab-size", "300", "--row-length", "16", "--batch-size", "4", "--tokens", str(20 * 4 * 16), "--save-steps", "5",
]  # fmt: skip


def train_teacher(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_teacher.py"), *map(str, arguments)],
        cwd=cwd, env=process_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 20)
    return tmp_path


def test_train_teacher_makes_a_model_folder_and_does_not_overwrite_it(text):
    arguments = ["--output", "teacher", "--data", "text", *TINY, "--save-dtype", "bfloat16"]
    result = train_teacher(*arguments, cwd=text)
    assert result.returncode == 0, result.stderr
    folder = text / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer) <= 300
    assert model.config.use_cache
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens"] == 20 * 4 * 16
    assert f"{results['held_out']['bits_per_byte']:.4f}" in (folder / "README.md").read_text()
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    again = train_teacher(*arguments, cwd=text)
    assert again.returncode == 1 and "holds a finished teacher" in again.stderr


def test_train_teacher_resumes(text):
    arguments = ["--output", "teacher", "--data", "text", *TINY]
    assert train_teacher(*arguments, cwd=text).returncode == 0
    whole = AutoModelForCausalLM.from_pretrained(text / "teacher").state_dict()
    # As if it had been killed after the checkpoint of step 15.
    (text / "teacher" / "results.json").unlink()
    for file in (text / "teacher" / "checkpoints" / "checkpoint-20").iterdir():
        file.unlink()
    (text / "teacher" / "checkpoints" / "checkpoint-20").rmdir()
    refused = train_teacher(*arguments, cwd=text)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    result = train_teacher(*arguments, "--resume", cwd=text)
    assert result.returncode == 0, result.stderr
    resumed = AutoModelForCausalLM.from_pretrained(text / "teacher").state_dict()
    assert all((whole[name] == resumed[name]).all() for name in whole)


# The study of the paper.


STUDY = ["--scale", "tiny", "--teacher", "teacher", "--data", "text", "--ratios", "0.33", "--baseline-ratios", "0.33",
         "--ablation-ratio", "0.33", "--other-text", "zero=text/0.txt", "--task", "pairs=pairs.jsonl"]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """Imports a module of `examples/`."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def study(tmp_path_factory, example):
    """A folder with a tiny random teacher, text, a task, and a study of everything; and how to run another."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text").mkdir()
    texts = [f"def function_{number}(x):\n    return x + {number}\n" * 20 for number in range(12)]
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    make_teacher(num_hidden_layers=6, vocab_size=300).save_pretrained(folder / "teacher")
    tokenizer = train_byte_level_bpe(texts, 290, ["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "teacher")
    pair = {"sentence_good": "return x + 1", "sentence_bad": "x return + 1"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["reproduce_paper.py", *STUDY, *arguments])
            example("reproduce_paper").main()
        return json.loads((folder / arguments[arguments.index("--output") + 1] / "results.json").read_text())

    run("--output", "whole")
    return folder, run


def entry_of(results, method):
    return next(run for run in results["runs"] if run["method"] == method)


def test_a_study_measures_every_method(study):
    folder, _ = study
    table, results = ((folder / "whole" / name).read_text() for name in ("results.md", "results.json"))
    results = json.loads(results)
    main = ["none", "cross-entropy", "paper", "ours untrained", "ours", "layer dropping untrained", "layer dropping"]
    main += ["KV sharing untrained", "KV sharing"]
    main += [f"random plan {seed}{state}" for seed in range(3) for state in (" untrained", "")]
    levers = ["copied", "aligned", "refitted", "both"]
    starts = [f"blocks, {lever}" for lever in levers] + ["similarity, copied"] + [f"effect, {each}" for each in levers]
    ablation = [start + state for start in starts for state in ("", ", 2 steps")]
    assert [run["method"] for run in results["runs"]] == main + ablation
    cells = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("|")]
    assert cells == ["method", "------------------------", "teacher", *main] + [
        "method", "---------------------------", "teacher", *ablation
    ]  # fmt: skip
    assert str(folder) not in json.dumps(results) + table
    assert (folder / "whole" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    paper, ours, on_text = (entry_of(results, method) for method in ("paper", "ours", "cross-entropy"))
    assert [tokens for tokens, _ in paper["curve"]] == [0, 64, 128, 192]  # steps of 2 rows of 16 tokens
    assert paper["curve"][0][1] == entry_of(results, "none")["evaluations"]["curve"]["perplexity"]
    assert paper["distillation"]["stage2_steps"] == 1 and on_text["distillation"]["stage2_steps"] == 6
    assert paper["plan"] == on_text["plan"] == entry_of(results, "KV sharing")["plan"]
    assert ours["plan"] == entry_of(results, "effect, copied")["plan"]
    assert set(ours["evaluations"]) == {"held-out", "curve", "text zero", "task pairs"}
    echo, dropped, sharing = (
        entry_of(results, method)["evaluations"]["held-out"] for method in ("none", "layer dropping", "KV sharing")
    )
    assert dropped["parameters"] <= echo["parameters"]
    # Two of six layers: an echo has values alone, a layer that shares keys and values has nothing of its own.
    total = results["teacher_evaluations"]["held-out"]["kv_bytes_per_token"]
    assert echo["kv_bytes_per_token"] == total * 5 // 6 and sharing["kv_bytes_per_token"] == total * 4 // 6
    student = AutoModelForCausalLM.from_pretrained(folder / "whole" / "0.33" / "layer-dropping" / "paper" / "student")
    assert student.num_parameters() == dropped["parameters"] and student.config.num_hidden_layers == 5


def test_a_study_that_is_done_is_left_alone(study):
    folder, run = study
    files = {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")}
    run("--output", "whole")
    assert {file: file.stat().st_mtime_ns for file in (folder / "whole").rglob("*")} == files


def test_an_interrupted_study_goes_on(study, example, monkeypatch, capsys):
    folder, run = study
    module, arguments = example("reproduce_paper"), ["--output", "stopped", "--methods", "paper", "KV sharing"]
    with monkeypatch.context() as patch:  # as by Ctrl-C at the end of stage 1
        patch.setattr(module, "distill", lambda *args, distill=module.distill, **kwargs: distill(
            *args, **kwargs, evaluate=lambda name, model: signal.raise_signal(signal.SIGINT)
        ))  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
        with pytest.raises(SystemExit):  # the second stage of `paper` has no more to stop, but KV sharing has
            run(*arguments)
    checkpoints = folder / "stopped" / "0.33" / "KV-sharing" / "paper" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-5")] == ["checkpoint-5"]
    assert not (folder / "stopped" / "results.json").exists()
    results, whole = run(*arguments), json.loads((folder / "whole" / "results.json").read_text())
    for method in ("paper", "KV sharing"):
        for key in ("curve", "evaluations"):
            assert entry_of(results, method)[key] == entry_of(whole, method)[key]
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "whole", "--learning-rate", "1e-4"], "made with other settings"),
        (["--output", "whole", "--row-length", "8"], "made with other settings"),
        (["--output", "new", "--ratios", "0.99"], "ratio 0.99 of 6 layers"),
        (["--output", "new", "--teacher", "./nowhere"], "'./nowhere' cannot be loaded|no model folder './nowhere'"),
        (["--output", "new", "--task", "gone=gone.jsonl"], "gone.jsonl"),
    ],
)
def test_a_study_refuses_in_one_line(study, arguments, message):
    folder, run = study
    with pytest.raises(SystemExit, match=message) as refused:
        run(*arguments)
    assert "\n" not in refused.value.code
    assert not (folder / "new" / "0.33").exists()


def test_a_named_file_needs_a_name(example, capsys):
    with pytest.raises(SystemExit):
        example("reproduce_paper").parse_arguments(["--output", "x", "--task", "piqa.jsonl"])
    assert "is not NAME=PATH" in capsys.readouterr().err


def attend_by_hand(attention, states, position_embeddings, shared):
    """Attention of Llama, one step after the other, with the keys and values in `shared` if there are any."""
    shape = (*states.shape[:-1], -1, attention.head_dim)
    query, *own = (
        projection(states).view(shape).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, own[0], *position_embeddings)
    key, value = shared or (key, own[1])
    keys, values = (repeat_kv(each, attention.num_key_value_groups) for each in (key, value))
    scores = query @ keys.transpose(2, 3) * attention.scaling
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attention.o_proj((weights @ values).transpose(1, 2).flatten(2)), (key, value)


def run_llama_by_hand(model, input_ids, sources):
    body = model.model
    states, made = body.embed_tokens(input_ids), {}
    position_embeddings = body.rotary_emb(states, torch.arange(input_ids.shape[1])[None])
    for index, layer in enumerate(body.layers):
        normed = layer.input_layernorm(states)
        output, made[index] = attend_by_hand(layer.self_attn, normed, position_embeddings, made.get(sources[index]))
        states = states + output
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(body.norm(states))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kv_sharing_equals_the_teacher_with_keys_and_values_put_in(example, attention):
    teacher, sources = make_teacher(num_hidden_layers=6, attention=attention), [0, 1, 1, 1, 4, 4]
    student = example("baselines").share_keys_values(copy.deepcopy(teacher), sources)
    input_ids = make_batch()["input_ids"]
    expected = run_llama_by_hand(teacher, input_ids, sources)
    found = student(input_ids=input_ids).logits
    torch.testing.assert_close(found, expected, **FP32_TOLERANCE)
    assert (found - teacher(input_ids=input_ids).logits).abs().max() > 1e-3
    kept = {name for name, _ in student.named_parameters()}
    gone = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in (2, 3, 5) for name in ("k_proj", "v_proj")]
    assert {name for name, _ in teacher.named_parameters()} - kept == set(gone)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_kv_sharing_of_other_families_trains(example, family):
    student = example("baselines").share_keys_values(make_teacher(family, attention="eager"), [0, 1, 2, 1, 2, 5])
    student(**make_batch()).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_kv_sharing_refuses_fused_projections(example):
    with pytest.raises(ValueError, match="no k_proj and v_proj of their own"):
        example("baselines").share_keys_values(make_teacher("gpt2"), [0, 1, 1, 3, 4, 5])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("share_weights", [False, True], ids=["copies", "shared"])
def test_layer_dropping_equals_a_model_with_fewer_layers(example, family, share_weights):
    baselines, teacher = example("baselines"), make_teacher(family, attention="eager")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    smaller = baselines.drop_layers(teacher, [2, 3], share_weights)
    built = AutoModelForCausalLM.from_config(smaller.config, attn_implementation="eager").eval()
    path = "transformer.h" if family == "gpt2" else "model.layers"
    state = {}
    for name, tensor in before.items():
        for new, old in enumerate([0, 1, 4, 5]):
            if name.startswith(f"{path}.{old}."):
                state[name.replace(f"{path}.{old}.", f"{path}.{new}.")] = tensor
        if not name.startswith(path):
            state[name] = tensor
    built.load_state_dict(state)
    assert built.config.num_hidden_layers == 4
    inputs = make_batch()
    torch.testing.assert_close(smaller(**inputs).logits, built(**inputs).logits, **FP32_TOLERANCE)
    assert all((before[name] == tensor).all() for name, tensor in teacher.state_dict().items())
    assert len(find_lists(teacher, 6)) == 1 and teacher.config.num_hidden_layers == 6


def find_lists(model, length):
    return [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == length]


def test_layer_dropping_saves_what_it_is_asked_to(example):
    baselines, teacher = example("baselines"), make_teacher(num_hidden_layers=6)
    layer = sum(parameter.numel() for parameter in teacher.model.layers[0].parameters())
    rows = [{"input_ids": row} for row in make_batch(rows=3)["input_ids"].tolist()]
    one, two = (baselines.choose_layers_to_drop(teacher, rows, parameters) for parameters in (layer, layer + 1))
    assert len(one) == 1 and len(two) == 2 and {*one} < {*two} < {1, 2, 3, 4}
    kl = {each: baselines.evaluate_model(baselines.drop_layers(teacher, [each]), rows, teacher=teacher)["kl"]
          for each in range(1, 5)}  # fmt: skip
    assert one == [min(kl, key=kl.get)]
    with pytest.raises(ValueError, match="inner layers together have fewer"):
        baselines.choose_layers_to_drop(teacher, rows, 5 * layer)


def test_random_plans_are_valid_and_differ(example):
    draw = example("baselines").draw_plan
    plans = [draw(12, 0.41, seed) for seed in range(20)]
    assert all(len(plan.echo_layers) == 5 and plan[0] == 0 and plan[11] == 11 for plan in plans)
    assert len({tuple(plan) for plan in plans}) > 15 and draw(12, 0.41, 3) == plans[3]
    types = ["sliding_attention", "full_attention"] * 3
    assert all(plan.layer_types == tuple(types) for plan in (draw(6, 0.4, seed, types) for seed in range(20)))


@pytest.mark.parametrize(("perplexity", "tokens"), [(30, 0.0), (20, 0.0), (15, 50), (10, 100), (9.5, 150), (8, None)])
def test_tokens_to_reach_a_perplexity(example, perplexity, tokens):
    assert example("study_report").tokens_to_reach([(0, 20), (100, 10), (200, 9), (300, 11)], perplexity) == tokens


def test_the_comparison_is_a_share_of_the_tokens_of_the_paper(example):
    report = example("study_report")
    runs = [{"method": "paper", "ratio": 0.4, "curve": [(0, 20), (400, 15)]}]
    assert report.compare(runs, 0.4) is None
    runs.append({"method": "ours", "ratio": 0.4, "curve": [(0, 20), (100, 10)]})
    assert report.compare(runs, 0.4)["share"] == 0.125
    assert "after 50 tokens, 12% of its 400" in report.describe(report.compare(runs, 0.4))
    runs[1]["curve"] = [(0, 15), (100, 10)]
    assert "before any training" in report.describe(report.compare(runs, 0.4))
    runs[1]["curve"] = [(0, 20), (100, 16)]
    assert "does not reach" in report.describe(report.compare(runs, 0.4))


# Stored teachers.


def test_stored_teachers_are_measured(study, example, monkeypatch, capsys):
    folder, _ = study
    monkeypatch.chdir(folder)
    few = ["--top-k", "3", "200", "--steps", "4", "--rounds", "1", "--row-length", "16", "--evaluation-rows", "4"]
    example("measure_stored_teacher").main(
        ["--teacher", "teacher", "--data", "text", "--ratio", "0.33", "--batch-size", "2", *few]
    )
    output = capsys.readouterr().out
    quality, speed = (table.splitlines() for table in output.split("\n\n")[-3:-1])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in quality[2:]]
    names = ["live", "top 3", "top 200", "top 3, renormalised", "top 200, renormalised"]
    assert [line[0] for line in cells] == names
    assert [line[1] for line in cells] == ["", "16", "804", "16", "804"]
    perplexity = {line[0]: float(line[3]) for line in cells}
    assert perplexity["top 200"] == pytest.approx(perplexity["live"], rel=0.01)
    assert perplexity["top 3, renormalised"] != perplexity["top 3"]
    assert [line.strip("|").split("|")[0].strip() for line in speed[2:]] == ["live", "top 3", "top 200"]
    assert "tokens/s" in speed[0] and "uses" in speed[-1] or "never" in speed[-1]


@pytest.mark.slow
def test_measure_loss_memory(tmp_path):
    script = [
        sys.executable,
        str(ROOT / "examples" / "measure_loss_memory.py"),
        "--output",
        str(tmp_path / "memory.json"),
    ]
    result = subprocess.run(
        [*script, "--vocab-sizes", "20000", "--tokens", "4096", "--repeats", "1"],
        env=process_environment(), capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "tokens/s" in result.stdout
    (found,) = json.loads((tmp_path / "memory.json").read_text())["results"]
    peaks = found["peak_bytes"]
    whole, chunks = (peaks[how] - peaks["states"] for how in ("whole", "chunks"))
    assert whole > 4 * 4096 * 20_000  # at the least the logits in float32
    assert 0 < chunks < whole / 2
