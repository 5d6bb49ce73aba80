"""New processes as forks of one that has imported vLLM: a second's start, not ten.

The plugin is not loaded in them, and their environment is that of the first use.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import TypeVar

R = TypeVar("R")


def context() -> BaseContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    return found


def in_fork(function: Callable[..., R], *arguments: object) -> R:
    """What `function`, of a module, returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments).result()
