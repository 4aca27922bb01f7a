"""Where the tests of the Hopper products run: the PTX emulator, and the GPU of this machine where
it is one of sm_90. A test module that imports `where` runs every test in both places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moekernels.ops._library import raw
from python_tests.support import emulated

# The epilogue of the product that a launcher launches.
EPILOGUES = {
    "grouped_gemm_sm90": "StoreRows",
    "row_product_hidden_sm90": "StoreRows",
    "grouped_wgrad_sm90": "StoreGradient",
    "grouped_wgrad_gathered_sm90": "StoreGradient",
    "grouped_wgrad_add_sm90": "AddGradient",
    "grouped_wgrad_add_gathered_sm90": "AddGradient",
    "grouped_wgrad_segments_sm90": "AddGradient",
    "grouped_wgrad_add_pingpong_sm90": "AddGradient",
    "experts_up_sm90": "StoreUp",
    "experts_up_hidden_sm90": "StoreUp",
    "experts_up_gathered_sm90": "StoreUp",
    "experts_down_sm90": "StoreRows",
    "experts_dact_sm90": "StoreDAct",
    "experts_dact_pingpong_sm90": "StoreDAct",
}
STYLES = ("hidden", "pingpong")
PRODUCT = re.compile(r"cuda4sm90\d+(hidden_|pingpong_)?product")


def why_not_emulated() -> str | None:
    return emulated.why_not() or (
        None if "grouped_gemm_sm90" in emulated.stems() else "no kernels for sm_90a"
    )


def why_not_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is none of sm_90"
    return None if raw._sm90_build() != "none" else "the library holds no kernels for sm_90a"


def skip_if(why: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(why is not None, reason=why or "")


_place = "emulator"


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param("emulator", marks=skip_if(why_not_emulated())),
        pytest.param("gpu", marks=[pytest.mark.gpu, skip_if(why_not_gpu())]),
    ],
)
def where(request) -> Iterator[str]:
    global _place
    _place = request.param
    yield _place
    _place = "emulator"


class Gpu:
    """What a test asks of an emulated device, of the real one."""

    def __init__(self):
        raw._sm90_launched()  # forgets those of before
        self.names: list[str] = []


@contextmanager
def hopper(**how):
    """The ops run as on Hopper; `how` (schedule, lazy) is for the emulator alone."""
    if _place == "gpu":
        yield Gpu()
        torch.cuda.synchronize()
    else:
        with emulated.emulated_cuda(capability=90, **how) as device:
            yield device


def products(device) -> list[str]:
    """The epilogues of the Hopper products that were launched; what mma.sync does is not there."""
    if isinstance(device, Gpu):
        device.names += filter(None, raw._sm90_launched().split(","))
        return [EPILOGUES[name] for name in device.names]
    launched = [name for name in device.launches if PRODUCT.search(name)]
    return [next(kind for kind in EPILOGUES.values() if kind in name) for name in launched]


def set_products(**settings) -> None:
    """Settings of the launches (`_sm90_settings`) where the ops run now; none: the defaults."""
    if _place == "gpu":
        raw._sm90_settings(**settings)
    else:
        emulated.device()
        torch.ops.moekernels_emulated._sm90_settings(**settings)


def styles(device) -> set[str]:
    """The styles of the Hopper products that were launched."""
    if isinstance(device, Gpu):
        names = [f"_{name}" for name in raw._sm90_launched().split(",") if name]
        return {next((s for s in STYLES if f"_{s}_" in name), "direct") for name in names}
    found = [match[1] for name in device.launches if (match := PRODUCT.search(name))]
    return {(style or "direct_")[:-1] for style in found}


def placed(t: Tensor, device) -> Tensor:
    """A copy that lies as the original does within 16 bytes."""
    off = t.data_ptr() % 16 // t.element_size() if t.is_contiguous() else 0
    copy = torch.empty(t.numel() + off, dtype=t.dtype, device=device)[off:].view(t.shape)
    return copy.copy_(t)


def here(*values):
    """Tensors, and dicts of them, on the device where the ops run now."""
    if _place == "gpu":
        values = tuple(
            {n: placed(v, "cuda") if isinstance(v, Tensor) else v for n, v in value.items()}
            if isinstance(value, dict)
            else placed(value, "cuda")
            for value in values
        )
    return values if len(values) > 1 else values[0]


def back(result):
    """What `evaluate` gave, or a tensor, on the CPU."""
    if isinstance(result, Tensor):
        return result.cpu()
    outputs, gradients = result
    return [t.cpu() for t in outputs], {
        n: None if g is None else g.cpu() for n, g in gradients.items()
    }
