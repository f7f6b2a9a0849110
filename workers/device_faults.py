"""What an error from a device means: memory that is short for now, or a device that is broken."""

import torch

# Libraries on the device translate its errors each in their own way.
_SHORT = ("CUDA error: out of memory", "[CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "STATUS_ALLOC_FAILED")
_BROKEN = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "CUDA driver error")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SHORT):
        return True
    # A capture that runs out of memory ends with an error of its own.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def is_fault(error: BaseException) -> bool:
    """Whether the device has failed, so that nothing queued on it can be trusted any more."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or any(sign in str(error) for sign in _BROKEN)
