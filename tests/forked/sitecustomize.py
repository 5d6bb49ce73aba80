"""On the `PYTHONPATH` of servers in the tests: their engine cores start workers as forks.

So vLLM does it with GPUs. With CPUs each worker is a new interpreter, which takes ten seconds;
`tests/test_plugin.py` has such.
"""

import sys
from multiprocessing import context

if "--multiprocessing-fork" in sys.orig_argv:  # a process that vLLM has started
    contexts = context._concrete_contexts
    contexts["spawn"] = contexts["fork"]
