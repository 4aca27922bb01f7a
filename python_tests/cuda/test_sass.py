"""The machine code of the Hopper kernels, read from the built library: no spills, tensor cores and
TMA in use, products that are not forced to wait for one another."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moekernels.predict import ours

LIBRARY = Path(__file__).parents[2] / "moekernels" / "_C.so"
# Where the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put their programs.
NVIDIA = importlib.util.find_spec("nvidia")
WHEELS = [
    str(Path(at) / "cu13" / "bin") for at in (NVIDIA.submodule_search_locations if NVIDIA else ())
]
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), *WHEELS])
KERNELS = ("StoreRows", "StoreGradient", "AddGradient", "StoreUp", "StoreDAct", "PushRows")


def cuobjdump(*args: str) -> str:
    program = shutil.which("cuobjdump", path=SEARCH)
    env = {**os.environ, "PATH": SEARCH}  # without nvdisasm on PATH it prints nothing
    done = subprocess.run([program, *args, str(LIBRARY)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def resources() -> dict[str, dict[str, int]]:
    """What every kernel of sm_90a uses: name -> {"REG": 168, "STACK": 0, ...}."""
    found, name = {}, None
    for line in cuobjdump("-res-usage", "-arch", "sm_90a").splitlines():
        if match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif name:
            found[name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            name = None
    return found


@functools.cache
def code_of(name: str) -> list[tuple[int, str]]:
    """The instructions of a kernel: (address, text)."""
    return parse(cuobjdump("-sass", "-fun", name, "-arch", "sm_90a"))


def parse(sass: str) -> list[tuple[int, str]]:
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    return [(int(address, 16), text.strip()) for address, text in lines]


def reached(code: list[tuple[int, str]], start: int) -> set[int]:
    """The instructions that can follow the one at `start`, by their places in `code`. A jump by a
    table, whose targets are not named, may lead to all of its role."""
    at = {address: i for i, (address, _) in enumerate(code)}
    seen, todo = set(), [start]
    while todo:
        i = todo.pop()
        while i < len(code) and i not in seen:
            seen.add(i)
            op = code[i][1]
            assert not re.search(r"\b(CALL|JMX|RET)\b", op), f"where {op} leads cannot be told"
            if re.search(r"\bBRX\b", op):
                todo += range(i + 1, end_of_role(code, i))
            if target := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", op):
                todo.append(at[int(target[1], 16)])
            if re.fullmatch(r"BRA 0x[0-9a-f]+|EXIT|BPT\.TRAP 0x1", op):
                break
            i += 1
    return seen


def end_of_role(code: list[tuple[int, str]], start: int) -> int:
    """Where what stands behind a place ends: by the last jump before another role, or an exit."""
    last = start
    for i in range(start + 1, len(code)):
        if re.search(r"USETMAXREG", code[i][1]):
            return last + 1
        if re.fullmatch(r"BRA 0x[0-9a-f]+", code[i][1]):
            last = i
        if code[i][1] == "EXIT":
            return i + 1
    return len(code)


def registers(texts: list[str]) -> int:
    return 1 + max(int(r) for text in texts for r in re.findall(r"\bR(\d+)\b", text))


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the loops that jump back by one branch."""
    at = {address: i for i, (address, _) in enumerate(code)}
    bodies = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            bodies.append([t for _, t in code[at[int(target[1], 16)] : i + 1]])
    return bodies


def straight(code: list[tuple[int, str]]) -> list[list[str]]:
    """The pieces of the code that nothing leads into or out of."""
    at = {address: i for i, (address, _) in enumerate(code)}
    begins = {0, len(code)}
    for i, (_, text) in enumerate(code):
        if target := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text):
            begins.add(at[int(target[1], 16)])
        if re.search(r"\b(BRA|EXIT)\b", text):
            begins.add(i + 1)
    begins = sorted(begins)
    return [[text for _, text in code[a:b]] for a, b in zip(begins, begins[1:])]


def why_not() -> str | None:
    for program in ("cuobjdump", "nvdisasm"):
        if shutil.which(program, path=SEARCH) is None:
            return f"{program} is not on PATH: pip install nvidia-cuda-{program}"
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built"
    if not any("cuda4sm90" in name for name in resources()):
        return f"{LIBRARY.name} holds no kernels for sm_90a"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def products(kind: str) -> list[str]:
    wanted = re.compile(rf"cuda4sm90\d+(peer_)?product.*\d+{kind}I")
    return [name for name in resources() if wanted.search(name)]


def alone(kind: str) -> list[str]:
    """Those whose rows lie here already, and stay."""
    return [name for name in products(kind) if "peer_product" not in name]


