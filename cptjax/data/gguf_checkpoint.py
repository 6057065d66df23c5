"""Turn a GGUF file of a llama model with a byte-pair tokenizer into a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cptjax.models import hf_checkpoint, safetensors_io
from cptjax.models.config import ModelConfig
from cptjax.models.hf_config import config_from_hf
from cptjax.models.safetensors_io import PlannedTensor

CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def convert_gguf(
    file: str | Path, folder: str | Path, dtype: str = "bfloat16", shard_bytes: float = 5e9
) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF file as a new folder.

    Quantised weights are written as the values that they stand for.
    """
    reader, values = _open(file)
    cfg = config_from_hf(_hf_config(values))
    tokenizer = _build_tokenizer(values)
    plan = _plan_tensors(reader, cfg)
    with safetensors_io.new_folder(folder) as temporary:
        safetensors_io.write_safetensors(temporary, plan, dtype, shard_bytes)
        hf_checkpoint.write_hf_config(cfg, temporary, dtype)
        tokenizer.save_pretrained(temporary)


def _open(file: str | Path) -> tuple[Any, Callable[[str], Any]]:
    """Return the reader of a file, and a function from a key to its value."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "reading GGUF files needs the package gguf: pip install 'cptjax[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{file} is not a GGUF file that can be read ({reason})") from error

    def value(key: str) -> Any:
        if key not in reader.fields:
            raise ValueError(f"{file} lacks {key}; expected a model with its tokenizer")
        return reader.fields[key].contents()

    for key, supported in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if value(key) != supported:
            raise ValueError(
                f"{file} has {key}={value(key)!r}; expected {supported!r}, the only form that is "
                "converted; use the Hugging Face checkpoint of this model"
            )
    return reader, value


def _hf_config(value: Callable[[str], Any]) -> dict[str, Any]:
    """Return the config.json of the model."""
    heads, width = value("llama.attention.head_count"), value("llama.embedding_length")
    return {
        "model_type": "llama",
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": round(value("llama.attention.layer_norm_rms_epsilon"), 10),
        "rope_theta": value("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }


def _plan_tensors(reader: Any, cfg: ModelConfig) -> list[PlannedTensor]:
    """Return the tensors to write; each is dequantised just before it is written."""
    import gguf

    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.text.depth)
    ours = {
        names.get_name(name, try_suffixes=(".weight",)): (name, entry.shape)
        for name, entry in hf_checkpoint.tensor_table(cfg).items()
    }
    if stored.keys() != ours.keys():
        different = sorted(stored.keys() ^ ours.keys())
        raise ValueError(
            f"expected the {len(ours)} tensors of a llama model with tied embeddings and without "
            f"rotary scaling; {different[0]} is {'missing' if different[0] in ours else 'unknown'}"
        )

    def plan(key: str, name: str, shape: tuple[int, ...]) -> PlannedTensor:
        def make() -> np.ndarray:
            w = gguf.dequantize(stored[key].data, stored[key].tensor_type).reshape(shape)
            heads = {"q_proj": cfg.text.heads, "k_proj": cfg.text.kv_heads}
            n = heads.get(name.split(".")[-2])
            return w if n is None else _split_pairs(w, n)

        return PlannedTensor(name, shape, make)

    return [plan(key, name, shape) for key, (name, shape) in ours.items()]


def _split_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head: GGUF has the pairs (i, i + H / 2) of the rotation together."""
    pairs = w.reshape(heads, -1, 2, w.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(w.shape))


def _build_tokenizer(value: Callable[[str], Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer with its special tokens and chat template."""
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    inner.add_special_tokens([AddedToken(token, special=True) for token in control])
    name = lambda role: tokens[value(f"tokenizer.ggml.{role}_token_id")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = value("tokenizer.chat_template")
    return tokenizer
