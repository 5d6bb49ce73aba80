"""What a step did."""

from dataclasses import dataclass, field

import numpy as np

from vllm_loopus.serving.messages.progress import PassTimes
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step.chunks import Ints


@dataclass
class StepReport:
    """What a step did.

    - `emitted`: sequences whose token can be sampled, and the `exit_depths` of these tokens.
    - `passes`: rows of each pass; `times`: how long each took.
    - `encoded_rows`: new positions. `catch_up_rows`: rows of passes for positions before those.
    - `guess_rows`: rows of passes for guessed positions; `guess_decoder_rows`: rows of the decoder
      for guesses, not in `decoder_rows`.
    - `wanting`: sequences that wanted a token when the passes ended; `ready`: those of them that
      had exited. `waiting`: sequences that had exited before a pass, summed over the passes.
    - `stalled`: how often a sequence was left out of a pass for lack of blocks.
    """

    emitted: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    exit_depths: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    passes: list[int] = field(default_factory=list)
    times: PassTimes = field(default_factory=PassTimes)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    guess_rows: int = 0
    guess_decoder_rows: int = 0
    waiting: int = 0
    ready: int = 0
    wanting: int = 0
    stalled: int = 0

    @property
    def boundary_rows(self) -> int:
        """Rows of decoder and encoder together; 0 without a decoder call."""
        return self.decoder_rows and self.decoder_rows + self.encoded_rows

    def stats(self) -> LoopStats:
        """What the step adds to the metrics."""
        return LoopStats(
            steps=[len(self.passes)],
            passes=list(self.passes),
            encoded_rows=self.encoded_rows,
            catch_up_rows=self.catch_up_rows,
            decoder_rows=self.decoder_rows,
            decoder_catch_up_rows=self.decoder_rows - len(self.emitted),
            quorums=[self.ready / self.wanting] if self.ready else [],
            waiting=self.waiting,
            guess_rows=self.guess_rows,
        )
