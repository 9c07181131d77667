"""The 2:4 masks and the layer plan of the default model, which are files of this package.

Weights of the default model are fetched (``default_model.py``); what makes it a pruned one is small enough to come
along: ``sparsert/data/smollm2-135m-instruct`` holds

    masks.npz   one mask for each of the 210 linear weights of its blocks, MaskLLM's form (``masks.py``)
    plan.json   the blocks that run, as ``LayerPlan.to_json`` writes them
    README.md   the model card: what the masks were learned on, and what they cost

A mask of one of six patterns a group carries log2(6) bits, 8.6 MB in all; deflate brings the bits, 13.3 MB, to 9.0 MB
even if the patterns are random, so the file needs no form of its own. It is read where it lies, which a package with a
compiled extension can rely on: it is never run from a zip.

An npz says neither shapes nor which model it is of. Both sources of the base give the same names and shapes, in bf16
from the hub and restored from 4 bits out of the package index, and a mask holds for both: it names positions. A base of
other names or shapes is refused.
"""

from __future__ import annotations

import dataclasses
import zipfile
from importlib import resources
from pathlib import Path

from sparsert.checkpoint.default_model import DEFAULT_MODEL
from sparsert.checkpoint.masks import DAMAGE, MaskFile, read_maskllm
from sparsert.checkpoint.reader import Checkpoint
from sparsert.errors import CheckpointError, InputError
from sparsert.schedule import LayerPlan

#: Where the files lie, in an installed package as in a source tree.
DIRECTORY = Path(str(resources.files("sparsert"))) / "data" / "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class DefaultMasks:
    """What turns the base of the default model into the pruned one.

    Attributes:
        masks: the opened mask file.
        plan: the blocks that run.
    """

    masks: MaskFile
    plan: LayerPlan

    def check(self, checkpoint: Checkpoint) -> None:
        """Check that a checkpoint is the model that masks and plan were made for, by names and shapes.

        Raises:
            CheckpointError: it is another one.
        """
        try:
            self.masks.check({name: checkpoint.shape(name) for name in checkpoint.block_linears()})
            if self.plan.num_blocks != checkpoint.num_blocks:
                raise CheckpointError(f"it has {checkpoint.num_blocks} blocks, the plan {self.plan.num_blocks}")
        except CheckpointError as error:
            raise CheckpointError(
                f"{checkpoint.directory}: is not {DEFAULT_MODEL}, which the masks of this package are for ({error}); "
                "remove that directory and the model is fetched again, or run what lies there with --model"
            ) from error


def read_default_masks() -> DefaultMasks:
    """Open the masks and the plan that come with this package, and check every byte of them (50 ms).

    Raises:
        CheckpointError: a file is missing or damaged.

    Example:
        >>> from sparsert.checkpoint import open_checkpoint, fetch_default_model
        >>> read_default_masks().check(open_checkpoint(fetch_default_model()))  # doctest: +SKIP
    """
    file, plan = DIRECTORY / "masks.npz", DIRECTORY / "plan.json"
    try:
        missing = [path.name for path in (file, plan) if not path.is_file()]
        if missing:
            raise CheckpointError(f"missing: {' and '.join(missing)}")
        masks = read_maskllm(file)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{file.name}: {damaged} has another checksum")
        return DefaultMasks(masks, LayerPlan.from_json(plan.read_text(encoding="utf-8")))
    except (CheckpointError, InputError, *DAMAGE) as error:
        raise CheckpointError(
            f"{DIRECTORY}: the masks of the default model, a part of this package, cannot be used ({error}); install "
            "sparsert again, or run the model unpruned (--masks none)"
        ) from error
