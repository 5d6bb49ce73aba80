"""What is measured, in the order of what it is worth, and how long each may take.

Measures of one round run at once: they say what is right, not how long it takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SIZES, POLICIES = ("4b", "1.7b"), ("exact", "last_exited")
BACKBONES = ("qwen3", "llama", "phi3")
LEASE = 900  # seconds that a machine is had for, its start and the copying included
STARTS = 100  # of them, until the first command runs
CALL = 560  # seconds of one command, where 600 is the most
LEAST = 15  # seconds; with less left, a measure is not begun


@dataclass(frozen=True)
class Measure:
    """`arguments` of the program `measures.<module>`. `seconds`: at most. `expected`: a guess, for
    nothing has run on a card yet. `on_cpu`: whether `--tiny` can run it."""

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: int
    expected: int
    on_cpu: bool = True


Round = tuple[Measure, ...]


def golden(*backbones: str, graphs: bool = False) -> Iterator[Measure]:
    for backbone in backbones:
        name = f"golden_{backbone}" + ("_graphs" if graphs else "")
        arguments = ("--backbone", backbone, *(("--graphs",) if graphs else ()))
        yield Measure(name, "golden", arguments, 120, 50)


def timed(module: str, graphs: bool) -> Iterator[Measure]:
    """Speeds for each size and policy."""
    for size in SIZES:
        for policy in POLICIES:
            name = f"{module}_{size}_{policy}" + ("_graphs" if graphs else "")
            arguments = ("--size", size, "--policy", policy, *(("--graphs",) if graphs else ()))
            yield Measure(name, module, arguments, 120 if graphs else 100, 55)


def full() -> list[Round]:
    """Everything, in the order of what it is worth."""
    v2 = Measure("golden_qwen3_v2", "golden", ("--v2",), 120, 60, on_cpu=False)
    return [
        (Measure("machine", "machine", (), 60, 20),),
        tuple(golden(*BACKBONES)),
        (Measure("passes_4b", "passes", ("--size", "4b"), 80, 40),),
        *((measure,) for measure in timed("speed", graphs=False)),
        (Measure("passes_4b_graphs", "passes", ("--size", "4b", "--graphs"), 100, 50),),
        *((measure,) for measure in timed("speed", graphs=True)),
        (Measure("host_4b_exact", "host", ("--size", "4b", "--graphs"), 90, 45),),
        (*golden(*BACKBONES, graphs=True), v2),
        (Measure("compiled_4b", "compiled", ("--size", "4b"), 120, 90),),
    ]


def tiny() -> list[Round]:
    """One measure of each kind, for a CPU: to its last step, in minutes."""
    chosen = {
        *("machine", "golden_qwen3", "golden_phi3_graphs", "passes_4b_graphs"),
        *("speed_4b_last_exited", "speed_4b_exact_graphs", "host_4b_exact", "compiled_4b"),
    }
    dry: list[Round] = [(m,) for measures in full() for m in measures if m.name in chosen]
    return [*dry, (TRAINING,)]


# By name only: it takes most of a lease.
TRAINING = Measure("training", "training", (), 540, 500)


def chosen(names: Sequence[str] | None, on_cpu: bool) -> list[Round]:
    """The rounds of a call; with names, only those, and those that run by name only.

    Raises `ValueError` for a name that there is none of.
    """
    rounds = tiny() if on_cpu else full()
    if names is None:
        return rounds
    every = [*full(), (TRAINING,)]
    known = [measure.name for measures in every for measure in measures]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {unknown[0]}: no such measure; there are {', '.join(known)}")
    picked = (tuple(m for m in measures if m.name in names) for measures in every)
    return [measures for measures in picked if measures]