def test_no_kernel_of_the_products_spills():
    for kind in KERNELS:
        assert products(kind)
        for name in products(kind):
            assert resources()[name]["STACK"] == 0, name
            assert resources()[name]["LOCAL"] == 0, name


@pytest.mark.parametrize("kind", KERNELS)
def test_tensor_cores_and_bulk_copies(kind):
    """One kernel of each kind and orientation: its wgmmas go out in groups of four, of which only
    the last is waited for; where ptxas has to serialise them, every one carries a barrier."""
    for name in (n for n in products(kind) if "bfloat16" in n):
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        wgmmas = re.findall(r"HGMMA\.64x(?:128|256)x16\.F32\.BF16 [^;]*;", code)
        assert wgmmas and len(wgmmas) % 4 == 0
        assert sum("gsb0" in w for w in wgmmas) == len(wgmmas) // 4
        assert re.search(r"UTMALDG\.[23]D", code)
        assert "USETMAXREG" in code and "SYNCS.PHASECHK" in code
        assert not re.search(r"\b(LDL|STL)\b", code)


def test_epilogues_store_whole_vectors():
    """What leaves for global memory is 16 bytes a lane, but for the fp32 gradient (a sector for
    every four lanes) and the dots of 64 columns (one number a row)."""
    limits = {"StoreRows": {"128"}, "StoreUp": {"128"}, "StoreDAct": {"128", "32"}}
    limits["PushRows"] = {"128", "64", "32"}  # beside rows weights, and who waits in vain says so
    for kind, allowed in limits.items():
        of = products if kind == "PushRows" else alone
        name = next(n for n in of(kind) if "bfloat16" in n)
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        stores = re.findall(r"\bSTG[.\w]* ", code)
        assert stores and {(re.findall(r"\.(\d+) ", s) or ["32"])[0] for s in stores} <= allowed


def test_sums_leave_by_bulk_reductions_alone():
    """A tile's eight parts; nothing that they add to passes the SM."""
    for name in [*products("AddGradient"), *of_style("pingpong_product_into_sums")]:
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        assert len(re.findall(r"UTMAREDG\.3D\.ADD", code)) == 8
        assert not re.search(r"(?<!\.)\b(STG|RED|ATOM)[.\w]* ", code)  # ARRIVE.RED: of a barrier


def test_rows_are_gathered_by_copies_that_pass_no_register():
    """8 copies a thread for 128 lines of a stage, 16 for 256."""
    gathered = [n for n in resources() if "product_gathered" in n]
    assert len(gathered) == 12
    for name in gathered:
        code = cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")
        copies = len(re.findall(r"LDGSTS\.E\.BYPASS\.(?:LTC128B\.)?128", code))
        assert copies and copies % 8 == 0
        assert "ARRIVES.LDGSTSBAR" in code and re.search(r"UTMALDG\.[23]D", code)


def budget(code: list[tuple[int, str]], change: str) -> tuple[int, int]:
    """Where setmaxnreg is, and what it leaves a thread."""
    (start,) = (i for i, (_, text) in enumerate(code) if f"USETMAXREG.{change}" in text)
    return start, int(re.search(r"0x[0-9a-f]+", code[start][1])[0], 16)


def producers_registers(code: list[tuple[int, str]]) -> int:
    start, _ = budget(code, "DEALLOC")
    return registers([code[i][1] for i in reached(code, start)])


def test_registers_are_within_what_setmaxnreg_leaves():
    """Nothing but this looks: ptxas does not, the emulator has registers without end, and a GPU
    would read other warps' registers."""
    for kind in KERNELS:
        for name in products(kind):
            code = code_of(name)
            producer, consumer = (56, 224) if "product_gathered" in name else (40, 232)
            assert budget(code, "DEALLOC")[1] == producer, name
            assert budget(code, "TRY_ALLOC")[1] == consumer, name
            assert 128 * producer + 256 * consumer <= 168 * 384  # the block's registers
            assert producers_registers(code) <= producer, name
            assert registers([text for _, text in code]) <= consumer, name


def test_a_producer_with_too_many_registers_is_found():
    sass = """
        /*0000*/  MOV R99, R1 ;
        /*0010*/  USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0020*/  @P0 BRA 0x40 ;
        /*0030*/  EXIT ;
        /*0040*/  IADD3 R39, R2, R3, RZ ;
        /*0050*/  BRA 0x30 ;
        /*0060*/  MOV R200, R1 ;"""
    assert producers_registers(parse(sass)) == 40
    assert producers_registers(parse(sass.replace("R39", "R40"))) == 41


STYLES = {
    # kernel: what its epilogues are, and what setmaxnreg leaves the threads of its roles
    "hidden_product": (("StoreRows", "StoreUp"), {200, 104}),
    "pingpong_product": (("StoreDAct",), {232, 40}),
    "pingpong_product_into_sums": (("AddGradientInTurn",), {232, 40}),
}


