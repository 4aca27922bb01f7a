"""Runs single PTX instructions in the emulator, one thread per row of operands."""

import numpy as np

import ptx_emulator as ptx

_HEADER = ".version 8.5\n.target sm_90a\n.address_size 64\n"
BITS = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}


def kernel(body: str, params: int, registers: str = "", shared: str = "") -> ptx.Module:
    """A module with one kernel `k` of pointer parameters; %rd0, %rd1, ... hold the pointers."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(params))
    return ptx.Module(
        f"""{_HEADER}
.visible .entry k({names}) {{
.reg .pred %p<16>; .reg .b16 %rs<32>; .reg .b32 %r<64>; .reg .b64 %rd<64>;
.reg .f32 %f<64>; .reg .f64 %fd<16>;
{registers}
{shared}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}"""
    )


def register_type(ptx_type: str) -> str:
    """A declarable register type of at least 16 bits."""
    size = max(16, 8 * ptx.types.size_of(ptx_type))
    return ptx_type if ptx_type in ("f32", "f64") else f"b{size}"


def run(op: str, result_type: str, source_types: list[str], sources: list, predicate: bool = False):
    """`op d, a, b, ...` for every row of the source arrays -> the results as an array.

    With `predicate` the result is a predicate, returned as 0 or 1.
    """
    n = len(sources[0])
    declare = "".join(f".reg .{register_type(t)} %s{i};" for i, t in enumerate(source_types))
    load = ""
    for i, t in enumerate(source_types):
        item = ptx.types.size_of(t)
        kind = BITS.get(t, t)
        load += f"mad.wide.u32 %rd20, %r0, {item}, %rd{i}; ld.global.{kind} %s{i}, [%rd20];\n"
    names = ", ".join(f"%s{i}" for i in range(len(source_types)))
    out = len(source_types)
    item = 4 if predicate else ptx.types.size_of(result_type)
    if predicate:
        declare += ".reg .pred %d;"
        store = "selp.u32 %r1, 1, 0, %d; st.global.u32 [%rd20], %r1;"
        dtype = ptx.types.DTYPES["u32"]
    else:
        declare += f".reg .{register_type(result_type)} %d;"
        store = f"st.global.{BITS.get(result_type, result_type)} [%rd20], %d;"
        dtype = ptx.types.DTYPES[result_type]
    body = f"{load}{op} %d, {names};\nmad.wide.u32 %rd20, %r0, {item}, %rd{out};\n{store}"
    result = np.zeros(n, dtype)
    arrays = [np.asarray(s, ptx.types.DTYPES[t]) for s, t in zip(sources, source_types)]
    kernel(body, out + 1, declare).launch("k", 1, n, [*arrays, result])
    return result
