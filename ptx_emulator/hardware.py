"""Runs kernels on the GPU through CUDA's driver, with the arguments that the emulator takes, so
that the two can be compared: PTX, the very text that the emulator executes, which the driver
compiles, or a cubin, the machine code that nvcc made of it."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch

import ptx_emulator as ptx

_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
ATTRIBUTES = {  # of CUfunction_attribute
    "max_threads": 0,
    "static_shared": 1,
    "local": 3,
    "registers": 4,
    "binary_version": 6,
}
_MAP_TYPES = {2: 9, 4: 7}  # bytes an element -> CUtensorMapDataType: bf16, f32
_MAP_SWIZZLES = (0, 32, 64, 128)
_L2_256B = 3


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver, torch's context current."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"ptx_hardware: no CUDA driver here ({error})") from None
    torch.cuda.init()  # makes torch's context the current one
    torch.zeros(1, device="cuda")
    return driver


def check(result: int, what: str) -> None:
    """Raises with the driver's number and text where a call failed."""
    if result != 0:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what}: error {result}, {(text.value or b'unknown').decode()}")


def tensor_map(map: ptx.TensorMap, address: int) -> ctypes.Array:
    """The 128 bytes that the driver encodes of a map over an array at `address`."""
    rank = len(map.box)
    room = ctypes.create_string_buffer(128 + 64)
    at = -(-ctypes.addressof(room) // 64) * 64  # a CUtensorMap is aligned to 64 bytes
    sizes = (ctypes.c_uint64 * rank)(*map.shape[::-1])
    strides = (ctypes.c_uint64 * max(rank - 1, 1))(*map.strides[-2::-1])
    box = (ctypes.c_uint32 * rank)(*map.box[::-1])
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    kind, swizzle = _MAP_TYPES[map.item], _MAP_SWIZZLES.index(map.swizzle_span)
    arguments = (ctypes.c_void_p(at), kind, rank, ctypes.c_void_p(address), sizes, strides, box)
    result = driver().cuTensorMapEncodeTiled(*arguments, steps, 0, swizzle, _L2_256B, 0)
    check(result, f"cuTensorMapEncodeTiled {map.shape} in boxes of {map.box}")
    return (ctypes.c_char * 128).from_buffer(room, at - ctypes.addressof(room))


class Program:
    """A module for this GPU: PTX (text), or a cubin (bytes) beside the PTX of its parameters.

    `launch` takes the arguments that the emulator's `Module.launch` takes.
    """

    def __init__(self, image: str | bytes, module: ptx.Module | None = None):
        self._module = ctypes.c_void_p()
        self._parsed = module
        source = ctypes.create_string_buffer(image.encode() if isinstance(image, str) else image)
        check(driver().cuModuleLoadData(ctypes.byref(self._module), source), "cuModuleLoadData")

    def function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        found = driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
        check(found, f"cuModuleGetFunction({name})")
        return function

    def attributes(self, name: str) -> dict[str, int]:
        """What the driver says that a kernel uses: registers, local memory, ..."""
        function, value, found = self.function(name), ctypes.c_int(), {}
        for attribute, number in ATTRIBUTES.items():
            result = driver().cuFuncGetAttribute(ctypes.byref(value), number, function)
            check(result, f"cuFuncGetAttribute({name}, {attribute})")
            found[attribute] = value.value
        return found

    def allow_shared(self, name: str, shared_bytes: int) -> None:
        """Lets a kernel have so much dynamic shared memory."""
        result = driver().cuFuncSetAttribute(
            self.function(name), _MOST_DYNAMIC_SHARED, shared_bytes
        )
        check(result, f"cuFuncSetAttribute({name}, {shared_bytes} bytes)")

    def start(
        self, name: str, blocks: int, threads: int, buffers: list[ctypes.Array], shared_bytes: int
    ) -> None:
        """Launches a kernel on torch's stream with the bytes of its arguments; does not wait."""
        parameters = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        if shared_bytes > 48 << 10:
            self.allow_shared(name, shared_bytes)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (blocks, 1, 1, threads, 1, 1, shared_bytes)
        launched = driver().cuLaunchKernel(self.function(name), *shape, stream, parameters, None)
        check(launched, name)

    def launch(
        self, name: str, blocks: int, threads: int, args: list, shared_bytes: int = 0
    ) -> None:
        """Launches a kernel on copies of the arrays, and copies them back when it is done."""
        arrays = {id(a): a for arg in args for a in _arrays(arg)}
        copies = {
            key: torch.from_numpy(a.reshape(-1).view(np.uint8).copy()).cuda()
            for key, a in arrays.items()
        }
        addresses = {key: copy.data_ptr() for key, copy in copies.items()}
        types = self._parsed.kernels[name].params if self._parsed else [(None, None)] * len(args)
        buffers = [_buffer(arg, kind, addresses) for arg, (_, kind) in zip(args, types)]
        self.start(name, blocks, threads, buffers, shared_bytes)
        torch.cuda.synchronize()
        for key, a in arrays.items():
            a.reshape(-1).view(np.uint8)[:] = copies[key].cpu().numpy()


def _arrays(arg) -> list[np.ndarray]:
    if isinstance(arg, ptx.Packed):
        return [a for _, a, _ in arg.entries()]
    array = arg.array if isinstance(arg, ptx.Uninitialized | ptx.TensorMap) else arg
    return [array] if isinstance(array, np.ndarray) else []


def _buffer(arg, kind: str | None, addresses: dict[int, int]) -> ctypes.Array:
    """An argument's bytes as the kernel gets them, its arrays at their addresses on the device."""
    if isinstance(arg, ptx.TensorMap):
        return tensor_map(arg, addresses[id(arg.array)])
    if isinstance(arg, ptx.Packed):
        data = arg.moved(addresses)
        for at, held in arg.maps.items():
            data = data[:at] + bytes(tensor_map(held, addresses[id(held.array)])) + data[at + 128 :]
    elif isinstance(arg, bytes):
        data = arg
    elif arrays := _arrays(arg):
        data = addresses[id(arrays[0])].to_bytes(8, "little")
    else:
        data = ptx.number_bytes(arg, kind)
    return ctypes.create_string_buffer(data, len(data))
