"""``SparseLinear``: a linear layer that holds a packed 2:4 weight and nothing else.

A drop-in for ``torch.nn.Linear`` in inference and under adapters: gradients reach the input and the
bias, the weight is frozen. There is no dense copy beside the packed one. Other backends exist so that
a user can compare on their own GPU: ``torch`` hands the weight to ``torch.sparse`` (its own second
format, made once), ``dense`` unpacks for every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.errors import InputError
from sparsert.formats import Packed24, packed_nbytes, packed_shapes

BACKENDS = (*ops.BACKENDS, "torch")


class SparseLinear(nn.Module):
    """``y = x W^T + bias`` with W packed 2:4.

    Args:
        in_features, out_features: width of the input and output.
        bias: whether there is a bias.
        backend: ``auto``, ``native``, ``triton``, ``dense`` or ``torch``.
        device, dtype: of the weight; bf16, fp16 or (CPU and ``dense``) fp32.

    Made empty, to be filled from a state dict; use :meth:`from_linear` or :meth:`from_packed` otherwise.

    Shape:
        x ``[..., in_features]`` -> ``[..., out_features]``, same dtype and device as the weight.

    Example:
        >>> linear = torch.nn.Linear(8, 4)
        >>> mask = torch.tensor([1, 0, 0, 1]).repeat(4, 2)
        >>> SparseLinear.from_linear(linear, mask)(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    values: Tensor
    metadata: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_backend(backend)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        values_shape, metadata_shape = packed_shapes(out_features, in_features)
        self.register_buffer("values", torch.empty(values_shape, device=device, dtype=dtype))
        self.register_buffer("metadata", torch.empty(metadata_shape, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._semi_structured: Any = None  # torch.sparse's own copy, only for backend="torch"

    @classmethod
    def from_packed(cls, packed: Packed24, bias: Tensor | None = None, *, backend: str = "auto") -> SparseLinear:
        """Wrap a packed weight; no copy is made.

        Raises:
            InputError: unknown backend, or a bias that does not fit.
        """
        layer = cls(packed.in_features, packed.out_features, bias=False, backend=backend, device="meta")
        layer.values, layer.metadata = packed.values, packed.metadata
        if bias is not None:
            if bias.shape != (packed.out_features,):
                raise InputError(f"bias has shape {tuple(bias.shape)}, the weight {packed.out_features} outputs")
            layer.bias = nn.Parameter(
                bias.detach().to(device=packed.device, dtype=packed.dtype).contiguous(), requires_grad=False
            )
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | None = None, *, name: str = "weight", backend: str = "auto"
    ) -> SparseLinear:
        """Pack a linear layer on the device where it is.

        Args:
            linear: any module with ``weight`` ``[out, in]`` and ``bias``.
            mask: 2:4 mask of the weight's shape; without it the weight's zeros are the mask.
            name: tensor name for errors.

        Raises:
            SparsityError: some group of four inputs keeps three or four values.
            InputError: the weight cannot be packed; the message says why.
        """
        bias = linear.bias.detach() if linear.bias is not None else None
        return cls.from_packed(ops.pack(linear.weight.detach(), mask, name=name), bias, backend=backend)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, unpacked anew at every access.

        For code that looks at a linear's weight (its dtype in T5, its device in peft), not for computing with it:
        nothing keeps the tensor, so what is written to it is lost.
        """
        weight: Tensor = torch.ops.sparsert.unpack24(self.values, self.metadata, self.out_features, self.in_features)
        return weight

    def packed(self) -> Packed24:
        """The weight, sharing this module's storage."""
        return Packed24(self.values, self.metadata, self.out_features, self.in_features)

    def to_linear(self) -> nn.Linear:
        """A dense ``torch.nn.Linear`` with the same values, on the same device."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(ops.unpack(self.packed()), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight as held here, metadata and padding included."""
        return packed_nbytes(self.out_features, self.in_features, self.values.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.backend == "torch":
            return torch.nn.functional.linear(x, self._torch_weight(), self.bias)
        # the operator itself, without the checks of ops.linear24: this is the hot path
        y: Tensor = torch.ops.sparsert.linear24(
            x, self.values, self.metadata, self.bias, self.out_features, self.in_features, self.backend
        )
        return y

    def _torch_weight(self) -> Tensor:
        if self._semi_structured is None or self._semi_structured.device != self.values.device:
            from sparsert.formats import to_semi_structured

            capability = torch.cuda.get_device_capability(self.values.device) if self.values.is_cuda else (0, 0)
            self._semi_structured = to_semi_structured(
                self.packed(), backend="cutlass" if capability[0] == 8 else "cusparselt"
            )
        weight: Tensor = self._semi_structured
        return weight

    def extra_repr(self) -> str:
        dense_bytes = self.in_features * self.out_features * self.values.dtype.itemsize
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={str(self.values.dtype).removeprefix('torch.')}, backend={self.backend}, "
            f"{self.weight_nbytes:,} bytes ({self.weight_nbytes / dense_bytes:.3f} of dense)"
        )


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
