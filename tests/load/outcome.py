"""What a script found: counts, figures, and what was not as promised (exit code 1)."""

from dataclasses import dataclass, field

from tests.load.client import Tally


@dataclass
class Outcome:
    """Of one script. `seen`: a line for each figure; `problems`: broken promises."""

    name: str
    tally: Tally = field(default_factory=Tally)
    seen: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: object, promise: str) -> None:
        """Notes a promise that does not hold."""
        if not holds:
            self.problems.append(promise)

    def tell(self) -> None:
        """Prints everything. Raises `SystemExit(1)` for a broken promise or a lost request."""
        self.require(self.tally.good, "each request is answered, failed or cancelled; none is lost")
        print(f"{self.name}: {self.tally}")
        for name, value in self.seen.items():
            print(f"  {name}: {value}")
        for problem in self.problems:
            print(f"  NOT AS PROMISED: {problem}")
        if self.problems:
            raise SystemExit(1)
