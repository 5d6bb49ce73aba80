"""`torch.cuda` and `torch.accelerator` pretended: tensors for a GPU lie in the CPU's memory."""

import time
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any


class Stream:
    """Everything is done at once, so there is nothing to wait for."""

    cuda_stream = 0
    device = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = time.perf_counter()

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds."""
        return 1e3 * (later._at - self._at)


class Graph:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def replay(self) -> None:
        raise RuntimeError("a pretended GPU captures nothing and replays nothing")


def pretend(torch: Any, name: str, capability: tuple[int, int], memory: int) -> None:
    """Changes `torch` in place, before anything else has imported it."""
    stream = Stream()
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=memory,
        multi_processor_count=132,
        warp_size=32,
        is_integrated=False,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        uuid="GPU-0",
    )
    of_both = {
        "is_available": True,
        "device_count": 1,
        "synchronize": None,
        "empty_cache": None,
        "empty_host_cache": None,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "current_stream": stream,
        "set_stream": None,
    }
    of_cuda = {
        **of_both,
        "_is_compiled": True,
        "_device_count_nvml": 1,
        "_lazy_init": None,
        "init": None,
        "is_initialized": True,
        "current_device": 0,
        "set_device": None,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": name,
        "default_stream": stream,
        "mem_get_info": (memory - 2**30, memory),
        "manual_seed": None,
        "manual_seed_all": None,
        "graph_pool_handle": (0, 0),
        "is_current_stream_capturing": False,
    }
    of_accelerator = {
        **of_both,
        "current_device_index": 0,
        "set_device_index": None,
        "get_memory_info": (memory - 2**30, memory),
        "current_accelerator": torch.device("cuda"),
    }
    for module, answers in ((torch.cuda, of_cuda), (torch.accelerator, of_accelerator)):
        for function, answer in answers.items():
            setattr(module, function, _always(answer))
        module.memory_stats = lambda *_: defaultdict(int)
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # in a build of torch for CPUs
        torch._C._cuda_getCurrentRawStream = _always(0)
    torch.cuda.memory.get_allocator_backend = _always("pretended")
    torch.cuda.stream = torch.cuda.device = lambda *_: nullcontext()
    torch.cuda.Stream = torch.Stream = Stream
    torch.cuda.Event = torch.Event = Event
    torch.cuda.CUDAGraph = Graph
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.Tensor.record_stream = lambda *_: None
    _put_on_the_cpu(torch)


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


def _put_on_the_cpu(torch: Any) -> None:
    """Whoever asks for a device `cuda` gets the CPU."""
    from torch.overrides import TorchFunctionMode

    def meant(device: Any) -> Any:
        if isinstance(device, torch.device):
            return torch.device("cpu") if device.type == "cuda" else device
        return "cpu" if isinstance(device, str) and device.startswith("cuda") else device

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(function, "__name__", "") == "cuda":
                return args[0]
            kwargs = dict(kwargs or {})
            if "device" in kwargs:
                kwargs["device"] = meant(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*map(meant, args), **kwargs)

    pretend.mode = OnTheCpu()  # type: ignore[attr-defined]  # it lives as long as the process
    pretend.mode.__enter__()  # type: ignore[attr-defined]
    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator.__new__(generator, meant(device))

    torch.Generator = Generator
