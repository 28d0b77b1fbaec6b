"""From the text of PTX to kernels (PTX ISA, section 4)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx.faults import Fault
from ptx.kernel import (
    BYTES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Pair,
    Param,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(.*?)\s+([\w$]+)(?:\[(\d+)\])?\s*$")
_VARIABLE = re.compile(
    r"(?:\.extern\s+)?\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?"
)
_LABEL = re.compile(r"([A-Za-z_$][\w$]*):(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
# Directives of a line, without a semicolon.
_LINES = re.compile(r"^\s*\.(loc|file|pragma|section)\b[^\n]*$", re.M)


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = _LINES.sub("", text)
    outer: list[Variable] = []
    kernels = {}
    position = 0
    for entry in _ENTRY.finditer(text):
        outer += map(_variable, _VARIABLE.finditer(text, position, entry.start()))
        end_of_params = _closing(text, entry.end() - 1)
        begin = text.index("{", end_of_params)
        position = _closing(text, begin)
        params = _params(text[entry.end() : end_of_params])
        block = re.search(r"\.reqntid\s+(\d+)", text[end_of_params:begin])
        kernel = Kernel(entry[1], params, int(block[1]) if block else None)
        kernel.variables += outer
        _Body(kernel).read(text[begin + 1 : position])
        kernels[kernel.name] = kernel
    return kernels


def _closing(text: str, opening: int) -> int:
    """Return the place of the bracket that closes the one at ``opening``."""
    depth = 0
    for match in re.compile(r"[(){}]").finditer(text, opening):
        depth += 1 if match[0] in "({" else -1
        if depth == 0:
            return match.start()
    raise Fault("the text ends within a bracket")


def _params(text: str) -> list[Param]:
    params = []
    for part in filter(str.strip, text.split(",")):
        match = _PARAM.match(part.strip())
        if not match:
            raise Fault(f"unknown parameter: {part.strip()}")
        align, kind, _, name, count = match.groups()
        size = BYTES[kind]
        params.append(Param(name, kind, size * int(count or 1), int(align or size)))
    return params


def _variable(match: re.Match) -> Variable:
    space, align, kind, name, count = match.groups()
    # An array of no size is the dynamic shared memory.
    elements = 0 if count == "" else int(count or 1)
    return Variable(name, space, BYTES[kind] * elements, int(align or BYTES[kind]))


class _Scope:
    """The names of a pair of braces: registers and labels."""

    def __init__(self, outer: _Scope | None) -> None:
        self.outer = outer
        self.registers: dict[str, Register] = {}
        self.labels: dict[str, int] = {}

    def chain(self) -> Iterator[_Scope]:
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer


class _Body:
    """The statements of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scope = _Scope(None)
        self.branches: list[tuple[Instruction, str, _Scope]] = []

    def read(self, text: str) -> None:
        place = 0
        while place < len(text):
            if text[place].isspace() or text[place] == ";":
                place += 1
            elif text[place] == "{":
                self.scope = _Scope(self.scope)
                place += 1
            elif text[place] == "}":
                assert self.scope.outer is not None
                self.scope = self.scope.outer
                place += 1
            elif label := _LABEL.match(text, place):
                self.scope.labels[label[1]] = len(self.kernel.instructions)
                place = label.end()
            else:
                end = text.index(";", place)
                self._statement(" ".join(text[place:end].split()))
                place = end + 1
        for branch, name, scope in self.branches:
            targets = [s.labels[name] for s in scope.chain() if name in s.labels]
            if not targets:
                raise Fault(f"no such label: {branch.text}")
            branch.target = targets[0]

    def _statement(self, text: str) -> None:
        if registers := _REGISTERS.match(text):
            self._declare(registers[1], registers[2])
        elif variable := _VARIABLE.match(text):
            self.kernel.variables.append(_variable(variable))
        elif not text.startswith("."):
            self._instruction(text)

    def _declare(self, kind: str, names: str) -> None:
        size = 0 if kind == "pred" else BYTES[kind]
        for name in re.findall(r"[%\w$]+(?:<\d+>)?", names):
            base, _, count = name.rstrip(">").partition("<")
            for full in [f"{base}{i}" for i in range(int(count))] if count else [base]:
                self.scope.registers[full] = Register(self.kernel.registers, size)
                self.kernel.registers += 1

    def _instruction(self, text: str) -> None:
        guard, negated, rest = None, False, text
        if match := re.match(r"@(!?)([%\w$]+)\s+(.*)", text):
            negated, rest = match[1] == "!", match[3]
            guard = self._operand(match[2])
            assert isinstance(guard, Register)
        name, _, operands = rest.partition(" ")
        op, *modifiers = name.split(".")
        parts = _split(operands)
        place = len(self.kernel.instructions)
        instruction = Instruction(op, tuple(modifiers), (), guard, negated, place, text)
        if op == "bra":
            self.branches.append((instruction, parts[0], self.scope))
        else:
            instruction.operands = tuple(self._operand(part) for part in parts)
        self.kernel.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        for scope in self.scope.chain():
            if text in scope.registers:
                return scope.registers[text]
        if text[0] == "%":
            return Special(text[1:])
        return _number(text) or Symbol(text)

    def _address(self, text: str) -> Address:
        base, *coordinates = _split(text)
        place = re.fullmatch(r"\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*", base)
        if not place:
            raise Fault(f"unknown address: [{text}]")
        inner: Operand = Vector(())
        if coordinates:
            inner = self._operand(coordinates[0])
        assert isinstance(inner, Vector)
        offset = int(place[2] or "0", 0)
        return Address(self._operand(place[1]), offset, inner.items)


def _split(text: str) -> list[str]:
    """Split operands at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _number(text: str) -> Immediate | None:
    if match := re.fullmatch(r"0([fF])([0-9a-fA-F]{8})|0([dD])([0-9a-fA-F]{16})", text):
        return Immediate(int(match[2] or match[4], 16), 4 if match[1] else 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None
