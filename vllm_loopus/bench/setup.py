"""What a run of the benchmark is made of: the plan, and what its sections share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_loopus.bench.fleet import EngineSpec
from vllm_loopus.bench.host import about_run
from vllm_loopus.bench.models import SIZES, ModelSize
from vllm_loopus.bench.workers.engine import Kind
from vllm_loopus.bench.workloads import Generator, Workload
from vllm_loopus.serving.knobs.engine import KV_POLICIES

BLOCK = {"cpu": 128, "cuda": 16}  # vLLM's own default block sizes
SPARE = 1.25  # K/V memory over what the workloads need
GPU_SHARE = 0.05  # of the GPU's memory that must be free when an engine starts
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. `minutes`: total measuring time, without engine starts; every section runs at
    least its minimum."""

    name: str
    size: str
    minutes: float
    seqs: tuple[int, ...]
    tokens: int
    waves: float  # requests for each sequence slot
    prompt: int = 4
    mean: float = 3.0
    seed: int = 0
    rounds: int = 3  # at least
    policies: tuple[str, ...] = KV_POLICIES
    eager_base: bool = False  # not compiled, which vLLM does with the base by default
    sweep_batches: tuple[int, ...] = (1, 4, 16)
    sweep_means: tuple[float, ...] = (2.0, 3.0, 5.0, 8.0)
    sweep_tokens: int = 6
    mixed_requests: int = 32
    mixed_prompt: int = 64
    mixed_answer: int = 32
    long_context: tuple[int, int] = (1024, 4096)
    long_requests: int = 4
    cache_lengths: tuple[int, ...] = (16, 64, 256, 1024)
    cache_counted: int = 4
    uneven_size: str = "published"
    uneven_requests: int = 64
    uneven_prompt: int = 32
    uneven_answer: int = 48
    served_requests: int = 48
    served_answer: int = 32
    quality_items: int = 20  # for each task and difficulty
    sections: tuple[str, ...] = field(default=())

    @property
    def model(self) -> ModelSize:
        return SIZES[self.size]


ALL = ("machine", "decode", "sweep", "mixed", "long", "cache", "uneven", "served", "quality")
FULL = Plan("full", "published", 45, (4, 16, 64), 32, 2, sections=ALL)
QUICK = Plan(
    "quick",
    "published",
    5,
    (16,),
    16,
    1,
    sweep_means=(3.0, 8.0),
    sweep_tokens=4,
    mixed_requests=12,
    mixed_prompt=128,
    mixed_answer=32,
    cache_lengths=(8, 128),
    cache_counted=2,
    uneven_size="small",
    uneven_answer=24,
    served_requests=12,
    served_answer=12,
    quality_items=3,
    sections=tuple(name for name in ALL if name != "long"),
)
TINY = replace(
    QUICK,
    name="tiny",
    size="tiny",
    minutes=0.05,
    seqs=(4,),
    tokens=4,
    rounds=2,
    policies=KV_POLICIES[:1],
    eager_base=True,
    sweep_batches=(1, 4),
    sweep_tokens=2,
    mixed_requests=6,
    mixed_prompt=16,
    mixed_answer=6,
    cache_lengths=(4, 8),
    uneven_size="tiny",
    uneven_requests=6,
    uneven_prompt=8,
    uneven_answer=6,
    quality_items=1,
    served_requests=4,
    served_answer=4,
    sections=("machine", "decode", "sweep", "mixed"),
)
PLANS = {plan.name: plan for plan in (FULL, QUICK, TINY)}


@dataclass(frozen=True)
class Setup:
    """A plan on this machine. `folder`: for models and logs. `original`: a checkout of the original
    implementation and the Python that runs it."""

    plan: Plan
    folder: Path
    dtype: str
    device: str
    tell: Callable[[str], None]
    original: tuple[Path, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What decides about the figures: dtype, device, plan and model."""
        return {
            "dtype": self.dtype,
            "device": self.device,
            "plan": asdict(self.plan),
            "model": self.plan.model.to_dict(),
        }

    @property
    def generator(self) -> Generator:
        model = self.plan.model
        return Generator(model.vocabulary, model.max_loops, self.plan.mean)

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    def seconds(self, share: float) -> float:
        """Of the plan's time, for a section."""
        return 60 * self.plan.minutes * share

    def engine(
        self,
        name: str,
        kind: Kind,
        model: Path,
        seqs: int,
        workloads: Sequence[Workload],
        **loopus: Any,
    ) -> EngineSpec:
        """An engine with room for the workloads, `seqs` sequences at a time."""
        longest = max(workload.longest for workload in workloads)
        options = {
            "dtype": self.dtype,
            "max_num_seqs": seqs,
            "max_model_len": -(-(longest + 1) // 64) * 64,
            "kv_cache_memory_bytes": self._kv_bytes(kind, seqs, workloads),
        }
        if self.device == "cuda":  # other engines are there too; K/V has its size already
            options["gpu_memory_utilization"] = GPU_SHARE
        if kind == "base":
            options |= {"load_format": "dummy", "enforce_eager": self.plan.eager_base}
        return EngineSpec(name, kind, model, loopus, options)

    def _kv_bytes(self, kind: Kind, seqs: int, workloads: Sequence[Workload]) -> int:
        model, block = self.plan.model, BLOCK[self.device]
        a_layer = 2 * model.kv_heads * model.head_size * self.itemsize
        layers = model.layers
        if kind != "base":  # a state is as wide as K and V of a layer, or a few of them
            state = -(-model.hidden * self.itemsize // a_layer)
            layers = model.max_loops * (model.layers + state)
        blocks = max(
            sum(sorted(-(-(len(r.prompt) + r.tokens) // block) for r in w.requests)[-seqs:])
            for w in workloads
        )
        longest = max(-(-(w.longest + 64) // block) for w in workloads)
        return int(SPARE * (blocks + longest + 2) * block * layers * a_layer)


def default_dtype(device: str) -> str:
    """bfloat16 where the machine has instructions for it, else float32: without them a row costs
    the same at every batch size, and batching gains nothing."""
    if device == "cuda":
        return "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def about(setup: Setup, command: Sequence[str]) -> dict[str, Any]:
    """What is needed to repeat a run."""
    return {**about_run(command), **setup.to_dict()}
