"""What a checkpoint says of itself before vLLM builds a model for it: whose it is, what is packed, what cannot run.

vLLM makes the parameters of a layer first and reads the files afterwards, so which layers are packed has to be known
from names alone. They come from the headers of the files, as everywhere here: a configuration that says "all linears"
is often wrong. What does not fit is refused at this point, because vLLM checks neither sizes nor completeness of
quantized weights and would run on uninitialised memory.

Nothing in this file imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from sparsert.checkpoint.quantization import QUANT_METHOD, check_config, unsupported_quantization
from sparsert.checkpoint.safetensors_file import DTYPE_OF_CODE, TensorInfo
from sparsert.checkpoint.stored import BITMASK, BITMASK_24, DENSE, MARLIN_24, StoredTensor, find_tensors
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.formats.packed import PACKED_DTYPES

COMPRESSED_TENSORS = "compressed-tensors"

#: Storages of ``sparsert.checkpoint.stored`` that vLLM's loader can bring into a layer.
_LOADABLE = (DENSE, BITMASK_24)

_NAMES_SHOWN = 4


def is_ours(quantization: Mapping[str, Any], user_method: str | None) -> bool:
    """Whether a checkpoint is run by this plugin rather than by vLLM itself.

    Args:
        quantization: ``quantization_config`` of the checkpoint.
        user_method: what the user gave as ``quantization``.

    Returns:
        True for our own format, for ``sparse-24-bitmask`` of compressed-tensors, which vLLM gave up, and, if the user
        asks for it, for compressed-tensors that are stored dense.

    Example:
        >>> is_ours({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, None)
        True
    """
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        return True
    if method != COMPRESSED_TENSORS or unsupported_quantization({"quantization_config": quantization}) is not None:
        return False
    form = _sparsity_format(quantization)
    if form == BITMASK_24:
        return True
    return user_method == QUANT_METHOD and form in (None, DENSE) and quantization.get("format") != MARLIN_24


def is_packed(quantization: Mapping[str, Any]) -> bool:
    """Whether a checkpoint that :func:`is_ours` claims to hold packed weights, not dense ones with zeros.

    Raises:
        CheckpointError: our own format, but a version or form that is not known here.
        UnsupportedError: a checkpoint that is none of ours.
    """
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        check_config({"quantization_config": quantization}, Path())
        return True
    if not is_ours(quantization, QUANT_METHOD):
        form = _sparsity_format(quantization) or quantization.get("format")
        raise UnsupportedError(
            f"quantization_config says method {method!r}, format {form!r}; the plugin runs checkpoints of sparsert, "
            f"{BITMASK_24} and dense weights: sparsert convert DIR OUT --to sparsert, if it reads this one"
        )
    return _sparsity_format(quantization) == BITMASK_24


def _sparsity_format(quantization: Mapping[str, Any]) -> Any:
    sparsity = quantization.get("sparsity_config")
    return sparsity.get("format") if isinstance(sparsity, Mapping) else None


def find_packed(metadata: Mapping[str, Mapping[str, Any]], model: str) -> dict[str, tuple[int, int]]:
    """The packed linears of a checkpoint.

    Args:
        metadata: of all its tensors, ``{"dtype", "shape"}`` as in the header of a safetensors file.
        model: directory or hub id, for errors.

    Returns:
        name of the module -> (outputs, inputs) of its weight.

    Raises:
        CheckpointError: parts of a packed weight are missing or do not fit each other.
        UnsupportedError: weights stored in another form, or values that are no bf16, fp16 or fp32.
    """
    infos = {
        name: TensorInfo(Path(model), tuple(info["shape"]), DTYPE_OF_CODE[info["dtype"]])
        for name, info in metadata.items()
        if info.get("dtype") in DTYPE_OF_CODE
    }
    tensors = find_tensors(infos, _read_nothing)
    foreign = {name: tensor.storage for name, tensor in tensors.items() if tensor.storage not in _LOADABLE}
    if foreign:
        _refuse_foreign(model, foreign)
    return {
        name.removesuffix(".weight"): _sizes(name, tensor, model)
        for name, tensor in tensors.items()
        if tensor.storage == BITMASK_24
    }


def _sizes(name: str, tensor: StoredTensor, model: str) -> tuple[int, int]:
    if tensor.dtype not in PACKED_DTYPES:
        raise UnsupportedError(
            f"{model}: the kept values of {name} are {tensor.dtype}, quantized beside being sparse; bfloat16, float16 "
            "and float32 can be run"
        )
    rows, columns = tensor.shape
    if columns % 4:
        raise CheckpointError(f"{model}: {name} is packed, but has {columns} inputs, no multiple of 4; fetch it again")
    return rows, columns


def _read_nothing(name: str) -> Tensor:
    # only the shape of a sparse-bitmask weight is ever asked for, and that form is refused by name
    raise UnsupportedError(f"{name}: is stored as {BITMASK}; sparsert convert DIR OUT --to sparsert, and serve OUT")


def _refuse_foreign(model: str, foreign: Mapping[str, str]) -> NoReturn:
    names = ", ".join(list(foreign)[:_NAMES_SHOWN])
    raise UnsupportedError(
        f"{model}: {len(foreign)} weights are stored as {', '.join(sorted(set(foreign.values())))} ({names}), which "
        "vLLM's loader cannot bring together; write them anew: sparsert convert DIR OUT --to sparsert, and serve OUT"
    )


def refuse_layouts_of_their_own(config: Mapping[str, Any]) -> None:
    """Refuse a model whose blocks differ in their layers or widths, which vLLM's model classes build all alike.

    Args:
        config: content of ``config.json``, defaults filled in.

    Raises:
        UnsupportedError: a block skips a half or has sizes of its own.
    """
    from sparsert.models.per_layer import PER_LAYER_KEYS

    overrides = config.get("per_layer_config")
    differing = [f"block {block}: {dict(own)}" for block, own in (overrides or {}).items() if own]
    differing += [f"a list for {key}" for key in PER_LAYER_KEYS if isinstance(config.get(key), list)]
    if differing:
        more = f" and {len(differing) - _NAMES_SHOWN} more" if len(differing) > _NAMES_SHOWN else ""
        raise UnsupportedError(
            f"config.json gives blocks layouts of their own ({'; '.join(differing[:_NAMES_SHOWN])}{more}), and vLLM "
            "builds all blocks of a model alike; run it with sparsert.LLM, or make a checkpoint from which whole "
            "blocks are gone and the rest is numbered anew: sparsert prune --method none --remove-blocks LIST"
        )
