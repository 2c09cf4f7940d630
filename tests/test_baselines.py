"""Other ways to make a model smaller, each against what it must equal."""

import pytest
import torch
from conftest import FP32_TOLERANCE, make_batch, make_teacher
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from echoatt_hf import EchoAttForCausalLM, SharingPlan, evaluate_model
from echoatt_hf.baselines.layer_dropping import choose_layers_to_drop
from echoatt_hf.baselines.random_plans import draw_plan
from echoatt_hf.conversion.dropping import drop_layers


pytestmark = pytest.mark.once


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
def test_kv_sharing_equals_the_teacher_with_keys_and_values_put_in(attention):
    teacher, sources = make_teacher(num_hidden_layers=6, attention=attention), [0, 1, 1, 1, 4, 4]
    student = EchoAttForCausalLM.from_teacher(teacher, SharingPlan(sources).with_kv())
    input_ids = make_batch()["input_ids"]
    expected = run_llama_by_hand(teacher, input_ids, sources)
    found = student(input_ids=input_ids).logits
    torch.testing.assert_close(found, expected, **FP32_TOLERANCE)
    assert (found - teacher(input_ids=input_ids).logits).abs().max() > 1e-3
    student_parameters = dict(student.language_model.named_parameters())
    kept = {*student_parameters}
    gone = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in (2, 3, 5) for name in ("k_proj", "v_proj")]
    assert {name for name, _ in teacher.named_parameters()} - kept == set(gone)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in teacher.named_parameters()}
    for name, parameter in student_parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[name], **FP32_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("share_weights", [False, True], ids=["copies", "shared"])
def test_layer_dropping_equals_a_model_with_fewer_layers(family, share_weights):
    teacher = make_teacher(family, attention="eager")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    smaller = drop_layers(teacher, [2, 3], share_weights)
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


def test_layer_dropping_saves_what_it_is_asked_to():
    teacher = make_teacher(num_hidden_layers=6)
    layer = sum(parameter.numel() for parameter in teacher.model.layers[0].parameters())
    rows = [{"input_ids": row} for row in make_batch(rows=3)["input_ids"].tolist()]
    one, two = (choose_layers_to_drop(teacher, rows, parameters) for parameters in (layer, layer + 1))
    assert len(one) == 1 and len(two) == 2 and {*one} < {*two} < {1, 2, 3, 4}
    kl = {each: evaluate_model(drop_layers(teacher, [each]), rows, teacher=teacher)["kl"]
          for each in range(1, 5)}  # fmt: skip
    assert one == [min(kl, key=kl.get)]
    with pytest.raises(ValueError, match="inner layers together have fewer"):
        choose_layers_to_drop(teacher, rows, 5 * layer)


def test_random_plans_are_valid_and_differ():
    draw = draw_plan
    plans = [draw(12, 0.41, seed) for seed in range(20)]
    assert all(len(plan.echo_layers) == 5 and plan[0] == 0 and plan[11] == 11 for plan in plans)
    assert len({tuple(plan) for plan in plans}) > 15 and draw(12, 0.41, 3) == plans[3]
    types = ["sliding_attention", "full_attention"] * 3
    assert all(plan.layer_types == tuple(types) for plan in (draw(6, 0.4, seed, types) for seed in range(20)))
