"""
The model of an EchoAtt student for mlx_lm, of the families llama, mistral, qwen2 and qwen3.

It lies beside the weights, and `model_file` in config.json names it: mlx_lm loads it with `trust_remote_code`.
A source layer hands its queries and keys on, after norms, rotary embedding and cache update. An echo layer attends
with them and with values of its own. It has no query and key projection and caches values alone.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    text_config: dict[str, Any]
    echo_sources: list[int]

    def __post_init__(self):
        self.family = self.text_config["model_type"]
        rope = {name: value for name, value in self.text_config["rope_parameters"].items() if value is not None}
        # mlx_lm also reads what the two of `rope_parameters` that every model has are called there.
        self.text = llama.ModelArgs.from_dict(
            {**self.text_config, "rope_theta": rope["rope_theta"], "rope_scaling": rope, "layer_types": None}
        )

    @property
    def sliding_layers(self) -> list[bool]:
        """Which layers see a window of tokens only."""
        if self.family in ("qwen2", "qwen3"):
            return [kind == "sliding_attention" for kind in self.text_config["layer_types"]]
        return [self.family == "mistral" and self.text.sliding_window is not None] * self.text.num_hidden_layers


class Attention(nn.Module):
    """Attention of a source or a plain layer. Its `call` is what an echo layer repeats: queries and keys."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        text, family = args.text, args.family
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        head_dim = text.head_dim or text.hidden_size // self.heads
        bias = text.attention_bias and family != "mistral"
        input_bias, output_bias = bias or family == "qwen2", bias and family != "qwen2"
        self.scale = head_dim**-0.5
        self.q_proj = nn.Linear(text.hidden_size, self.heads * head_dim, bias=input_bias)
        self.k_proj = nn.Linear(text.hidden_size, self.kv_heads * head_dim, bias=input_bias)
        self.v_proj = nn.Linear(text.hidden_size, self.kv_heads * head_dim, bias=input_bias)
        self.o_proj = nn.Linear(self.heads * head_dim, text.hidden_size, bias=output_bias)
        if family == "qwen3":
            self.q_norm = nn.RMSNorm(head_dim, eps=text.rms_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=text.rms_norm_eps)
        self.rope = initialize_rope(head_dim, text.rope_theta, False, text.rope_scaling, text.max_position_embeddings)

    def __call__(self, x: mx.array, mask, cache, call=None) -> tuple[mx.array, tuple]:
        queries = split_heads(self.q_proj(x), self.heads)  # (B, T, H, D)
        keys = split_heads(self.k_proj(x), self.kv_heads)  # (B, T, H_kv, D)
        values = split_heads(self.v_proj(x), self.kv_heads).transpose(0, 2, 1, 3)  # (B, H_kv, T, D)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        offset = cache.offset if cache is not None else 0
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=offset)
        keys = self.rope(keys.transpose(0, 2, 1, 3), offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        # Scaled here, as mlx_lm scales the queries of quantized caches in place, and an echo uses them again.
        call = queries * self.scale, keys
        return self.o_proj(attend(call, values, mask, cache)), call


class EchoAttention(nn.Module):
    """Attention of an echo layer: the call of its source with its own values."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        like = Attention(args)
        self.kv_heads, self.v_proj, self.o_proj = like.kv_heads, like.v_proj, like.o_proj

    def __call__(self, x: mx.array, mask, cache, call: tuple) -> tuple[mx.array, tuple]:
        values = split_heads(self.v_proj(x), self.kv_heads).transpose(0, 2, 1, 3)
        if cache is not None:
            # Values where keys would be, of which the caches take the length, and nothing where values would be.
            values, _ = cache.update_and_fetch(values, values[..., :0])
        return self.o_proj(attend(call, values, mask, cache)), call


def split_heads(x: mx.array, heads: int) -> mx.array:
    return x.reshape(*x.shape[:2], heads, -1)


def attend(call: tuple, values: mx.array, mask, cache) -> mx.array:
    """Attention with scaled queries and keys: `(B, T, H · D)`."""
    output = scaled_dot_product_attention(*call, values, cache=cache, scale=1.0, mask=mask)
    return output.transpose(0, 2, 1, 3).flatten(2)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, is_echo: bool):
        super().__init__()
        text = args.text
        self.self_attn = EchoAttention(args) if is_echo else Attention(args)
        self.mlp = llama.MLP(text)
        self.input_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def __call__(self, x: mx.array, mask, cache, call=None) -> tuple[mx.array, tuple]:
        attended, call = self.self_attn(self.input_layernorm(x), mask, cache, call)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), call


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.text.vocab_size, args.text.hidden_size)
        self.layers = [Block(args, layer != source) for layer, source in enumerate(args.echo_sources)]
        self.norm = nn.RMSNorm(args.text.hidden_size, eps=args.text.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache=None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches, masks, calls = cache or [None] * len(self.layers), {}, {}
        sliding_layers = self.args.sliding_layers
        for index, (layer, source) in enumerate(zip(self.layers, self.args.echo_sources)):  # noqa: B905, as mlx_lm
            is_sliding = sliding_layers[index]
            if is_sliding not in masks:
                window = self.args.text.sliding_window if is_sliding else None
                masks[is_sliding] = create_attention_mask(h, caches[index], window_size=window)
            h, calls[index] = layer(h, masks[is_sliding], caches[index], calls.get(source))
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.text.tie_word_embeddings:
            self.lm_head = nn.Linear(args.text.hidden_size, args.text.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache=None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.model(inputs, cache, input_embeddings)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights = {name.removeprefix("language_model."): weight for name, weight in weights.items()}
        if "lm_head" not in self:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def make_cache(self) -> list:
        window = self.args.text.sliding_window
        return [RotatingKVCache(window) if is_sliding else KVCache() for is_sliding in self.args.sliding_layers]
