"""How much is done: a try, an afternoon on two cores, a day on a GPU."""

from dataclasses import dataclass

from vllm_loopus.smollm2.corpus import PACKAGES


@dataclass(frozen=True)
class Size:
    """A size of the run.

    - `packages`: whose documentation is in the corpus, beside Python's.
    - `tokens`: of each of both trainings. `settings`: other keys of `configs/smollm2.yaml`.
    - `analysed`: tokens of the analysis. `documents`: of each task of the quality table.
    """

    packages: tuple[str, ...]
    tokens: int
    analysed: int
    documents: int
    settings: dict[str, object]


SIZES = {
    "test": Size(
        packages=(),
        tokens=4_000,
        analysed=512,
        documents=6,
        settings={
            "batch_size": 2,
            "optimizer.warmup_tokens": 400,
            "data.eval_documents": 1,
            "eval_every": 1000,  # so at the beginning and at the end
            "save_every": 4,
            "log_every": 2,
        },
    ),
    "default": Size(
        packages=PACKAGES[:3], tokens=400_000, analysed=2048, documents=60, settings={}
    ),
    "gpu": Size(
        packages=PACKAGES,
        tokens=100_000_000,
        analysed=8192,
        documents=400,
        settings={
            "batch_size": 64,
            "micro_batch_size": 16,
            "data.max_length": 1024,
            "data.eval_documents": 200,
            "mixed_precision": "bf16",
            "optimizer.warmup_tokens": 2_000_000,
            "eval_every": 100,
            "save_every": 200,
        },
    ),
}
