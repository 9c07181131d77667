"""``y = x W^T + bias`` with W packed 2:4: the operator ``sparsert::linear24`` and its Python door.

Registered with ``torch.library.Library`` rather than ``custom_op``: half the host time per call, and at
batch 1 a 7B model makes 224 calls a token. The operator is opaque to ``torch.compile`` (fullgraph is
fine), allocates through torch's caching allocator only, and never waits for the GPU, so it can be
captured. Where no kernel takes it (float32 on a GPU, more than a few rows on a CPU), the weight is unpacked into a
scratch that lives for this call only.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.packed import PACKED_DTYPES, Packed24, unpack_reference
from sparsert.ops import native
from sparsert.ops.activation import ACTIVATIONS, activate
from sparsert.ops.choice import Choice, choose
from sparsert.ops.norm import DeferredNorm, residual_norm
from sparsert.ops.pack import choose_packer, dtype_code, unpack_into
from sparsert.ops.tiles import Tiled, empty_tiles, to_rows, worth_tiling

#: Kernels for prompts and large batches, and what the extension calls them. All take a SiLU gate behind the layer.
_GEMMS = {"wgmma_sp": "gemm24", "mma_sp_gemm": "gemm24_mma"}

_library = torch.library.Library("sparsert", "DEF")
_library.define(
    "linear24(Tensor x, Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features, "
    'str backend="auto") -> Tensor'
)


@functools.cache
def _warn_fallback(text: str) -> None:
    warnings.warn(f"sparsert: 2:4 linears run without the compiled kernel: {text}", stacklevel=2)


def _dense(values: Tensor, metadata: Tensor, rows: int, columns: int) -> Tensor:
    """The weight unpacked, for one call."""
    implementation = choose_packer(values.device, "auto")
    if implementation == "reference":
        return unpack_reference(Packed24(values, metadata, rows, columns))
    return unpack_into(values, metadata, rows, columns, implementation)


def _cpu_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    wide = x.float().contiguous()
    y = torch.empty((x.shape[0], rows), dtype=torch.float32)
    extension: Any = native.module()
    extension.linear24_cpu(
        values.data_ptr(), metadata.data_ptr(), wide.data_ptr(), y.data_ptr(), x.shape[0], rows, columns,
        dtype_code(values.dtype), torch.get_num_threads(),
    )  # fmt: skip
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _mma_sp_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    x = native.aligned_rows(x, 8)
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    extension: Any = native.module()
    with torch.cuda.device(x.device):
        extension.linear24_cuda(
            values.data_ptr(), metadata.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), x.shape[0], rows, columns, x.stride(0), dtype_code(x.dtype), native.stream(x.device),
        )  # fmt: skip
    return y


def _gemm_linear(
    kernel: str,
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    *,
    kind: int = -1,
    gated: bool = False,
) -> Tensor:
    """By one of :data:`_GEMMS`."""
    # they read rows of x of 16-byte multiples; inputs that are added meet weights of zero
    x = torch.nn.functional.pad(x, (0, -columns % 8)) if columns % 8 else native.aligned_rows(x, 16)
    batch, width = x.shape
    y = torch.empty((batch, rows // 2 if gated else rows), dtype=x.dtype, device=x.device)
    extension: Any = native.module()
    with torch.cuda.device(x.device):
        size = getattr(extension, f"{_GEMMS[kernel]}_workspace")(batch, rows, width)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
        getattr(extension, f"{_GEMMS[kernel]}_cuda")(
            values.data_ptr(), metadata.data_ptr(), x.data_ptr(), native.address(bias), y.data_ptr(), batch, rows,
            width, x.stride(0), kind, gated, native.address(workspace), dtype_code(x.dtype), native.stream(x.device),
        )  # fmt: skip
    return y


# torch leaves out arguments that equal the schema's default, so the default is repeated here
def _linear24_impl(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    backend: str = "auto",
) -> Tensor:
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    choice = choose(x.device, x.dtype, flat.shape[0], backend, out_features * in_features)
    if choice.is_fallback:
        _warn_fallback(next(why for _, why in choice.rejected if why.startswith("unavailable")))
    if choice.kernel in _GEMMS:
        y = _gemm_linear(choice.kernel, flat, values, metadata, bias, out_features, in_features)
    elif choice.kernel == "mma_sp":
        y = _mma_sp_linear(flat, values, metadata, bias, out_features, in_features)
    elif choice.kernel == "cpu":
        y = _cpu_linear(flat, values, metadata, bias, out_features, in_features)
    elif choice.kernel == "triton":
        from sparsert.kernels.linear24 import linear24 as triton_linear24

        y = triton_linear24(flat, values, metadata, out_features, in_features, bias)
    else:
        y = torch.nn.functional.linear(flat, _dense(values, metadata, out_features, in_features), bias)
    return y.view((*x.shape[:-1], out_features))


def _linear24_fake(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    backend: str = "auto",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("linear24", _linear24_impl, "CPU")
_library.impl("linear24", _linear24_impl, "CUDA")
torch.library.register_fake("sparsert::linear24", _linear24_fake, lib=_library)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients to x and bias through the packed weight; the weight itself is frozen."""
    values, metadata = context.saved_tensors
    gradient_x = gradient_bias = None
    if context.needs_input_grad[0]:
        # the operator, not the function behind it: a compiled backward pass traces this
        gradient_x = gradient @ torch.ops.sparsert.unpack24(values, metadata, context.out_features, context.in_features)
    if context.needs_input_grad[3]:
        gradient_bias = gradient.reshape(-1, context.out_features).sum(0)
    return gradient_x, None, None, gradient_bias, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, metadata, _, ctx.out_features, ctx.in_features, *_ = inputs
    ctx.save_for_backward(values, metadata)


