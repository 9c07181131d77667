"""Decoder architectures as data, one forward for all of them, and the loader that packs them."""

from sparsert.models.config import DecoderConfig, LinearShape, RopeConfig
from sparsert.models.decoder import DecoderModel
from sparsert.models.loader import load_model
from sparsert.models.placement import resolve_device, resolve_dtype
from sparsert.models.report import LinearRecord, LoadReport

__all__ = [
    "DecoderConfig",
    "DecoderModel",
    "LinearRecord",
    "LinearShape",
    "LoadReport",
    "RopeConfig",
    "load_model",
    "resolve_device",
    "resolve_dtype",
]