def of_style(style: str) -> list[str]:
    return [n for n in resources() if re.search(rf"\d+{style}I", n)]


def held_by_its_roles(code: list[tuple[int, str]]) -> dict[int, int]:
    """What each setmaxnreg of a kernel leaves a thread -> the registers used behind it."""
    found = {}
    for i, (_, text) in enumerate(code):
        if "USETMAXREG" in text:
            left = int(re.search(r"0x[0-9a-f]+", text)[0], 16)
            found[left] = registers([code[j][1] for j in reached(code, i)])
    return found


@pytest.mark.parametrize("style", STYLES)
def test_styles_stay_within_their_registers(style):
    """Both types and orientations of each epilogue (a gradient has one); none spills, both kinds of
    loads are there."""
    kinds, budgets = STYLES[style]
    names, ways = of_style(style), 2 if "sums" in style else 4
    assert len(names) == ways * len(kinds) and all(any(k in n for k in kinds) for n in names)
    for name in names:
        assert resources()[name]["STACK"] == resources()[name]["LOCAL"] == 0, name
        code = code_of(name)
        used = held_by_its_roles(code)
        assert used.keys() == budgets and all(used[left] <= left for left in used), (name, used)
        text = [t for _, t in code]
        assert not any(re.search(r"\b(LDL|STL)\b", t) for t in text), name
        loads = [t for t in text if "UTMALDG" in t]
        both = [t for t in loads if "MULTICAST" in t]
        assert both and len(both) < len(loads), name
        wgmmas = [t for t in text if "HGMMA" in t]
        assert wgmmas and sum("gsb0" in t for t in wgmmas) * 4 <= len(wgmmas), name


def test_fp8_promotes_by_one_instruction_an_element():
    """The four products of a stage are waited for once, then 64 fused multiplies and adds; nothing
    spills, and both roles stay within their registers."""
    names = [n for n in resources() if "fp8_product" in n]
    assert len(names) == 2
    for name in names:
        assert resources()[name]["STACK"] == resources()[name]["LOCAL"] == 0, name
        code = code_of(name)
        body = min((b for b in loops(code) if any("QGMMA" in t for t in b)), key=len)
        products_ = [t for t in body if "QGMMA.64x128x32.F32.E4M3.E4M3" in t]
        assert len(products_) == 4 and ["gsb0" in t for t in products_] == [False] * 3 + [True]
        assert sum("FFMA" in t for t in body) == 64
        used = held_by_its_roles(code)
        assert used.keys() == {232, 40} and all(used[left] <= left for left in used), (name, used)
        assert not any(re.search(r"\b(LDL|STL)\b", text) for _, text in code), name


CHAINED = ("chained_product", "chained_into_sums", "chained_gathered", "chained_permute")
CHAINED += ("chained_combine", "chained_dweights", "route_at_onceILb1")


def in_chain(code: list[tuple[int, str]]) -> tuple[int, int]:
    """How often a kernel lets the next begin, and waits for the one ahead."""
    text = [t for _, t in code]
    return sum("PREEXIT" in t for t in text), sum("ACQBULK" in t for t in text)


@pytest.mark.parametrize("kind", CHAINED)
def test_kernels_of_a_chain_wait_and_do_not_spill(kind):
    """Of those of an element at a time combine alone may keep some bytes, as it does in turn."""
    names = [n for n in resources() if kind in n]
    assert names
    for name in names:
        if "chained_combine" not in name:
            assert resources()[name]["STACK"] == resources()[name]["LOCAL"] == 0, name
    for name in {names[0], names[-1]}:
        code = code_of(name)
        assert in_chain(code) == (1, 1), name
        used = held_by_its_roles(code)
        assert all(used[left] <= left for left in used), (name, used)


def test_other_products_neither_wait_nor_let_others_begin():
    for name in (products("StoreUp")[0], products("StoreRows")[0]):
        assert in_chain(code_of(name)) == (0, 0), name


@functools.cache
def dump() -> tuple[str, str]:
    """A product's name and its machine code."""
    name = next(n for n in products("StoreRows") if "bfloat16" in n)
    return name, cuobjdump("-sass", "-fun", name, "-arch", "sm_90a")


