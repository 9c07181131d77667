"""Triton linear layer straight from the packed 2:4 layout: the portable second implementation.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n]          W packed 2:4, accumulated in float32

Triton has no sparse dot, so the kernel spends the tensor cores as a dense layer does and saves only
memory traffic: 9/16 of the bytes of a bf16 weight are read, which is what small batches wait for. A
pair of values and its nibble expand to four positions by selects in registers. The four position
planes are put side by side with ``tl.join``, whose two new axes live inside one thread, so that the
reshape to a dense ``[rows, inputs]`` tile moves nothing and one ``tl.dot`` per row half does the
rest. The alternative, four dots of a plane each against ``x[:, p::4]``, needs x in 2-byte strided
loads (four times the load instructions of a skinny layer, whose bottleneck they already are) and
four layout conversions of W where this has one.

The sum over k may run in any order as long as x follows, so inputs are walked in the slot order of
``fragments24``: then weights load in wide accesses and only x, which is small and comes from L2,
is read in pieces of four inputs. Rows g and g + 8 of a row tile arrive in one 64-bit unit and go to
two dots; no shuffle is needed between them.

    program (n, m, s):   W tiles  16 n' .. : [BLOCK_N / 2 rows g | BLOCK_N / 2 rows g + 8] x BLOCK_K
                         x rows   BLOCK_M m ..          inputs: the s-th of split_k equal ranges

Few outputs do not fill a GPU, so k is split when the tiles are fewer than the multiprocessors can
hold; the parts go to a float32 workspace and a second kernel adds them in a fixed order. Results are
therefore deterministic, and launches are safe under CUDA graph capture: tile sizes come from a table,
never from timing. What it gives up: tensor-core sparsity, hence no gain where compute rules (batch
above a hundred or so), and several times the arithmetic of ``mma.sp`` per byte.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsert.kernels.fragments24 import interpreted, load_pairs, slot_input, value_offset, word_offset

#: dtypes of x, values and y. float32 multiplies in IEEE precision, without tensor cores.
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Tile(NamedTuple):
    """Sizes of one program and how it is compiled."""

    block_m: int  #: batch rows, at least 16: the smallest side of a tensor-core dot
    block_n: int  #: outputs, a multiple of 32
    block_k: int  #: inputs a step, a multiple of 32
    num_warps: int
    num_stages: int  #: loads in flight, in steps


# Shared memory must stay below 99 KB, what sm_86 and sm_89 have. A stage of the first row is 8 KB of
# values, 1 KB of metadata and 4 KB of x. Compiled for sm_80 and sm_90 by Triton 3.6 and 3.9: 126-255
# registers, 44-84 KB, no spills, all three loads asynchronous.
_TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile(16, 64, 128, 4, 4)),
    (32, Tile(32, 64, 128, 4, 4)),
    (64, Tile(64, 64, 128, 4, 3)),
)
# Prompts: what a step expands serves twice as many rows as in the tile for 64, which spills at 128 outputs.
_TILE_LARGE = Tile(128, 128, 64, 8, 3)
_TILE_FLOAT32 = Tile(16, 32, 64, 4, 2)

#: k-steps below which a further split costs more in workspace traffic and launch than it fills.
_MIN_STEPS_PER_SPLIT = 4
_MAX_SPLIT_K = 8


def choose_tile(batch: int, dtype: torch.dtype) -> Tile:
    """Tile for a batch; depends on nothing else, so that results of a shape never change within a process."""
    if dtype == torch.float32:
        return _TILE_FLOAT32
    return next((tile for limit, tile in _TILES if batch <= limit), _TILE_LARGE)


def choose_split_k(programs: int, steps: int, multiprocessors: int) -> int:
    """How many ranges of k share a tile: doubled until two programs a multiprocessor, while ranges stay long enough.

    Args:
        programs: output tiles.
        steps: k-steps of a tile.
        multiprocessors: of the device.
    """
    split = 1
    while split < _MAX_SPLIT_K and programs * split < 2 * multiprocessors and steps >= 2 * split * _MIN_STEPS_PER_SPLIT:
        split *= 2
    return split


@triton.jit
def _expand(first, second, nibbles):
    """Pairs and nibbles [R, G] -> dense bits [R, 4 G], position fastest."""
    position0 = nibbles & 3
    position1 = (nibbles >> 2) & 3
    zero = tl.zeros_like(first)
    # i0 < i1: position 0 can only be the first of a pair, position 3 only the second
    p0 = tl.where(position0 == 0, first, zero)
    p1 = tl.where(position0 == 1, first, tl.where(position1 == 1, second, zero))
    p2 = tl.where(position0 == 2, first, tl.where(position1 == 2, second, zero))
    p3 = tl.where(position1 == 3, second, zero)
    planes = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [R, G, p >> 1, p & 1]
    return tl.reshape(planes, (first.shape[0], first.shape[1] * 4))


# Sizes are left unspecialised: their divisibility buys nothing here (weight addresses are multiples of
# 32 by construction), and every batch of a tile then runs one binary. Only stride_xm widens loads.
@triton.jit(do_not_specialize=["M", "N", "K", "stride_ym", "row_tiles", "units", "blocks_per_split"])
def _linear24_kernel(
    x,  # [M, K], rows stride_xm apart, inputs contiguous
    values,  # 64-bit units, see fragments24
    metadata,  # int32 words
    bias,  # [N] or None
    y,  # [M, N] contiguous in n, rows stride_ym apart; if IS_SPLIT float32 [parts, M, N]
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    row_tiles,
    units,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's tl.dot is wrong in bf16: multiply float32 there
):
    ROWS: tl.constexpr = BLOCK_N // 2  # pairs of rows (g, g + 8)
    GROUPS: tl.constexpr = BLOCK_K // 4
    BLOCKS: tl.constexpr = BLOCK_K // 32
    WORDS: tl.constexpr = BLOCK_K // 16  # metadata words of a pair of rows
    blocks = units * 2
    first_tile = tl.program_id(0) * (BLOCK_N // 16)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)

    # int64 from here on: a vocabulary-sized layer has more than 2^31 values
    values += first_tile.to(tl.int64) * blocks * (128 if WIDE else 64)
    metadata += first_tile.to(tl.int64) * units * 32
    row = tl.arange(0, ROWS)
    tile = row // 8
    g = row % 8
    in_tile = first_tile + tile < row_tiles
    index = tl.arange(0, GROUPS)
    slot = index % 8
    shift = slot // 2 * 4  # of the slot's nibble in its word
    # The words are a flat tile on purpose: in two dimensions neither axis is contiguous, and which one
    # Triton then lays across lanes differs between its versions; the wrong one scatters every access
    # to shared memory in 2-byte stores (seen in the machine code of 3.6 and of 3.9).
    word = tl.arange(0, ROWS * WORDS)
    word_row = word // WORDS
    lane = word_row % 8 * 4 + word % 4
    word_in_tile = first_tile + word_row // 8 < row_tiles
    value_rows = tile * blocks * 64
    word_rows = word_row // 8 * units * 32

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = slot_input(tl.arange(0, BLOCK_K))
    x += m[:, None].to(tl.int64) * stride_xm + k[None, :]
    in_batch = m < M

    low = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)  # outputs of rows g
    high = tl.zeros((BLOCK_M, ROWS), dtype=tl.float32)  # outputs of rows g + 8
    begin = pid_k * blocks_per_split
    for first_block in range(begin, tl.minimum(begin + blocks_per_split, blocks), BLOCKS):
        block = first_block + index // 8
        unit = first_block // 2 + word % WORDS // 4
        if EVEN_K:
            mask = in_tile[:, None]
            word_mask = word_in_tile
            x_mask = in_batch[:, None]
        else:
            mask = in_tile[:, None] & (block < blocks)[None, :]
            word_mask = word_in_tile & (unit < units)
            # groups of four never straddle K, so one comparison a group keeps the loads wide
            x_mask = in_batch[:, None] & (first_block * 8 + k // 4 < K // 4)[None, :]
        offset = value_rows[:, None] + value_offset(block[None, :], g[:, None], slot[None, :])
        low_first, low_second, high_first, high_second = load_pairs(values, offset, mask, WIDE)
        words = tl.load(metadata + word_rows + word_offset(unit, lane, units), mask=word_mask, other=0)
        words = tl.reshape(words, (ROWS, BLOCKS, 1, 2))  # the four q of a half share a word
        words = tl.reshape(tl.broadcast_to(words, (ROWS, BLOCKS, 4, 2)), (ROWS, GROUPS)) >> shift[None, :]
        xs = tl.load(x + first_block * 32, mask=x_mask, other=0.0)

        w_low = _expand(low_first, low_second, words).to(DTYPE, bitcast=True)  # [ROWS, BLOCK_K]
        w_high = _expand(high_first, high_second, words >> 16).to(DTYPE, bitcast=True)
        if UPCAST:
            xs = xs.to(tl.float32)
            w_low = w_low.to(tl.float32)
            w_high = w_high.to(tl.float32)
        low = tl.dot(xs, tl.trans(w_low), low, input_precision="ieee")
        high = tl.dot(xs, tl.trans(w_high), high, input_precision="ieee")

    n_low = (first_tile + tile) * 16 + g
    n_high = n_low + 8
    if HAS_BIAS:
        low += tl.load(bias + n_low, mask=n_low < N, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias + n_high, mask=n_high < N, other=0.0).to(tl.float32)[None, :]
    y += m[:, None].to(tl.int64) * stride_ym
    if IS_SPLIT:
        y += pid_k.to(tl.int64) * M * N
    tl.store(y + n_low[None, :], low.to(y.dtype.element_ty), mask=in_batch[:, None] & (n_low < N)[None, :])
    tl.store(y + n_high[None, :], high.to(y.dtype.element_ty), mask=in_batch[:, None] & (n_high < N)[None, :])


@triton.jit(do_not_specialize=["M", "N", "stride_ym"])
def _add_parts_kernel(
    parts,  # float32 [SPLIT_K, M, N]
    bias,  # [N] or None
    y,  # [M, N], rows stride_ym apart
    M,
    N,
    stride_ym,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = sum of the parts in ascending order + bias: one order, so one result."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(parts + (part * M + m) * N + n, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + m * stride_ym + n, total.to(y.dtype.element_ty), mask=mask)


def linear24(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    split_k: int | None = None,
) -> Tensor:
    """``y = x W^T + bias`` with W in the packed 2:4 layout.

    Args:
        x: ``[M, in_features]`` on a GPU (any device in the interpreter); rows may be strided. An x whose
            inputs are not contiguous is copied first.
        values, metadata: of a ``Packed24``; same device and dtype as x.
        out_features, in_features: of the weight, before padding.
        bias: ``[out_features]``, any floating dtype, added in float32.
        out: ``[M, out_features]`` to write to, x's dtype, outputs contiguous; made if not given.
        split_k: ranges of k computed apart and then added; chosen by shape if not given.

    Returns:
        ``[M, out_features]`` in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit. ``sparsert.ops.linear24`` explains such things to users.
    """
    if x.dim() != 2 or x.shape[1] != in_features or x.dtype != values.dtype or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"linear24: got x {tuple(x.shape)} {x.dtype}, need [M, {in_features}] in the values' dtype, {values.dtype}"
        )
    M = x.shape[0]
    if out is None:
        out = torch.empty((M, out_features), dtype=x.dtype, device=x.device)
    elif out.shape != (M, out_features) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"linear24: got out {tuple(out.shape)} {out.dtype}, need [{M}, {out_features}] {x.dtype}")
    if M == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()

    tile = choose_tile(M, x.dtype)
    row_tiles, blocks = values.shape[0], values.shape[1]
    steps = triton.cdiv(blocks * 32, tile.block_k)
    programs_n, programs_m = triton.cdiv(row_tiles * 16, tile.block_n), triton.cdiv(M, tile.block_m)
    if split_k is None:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        split_k = choose_split_k(programs_n * programs_m, steps, multiprocessors)
    steps_per_split = triton.cdiv(steps, split_k)
    # the interpreter cuts float32 to bf16 where a GPU rounds: let it write float32 and torch round
    emulated = interpreted(_linear24_kernel)
    y = torch.empty_like(out, dtype=torch.float32) if emulated else out
    parts = torch.empty((split_k, M, out_features), dtype=torch.float32, device=x.device) if split_k > 1 else None

    # Triton launches on the current device, which need not be x's
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _linear24_kernel[(programs_n, programs_m, split_k)](
            x,
            values.view(torch.int64),
            metadata,
            bias if split_k == 1 else None,
            y if parts is None else parts,
            M,
            out_features,
            in_features,
            x.stride(0),
            y.stride(0) if parts is None else out_features,
            row_tiles,
            blocks // 2,
            steps_per_split * (tile.block_k // 32),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            IS_SPLIT=split_k > 1,
            DTYPE=_TRITON_DTYPES[x.dtype],
            WIDE=x.dtype == torch.float32,
            HAS_BIAS=bias is not None and split_k == 1,
            EVEN_K=in_features % tile.block_k == 0,
            UPCAST=emulated,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if parts is not None:
            _add_parts_kernel[(triton.cdiv(out_features, 1024), M)](
                parts,
                bias,
                y,
                M,
                out_features,
                y.stride(0),
                SPLIT_K=split_k,
                HAS_BIAS=bias is not None,
                BLOCK=1024,
            )
    return out if y is out else out.copy_(y)
