"""The changes of a sensitivity report as a picture, drawn by matplotlib, which is optional and loaded here only."""

from __future__ import annotations

from pathlib import Path

from sparsert.compress.sensitivity import Sensitivity

_DOTS_PER_INCH = 150

#: Okabe and Ito's colours, told apart by nearly everyone.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")


def draw(sensitivity: Sensitivity, path: Path) -> None:
    """Draw two panels over the blocks: loss without each, and loss with a mask on each layer.

    Args:
        sensitivity: of a model.
        path: PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 6), layout="constrained")
    blocks_axes, masks_axes = canvas.subplots(2, 1, sharex=True)
    removals = [change for change in sensitivity.changes if not change.linear]
    blocks_axes.bar(
        [change.block for change in removals], [change.loss_increase for change in removals], color="#8a94a6"
    )
    blocks_axes.set_title("increase of the loss without each block", loc="left", fontsize=10)
    kinds = list(dict.fromkeys(change.name.rpartition(".")[2] for change in sensitivity.changes if change.linear))
    for number, kind in enumerate(kinds):
        points = [change for change in sensitivity.changes if change.linear and change.name.endswith(f".{kind}")]
        masks_axes.plot(
            [change.block for change in points],
            [change.loss_increase for change in points],
            marker=".",
            linewidth=1.0,
            color=_COLOURS[number % len(_COLOURS)],
            label=kind,
        )
    masks_axes.set_title("... with a 2:4 mask on each layer alone", loc="left", fontsize=10)
    masks_axes.set_xlabel("block")
    for axes in (blocks_axes, masks_axes):
        # the first block costs a thousand times what one in the middle does
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_axisbelow(True)
        axes.set_ylabel("nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dde1e7", linewidth=0.8)
    if kinds:
        masks_axes.legend(frameon=False, fontsize=8, ncols=4)
    canvas.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
