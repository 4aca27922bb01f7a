"""What PTX consists of: operands, instructions, variables, kernels."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    name: str


@dataclass(frozen=True)
class Imm:
    value: int | float


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x, without the percent sign."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or a kernel parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    base: object
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result and its predicate."""

    first: object
    second: object


@dataclass(frozen=True)
class Not:
    operand: object


@dataclass(frozen=True)
class TensorAddress:
    """`[map, {x, y, ...}]`: a tensor map and coordinates, innermost first."""

    base: object
    coordinates: Vector


@dataclass(frozen=True)
class Sink:
    """`_`: a result nobody wants."""


@dataclass
class Instruction:
    op: str
    mods: tuple[str, ...]
    types: tuple[str, ...]
    operands: list
    guard: Reg | None
    negated: bool
    text: str
    target: int | tuple | None = None
    registers: frozenset[str] = frozenset()
    location: tuple[int, int] | None = None  # file number and line in the source

    @property
    def type(self) -> str:
        """The type that names the operation: the last one written."""
        return self.types[-1]

    def state_space(self) -> str:
        for mod in self.mods:
            name = mod.split("::")[0]
            if name in ("global", "shared", "local", "param", "const"):
                return name
        return "generic"


@dataclass
class Variable:
    """A .shared, .local, .const or .global variable or a parameter."""

    name: str
    space: str
    offset: int
    size: int
    initial: bytes | None = None


@dataclass
class Kernel:
    name: str
    params: list[tuple[Variable, str]] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=lambda: {"shared": 0, "local": 0, "param": 0})
    dynamic_shared: set[str] = field(default_factory=set)
    max_threads: int | None = None
    cluster: int = 1
    files: dict[int, str] = field(default_factory=dict)
