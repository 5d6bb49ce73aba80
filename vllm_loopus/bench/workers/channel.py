"""The worker's end: a JSON command a line on standard input, a JSON answer a line.

Standard output is the answers' alone; whatever else prints goes to standard error. Imports nothing
of this package, so that a worker can run in an environment that does not have it.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Command = Callable[..., Any]


def serve(commands: Mapping[str, Command]) -> None:
    """Answers `{"command": NAME, "arguments": {...}}` until standard input ends.

    An answer is `{"result": ...}` or, after an exception, `{"error": its traceback}`.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = {"result": commands[message["command"]](**message["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
