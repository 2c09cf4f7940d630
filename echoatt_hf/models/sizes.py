"""How large a model's cache is."""

from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

from ..modeling_echoatt import EchoAttention, KVAttention
from .families import count_value_features, find_attention_modules


__all__ = ["count_cache_bytes", "count_kv_bytes_per_token", "describe_sizes", "name_dtype"]


def count_kv_bytes_per_token(model: PreTrainedModel) -> int:
    """
    Bytes of KV cache a model needs for each token: keys and values of every layer, values alone of echo layers, nothing of
    layers that use the keys and values of others or have no attention. What recurrent layers of a hybrid hold does not grow with the tokens and is not counted.

    Args:
        model (`PreTrainedModel`):
            Teacher or student; its dtype is taken for the cache's.

    Returns:
        `int`: bytes per token and sequence. For layers with a sliding window it holds up to the window.
    """
    features = 0
    for attention in find_attention_modules(model).values():
        if not isinstance(attention, KVAttention):
            features += count_value_features(attention) * (1 if isinstance(attention, EchoAttention) else 2)
    return features * model.dtype.itemsize


def name_dtype(model: PreTrainedModel) -> str:
    """The type of a model's weights, and so of its cache, such as `"bfloat16"`."""
    return str(model.dtype).removeprefix("torch.")


def describe_sizes(model: PreTrainedModel) -> dict[str, int | str]:
    """
    What a report says of the sizes of a model: `parameters`, `kv_bytes_per_token`, and `kv_bytes_dtype`, in which those bytes
    are counted. That is the type in memory, on a CPU mostly float32, whatever the model is saved in.
    """
    return {
        "parameters": model.num_parameters(),
        "kv_bytes_per_token": count_kv_bytes_per_token(model),
        "kv_bytes_dtype": name_dtype(model),
    }


def count_cache_bytes(cache: Cache) -> int:
    """
    Bytes of the keys and values that a cache holds: what [`count_kv_bytes_per_token`] foresees, for a cache in use.

    Args:
        cache (`Cache`):
            A cache of transformers, such as the `past_key_values` that a model returns. A static one has its full size
            from the first token on.

    Returns:
        `int`: bytes of all rows and tokens.

    Raises:
        `ValueError`: the cache is quantized.

    Example:

    ```python
    >>> from transformers import DynamicCache
    >>> from echoatt_hf import count_cache_bytes

    >>> cache = DynamicCache(config=student.config)
    >>> tokens = student.generate(**inputs, past_key_values=cache, max_new_tokens=100)
    >>> print(count_cache_bytes(cache))
    ```
    """
    if any(isinstance(layer, QuantizedLayer) for layer in cache.layers):
        raise ValueError("count_cache_bytes cannot count a quantized cache: its backend packs keys and values.")
    states = [states for layer in cache.layers if layer.is_initialized for states in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in states)