@pytest.mark.parametrize(
    "held, right, wrong",
    [
        (test_no_kernel_of_the_products_spills, "STACK", 8),
        (test_no_kernel_of_the_products_spills, "LOCAL", 8),
        (test_tensor_cores_and_bulk_copies, "STSM", "STL"),
        (test_tensor_cores_and_bulk_copies, "UTMALDG", "LDGSTS"),
        (test_tensor_cores_and_bulk_copies, r"(HGMMA[^;]*[^0]) ;", r"\1, gsb0 ;"),
        (test_epilogues_store_whole_vectors, "STG.E.128 ", "STG.E.64 "),
        (test_registers_are_within_what_setmaxnreg_leaves, "CTAPOOL 0x28", "CTAPOOL 0x30"),
        (
            test_registers_are_within_what_setmaxnreg_leaves,
            r"(TRY_ALLOC\S* [^;]*)0xe8",
            r"\g<1>0xf0",
        ),
        (test_registers_are_within_what_setmaxnreg_leaves, "UTMALDG", "R40 UTMALDG"),
        (test_registers_are_within_what_setmaxnreg_leaves, "STSM", "R232 STSM"),
    ],
)
def test_a_word_that_is_wrong_in_the_machine_code_is_found(monkeypatch, held, right, wrong):
    """One product alone, as it is and with a word exchanged."""
    name, text = dump()
    used = resources()[name]
    kind = ["StoreRows"] if held is test_tensor_cores_and_bulk_copies else []
    monkeypatch.setitem(globals(), "KERNELS", ("StoreRows",))
    monkeypatch.setitem(globals(), "resources", lambda: {name: used})
    monkeypatch.setitem(globals(), "code_of", lambda _: parse(text))
    monkeypatch.setitem(globals(), "cuobjdump", lambda *_: text)
    if held is not test_epilogues_store_whole_vectors:  # which asks for three of them
        held(*kind)
    if right in used:
        used = {**used, right: wrong}
    else:
        assert re.search(right, text)
        text = re.sub(right, wrong, text)
    with pytest.raises(AssertionError):
        held(*kind)


# Instructions that an epilogue takes for 8 elements of SwiGLU, which decide how long it lasts, as
# nothing runs beside it. A lower count replaces its number here.
UP, DACT = 102, 175


def test_predictions_are_of_these_epilogues():
    assert (ours.UP_PER_CHUNK, ours.DACT_PER_CHUNK) == (UP, DACT)


def up_per_chunk(code: list[tuple[int, str]]) -> list[int]:
    """Of StoreUp's loops over its rows, those with a sigmoid an element and three whole stores."""
    of = [(b, sum("STG.E.128" in t for t in b), sum("MUFU" in t for t in b)) for b in loops(code)]
    return sorted(len(body) for body, stores, mufu in of if stores == 3 and mufu == 16)


def dact_per_chunk(code: list[tuple[int, str]]) -> list[float]:
    """The same of StoreDAct, which takes four rows at once without a branch; their dots, which all
    activations share, are added up where the 12 shuffles are."""
    pieces = straight(code)
    count = [
        {op: sum(op in t for t in p) for op in ("MUFU", "STG", "SHFL", "WARPSYNC")} for p in pieces
    ]
    (dots,) = (len(p) for p, n in zip(pieces, count) if n["SHFL"] == 12 and not n["WARPSYNC"])
    gated = (len(p) for p, n in zip(pieces, count) if n["MUFU"] == 64 and n["STG"] >= 11)
    return sorted((length + dots) / 4 for length in gated)


def test_epilogues_take_no_more_instructions():
    """The leanest of the gated activations with a sigmoid is SwiGLU; it comes in two layouts."""
    for name in (n for n in alone("StoreUp") if "bfloat16" in n):
        sizes = up_per_chunk(code_of(name))
        most = UP + 6 * ("product_gathered" in name)  # with 224 registers for 232
        assert len(sizes) >= 6 and sizes[1] <= most, sizes
    for name in (n for n in alone("StoreDAct") if "bfloat16" in n):
        sizes = dact_per_chunk(code_of(name))
        assert len(sizes) == 8 and sizes[1] <= DACT, sizes


def test_a_longer_epilogue_is_found():
    body = ["MUFU.EX2 R1, R2", "MUFU.RCP R1, R1"] * 8 + ["STG.E.128 desc[UR4][R2.64], R4"] * 3
    lines = [*body, *["FMUL R1, R2, R3"] * (UP - len(body)), "@P0 BRA 0x0"]
    sass = "".join(f"\n /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    assert up_per_chunk(parse(sass)) == [UP + 1]
    dots = ["SHFL.BFLY R1, R2"] * 12
    body = ["MUFU.EX2 R1, R2", "MUFU.RCP R1, R1"] * 32 + ["@P0 STG.E.128 desc[UR4][R2.64], R4"] * 12
    lines = [*body, *["FMUL R1, R2, R3"] * (4 * DACT - len(body + dots)), "BRA 0x0", *dots, "EXIT"]
    sass = "".join(f"\n /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    assert dact_per_chunk(parse(sass)) == [DACT + 0.5]
