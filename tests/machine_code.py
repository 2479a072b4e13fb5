"""Reads machine code as cuobjdump prints it: which instructions a loop costs per round, on the cheapest way through it."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate it hangs on, or ""
    name: str
    operands: str


def functions(dump: str) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions, from `cuobjdump -sass`."""
    found = {}
    for function in re.finditer(r"Function : (\S+)\n(.*?)(?=\n\t\tFunction : |\Z)", dump, re.S):
        found[function[1]] = [
            Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4])
            for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", function[2])
        ]
    return found


class Loops:
    """The control flow of a function, as blocks of instructions that run together."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        at = {instruction.address: i for i, instruction in enumerate(code)}
        after = [self._successors(i, at) for i in range(len(code))]
        starts = {0}
        for i, successors in enumerate(after):
            if successors != [i + 1]:
                starts.update(successors, [i + 1])
        ordered = sorted(i for i in starts if i < len(code))
        self.blocks = [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(code)], strict=True)]
        number = {block[0]: k for k, block in enumerate(self.blocks)}
        self.next = [[number[i] for i in after[block[-1]] if i in number] for block in self.blocks]

    def _successors(self, i: int, at: dict[int, int]) -> list[int]:
        instruction = self.code[i]
        kind = instruction.name.split(".")[0]
        if kind in ("EXIT", "RET"):
            return [i + 1] if instruction.guard else []
        if kind not in ("BRA", "JMP"):
            return [i + 1]
        target = re.search(r"0x([0-9a-f]+)", instruction.operands)
        targets = [at[int(target[1], 16)]] if target and int(target[1], 16) in at else []
        # A condition is a guard, a predicate among the operands, or that the warp has come apart.
        conditional = instruction.guard or ".DIV" in instruction.name or re.match(r"\s*!?U?P\d", instruction.operands)
        return [*targets, i + 1] if conditional else targets

    def rounds(self, core: str, least: int) -> Iterator[Counter[str]]:
        """For each block with that many instructions of a kind: all instructions of the cheapest round through it."""
        for start, block in enumerate(self.blocks):
            if sum(self.code[i].name.startswith(core) for i in block) >= least:
                path = self._cheapest_round(start)
                if path:
                    yield Counter(self.code[i].name for b in path for i in self.blocks[b])

    def _cheapest_round(self, start: int) -> list[int]:
        before: dict[int, int] = {}
        waiting = [(0, k, start) for k in self.next[start]]
        while waiting:
            cost, block, came_from = heapq.heappop(waiting)
            if block == start:
                path = [start]
                while came_from != start:
                    path.append(came_from)
                    came_from = before[came_from]
                return path
            if block not in before:
                before[block] = came_from
                for k in self.next[block]:
                    heapq.heappush(waiting, (cost + len(self.blocks[block]), k, block))
        return []


def count(round_: Counter[str], name: str, suffix: str = "") -> int:
    """Instructions of a kind, as LDG, with a suffix, as 128."""
    return sum(n for full, n in round_.items() if full.split(".")[0] == name and suffix in full)
