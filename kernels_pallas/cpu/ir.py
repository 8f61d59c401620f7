"""LLVM's language, written from Python: values with operators, loops and branches as `with` blocks.

A kernel is a Python function that calls these methods; what it does with Python's own loops and lists is unrolled, so a
register tile is a list of lists. Types are LLVM's names ("i64", "ptr", "<16 x float>"). Mutable variables are stack
slots, which LLVM turns into registers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

I1, I32, I64, F32, PTR, VOID = "i1", "i32", "i64", "float", "ptr", "void"

_COMPARISONS = {"<": "slt", "<=": "sle", ">": "sgt", ">=": "sge", "==": "eq", "!=": "ne"}


def vector(lanes: int, element: str) -> str:
    return f"<{lanes} x {element}>"


def element(type_: str) -> str:
    """Of a vector type; a scalar's is itself."""
    return type_[1:-1].split(" x ")[1] if type_.startswith("<") else type_


def lanes(type_: str) -> int:
    return int(type_[1:].split(" x ")[0]) if type_.startswith("<") else 1


def _is_float(type_: str) -> bool:
    return element(type_) in ("float", "double", "bfloat")


def _literal(value: float, type_: str) -> str:
    """float32's bits as LLVM writes them: those of the double of the same value."""
    if not _is_float(type_):
        return str(int(value))
    single = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"


class Value:
    """A result, an argument or a constant. Operators emit into the function it belongs to."""

    def __init__(self, function: Function, text: str, type_: str) -> None:
        self.function, self.text, self.type = function, text, type_

    def _binary(self, name: str, other: Value | float) -> Value:
        other = self.function.like(other, self)
        op = ("f" if _is_float(self.type) else "") + name
        return self.function.emit(f"{op} {self.type} {self.text}, {other.text}", self.type)

    def __add__(self, other: Value | float) -> Value:
        return self._binary("add", other)

    __radd__ = __add__

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("sub", other)

    def __rsub__(self, other: Value | float) -> Value:
        return self.function.like(other, self) - self

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("div", other)

    def __floordiv__(self, other: Value | int) -> Value:
        """Of integers that are not negative."""
        other = self.function.like(other, self)
        return self.function.emit(f"udiv {self.type} {self.text}, {other.text}", self.type)

    def __mod__(self, other: Value | int) -> Value:
        other = self.function.like(other, self)
        return self.function.emit(f"urem {self.type} {self.text}, {other.text}", self.type)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        """Zeros come in from the left."""
        return self._binary("lshr", other)

    def is_(self, relation: str, other: Value | float) -> Value:
        """Compares: "<", "<=", ">", ">=", "==" or "!="; integers as signed ones."""
        other = self.function.like(other, self)
        kind = _COMPARISONS[relation]
        if _is_float(self.type):
            kind = "o" + kind.removeprefix("s") if kind != "ne" else "une"
        compare = "fcmp" if _is_float(self.type) else "icmp"
        bits = vector(lanes(self.type), I1) if self.type.startswith("<") else I1
        return self.function.emit(f"{compare} {kind} {self.type} {self.text}, {other.text}", bits)

    def at(self, num_bytes: Value | int) -> Value:
        """A pointer so many bytes on."""
        offset = self.function.int64(num_bytes)
        return self.function.emit(f"getelementptr i8, ptr {self.text}, i64 {offset.text}", PTR)

    def load(self, type_: str, align: int | None = None) -> Value:
        """align: bytes; None: those of an element."""
        return self.function.emit(f"load {type_}, ptr {self.text}, align {align or _element_bytes(type_)}", type_)

    def store(self, value: Value, align: int | None = None) -> None:
        align = align or _element_bytes(value.type)
        self.function.line(f"store {value.type} {value.text}, ptr {self.text}, align {align}")

    def prefetch(self) -> None:
        """Asks for what the pointer points at to be read into the caches; no address is wrong."""
        how = [Value(self.function, text, I32) for text in ("0", "3", "1")]  # to be read, as near as can be, data
        self.function.intrinsic("llvm.prefetch.p0", VOID, self, *how)

    def bits_as(self, type_: str) -> Value:
        return self.function.emit(f"bitcast {self.type} {self.text} to {type_}", type_)

    def convert(self, how: str, type_: str) -> Value:
        """how: an LLVM conversion ("sext", "trunc", "sitofp", "fpext", ...)."""
        return self.function.emit(f"{how} {self.type} {self.text} to {type_}", type_)

    def splat(self, num_lanes: int) -> Value:
        type_ = vector(num_lanes, self.type)
        first = self.function.emit(f"insertelement {type_} poison, {self.type} {self.text}, i64 0", type_)
        return first.shuffle(first, [0] * num_lanes)

    def shuffle(self, other: Value, order: Sequence[int]) -> Value:
        """Lanes of this vector and, counted on, of the other."""
        mask = ", ".join(f"i32 {lane}" for lane in order)
        type_ = vector(len(order), element(self.type))
        return self.function.emit(
            f"shufflevector {self.type} {self.text}, {other.type} {other.text}, <{len(order)} x i32> <{mask}>", type_
        )

    def lane(self, index: int) -> Value:
        return self.function.emit(f"extractelement {self.type} {self.text}, i64 {index}", element(self.type))

    def then(self, yes: Value | float, no: Value | float) -> Value:
        """Of a condition, or lane by lane of a vector of them: which of the two."""
        if not isinstance(yes, Value):
            assert isinstance(no, Value)
            yes = self.function.like(yes, no)
        no = self.function.like(no, yes)
        return self.function.emit(
            f"select {self.type} {self.text}, {yes.type} {yes.text}, {no.type} {no.text}", yes.type
        )

    def _pick(self, name: str, other: Value | float) -> Value:
        other = self.function.like(other, self)
        kind = f"{name}num" if _is_float(self.type) else f"s{name}"
        return self.function.intrinsic(f"llvm.{kind}.{_suffix(self.type)}", self.type, self, other)

    def min(self, other: Value | float) -> Value:
        return self._pick("min", other)

    def max(self, other: Value | float) -> Value:
        return self._pick("max", other)


