"""PTX text -> kernels of instructions, with every operand resolved to what it names."""

import re
import struct
from dataclasses import dataclass

import numpy as np

from .errors import ParseError
from .syntax import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Not,
    Pair,
    Reg,
    Sink,
    Special,
    Symbol,
    TensorAddress,
    Variable,
    Vector,
)
from .types import DTYPES, size_of

_VARIABLE = re.compile(
    r"\.(shared|local|const|global|param)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")


def strip_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def _declare(text: str, sizes: dict[str, int]) -> tuple[Variable, str]:
    """Parse one variable declaration and give it an offset in its space."""
    match = _VARIABLE.search(text)
    if not match:
        raise ParseError(f"cannot parse the declaration `{text}`")
    space, align, type_name, name, dims, initial = match.groups()
    item = size_of(type_name)
    count = int(np.prod([int(d or 0) for d in re.findall(r"\[(\d*)\]", dims)], dtype=int))
    offset = _align(sizes.get(space, 0), int(align or item))
    sizes[space] = offset + item * count
    data = None
    if initial:
        data = np.zeros(count, DTYPES[type_name])
        values = [v.strip() for v in initial.strip().strip("{}").split(",") if v.strip()]
        for i, value in enumerate(values):
            number = _immediate(value)
            if number is None:
                raise ParseError(f"the initial value `{value}` of {name} is not a number")
            if isinstance(number, int) and data.dtype.kind in "ui":
                number &= (1 << 8 * item) - 1
                number = np.array(number, f"u{item}").view(data.dtype)
            data[i] = number
        data = data.tobytes()
    return Variable(name, space, offset, item * count, data), type_name


def _immediate(text: str) -> int | float | None:
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return struct.unpack(">d", bytes.fromhex(text[2:]))[0]
    if _NUMBER.match(text):
        digits = text.rstrip("U")
        octal = re.match(r"-?0\d+$", digits)
        return int(digits, 8 if octal else 0)
    return None


class _Body:
    """Parses one kernel body: scopes, declarations, labels, instructions."""

    def __init__(self, kernel: Kernel, text: str, start: int):
        self.kernel, self.text, self.position = kernel, text, start
        self.scopes = [0]
        self.scoped_registers: dict[tuple[int, str], str] = {}
        self.labels: dict[tuple[int, str], int] = {}
        self.tables: dict[str, list[str]] = {}
        self.pending: list[tuple[str, tuple[int, ...], tuple[int, int] | None]] = []
        self.location: tuple[int, int] | None = None

    def run(self) -> int:
        """Returns the position behind the closing brace."""
        text, next_scope = self.text, 0
        skip = re.compile(r"\s*")
        while True:
            i = skip.match(text, self.position).end()
            if text[i] == "{":
                next_scope += 1
                self.scopes.append(next_scope)
                self.position = i + 1
                continue
            if text[i] == "}":
                self.position = i + 1
                self.scopes.pop()
                if not self.scopes:
                    break
                continue
            location = _LOCATION.match(text, i)
            if location:
                self.location = (int(location[1]), int(location[2]))
                self.position = location.end()
                continue
            label = _LABEL.match(text, i)
            if label:
                self._label(label)
                continue
            end = text.index(";", i)
            self._statement(" ".join(text[i:end].split()))
            self.position = end + 1
        for statement, scopes, location in self.pending:
            ins = self._instruction(statement, scopes)
            ins.location = location
            self.kernel.code.append(ins)
        return self.position

    def _label(self, match: re.Match) -> None:
        self.position = match.end()
        table = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(self.text, match.end())
        if table:
            self.tables[match[1]] = [t.strip() for t in table[1].split(",")]
            self.position = table.end()
        else:
            self.labels[self.scopes[-1], match[1]] = len(self.pending)

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, type_name, names = text.split(None, 2)
            for name in (n.strip() for n in names.split(",")):
                self._register(name, type_name[1:])
        elif text.startswith((".shared", ".local")):
            variable, _ = _declare(text, self.kernel.sizes)
            self.kernel.variables[variable.name] = variable
        elif text.startswith("."):
            if not text.startswith((".pragma", ".param")):
                raise ParseError(f"unknown directive `{text}` in {self.kernel.name}")
        elif text:
            self.pending.append((text, tuple(self.scopes), self.location))

    def _register(self, name: str, type_name: str) -> None:
        block = re.match(r"(%?[\w$]+?)<(\d+)>$", name)
        names = [f"{block[1]}{i}" for i in range(int(block[2]))] if block else [name]
        for each in names:
            unique = each if self.scopes[-1] == 0 else f"{each}@{self.scopes[-1]}"
            self.scoped_registers[self.scopes[-1], each] = unique
            self.kernel.registers[unique] = type_name

    def _find(self, table: dict, name: str, scopes: tuple[int, ...]):
        for scope in reversed(scopes):
            if (scope, name) in table:
                return table[scope, name]
        return None

    def _instruction(self, text: str, scopes: tuple[int, ...]) -> Instruction:
        body, guard, negated = text, None, False
        match = re.match(r"@(!?)([%\w$]+)\s+(.*)", text)
        if match:
            negated, body = match[1] == "!", match[3]
            guard = self._operand(match[2], scopes)
        head, _, rest = body.partition(" ")
        op, *mods = head.split(".")
        types = tuple(m for m in mods if m in DTYPES)
        if op == "call":
            return Instruction(op, tuple(mods), types, [], guard, negated, text)
        words = [w.strip() for w in _OPERANDS.findall(rest)]
        if op == "bra" or (op == "brx"):
            return self._branch(op, mods, words, scopes, guard, negated, text)
        operands = [self._operand(w, scopes) for w in words if w]
        used: set[str] = set()
        for operand in operands + ([guard] if guard else []):
            _collect_registers(operand, used)
        return Instruction(
            op, tuple(mods), types, operands, guard, negated, text, registers=frozenset(used)
        )

    def _branch(self, op, mods, words, scopes, guard, negated, text) -> Instruction:
        def resolve(name: str) -> int:
            index = self._find(self.labels, name, scopes)
            if index is None:
                raise ParseError(f"no label {name} for `{text}`")
            return index

        if op == "bra":
            return Instruction(
                op, tuple(mods), (), [], guard, negated, text, target=resolve(words[0])
            )
        table = tuple(resolve(name) for name in self.tables[words[1]])
        index = self._operand(words[0], scopes)
        return Instruction(op, tuple(mods), (), [index], guard, negated, text, target=table)

    def _operand(self, text: str, scopes: tuple[int, ...]):
        if text[0] == "{":
            items = [t.strip() for t in text[1:-1].split(",") if t.strip()]
            return Vector(tuple(self._operand(t, scopes) for t in items))
        if text[0] == "[":
            return self._address(text[1:-1].strip(), scopes)
        if "|" in text:
            first, second = (self._operand(t.strip(), scopes) for t in text.split("|"))
            return Pair(first, second)
        register = self._find(self.scoped_registers, text, scopes)
        if register is not None:
            return Reg(register)
        if text == "_":
            return Sink()
        if text[0] == "!":
            return Not(self._operand(text[1:], scopes))
        if text[0] == "%":
            return Special(text[1:])
        number = _immediate(text)
        if number is not None:
            return Imm(number)
        if text in ("WARP_SZ",):
            return Imm(32)
        base, plus, offset = text.partition("+")
        if plus and _NUMBER.match(offset.strip()):
            return Address(Symbol(base.strip()), int(offset, 0))
        if re.match(r"[\w$%.]+$", text):
            return Symbol(text)
        raise ParseError(f"cannot parse the operand `{text}` in {self.kernel.name}")

    def _address(self, text: str, scopes: tuple[int, ...]):
        tensor = re.match(r"(.*?),\s*(\{.*\})$", text)
        if tensor:
            base = self._address(tensor[1].strip(), scopes)
            return TensorAddress(base, self._operand(tensor[2], scopes))
        match = re.match(r"(.+?)\s*(?:([+-])\s*(-?\w+))?$", text)
        base = self._operand(match[1].strip(), scopes)
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        return Address(base, offset)


