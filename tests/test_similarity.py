import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from conftest import make_batch, make_teacher
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

from echoatt_hf import EchoAttForCausalLM, plan_from_similarity
from echoatt_hf.analysis import similarity
from echoatt_hf.analysis.figure import plot_similarity
from echoatt_hf.analysis.similarity import AttentionSimilarity, measure_attention_similarity
from echoatt_hf.planning.from_settings import make_plan
from echoatt_hf.settings import PlanSettings


# Different lengths, no padding, padding on the left, on the right, and a row of one token, which says nothing.
BATCHES = [
    make_batch(2, 9, seed=1),
    make_batch(3, 13, padding=(4, 0, 12), seed=2),
    make_batch(2, 7, padding=(0, 3), seed=3, side="right"),
]


def weights_of(model, batches):
    """For each row of the batches its attention weights `(L, H, N, N)`, float64, of its N tokens, as the model returns them."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    for batch in batches:
        with torch.no_grad():
            attentions = model(**batch, use_cache=False, output_attentions=True).attentions
        weights = torch.stack(attentions).double()  # (L, B, H, T, S)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            yield weights[:, row][:, :, mask][..., mask]


def similarity_by_loops(model, batches) -> tuple[torch.Tensor, int]:
    """Mean cosine of attention rows, a row at a time in float64."""
    total, rows = 0.0, 0
    for weights in weights_of(model, batches):
        for position in range(1, weights.shape[2]):
            heads = weights[:, :, position]  # (L, H, S)
            heads = heads / heads.norm(dim=-1, keepdim=True)
            total = total + torch.einsum("igs,jhs->ijgh", heads, heads)
            rows += 1
    return total / rows, rows


def flattened_by_loops(model, batches) -> tuple[torch.Tensor, int]:
    """The paper's similarity: the cosine of whole attention tensors, a pair of layers and a sample at a time."""
    samples = [weights for weights in weights_of(model, batches) if weights.shape[2] > 1]
    found = [
        [[float(F.cosine_similarity(a.flatten(), b.flatten(), 0)) for a in each] for b in each] for each in samples
    ]
    return torch.tensor(found, dtype=torch.float64).mean(0), len(samples)


@pytest.fixture(scope="module")
def measured():
    return measure_attention_similarity(make_teacher("llama", num_hidden_layers=5), BATCHES)


# What is measured


