"""vLLM: our checkpoints run in its engine, on our kernels.

    pip install 'sparsert[vllm]'
    vllm serve DIR                                  quant_method: sparsert, or sparse-24-bitmask
    vllm serve DENSE --quantization sparsert        dense weights with 2:4 zeros, packed while loading

Nothing has to be imported: vLLM looks for the entry point ``vllm.general_plugins`` in each of its processes and calls
:func:`register`. From then on the quantization method "sparsert" exists. What it gives up beside ``sparsert.LLM``: the
norms, the gate and the residual addition stay kernels of their own. What it gains is vLLM: batching of requests as
they come, paged caches, several GPUs and hosts, an OpenAI server, adapters.

vLLM removed its own 2:4 support in 2026, and with it the reader of compressed-tensors' ``sparse-24-bitmask``; such
checkpoints are claimed before vLLM refuses them.

Written against vLLM 0.24 (``base_config.QuantizationConfig``, ``linear.LinearMethodBase``). The layers are in
:mod:`sparsert.integrations.vllm_layers`, which is imported with the first layer: vLLM loads plugins long before it
knows what it will run, and in processes that never build a model.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from sparsert.checkpoint.quantization import QUANT_METHOD
from sparsert.errors import UnsupportedError
from sparsert.integrations.vllm_checkpoint import find_packed, is_ours, is_packed, refuse_layouts_of_their_own
from sparsert.integrations.vllm_report import LayerReport

#: The release it was run on; interfaces of plugins change from one to the next.
TESTED_VERSION = (0, 24)

# a name below vllm's, or vLLM's handler would not print it
_logger = init_logger("vllm.sparsert")


def register() -> None:
    """Make the quantization method "sparsert" known to vLLM; once or several times makes no difference."""
    register_quantization_config(QUANT_METHOD)(SparsertConfig)


class SparsertConfig(QuantizationConfig):
    """vLLM's view of a checkpoint: which of its linear layers are packed.

    Args:
        packed: the checkpoint holds packed weights; otherwise dense ones, of which those that are 2:4 get packed.

    Attributes:
        report: what became of the linear layers of this process.

    Raises:
        UnsupportedError: vLLM is older than any release this was written for.
    """

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        _check_version(str(vllm.__version__))
        self.packed = packed
        self.report = LayerReport()
        #: Name of a packed module -> (outputs, inputs); None until the headers were read.
        self.stored: dict[str, tuple[int, int]] | None = None

    @classmethod
    def get_name(cls) -> str:
        """Of the method."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes a model may run in."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability of the oldest GPUs, times ten."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Configuration files beside ``config.json``: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparsertConfig:
        """From a checkpoint's ``quantization_config``.

        Raises:
            CheckpointError: our format in a version that is not known here.
            UnsupportedError: a checkpoint of another kind.
        """
        return cls(packed=is_packed(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint whose configuration names another method; vLLM asks before its own methods."""
        return QUANT_METHOD if is_ours(hf_quant_cfg, user_quant) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read from the headers of the weight files which layers are packed.

        Raises:
            CheckpointError: the checkpoint is damaged.
            UnsupportedError: its weights or its layout cannot run in vLLM, or its headers cannot be read.
        """
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        if hf_config is not None:
            content = hf_config.to_dict()
            for part in (content, content.get("text_config") or {}):
                refuse_layouts_of_their_own(part)
        self.stored = find_packed(get_safetensors_params_metadata(model_name, revision=revision), model_name)
        if self.packed and not self.stored:
            raise UnsupportedError(
                f"{model_name}: its configuration says that weights are packed, but no packed weight was found in "
                "safetensors files; give vLLM a directory that holds them, or a hub id that can be reached"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as the model class renames the checkpoint's."""
        if self.stored is not None:
            self.stored = hf_to_vllm_mapper.apply_dict(self.stored)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; vLLM asks for every layer that has weights, and for attention.

        Args:
            layer: being made.
            prefix: its name in vLLM's model.

        Raises:
            UnsupportedError: a packed weight belongs to a layer that is no plain linear.
        """
        from sparsert.integrations.vllm_layers import LinearBase, make_method

        if self.stored is None:
            raise UnsupportedError(
                "vLLM did not say which files it will load, so it is not known what is packed; vLLM "
                f"{'.'.join(map(str, TESTED_VERSION))} does: this one is {vllm.__version__}"
            )
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            stored = {part: self.stored[part] for part in parts if part in self.stored}
            return make_method(parts, stored, pack_dense=not self.packed, report=self.report)
        inside = [name for name in self.stored if name == prefix or name.startswith(f"{prefix}.")]
        if inside and prefix:
            raise UnsupportedError(
                f"{inside[0]} is packed, and vLLM runs it in a {type(layer).__name__}, which takes dense weights only; "
                "write the checkpoint with it dense: sparsert convert DIR OUT --to dense"
            )
        return None

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the linears that vLLM joins in one."""
        parent, _, own = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(own, [own])
        return [f"{parent}.{name}" if parent else name for name in names]


def _check_version(found: str) -> None:
    """Refuse a vLLM that is too old, and say so once if it is newer than what was tested."""
    tested = ".".join(map(str, TESTED_VERSION))
    try:
        release = Version(found).release[:2]
    except InvalidVersion:
        release = ()
    if release == TESTED_VERSION:
        return
    if release and release < TESTED_VERSION:
        raise UnsupportedError(f"sparsert's plugin needs vLLM {tested}, this is {found}; install vllm=={tested}.*")
    _logger.warning_once(f"sparsert's plugin was tested with vLLM {tested}, this is {found}; check what it generates")