def _collect_registers(operand, into: set[str]) -> None:
    match operand:
        case Reg(name):
            into.add(name)
        case Vector(items):
            for item in items:
                _collect_registers(item, into)
        case Pair(first, second):
            _collect_registers(first, into)
            _collect_registers(second, into)
        case Not(inner) | Address(inner, _):
            _collect_registers(inner, into)
        case TensorAddress(base, coordinates):
            _collect_registers(base, into)
            _collect_registers(coordinates, into)


@dataclass
class ParsedModule:
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]
    target: str


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?\s*((?:\.[a-z]+[^{;]*)?)\{", re.S)


def parse(text: str) -> ParsedModule:
    """Parse a module. Device functions (.func) are skipped: nvcc inlines what kernels call."""
    text = strip_comments(text)
    if ".version" not in text:
        raise ParseError("not PTX: no .version directive")
    target = re.search(r"\.target\s+(\w+)", text)
    first = _ENTRY.search(text)
    outside, position, kernels = "", 0, {}
    while first:
        outside += text[position : first.start()]
        kernel = Kernel(first[1])
        for declaration in filter(None, (p.strip() for p in (first[2] or "").split(","))):
            variable, type_name = _declare(declaration, kernel.sizes)
            kernel.params.append((variable, type_name))
            kernel.variables[variable.name] = variable
        limit = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", first[3])
        if limit:
            kernel.max_threads = int(np.prod([int(v or 1) for v in limit.groups()]))
        cluster = re.search(r"\.reqnctapercluster\s+([\d, ]+)", first[3])
        if cluster:
            kernel.cluster = int(np.prod([int(v) for v in cluster[1].split(",")]))
        position = _Body(kernel, text, first.end()).run()
        kernels[kernel.name] = kernel
        first = _ENTRY.search(text, position)
    outside += text[position:]
    dynamic = set(re.findall(r"\.extern\s+\.shared\s+[^;]*?([\w$]+)\[\]\s*;", outside))
    variables, sizes = {}, {}
    declaration = re.compile(r"(?<!\.extern )\.(?:const|global|shared)\s[^;]*;")
    for match in declaration.finditer(outside):
        body = match[0].rstrip(";").strip()
        if re.search(r"\[\]\s*$", body):
            continue
        variable, _ = _declare(body, sizes)
        variables[variable.name] = variable
    files = {int(n): name for n, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', outside)}
    for kernel in kernels.values():
        kernel.files = files
        kernel.dynamic_shared = dynamic
        _module_shared(kernel, variables)
    return ParsedModule(kernels, variables, target[1] if target else "")


def _module_shared(kernel: Kernel, variables: dict[str, Variable]) -> None:
    """Shared variables of module scope belong to each kernel that may name them."""
    base = kernel.sizes["shared"]
    for variable in variables.values():
        if variable.space == "shared":
            offset = _align(base, 1024) + variable.offset
            kernel.variables[variable.name] = Variable(
                variable.name, "shared", offset, variable.size
            )
            kernel.sizes["shared"] = max(kernel.sizes["shared"], offset + variable.size)
