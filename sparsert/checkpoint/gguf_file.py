"""Convert a Llama or Gemma 3 model in GGUF into an ordinary Hugging Face directory, a tensor at a time.

Configuration and tokenizer (with special tokens and chat template) come out of the file through
``transformers``. The weights do not: its GGUF loader keeps them in 4-bit blocks where it finds a
kernel for that, and needs a further package; here every tensor is dequantised by the ``gguf``
package and written as bf16. What differs between architectures stands in :data:`_FORMATS`; the two are those of
the default model and of the one that tests hold Gemma against.

GGUF stores the rows of Llama's query and key projections interleaved: within a head, row pairs
``(i, i + head_dim/2)`` of the Hugging Face order stand next to each other. And it stores the weights of Gemma's
norms as they are multiplied, one more than Hugging Face's.

    file            d0  d1  d2  d3  ...        row 2 i     of a head = Hugging Face row i
    Hugging Face    d0  d2 ... | d1  d3 ...    row 2 i + 1 of a head = Hugging Face row i + head_dim / 2

Source: the GGUF specification; llama.cpp's rotary embedding works on neighbouring rows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.gguf_header import check_gguf_header
from sparsert.checkpoint.safetensors_file import SafetensorsWriter
from sparsert.errors import CheckpointError, SparsertError, UnsupportedError

_OUTSIDE_BLOCKS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LLAMA_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_BLOCKS = {
    **_LLAMA_BLOCKS,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class _Format:
    """How an architecture is stored: names inside a block, and what has to be undone."""

    title: str
    class_name: str
    in_blocks: dict[str, str]
    interleaved_heads: bool = False
    norms_plus_one: bool = False


_FORMATS = {
    "llama": _Format("Llama", "LlamaForCausalLM", _LLAMA_BLOCKS, interleaved_heads=True),
    "gemma3": _Format("Gemma 3", "Gemma3ForCausalLM", _GEMMA3_BLOCKS, norms_plus_one=True),
}
#: Rotation frequencies that some files carry; the configuration says the same.
_IGNORED = ("rope_freqs.weight",)


def convert_gguf(gguf: Path, output: Path, *, progress: bool = False) -> None:
    """Write ``config.json``, tokenizer files and ``model.safetensors`` (bf16) from a GGUF file.

    Args:
        gguf: a Llama or Gemma 3 model (its text part) with its tokenizer.
        output: directory to create; an empty one may exist.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        UnsupportedError: another architecture, or a tensor that it does not have.
        CheckpointError: the package ``gguf`` is missing, or the file is damaged.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("reading a GGUF file needs the package `gguf`; run `pip install gguf`")
    check_gguf_header(gguf)
    try:
        _convert(gguf, output, progress)
    except SparsertError:
        raise
    # numpy, gguf, tokenizers and transformers meet a damaged value where they happen to use it, with any error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{gguf}: is damaged or cannot be converted ({reason}); fetch it again") from error


def _convert(gguf: Path, output: Path, progress: bool) -> None:
    from gguf import GGUFReader, dequantize
    from tqdm import tqdm
    from transformers import AutoConfig, AutoTokenizer

    try:
        reader = GGUFReader(gguf)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{gguf}: is no readable GGUF file ({error}); fetch it again") from error
    if architecture not in _FORMATS:
        raise UnsupportedError(
            f"{gguf}: architecture {architecture!r}; only {', '.join(_FORMATS)} can be converted from GGUF; get the "
            f"model as safetensors"
        )
    stored = _FORMATS[architecture]

    output.mkdir(exist_ok=True)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    _set_special_tokens_(tokenizer, reader)
    if "tokenizer.ggml.pre" in reader.fields and reader.fields["tokenizer.ggml.pre"].contents() == "smollm":
        split_digits_(tokenizer)
    tokenizer.save_pretrained(output)
    tensors = {_new_name(tensor.name, stored): tensor for tensor in reader.tensors if tensor.name not in _IGNORED}
    # GGUF lists the fastest dimension first
    layout = {name: (tuple(map(int, reversed(tensor.shape))), torch.bfloat16) for name, tensor in tensors.items()}
    # disable=None: tqdm stays silent when standard error is no terminal
    bar = tqdm(tensors.items(), unit="tensor", desc="converting", disable=None if progress else True)
    with SafetensorsWriter(output / "model.safetensors", layout) as writer:
        for name, tensor in bar:
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(layout[name][0])
            if stored.interleaved_heads and name.endswith("q_proj.weight"):
                weight = deinterleave_heads(weight, config.num_attention_heads)
            elif stored.interleaved_heads and name.endswith("k_proj.weight"):
                weight = deinterleave_heads(weight, config.num_key_value_heads)
            elif stored.norms_plus_one and name.endswith("norm.weight"):
                weight = weight - 1
            writer.write(name, weight.to(torch.bfloat16))
    _write_configs(config, output, stored.class_name, tied="lm_head.weight" not in tensors)


def _set_special_tokens_(tokenizer: Any, reader: Any) -> None:
    """Give the tokenizer the special tokens that the file names; not every release of ``transformers`` does."""
    for kind, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        entry = reader.fields.get(f"tokenizer.ggml.{field}_token_id")
        if entry is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(int(entry.contents())))


def split_digits_(tokenizer: Any) -> None:
    """Make a byte-level tokenizer cut text at every digit first, as SmolLM's does.

    The GGUF loader of ``transformers`` does not look at the name of the pre-tokenizer; without this
    step the whitespace before a digit becomes other tokens than those the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def deinterleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from GGUF's order into Hugging Face's.

    Args:
        weight: ``[heads * head_dim, in_features]``.
        heads: number of query or key heads.

    Returns:
        A tensor of the same shape.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _new_name(name: str, stored: _Format) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match.group(2) in stored.in_blocks:
        return f"model.layers.{match.group(1)}.{stored.in_blocks[match.group(2)]}.weight"
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    raise UnsupportedError(f"GGUF tensor {name!r} has no place in a {stored.title} model; the file cannot be converted")


def _write_configs(config: Any, output: Path, class_name: str, *, tied: bool) -> None:
    content = config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        content.pop(key, None)
    content.update(architectures=[class_name], dtype="bfloat16", tie_word_embeddings=tied)
    (output / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    generation = {
        key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if content.get(key) is not None
    }
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
