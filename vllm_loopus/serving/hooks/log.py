"""What vLLM logs at a start that says nothing about a looped model, left out.

A user can do nothing about these lines, and they stand before the summary of the engine
(`runners/start_up.py`), which says what is switched off and why. Other models keep them.
"""

import logging
import os
import warnings

# Set where a looped model is configured; the processes of its engine inherit it.
SERVED_VARIABLE = "LOOPUS_IS_SERVED"
# Logger and beginning of a message -> why it says nothing.
LEFT_OUT = {
    ("vllm.config.vllm", "Inductor compilation was disabled by user settings"): "we disable it",
    ("vllm.config.vllm", "Model Runner V2 requires Triton"): "the V1 runner is used anyway",
    ("vllm.config.scheduler", "Using custom scheduler class"): "the loop's own",
    ("vllm.platforms.cpu", "Triton is not installed"): "no kernel of the loop needs it",
    ("vllm.platforms.cpu", "Reset SSM cache type"): "there are no such states",
    ("torch._library.triton", "Triton not available"): "no kernel of the loop needs it",
}


def filter_log() -> None:
    """Filters vLLM's log in this process, once a looped model is configured. May be repeated."""
    for name, _ in LEFT_OUT:
        logging.getLogger(name).addFilter(_says_something)  # adding it again has no effect
    if SERVED_VARIABLE in os.environ:
        # vLLM looks at everything in torch's modules when it searches them for Triton kernels.
        deprecated = "`torch.distributed.reduce_op` is deprecated"
        warnings.filterwarnings("ignore", deprecated, FutureWarning)


def note_looped_model() -> None:
    """From now on the log is filtered, here and in processes that are started from here."""
    os.environ[SERVED_VARIABLE] = "1"
    filter_log()


def _says_something(record: logging.LogRecord) -> bool:
    return SERVED_VARIABLE not in os.environ or not any(
        record.name == name and str(record.msg).startswith(beginning)
        for name, beginning in LEFT_OUT
    )