class Variable:
    """A value that loops change."""

    def __init__(self, slot: Value, type_: str) -> None:
        self.slot, self._type = slot, type_

    def get(self) -> Value:
        return self.slot.load(self._type)

    def set(self, value: Value) -> None:
        self.slot.store(value)


class Function:
    """One function of a module, being written. args: its arguments."""

    def __init__(self, module: Module, name: str, arg_types: Sequence[str], returns: str, *, exported: bool) -> None:
        self.module, self.name, self.returns = module, name, returns
        self._arg_types = list(arg_types)
        self._linkage = "" if exported else "internal "
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._num_values = self._num_labels = 0
        self.args = [Value(self, f"%a{i}", type_) for i, type_ in enumerate(arg_types)]

    # -- values ------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self._lines.append(f"  {text}")

    def emit(self, text: str, type_: str) -> Value:
        """An instruction with a result."""
        self._num_values += 1
        self.line(f"%v{self._num_values} = {text}")
        return Value(self, f"%v{self._num_values}", type_)

    def constant(self, value: float, type_: str) -> Value:
        literal = _literal(value, element(type_))
        if type_.startswith("<"):
            literal = "<" + ", ".join([f"{element(type_)} {literal}"] * lanes(type_)) + ">"
        return Value(self, literal, type_)

    def constants(self, values: Sequence[float], element_type: str) -> Value:
        """A vector."""
        literal = ", ".join(f"{element_type} {_literal(value, element_type)}" for value in values)
        return Value(self, f"<{literal}>", vector(len(values), element_type))

    def int64(self, value: Value | int) -> Value:
        return value if isinstance(value, Value) else self.constant(value, I64)

    def like(self, value: Value | float, other: Value) -> Value:
        return value if isinstance(value, Value) else self.constant(value, other.type)

    def null(self) -> Value:
        return Value(self, "null", PTR)

    def variable(self, start: Value) -> Variable:
        slot = self.stack(start.type)
        slot.store(start)
        return Variable(slot, start.type)

    def stack(self, type_: str, align: int | None = None) -> Value:
        """Room on the stack, for as long as the function runs."""
        self._num_values += 1
        at = f", align {align}" if align else ""
        self._slots.append(f"  %s{self._num_values} = alloca {type_}{at}")
        return Value(self, f"%s{self._num_values}", PTR)

    # -- control -----------------------------------------------------------------------------------

    def _labels(self, *names: str) -> list[str]:
        self._num_labels += 1
        return [f"{name}{self._num_labels}" for name in names]

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """`for i in range(start, stop, step)`, of i64."""
        head, body, end = self._labels("head", "body", "end")
        i = self.variable(self.int64(start))
        stop = self.int64(stop)
        self.line(f"br label %{head}")
        self._begin(head)
        now = i.get()
        self.line(f"br i1 {now.is_('<', stop).text}, label %{body}, label %{end}")
        self._begin(body)
        yield now
        i.set(now + step)
        self.line(f"br label %{head}")
        self._begin(end)

    @contextmanager
    def repeat(self) -> Iterator[Repeat]:
        """Again and again, until `Repeat.stop_if`."""
        head, end = self._labels("head", "end")
        self.line(f"br label %{head}")
        self._begin(head)
        yield Repeat(self, end)
        self.line(f"br label %{head}")
        self._begin(end)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        yes, end = self._labels("yes", "end")
        self.line(f"br i1 {condition.text}, label %{yes}, label %{end}")
        self._begin(yes)
        yield
        self.line(f"br label %{end}")
        self._begin(end)

    def give(self, value: Value | None = None) -> None:
        """Returns. What is written behind it is never run."""
        self.line("ret void" if value is None else f"ret {value.type} {value.text}")
        (after,) = self._labels("after")
        self._begin(after)

    # -- calls -------------------------------------------------------------------------------------

    def call(self, callee: str | Value, returns: str, *args: Value) -> Value:
        """callee: a function's name, or a pointer to one."""
        target = f"@{callee}" if isinstance(callee, str) else callee.text
        text = f"call {returns} {target}({', '.join(f'{arg.type} {arg.text}' for arg in args)})"
        if returns != VOID:
            return self.emit(text, returns)
        self.line(text)
        return Value(self, "", VOID)

    def intrinsic(self, name: str, returns: str, *args: Value) -> Value:
        self.module.declare(name, returns, [arg.type for arg in args])
        return self.call(name, returns, *args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c."""
        return self.intrinsic(f"llvm.fma.{_suffix(a.type)}", a.type, a, b, c)

    def atomic_add(self, pointer: Value, value: int) -> Value:
        """What was there before."""
        return self.emit(f"atomicrmw add ptr {pointer.text}, i64 {value} seq_cst", I64)

    def keep_order(self) -> None:
        """LLVM moves no access to memory past this; the processor does as it likes."""
        self.line('fence syncscope("singlethread") seq_cst')

    def hidden(self, pointer: Value) -> Value:
        """The same pointer, of whose target LLVM assumes nothing."""
        return self.emit(f'call ptr asm sideeffect "", "=r,0,~{{memory}}"(ptr {pointer.text})', PTR)

    def pause(self) -> None:
        """Tells the processor that this loop waits."""
        if "sse2" in self.module.features:
            self.intrinsic("llvm.x86.sse2.pause", VOID)

    def text(self) -> str:
        args = ", ".join(f"{type_} %a{i}" for i, type_ in enumerate(self._arg_types))
        return "\n".join(
            [
                f"define {self._linkage}{self.returns} @{self.name}({args}) nounwind {{",
                "entry:",
                *self._slots,
                *self._lines,
                "  unreachable",
                "}",
            ]
        )


class Repeat:
    def __init__(self, function: Function, end: str) -> None:
        self._function, self._end = function, end

    def stop_if(self, condition: Value) -> None:
        (on,) = self._function._labels("on")
        self._function.line(f"br i1 {condition.text}, label %{self._end}, label %{on}")
        self._function._begin(on)


class Module:
    """A file of functions. features: what the processor can do, by LLVM's names."""

    def __init__(self, features: frozenset[str] = frozenset()) -> None:
        self.features = features
        self._functions: dict[str, Function] = {}
        self._declared: dict[str, str] = {}

    def function(self, name: str, arg_types: Sequence[str], returns: str = VOID, *, exported: bool = False) -> Function:
        function = Function(self, name, arg_types, returns, exported=exported)
        self._functions[name] = function
        return function

    def declare(self, name: str, returns: str, arg_types: Sequence[str]) -> None:
        """A function of LLVM's or of the C library."""
        self._declared[name] = f"declare {returns} @{name}({', '.join(arg_types)})"

    def text(self) -> str:
        return "\n\n".join([*self._declared.values(), *(f.text() for f in self._functions.values())]) + "\n"


_BYTES = {"i8": 1, "i16": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}
_SUFFIXES = {"float": "f32", "double": "f64", "bfloat": "bf16"}


def _element_bytes(type_: str) -> int:
    return _BYTES[element(type_)]


def _suffix(type_: str) -> str:
    name = _SUFFIXES.get(element(type_), element(type_))
    return f"v{lanes(type_)}{name}" if type_.startswith("<") else name