torch.library.register_autograd("sparsert::linear24", _backward, setup_context=_setup_context, lib=_library)


def check_linear24(x: Tensor, packed: Packed24, bias: Tensor | None) -> None:
    """Check that an input fits a packed weight.

    Raises:
        InputError: last dimension, dtype or device of x or bias does not fit.
    """
    if x.dim() == 0 or x.shape[-1] != packed.in_features:
        raise InputError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features={packed.in_features}")
    if x.dtype != packed.dtype or x.device != packed.device:
        raise InputError(
            f"x is {x.dtype} on {x.device}, the packed weight {packed.dtype} on {packed.device}; they must agree "
            f"(packed dtypes: {', '.join(map(str, PACKED_DTYPES))})"
        )
    if bias is not None and (
        bias.shape != (packed.out_features,)
        or bias.dtype != x.dtype
        or bias.device != x.device
        or not bias.is_contiguous()
    ):
        raise InputError(
            f"bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}; needed: contiguous ({packed.out_features},) "
            f"{x.dtype} on {x.device}"
        )


def linear24(x: Tensor, packed: Packed24, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``y = x W^T + bias`` with W packed 2:4.

    Args:
        x: ``[..., in_features]``, the packed weight's dtype and device, any strides.
        packed: the weight, from :func:`sparsert.ops.pack`.
        bias: ``[out_features]`` or None.
        backend: ``auto``, ``native``, ``triton`` or ``dense``; see :func:`explain`.

    Returns:
        ``[..., out_features]``, dtype of x; fp32 accumulation, deterministic.

    Raises:
        InputError: something does not fit; the message says what.
        UnsupportedError: the named backend cannot run here.

    Example:
        >>> from sparsert import ops
        >>> weight = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
        >>> ops.linear24(torch.ones(1, 4), ops.pack(weight)).tolist()
        [[3.0]]
    """
    check_linear24(x, packed, bias)
    y: Tensor = torch.ops.sparsert.linear24(
        x, packed.values, packed.metadata, bias, packed.out_features, packed.in_features, backend
    )
    return y


def linear24_open(
    x: Tensor | Tiled | DeferredNorm,
    packed: Packed24,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
    tiled: bool = False,
    backend: str = "auto",
) -> Tensor | Tiled:
    """A packed linear layer at the start of a sub-block: perhaps a norm's division before it, an activation behind it.

    On a GPU it is one kernel up to batch 16, and above that if the activation is a SiLU gate. Inference only: where a
    gradient is wanted, or another kernel runs the layer, the parts run one after the other.

    Args:
        x: ``[..., in_features]``, as for :func:`linear24`, in tiles, or a norm's deferred result.
        packed: the weight. If ``gated``, gate and up with their row tiles in turn: 16 outputs of the gate, the
            same 16 of up, and so on (:func:`sparsert.formats.interleave_outputs`); ``out_features`` is both together.
        bias: ``[out_features]`` in the weight's order, or None.
        activation: one of :data:`sparsert.ops.ACTIVATIONS`, or None.
        gated: return ``activation(gate) * up``.
        tiled: the result may be in tiles, where that is worth it.

    Returns:
        ``[..., out_features]``, or half as many values if ``gated``; dtype of x.

    Raises:
        InputError, UnsupportedError: as for :func:`linear24`; an unknown activation, or a gate without one.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r} is not known; choose of {', '.join(ACTIVATIONS)}")
    if gated and activation is None:
        raise InputError(f"a gate needs an activation; choose of {', '.join(ACTIVATIONS)}")
    norm = x if isinstance(x, DeferredNorm) else None
    given = norm.weighted if norm is not None else x
    assert not isinstance(given, DeferredNorm)
    if not fuses24(given, backend):
        rows = to_rows(given) if norm is None else norm.resolve()
        kernel = _gemm_kernel(rows, packed, backend) if gated and activation == "silu" else None
        if kernel is not None:
            check_linear24(rows, packed, bias)
            flat = rows.reshape(-1, packed.in_features)
            y = _gemm_linear(
                kernel, flat, packed.values, packed.metadata, bias, packed.out_features, packed.in_features,
                kind=ACTIVATIONS.index("silu"), gated=True,
            )  # fmt: skip
            return y.view((*rows.shape[:-1], -1))
        y = linear24(rows, packed, bias, backend=backend)
        return y if activation is None else activate(y, activation, gated=gated, interleaved=True)
    shape = torch.Size((*given.shape[:-1], packed.out_features // (2 if gated else 1)))
    kind = -1 if activation is None else ACTIVATIONS.index(activation)
    result = _room(shape, given, tiled)
    _step(given, packed, bias, result, kind=kind, gated=gated, norm=norm)
    return result


def linear24_close(
    x: Tensor | Tiled,
    packed: Packed24,
    bias: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | DeferredNorm]:
    """A packed linear layer at the end of a sub-block, the residual addition, and the RMSNorm behind it.

    On a GPU, in bfloat16 and where ``mma_sp`` runs the layer, one kernel does all but the norm's division, which it
    leaves to the next layer. In float16 the undivided stream could overflow, so there and elsewhere the parts run one
    after the other.

    Args:
        x: ``[..., in_features]``, as for :func:`linear24`, or in tiles.
        packed, bias: the layer.
        stream: ``[..., out_features]``: the residual stream.
        weight: ``[out_features]`` of the norm.
        eps: of the norm.

    Returns:
        (new stream, its norm): the second is a tensor, or deferred.

    Raises:
        InputError, UnsupportedError: as for :func:`linear24`.
    """
    data = _data(x)
    if (
        not fuses24(x, backend)
        or data.dtype != torch.bfloat16
        or weight.dtype != data.dtype
        or packed.out_features % 8
        or not stream.is_contiguous()
    ):
        return residual_norm(linear24(to_rows(x), packed, bias, backend=backend), stream, weight, eps)
    rows = x.shape[:-1].numel()
    extension: Any = native.module()
    with torch.cuda.device(data.device):
        parts = extension.linear24_parts(rows, packed.out_features, packed.in_features)
    new_stream, weighted = torch.empty_like(stream), _room(stream.shape, stream, True)
    squares = torch.empty((rows, parts), dtype=torch.float32, device=data.device)
    _step(x, packed, bias, new_stream, residual=stream, norm_weight=weight, weighted=weighted, squares=squares)
    return new_stream, DeferredNorm(weighted, squares, eps)


def fuses24(x: Tensor | Tiled, backend: str = "auto") -> bool:
    """Whether one CUDA kernel runs a packed layer together with what stands before and behind it.

    Args:
        x: ``[..., width]``: as many rows, of such a dtype, on such a device.
        backend: of the layer.
    """
    data, rows = _data(x), x.shape[:-1].numel()
    return rows > 0 and native.fuses(data) and choose(data.device, data.dtype, rows, backend).kernel == "mma_sp"


def _gemm_kernel(x: Tensor, packed: Packed24, backend: str) -> str | None:
    """The kernel for prompts that runs a packed layer and may be called without the operator around it, or None."""
    rows, weights = x.shape[:-1].numel(), packed.out_features * packed.in_features
    if rows == 0 or not native.fuses(x):
        return None
    kernel = choose(x.device, x.dtype, rows, backend, weights).kernel
    return kernel if kernel in _GEMMS else None


def _data(x: Tensor | Tiled) -> Tensor:
    return x.data if isinstance(x, Tiled) else x


def _room(shape: torch.Size, like: Tensor | Tiled, tiled: bool) -> Tensor | Tiled:
    """Room for a result, in tiles if that is allowed and worth it."""
    if tiled and worth_tiling(shape[:-1].numel(), shape[-1]):
        return empty_tiles(shape, _data(like))
    return _data(like).new_empty(shape)


def _step(
    x: Tensor | Tiled,
    packed: Packed24,
    bias: Tensor | None,
    y: Tensor | Tiled,
    *,
    kind: int = -1,
    gated: bool = False,
    norm: DeferredNorm | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    weighted: Tensor | Tiled | None = None,
    squares: Tensor | None = None,
) -> None:
    """Launch the kernel; tensors are checked against the weight, the rest is the callers'."""
    data, rows = _data(x), x.shape[:-1].numel()
    check_linear24(data.new_empty((0, x.shape[-1])) if isinstance(x, Tiled) else data, packed, bias)
    flat = data if isinstance(x, Tiled) else native.aligned_rows(data.reshape(-1, packed.in_features), 8)
    result = y if weighted is None else weighted
    extension: Any = native.module()
    with torch.cuda.device(data.device):
        extension.linear24_step_cuda(
            packed.values.data_ptr(), packed.metadata.data_ptr(), flat.data_ptr(), native.address(bias),
            _data(y).data_ptr(), rows, packed.out_features, packed.in_features, packed.in_features
            if isinstance(x, Tiled) else flat.stride(0), kind, gated,
            0 if norm is None else norm.squares.data_ptr(), 0 if norm is None else norm.squares.shape[-1],
            0.0 if norm is None else norm.eps, native.address(residual), native.address(norm_weight),
            0 if weighted is None else _data(weighted).data_ptr(), native.address(squares), isinstance(x, Tiled),
            isinstance(result, Tiled), dtype_code(data.dtype), native.stream(data.device),
        )  # fmt: skip


def explain(
    out_features: int,
    in_features: int,
    batch: int,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Choice:
    """Say which kernel :func:`linear24` runs for a shape, and why not a preferred one.

    Args:
        out_features, in_features: shape of the weight.
        batch: rows of x.

    Returns:
        A :class:`~sparsert.ops.choice.Choice`; print it.

    Raises:
        UnsupportedError: nothing can run it, or the named backend cannot.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        from sparsert.errors import UnsupportedError

        raise UnsupportedError("device='cuda': torch sees no CUDA device here; use device='cpu'")
    choice = choose(device, dtype, batch, backend, out_features * in_features)
    extension: Any = native.module()
    on_gpu = choice.kernel in ("mma_sp", *_GEMMS)
    multiprocessors, capability = _device_facts(device) if on_gpu else (0, 0)
    if choice.kernel == "wgmma_sp":
        tile = extension.gemm24_choice(batch, out_features, in_features, multiprocessors)
    elif choice.kernel == "mma_sp_gemm":
        *_, tile = extension.gemm24_mma_choice(batch, out_features, in_features, multiprocessors, capability)
    elif choice.kernel == "mma_sp":
        tile = extension.linear24_choice(batch, out_features, in_features, multiprocessors, capability)
    else:
        return choice
    return Choice(choice.kernel, f"{choice.summary}; tile {tile}", choice.rejected)


def _device_facts(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, compute capability as 90)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major * 10 + properties.minor
