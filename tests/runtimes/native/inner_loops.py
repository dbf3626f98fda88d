"""The innermost loops of the functions in an object file of x86-64 or aarch64, from its disassembly by objdump."""

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
INSTRUCTION = re.compile(r"^\s+(?P<address>[0-9a-f]+):\t(?P<text>.*)$")
FRAME = re.compile(r"mov\s+%rsp,%rbp")  # %rbp is a general register without this


@dataclass(frozen=True, slots=True)
class Machine:
    """How the disassembly of a CPU family reads."""

    objdump: str
    jump: re.Pattern[str]  # an instruction that may jump, with the group `address`
    no_successor: re.Pattern[str]  # execution does not reach the next instruction
    stack: re.Pattern[str]  # a memory operand on the stack
    stack_with_frame: re.Pattern[str]


X86_64 = Machine(
    "objdump",
    re.compile(r"^j\w+\s+(?:\*)?(?P<address>[0-9a-f]+)\b"),
    re.compile(r"^(jmp|ret|ud2)"),
    re.compile(r"\(%rsp\b"),
    re.compile(r"\(%r[sb]p\b"),
)
_ARM_STACK = re.compile(r"\[(sp|x29)\b")
AARCH64 = Machine(
    "aarch64-linux-gnu-objdump",
    re.compile(r"^(?:b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,\s*#\d+,)\s+(?P<address>[0-9a-f]+)\b"),
    re.compile(r"^(b|br|ret|udf|brk)\b(?!\.)"),
    _ARM_STACK,
    _ARM_STACK,
)

Graph = Mapping[int, Iterable[int]]  # address of an instruction -> addresses of those that may follow it


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop: the function's name, and the instructions in the order of their addresses."""

    function: str
    instructions: tuple[str, ...]
    stack: tuple[str, ...]  # the instructions that address the stack: spilled registers


def disassembled(file: Path, machine: Machine = X86_64) -> str:
    """Returns the disassembly of an object file, with demangled names."""
    command = [machine.objdump, "-d", "-C", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost_loops(disassembly: str, function: str, machine: Machine = X86_64) -> list[Loop]:
    """Returns the innermost loops of all functions whose name contains `function`."""
    loops = []
    for name, code in _functions(disassembly):
        if function in name:
            framed = any(FRAME.match(text) for text in code.values())
            addresses = machine.stack_with_frame if framed else machine.stack
            for nodes in _innermost(_successors(code, machine)):
                body = tuple(code[address] for address in sorted(nodes))
                loops.append(Loop(name, body, tuple(text for text in body if addresses.search(text))))
    return loops


def _functions(disassembly: str) -> list[tuple[str, dict[int, str]]]:
    """Returns each function's name, and its instructions by address."""
    functions: list[tuple[str, dict[int, str]]] = []
    for line in disassembly.splitlines():
        if found := FUNCTION.match(line):
            functions.append((found["name"], {}))
        elif functions and (found := INSTRUCTION.match(line)):
            functions[-1][1][int(found["address"], 16)] = found["text"].strip()
    return functions


def _successors(code: Mapping[int, str], machine: Machine) -> dict[int, list[int]]:
    graph: dict[int, list[int]] = {}
    following = [*list(code)[1:], None]
    for (address, text), after in zip(code.items(), following, strict=True):
        jump = machine.jump.match(text)
        targets = [int(jump["address"], 16)] if jump and int(jump["address"], 16) in code else []
        through = [] if after is None or machine.no_successor.match(text) else [after]
        graph[address] = targets + through
    return graph


def _innermost(graph: Graph) -> list[set[int]]:
    """Returns the instructions of each loop without a loop inside.

    A loop is a strongly connected component. Without the edges into its first instructions, those that are reached from
    outside, it falls into the loops inside it.
    """
    loops = []
    for component in _components(graph):
        entries = {to for address in graph.keys() - component for to in graph[address]} & component
        entries = entries or {min(component)}
        inside = {address: [to for to in graph[address] if to in component - entries] for address in component}
        loops += _innermost(inside) or [component]
    return loops


def _components(graph: Graph) -> list[set[int]]:
    """Returns the strongly connected components that contain a cycle (Kosaraju's algorithm, without recursion)."""
    order = _finish_order(graph, graph)
    reverse: dict[int, list[int]] = {address: [] for address in graph}
    for address, targets in graph.items():
        for to in targets:
            reverse[to].append(address)
    seen: set[int] = set()
    components = []
    for start in reversed(order):
        if start not in seen:
            component = set(_finish_order(reverse, [start], seen))
            if len(component) > 1 or start in graph[start]:
                components.append(component)
    return components


def _finish_order(graph: Graph, starts: Iterable[int], seen: set[int] | None = None) -> list[int]:
    """Returns what a depth-first search from `starts` reaches, in the order in which it leaves. Adds it to `seen`."""
    seen = set() if seen is None else seen
    order = []
    for start in starts:
        if start in seen:
            continue
        seen.add(start)
        path = [(start, iter(graph[start]))]
        while path:
            _, targets = path[-1]
            fresh = next((to for to in targets if to not in seen), None)
            if fresh is None:
                order.append(path.pop()[0])
            else:
                seen.add(fresh)
                path.append((fresh, iter(graph[fresh])))
    return order
