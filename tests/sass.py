"""Reads the machine code of a kernel: registers that nothing wrote.

The ptxas of CUDA 12.8 took the descriptor of a matrix product from a uniform register that nothing
had written, where a loop without a pipeline had a product of registers with shared memory: wrong
numbers and illegal accesses on an H200.
"""

import re

EVERY = frozenset(range(63))  # UR63 is the zero
# of uniform operations, those whose first operand is no uniform register that they write
WITHOUT_RESULT = ("UISETP", "UPLOP3", "USETMAXREG", "UP2UR")
OTHERS = ("S2UR", "R2UR", "CS2UR", "REDUX", "VOTEU", "LDCU")


def parse(text: str) -> list[tuple[int, str]]:
    """Addresses and instructions of a disassembly."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return [(int(address, 16), instruction) for address, instruction in lines]


def uniform(instruction: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction reads, and those that it writes."""
    found = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*)", instruction)
    assert found, instruction
    name, operands = found[1].split(".")[0], [x.strip() for x in found[2].split(",")]
    wide, product = ".64" in found[1], ".WIDE" in found[1]
    writes_first = name in OTHERS or (name.startswith("U") and name not in WITHOUT_RESULT)
    reads, writes = set[int](), set[int]()
    for i, operand in enumerate(operands):
        for first in map(int, re.findall(r"\bUR(\d+)\b", operand)):
            if "gdesc[" in operand:  # both matrices; one of them may be in other registers
                inside = i == 2 and bool(re.match(r"R\d", operands[1]))
                reads |= set(range(first + 2 * inside, first + 4))
            elif "desc[" in operand:
                reads |= {first, first + 1}
            elif i == 0 and writes_first:
                count = 4 if ".128" in found[1] else 2 if wide or product or name == "CS2UR" else 1
                writes |= set(range(first, first + count))
            else:
                # a wide product is of single registers, and is added to a pair
                pair = writes_first and "[" not in operand and (wide or (product and i == 3))
                reads |= set(range(first, first + 1 + pair))
    return reads, writes


def unwritten(text: str) -> list[str]:
    """The instructions that read a uniform register which some way to them has not written."""
    code = parse(text)
    at = {address: i for i, (address, _) in enumerate(code)}
    uses = [uniform(instruction) for _, instruction in code]
    written = [EVERY] * len(code)
    written[0] = frozenset()
    waiting, reached = [0], {0}
    while waiting:
        i = waiting.pop()
        _, instruction = code[i]
        following = []
        if re.match(r"(?:@!?U?P\w+\s+)?BRA", instruction):
            target = re.search(r"0x([0-9a-f]+)", instruction)
            following += [at[int(target[1], 16)]] if target and int(target[1], 16) in at else []
        if not re.match(r"EXIT|RET|BRA(?!.* !?U?P\w*, )", instruction) and i + 1 < len(code):
            following.append(i + 1)
        for j in following:
            now = written[j] & (written[i] | uses[i][1])
            if now != written[j] or j not in reached:
                written[j] = now
                reached.add(j)
                waiting.append(j)
    return [code[i][1] for i in sorted(reached) if (uses[i][0] & EVERY) - written[i]]