@pytest.mark.parametrize(
    "block_bytes", [similarity.BLOCK_BYTES, 4 * 24 * 13 * 2, 1], ids=["one-block", "two-rows", "rows"]
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "phi", "gpt2", "gpt_oss", "opt"])
def test_equals_slow_reference(family, block_bytes, monkeypatch):
    """Also where windows and sinks are, and in blocks of any number of queries."""
    monkeypatch.setattr(similarity, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(similarity, "PRODUCT_ROWS", 7)  # which does not divide the 24 heads
    model = make_teacher(family, None)  # gpt_oss has no sdpa
    found = measure_attention_similarity(model, BATCHES)
    expected, rows = similarity_by_loops(model, BATCHES)
    assert found.heads.shape == (6, 6, 4, 4)
    assert found.heads.dtype == torch.float64
    assert found.rows == rows == 2 * 8 + (8 + 12) + (6 + 3)
    torch.testing.assert_close(found.heads, expected, rtol=1e-5, atol=1e-6)
    same_heads = torch.stack([expected[:, :, head, head] for head in range(4)]).mean(0)
    torch.testing.assert_close(found.layers, same_heads, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.01  # the layers do differ
    flattened, samples = flattened_by_loops(model, BATCHES)
    torch.testing.assert_close(found.flattened, flattened, rtol=1e-5, atol=1e-6)
    assert found.samples == samples == 2 + 2 + 2
    assert (flattened - same_heads).abs().max() > 0.01  # which are two measures


def test_documents_of_a_row():
    """Each query sees its own document alone; the row is one sample."""
    model = make_teacher("llama")
    batch = {"input_ids": BATCHES[0]["input_ids"], "position_ids": torch.tensor([[*range(4), *range(5)]] * 2)}
    apart = [{"input_ids": part} for part in batch["input_ids"].split([4, 5], dim=1)]
    found, expected = measure_attention_similarity(model, [batch]), measure_attention_similarity(model, apart)
    assert found.rows == expected.rows == 14 and (found.samples, expected.samples) == (2, 4)
    torch.testing.assert_close(found.heads, expected.heads, rtol=1e-5, atol=1e-6)


def test_hybrid_measures_its_attention_layers():
    """Recurrent layers have no attention weights: nothing is measured for them."""
    model = make_teacher("qwen3_5_text", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    found = measure_attention_similarity(model, BATCHES[:1])
    expected, _ = similarity_by_loops(model, BATCHES[:1])
    assert expected.shape == (2, 2, 4, 4)
    torch.testing.assert_close(found.heads[1::2, 1::2], expected, rtol=1e-5, atol=1e-6)
    assert not found.heads[::2].any() and not found.heads[:, ::2].any()
    plan = plan_from_similarity(found.layers, ratio=0.25, protected_layers=0, layer_types=model.config.layer_types)
    assert list(plan) == [0, 1, 2, 1]


def test_headless_model(measured):
    model = make_teacher("llama", num_hidden_layers=5).model
    torch.testing.assert_close(measure_attention_similarity(model, BATCHES).heads, measured.heads)


def test_symmetric_with_ones_on_the_diagonal(measured):
    torch.testing.assert_close(measured.layers, measured.layers.T)
    torch.testing.assert_close(measured.heads, measured.heads.permute(1, 0, 3, 2))
    torch.testing.assert_close(measured.layers.diagonal(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(
        measured.heads.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1), torch.ones(5, 4, dtype=torch.float64)
    )
    assert measured.heads.min() >= 0 and measured.heads.max() <= 1 + 1e-6


def test_padding_changes_nothing(measured):
    """The same rows of tokens with more padding, each in a batch of its own."""
    padded = []
    for batch in BATCHES:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            tokens = row[mask.bool()]
            zeros = torch.zeros(3, dtype=torch.long)
            padded.append(
                {
                    "input_ids": torch.cat([zeros, tokens])[None],
                    "attention_mask": torch.cat([zeros, torch.ones_like(tokens)])[None],
                }
            )
    # Positions count padding on the left here, and rotary embedding is relative.
    found = measure_attention_similarity(make_teacher("llama", num_hidden_layers=5), padded)
    assert found.rows == measured.rows
    torch.testing.assert_close(found.heads, measured.heads, rtol=1e-4, atol=1e-5)


def test_without_attention_mask(measured):
    model = make_teacher("llama", num_hidden_layers=5)
    found = measure_attention_similarity(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    torch.testing.assert_close(found.heads, measure_attention_similarity(model, BATCHES[:1]).heads)


@pytest.mark.parametrize(
    "batches",
    [[], [make_batch(2, 1)], [make_batch(1, 5, padding=(5,))]],
    ids=["no-batch", "one-token", "only-padding"],
)
def test_nothing_to_compare(tiny_teacher, batches):
    with pytest.raises(ValueError, match="no attention row to compare: give batches with rows of at least two tokens"):
        measure_attention_similarity(tiny_teacher, batches)


def test_model_that_is_spread_over_devices(measured, tmp_path):
    """As by `device_map`; a disk stands for a second device."""
    devices = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    devices |= {f"model.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(5)}
    model = dispatch_model(make_teacher("llama", num_hidden_layers=5), devices, offload_dir=tmp_path)
    found = measure_attention_similarity(model, BATCHES)
    torch.testing.assert_close(found.heads, measured.heads, rtol=1e-5, atol=1e-6)
    assert model.model.layers[4].self_attn.q_proj.weight.is_meta


def test_layers_with_different_heads():
    """They cannot share: what is known is how layers of one number of heads attend."""
    tiny_teacher = make_teacher("llama", "eager", num_hidden_layers=5)
    config = copy.deepcopy(tiny_teacher.config)
    config.num_attention_heads, config.head_dim = 2, tiny_teacher.config.hidden_size // 4
    for layer in (1, 3):
        tiny_teacher.model.layers[layer].self_attn = LlamaAttention(config, layer_idx=layer)
    found = measure_attention_similarity(tiny_teacher.eval(), BATCHES)
    assert found.num_heads == (4, 2, 4, 2, 4)
    torch.testing.assert_close(found.layers.diagonal(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.flattened.diagonal(), torch.ones(5, dtype=torch.float64))
    alike = torch.tensor([[(one + other) % 2 == 0 for one in range(5)] for other in range(5)])
    for measure in (found.layers, found.flattened):
        assert (measure[~alike] == 0).all() and (measure[alike] > 0).all()
    assert found.between(1, 3).shape == (2, 2) and found.between(0, 2).shape == (4, 4)
    assert float(found.between(1, 3).diagonal().mean()) == pytest.approx(float(found.layers[1, 3]))


# The model afterwards


def state_of(model) -> tuple:
    attentions = [layer.self_attn for layer in model.model.layers]
    return (
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        [id(attention.config) for attention in attentions],
        [sorted(vars(attention)) for attention in attentions],
        model.config.to_dict(),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_is_left_as_it_was(attention, training):
    model = make_teacher("llama", attention, num_hidden_layers=4).train(training)
    before = state_of(model)
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(**BATCHES[0]).logits
    measure_attention_similarity(model, BATCHES)
    assert state_of(model) == before
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(**BATCHES[0]).logits, logits)


def test_module_in_evaluation_mode_stays_so(tiny_teacher):
    """As with a frozen part of a model in training."""
    tiny_teacher.train()
    tiny_teacher.model.layers[2].eval()
    measure_attention_similarity(tiny_teacher, BATCHES[:1])
    assert tiny_teacher.model.layers[1].training
    assert not tiny_teacher.model.layers[2].training


def test_model_is_left_as_it_was_after_an_error(tiny_teacher):
    tiny_teacher.train()
    before = state_of(tiny_teacher)
    with pytest.raises(IndexError):
        measure_attention_similarity(tiny_teacher, [BATCHES[0], {"input_ids": torch.full((1, 4), 10_000)}])
    assert state_of(tiny_teacher) == before


def test_measures_in_evaluation_mode(measured):
    """Attention dropout would make every measurement another one."""
    model = make_teacher("llama", num_hidden_layers=5, attention_dropout=0.5).train()
    torch.testing.assert_close(measure_attention_similarity(model, BATCHES).heads, measured.heads)


def test_student_is_refused(tiny_teacher):
    student = EchoAttForCausalLM.from_teacher(tiny_teacher, [0, 1, 1, 1, 4]).train()
    logits = student(**BATCHES[0]).logits
    with pytest.raises(ValueError, match="already an EchoAtt student: give the model it was made from"):
        measure_attention_similarity(student, BATCHES)
    assert student.config._attn_implementation == "sdpa"
    assert student.training
    assert torch.equal(student(**BATCHES[0]).logits, logits)


def test_family_that_does_not_call_the_attention_interface_is_refused():
    config = AutoConfig.for_model("bloom", n_layer=3, hidden_size=32, n_head=4, vocab_size=97)
    with pytest.raises(ValueError, match="does not support the family 'bloom'"):
        measure_attention_similarity(AutoModelForCausalLM.from_config(config), BATCHES)


# Memory


class LargeTensors(TorchDispatchMode):
    """Counts the tensors of at least `size` elements that are alive, by their storage."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.alive, self.most = size, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    self.alive.add(storage.data_ptr())
                    weakref.finalize(storage, self.alive.discard, storage.data_ptr())
                self.most = max(self.most, len(self.alive))
        return result


def test_weights_of_a_layer_are_made_once_a_batch(tiny_teacher, monkeypatch):
    compute, made = similarity.compute_attention_weights, []

    def counting(*args):
        weights = compute(*args)
        made.append(weights.shape[1])
        return weights

    monkeypatch.setattr(similarity, "compute_attention_weights", counting)
    found = measure_attention_similarity(tiny_teacher, BATCHES)
    assert sum(made) == 5 * (
        found.rows + found.samples
    )  # the first query of each sample is not compared, but flattened


def test_memory_does_not_grow_with_depth_and_batches(monkeypatch):
    """Tensors as large as an attention matrix `(B, H, T, S)`, by whatever part of the code they are made."""
    size = 2 * 4 * 64 * 64
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 2 * size)
    most = []
    for layers, count in ((3, 1), (6, 1), (3, 4)):
        model = make_teacher("llama", num_hidden_layers=layers, intermediate_size=32)
        with LargeTensors(size) as tensors:
            measure_attention_similarity(model, (make_batch(2, 64, seed=seed) for seed in range(count)))
        most.append(tensors.most)
    assert 1 <= most[0] == most[1] == most[2]


# Files


def test_round_trip(measured, tmp_path):
    path = tmp_path / "similarity.json"
    measured.save(path)
    loaded = AttentionSimilarity.from_json(path)
    assert (loaded.rows, loaded.samples, loaded.num_heads) == (measured.rows, measured.samples, None)
    torch.testing.assert_close(loaded.heads, measured.heads, rtol=0, atol=1e-7)
    torch.testing.assert_close(loaded.layers, measured.layers, rtol=0, atol=5.1e-7)
    torch.testing.assert_close(loaded.flattened, measured.flattened, rtol=0, atol=5.1e-7)
    content = json.loads(path.read_text())
    assert "single attention rows" in content["measures"]["layers"]
    assert "flattened over heads and both positions" in content["measures"]["flattened"]
    (tmp_path / "similarity.safetensors").unlink()
    alone = AttentionSimilarity.from_json(path)
    torch.testing.assert_close(alone.layers, loaded.layers)
    with pytest.raises(ValueError, match="similarity of heads is not known: keep similarity.safetensors beside"):
        alone.between(0, 1)


def test_file_of_an_earlier_version(measured, tmp_path):
    """It has the heads in the JSON itself, and the mean of rows alone."""
    path = tmp_path / "similarity.json"
    old = {"measure": "mean cosine similarity of attention rows", "rows": 45, "layers": measured.layers.tolist()}
    path.write_text(json.dumps(old | {"heads": measured.heads.tolist()}))
    loaded = AttentionSimilarity.from_json(path)
    torch.testing.assert_close(loaded.heads, measured.heads)
    torch.testing.assert_close(loaded.layers, measured.layers)
    assert loaded.flattened is None
    loaded.plot(tmp_path / "figure.png")
    with pytest.raises(ValueError, match="earlier version lacks: run `echoatt analyze` again"):
        make_plan(PlanSettings(plan="paper"), make_teacher("llama", num_hidden_layers=5).config, loaded)


def test_file_of_a_large_model_is_small(tmp_path):
    """80 layers of 64 heads."""
    size, generator = 80, torch.Generator().manual_seed(0)
    matrix = torch.rand(size, size, generator=generator, dtype=torch.float64)
    found = AttentionSimilarity(torch.zeros(1).expand(size, size, 64, 64), 8176, matrix, matrix, 16)
    assert len(found.to_json()) < 5e6
    assert torch.equal(torch.tensor(json.loads(found.to_json())["layers"]), matrix.mul(1e6).round().div(1e6).float())


@pytest.mark.parametrize(
    "text",
    ["not json", "{}", "[1]", '{"heads": [[1.0]], "rows": 3}', '{"heads": "a", "rows": 3}', '{"heads": [[[[1.0]]]]}',
     '{"layers": [1.0], "rows": 3}'],
    ids=["text", "empty", "list", "two-dimensions", "string", "no-rows", "one-dimension"],
)  # fmt: skip
def test_from_json_of_something_else(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="plan.json' is not a similarity file"):
        AttentionSimilarity.from_json(path)


@pytest.mark.parametrize("content", [b"cut off", save({"heads": torch.zeros(3, 4, 4)})], ids=["cut-off", "another"])
def test_heads_of_something_else(measured, tmp_path, content):
    measured.save(tmp_path / "similarity.json")
    (tmp_path / "similarity.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="similarity.json' is not a similarity file"):
        AttentionSimilarity.from_json(tmp_path / "similarity.json")


def test_plot_writes_a_png(measured, tmp_path, monkeypatch):
    import matplotlib
    from matplotlib import image, pyplot

    before = matplotlib.get_backend()
    monkeypatch.setattr(matplotlib, "use", lambda *_, **__: pytest.fail("the backend is the caller's"))
    plain, framed = tmp_path / "plain.png", tmp_path / "framed.png"
    measured.plot(plain)
    measured.plot(str(framed), plan=[0, 1, 1, 1, 4])
    assert plain.read_bytes()[:8] == framed.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pyplot.get_fignums() == [] and matplotlib.get_backend() == before

    def red_pixels(path):
        pixels = image.imread(path)
        return int(((pixels[..., 0] > 0.9) & (pixels[..., 1:3] < 0.1).all(-1)).sum())

    assert red_pixels(plain) == 0
    assert red_pixels(framed) > 100


def test_plot_of_many_layers_is_no_larger_than_a_screen(tmp_path):
    from matplotlib import image

    plot_similarity([[1 / (1 + abs(i - j)) for i in range(80)] for j in range(80)], tmp_path / "many.png", "made up")
    height, width, _ = image.imread(tmp_path / "many.png").shape
    assert width < 2000 and height < 2600


# A trained model


@pytest.mark.real_weights
def test_stories260k(stories260k):
    """The figures that are known of this model: 0.26 to 0.47 between its layers, layers 0 and 1 most alike."""
    stories = stories260k.parents[1] / "tinystories/stories.txt"
    if not stories.exists():
        pytest.skip("the stories are not here")
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    with stories.open(encoding="utf-8") as file:
        texts = file.read(8_000).split("<|endoftext|>")[:4]
    batches = [tokenizer(text.strip(), return_tensors="pt", truncation=True, max_length=256) for text in texts]
    found = measure_attention_similarity(model, batches)
    assert found.rows > 500
    assert torch.isfinite(found.heads).all()
    others = found.layers[~torch.eye(5, dtype=torch.bool)]
    assert float(others.min()) == pytest.approx(0.26, abs=0.02)
    assert float(others.max()) == pytest.approx(0.47, abs=0.02)
    assert float(found.layers[0, 1]) == float(others.max())
