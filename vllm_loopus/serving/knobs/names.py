"""Names of the loop knobs of a request, and which unknown names are refused.

vLLM's connectors and the user's logits processors also take their arguments from `extra_args`
(`vllm_xargs` over HTTP). So an unknown name is only refused if it

1. is a field of the checkpoint or an option of the engine (`halting_strategy`, `kv_policy`, `N`),
2. is spelt almost like a knob (`max_loop`, `exit_treshold`), or
3. contains `loop`, or the word `exit` (`num_loops`, `early_exit`).

If the engine has logits processors of the user's, their arguments may have such names, and only
rule 2 applies.
"""

import difflib
import re

from vllm_loopus.architectures import ARCHITECTURES

RETURN_EXIT_DEPTHS = "return_exit_depths"
SPECULATE, GUESSES = "speculate", "guesses"
REQUEST_KNOBS = (
    "max_loops",
    "min_loops",
    "exit_threshold",
    "exit_depths",
    SPECULATE,
    GUESSES,
    RETURN_EXIT_DEPTHS,
)
OF_THE_ENGINE = (
    "kv_policy",
    "prefill_depth",
    "exit_quorum",
    "overlap",
    "late_verdicts",
    "initial_state",
)
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # of the three APIs
SIMILARITY = 0.8
LOOPISH = re.compile(r"loop|(?<![a-z])exits?(?![a-z])")


def objection(name: str, custom_processors: bool = False) -> str | None:
    """Why an unknown name is refused, as text to follow the name; None if it passes."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[:100]).lower().replace("-", "_")
    close = difflib.get_close_matches(plain, REQUEST_KNOBS, n=1, cutoff=SIMILARITY)
    if not custom_processors:
        if (ours := _of_a_checkpoint(name)) in REQUEST_KNOBS:
            return f"is called {ours} here"
        if ours is not None:
            return "cannot be set by a request; start the server with --hf-overrides"
        if name in OF_THE_ENGINE:
            return "cannot be set by a request; start the server with --additional-config"
    if close:
        return f"is not a knob of a request; did you mean {close[0]}?"
    if LOOPISH.search(plain) and not custom_processors:
        return f"is not a knob of a request; there are {', '.join(REQUEST_KNOBS)}"
    return None


def _of_a_checkpoint(name: str) -> str | None:
    """Our name of a field that a checkpoint of some architecture has; None for another name."""
    for architecture in ARCHITECTURES:
        ours = architecture.released_names.get(name, name)
        if ours in architecture.served_fields:
            return ours
    return None
