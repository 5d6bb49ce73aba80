"""What a step needs computed; `worker/executor.py` does it. The property tests use a fake one."""

from collections.abc import Callable
from typing import Any, Protocol

from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints


class Reading(Protocol):
    """Results on their way to the host."""

    def wait(self) -> Bools:
        """Whether the exit rule lets each deciding position exit. Sequences with a NaN or infinite
        state, in this call or in those since the last reading, have failed (`Staircases.fail`)."""
        ...

    def complete(self, leaving: Bools) -> None:
        """Launches what waits for the exits, before anything reads it. `leaving`: which of the
        deciding positions exit in this pass; others may have exited before."""
        ...


class DecoderReading(Reading, Protocol):
    """That of a decoder call."""

    def tokens(self) -> Ints:
        """After `wait`: the most likely tokens after the guessing positions."""
        ...


class StepExecutor(Protocol):
    """What a step needs computed. The chunks of one call may be at different depths.

    If a sequence `copies_on_exit`, the K/V and state of its newest row also go to all deeper depths
    when it exits, and the decoder's K/V to all depths at which a token may exit.
    """

    def make_room(self, chunks: Chunks) -> Ints:
        """How many positions of each chunk, from the first, have blocks [C]; takes new blocks."""
        ...

    def make_room_next(self, chunks: Chunks) -> Ints:
        """`make_room` for generated positions that have not begun."""
        ...

    def make_room_deeper(self, chunks: Chunks, passes: int) -> int:
        """How many of the next `passes` every chunk has blocks for; takes new blocks from the
        second pass on. The first pass is at the depths of the chunks, each later one a depth
        deeper."""
        ...

    def encode(self, chunks: Chunks, prepared: Any = None) -> None:
        """Runs the encoder over new positions and keeps `h^0` for the pass that follows.
        `prepared`: what `prepare_encoder` returned for these positions, and maybe others."""
        ...

    def prepare_encoder(self, chunks: Chunks) -> Any:
        """Prepares an encoder call over next positions, those of some of which will begin."""
        ...

    def prepare_pass(self, chunks: Chunks) -> Any:
        """Prepares a pass over `chunks` while the device runs another call."""
        ...

    def prepare_decoder(self, chunks: Chunks) -> Any:
        """Prepares a decoder call in the same way; None if that cannot be done."""
        ...

    def run_passes(
        self, chunks: Chunks, passes: int, decides: Callable[[], Ints], prepared: Any = None
    ) -> Reading | None:
        """Launches passes of the reasoning block over the same positions, one depth deeper each;
        `chunks` are at the depths of the last. In the first, chunks at depth 1 come first, as
        encoded. The exit rule is asked about the newest positions of the chunks that `decides`
        returns, after the last pass; no token exits earlier. None if there are none.
        `prepared`: what `prepare_pass` returned for the same chunks."""
        ...

    def decode(
        self,
        chunks: Chunks,
        used: Bools | None = None,
        prepared: Any = None,
        guessing: Bools | None = None,
        beginning: Bools | None = None,
    ) -> DecoderReading:
        """Launches the decoder and keeps the hidden states of the newest positions of the chunks,
        of those `used` [C] and not `guessing` [C]. Of those guessing the reading has the most
        likely tokens; it decides nothing else. The next positions begin with those of `beginning`
        [C], by default of all that guess. `prepared`: what `prepare_decoder` returned for the same
        chunks."""
        ...

    def check_states(self) -> Reading | None:
        """For passes that no reading covers yet; None if there are none."""
        ...

    def must_read(self) -> bool:
        """Whether blocks have been given out that passes which have not been read may have filled
        with NaN."""
        ...

    def trust(self, oldest: int) -> None:
        """All calls before `oldest` have been read; they are numbered from 1."""
        ...

    def may_chain(self) -> bool:
        """Whether a pass may be launched although sequences in it may have exited."""
        ...
