"""Runs PTX on the GPU through CUDA's driver: the very text that the emulator executes, on the same
arrays and argument bytes, so that the two can be compared."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch

from python_tests import ptx

_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"ptx_hardware: no CUDA driver here ({error})") from None
    torch.cuda.init()  # makes torch's context the current one
    torch.zeros(1, device="cuda")
    return driver


def _check(result: int, what: str) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown error').decode()}")


class Program:
    """A module of PTX, compiled by the driver for this GPU."""

    def __init__(self, text: str):
        self._module = ctypes.c_void_p()
        source = ctypes.create_string_buffer(text.encode())
        _check(_driver().cuModuleLoadData(ctypes.byref(self._module), source), "cuModuleLoadData")

    def launch(
        self, name: str, blocks: int, threads: int, args: list[ptx.Packed], shared_bytes: int
    ) -> None:
        """Launches a kernel on copies of the arrays, and copies them back when it is done."""
        arrays = {id(a): a for packed in args for _, a, _ in packed.entries()}
        copies = {
            key: torch.from_numpy(a.reshape(-1).view(np.uint8).copy()).cuda()
            for key, a in arrays.items()
        }
        addresses = {key: copy.data_ptr() for key, copy in copies.items()}
        buffers = [ctypes.create_string_buffer(p.moved(addresses), len(p.data)) for p in args]
        parameters = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        driver, function = _driver(), ctypes.c_void_p()
        found = driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
        _check(found, f"cuModuleGetFunction({name})")
        if shared_bytes > 48 << 10:
            allowed = driver.cuFuncSetAttribute(function, _MOST_DYNAMIC_SHARED, shared_bytes)
            _check(allowed, f"cuFuncSetAttribute({name}, {shared_bytes} bytes)")
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (blocks, 1, 1, threads, 1, 1, shared_bytes)
        _check(driver.cuLaunchKernel(function, *shape, stream, parameters, None), name)
        torch.cuda.synchronize()
        for key, a in arrays.items():
            a.reshape(-1).view(np.uint8)[:] = copies[key].cpu().numpy()
