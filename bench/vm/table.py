"""Makes Markdown tables of what plan.sh printed. usage: table.py OUTPUT"""

import collections
import statistics
import sys

NAMES = {
    "ramdisk": "ramdisk (the block layer)",
    "ublk-null": "ublk, null target, one queue",
    "wb-ublk": "wb over ublk",
    "wb-loop": "wb over the loop device",
    "no-cache": "no cache",
}
MEMORY = {
    "write-32": "write, 32",
    "write-1": "write, 1",
    "read-32": "read, 32",
    "read-1": "read, 1",
    "sync": "write + fsync",
}
DISKS = {"burst": "burst of writes, 32", "sync": "write + fsync"}
# The ratios that matter: of which group and work, of which target to which other.
RATIOS = [
    ("disks", "burst", "wb-ublk", "dm-writecache"),
    ("disks", "sync", "wb-ublk", "dm-writecache"),
    ("disks", "burst", "wb-loop", "dm-writecache"),
    ("disks", "sync", "wb-loop", "dm-writecache"),
    ("disks", "burst", "dm-writeboost", "dm-writecache"),
    ("memory", "write-32", "wb-ublk", "ublk-null"),
    ("memory", "write-32", "wb-ublk", "wb-loop"),
    ("memory", "sync", "wb-ublk", "wb-loop"),
]


def read(path):
    """The figures by round, by group, target and work, in the order of their first coming."""
    figures = collections.defaultdict(dict)
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("= "):
                turn, group, target, work, per_second = line.split()[1:]
                figures[group, target, work][turn] = float(per_second)
    return figures


def row(*cells):
    print("| " + " | ".join(cells) + " |")


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def table(figures, group, works, first):
    header(first, *works.values())
    for target in dict.fromkeys(target for of, target, _ in figures if of == group):
        rounds = [figures.get((group, target, work)) for work in works]
        cells = [f"{statistics.median(of.values()):,.0f}" if of else "–" for of in rounds]
        row(NAMES.get(target, target), *cells)
    print()


def ratios(figures):
    header("ratio", "median of the rounds", "lowest", "highest")
    for group, work, target, by in RATIOS:
        ours, baseline = figures.get((group, target, work), {}), figures.get((group, by, work), {})
        of = [ours[turn] / baseline[turn] for turn in ours if turn in baseline]
        if of:
            works = MEMORY if group == "memory" else DISKS
            what = f"{works[work]}, on {group}: {NAMES.get(target, target)} ÷ {NAMES.get(by, by)}"
            row(what, *(f"{f(of):.2f}" for f in (statistics.median, min, max)))
    print()


def main():
    figures = read(sys.argv[1])
    table(figures, "memory", MEMORY, "4 KiB requests a second, on memory")
    table(figures, "disks", DISKS, "4 KiB requests a second, on disks")
    ratios(figures)


main()
