"""A module's parameters and buffers as one row of bytes, so that a whole network moves by one copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Vectorised loads want their tensors aligned, and a view as another dtype wants it of every row.
_ALIGNED, _ROW_ALIGNED = 64, 256


@dataclass(frozen=True)
class Field:
    """Where one tensor lies in a row.

    Attributes:
        name: As `named_parameters` and `named_buffers` give it.
        shape: Of the tensor.
        dtype: Of the tensor.
        strides: Within the row, in elements; float kernels of convolutions are channels_last.
        offset: In bytes from the row's beginning.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SlotLayout:
    """Where each tensor of a module lies in a row of `nbytes` bytes; equal for modules of equal structure."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, module: nn.Module) -> SlotLayout:
        """Lay out all parameters and buffers, those that are not saved too."""
        fields, offset = [], 0
        for name, tensor in tensors_of(module).items():
            field = Field(name, tuple(tensor.shape), tensor.dtype, _strides(tensor), offset)
            fields.append(field)
            offset += _rounded(field.nbytes, _ALIGNED)
        return cls(tuple(fields), _rounded(max(offset, 1), _ROW_ALIGNED))

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return each tensor as a view.

        Args:
            rows: (nbytes,) or (N, nbytes) contiguous uint8.

        Returns:
            By name, of the tensor's own shape, or (N, *shape).
        """
        views = {}
        for field in self.fields:
            typed = rows[..., field.offset : field.offset + field.nbytes].view(field.dtype)
            size, strides = typed.shape[:-1] + field.shape, (*typed.stride()[:-1], *field.strides)
            views[field.name] = typed.as_strided(size, strides, typed.storage_offset())
        return views

    def pack(self, module: nn.Module, row: Tensor) -> None:
        """Copy a module's tensors into a (nbytes,) uint8 row of the same device."""
        views = self.views(row)
        with torch.no_grad():
            for name, tensor in tensors_of(module).items():
                views[name].copy_(tensor)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; one that two modules share has both names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def bind(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place of a module's parameters and buffers; the module then computes on their memory."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    if tensor.dim() == 4 and tensor.is_floating_point():
        _, channels, height, width = tensor.shape
        return (channels * height * width, 1, width * channels, channels)
    return tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim()))


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
