"""Decoder architectures as data, one forward for all of them, and the loader that packs them."""

from sparsert.models.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    LinearShape,
    MLPConfig,
    NormConfig,
    RopeConfig,
)
from sparsert.models.decoder import DecoderModel
from sparsert.models.loader import load_model
from sparsert.models.placement import resolve_device, resolve_dtype
from sparsert.models.report import LinearRecord, LoadReport

__all__ = [
    "AttentionConfig",
    "BlockConfig",
    "DecoderConfig",
    "DecoderModel",
    "LinearRecord",
    "LinearShape",
    "LoadReport",
    "MLPConfig",
    "NormConfig",
    "RopeConfig",
    "load_model",
    "resolve_device",
    "resolve_dtype",
]
