"""`time.time` of a process that finds this on its path is off by what `LOOPUS_CLOCK` says."""

import os
import sys
import time

_real, _file = time.time, os.environ.get("LOOPUS_CLOCK", "")
_state = [0.0, 0.0]  # when the file was read last, the seconds read


def _time() -> float:
    if time.monotonic() - _state[0] > 0.2:
        _state[0] = time.monotonic()
        try:
            with open(_file) as file:
                _state[1] = float(file.read() or 0)
        except (OSError, ValueError):
            pass
    return _real() + _state[1]


if _file:
    time.time = _time
    print("a clock that jumps", file=sys.stderr)
