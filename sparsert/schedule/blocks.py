"""Block lists: the text forms in which people name transformer blocks.

Two forms exist. A list for the command line, ``21-25,27``, whose ranges include both ends. And the
order file that Shortened LLaMA publishes for each model: one line of comma-separated block numbers
without a header, the block to remove first standing first, in the numbering of the unpruned model;
how many to take from it is said separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsert.errors import InputError

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")

#: Longest range that is expanded; no model comes near, and "1-99999999999" must not fill the memory.
_MOST_BLOCKS = 100_000

#: Longest order file that is read: every block of the largest model fits a hundred times.
_MOST_ORDER_BYTES = 100_000

_GUARDED_FIRST = 4
_GUARDED_LAST = 2


def guarded_blocks(num_blocks: int) -> frozenset[int]:
    """Blocks that are not removed unless forced: 0-3 and the last two.

    Example:
        >>> sorted(guarded_blocks(32))
        [0, 1, 2, 3, 30, 31]
    """
    first = range(min(_GUARDED_FIRST, num_blocks))
    last = range(max(0, num_blocks - _GUARDED_LAST), num_blocks)
    return frozenset(first) | frozenset(last)


def check_block_indices(indices: Sequence[int], num_blocks: int, verb: str) -> None:
    """Check that each index names a block of the model, once.

    Raises:
        InputError: naming the first index that does not, and the allowed range.
    """
    seen: set[int] = set()
    for index in indices:
        if not 0 <= index < num_blocks:
            raise InputError(
                f"cannot {verb} block {index}: the model has {num_blocks} blocks, numbered 0-{num_blocks - 1}"
            )
        if index in seen:
            raise InputError(f"cannot {verb} block {index} twice; name each block once")
        seen.add(index)


def parse_block_list(text: str) -> tuple[int, ...]:
    """Block numbers of a list such as ``"21-25,27"``; ranges include both ends.

    Returns:
        The numbers in the order given.

    Raises:
        InputError: a part is neither a number nor an ascending range, or a block is named twice.

    Example:
        >>> parse_block_list("21-25,27")
        (21, 22, 23, 24, 25, 27)
    """
    blocks: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"block list {text!r}: {part.strip()!r} is neither a block number nor a range; write it like 21-25,27"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"block list {text!r}: range {first}-{last} runs backwards; write {last}-{first}")
        if last - first >= _MOST_BLOCKS:
            raise InputError(f"block list {text!r}: range {first}-{last} is longer than any model")
        for block in range(first, last + 1):
            if block in blocks:
                raise InputError(f"block list {text!r}: block {block} is named twice; name each block once")
            blocks.append(block)
    return tuple(blocks)


def format_block_list(blocks: Iterable[int]) -> str:
    """The shortest list that :func:`parse_block_list` reads as ``blocks`` (sorted).

    Example:
        >>> format_block_list([27, 21, 22, 23, 24, 25])
        '21-25,27'
    """
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_block_order(path: str | Path, count: int, num_blocks: int, *, force: bool = False) -> tuple[int, ...]:
    """The first ``count`` blocks that an order file says to remove.

    Args:
        path: one line of comma-separated block numbers, no header, the first to remove standing first.
        count: how many blocks to remove; 0 removes none.
        num_blocks: blocks of the unpruned model, whose numbering the file uses.
        force: also take the guarded blocks (0-3 and the last two), which are passed over otherwise.

    Returns:
        The blocks to remove, in the file's order.

    Raises:
        InputError: the file cannot be read or is no such list, it names a block that the model does
            not have or one twice, or fewer than ``count`` candidates are left.

    Source: Kim et al., "Shortened LLaMA" (2024); guarded blocks: its "+" rule.
    """
    order = read_order_file(path)
    try:
        check_block_indices(order, num_blocks, "remove")
    except InputError as error:
        raise InputError(f"block order {path}: {error}") from None
    guarded = frozenset() if force else guarded_blocks(num_blocks)
    candidates = [block for block in order if block not in guarded]
    if not 0 <= count <= len(candidates):
        passed_over = len(order) - len(candidates)
        hint = f" ({passed_over} guarded ones, 0-3 and the last two, are passed over)" if passed_over else ""
        raise InputError(
            f"block order {path}: asked to remove {count} blocks, but it offers {len(candidates)} candidates{hint}; "
            f"ask for 0-{len(candidates)}"
        )
    return tuple(candidates[:count])


def read_order_file(path: str | Path) -> list[int]:
    """All block numbers of an order file, the first to remove standing first.

    Raises:
        InputError: the file cannot be read or is no such list.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_ORDER_BYTES:
            raise InputError(f"block order {path}: has {path.stat().st_size} bytes; an order file is one short line")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"block order {path}: cannot be read ({error}); give a text file such as 24,26,25,10"
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) != 1:
        raise InputError(
            f"block order {path}: has {len(lines)} lines; one line of comma-separated block numbers is needed, "
            f"without a header, the first to remove standing first"
        )
    order = []
    for part in lines[0].strip().rstrip(",").split(","):
        if not re.fullmatch(r"[0-9]{1,6}", part.strip()):
            raise InputError(f"block order {path}: {part.strip()[:40]!r} is no block number; write it like 24,26,25,10")
        order.append(int(part.strip()))
    return order


def write_order_file(path: str | Path, order: Sequence[int]) -> None:
    """Write an order file, which :func:`read_block_order` and other readers of the format read.

    Args:
        path: file to write; its directory exists.
        order: block numbers, the first to remove standing first.

    Raises:
        InputError: the list is empty, or the file cannot be written.
    """
    if not order:
        raise InputError(f"block order {path}: there is no block to write")
    try:
        Path(path).write_text(",".join(str(block) for block in order), encoding="utf-8")
    except OSError as error:
        raise InputError(f"block order {path}: cannot be written ({error.strerror}); give another path") from error
