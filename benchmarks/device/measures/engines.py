"""The engines that are measured: in this process, with dummy weights or a golden checkpoint."""

import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_loopus.bench.models import SIZES, ModelSize, write_config
from vllm_loopus.bench.workloads import Generator, Request

HERE = Path(__file__).resolve()
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEAN = 3.0  # depth at which tokens exit, of 8
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model with random weights: `base` cut after `encoder` layers and before the last
    `decoder`."""

    base: ModelSize
    encoder: int
    decoder: int

    @property
    def reasoning(self) -> int:
        return self.base.layers - self.encoder - self.decoder

    def config(self) -> dict[str, Any]:
        ends = self.encoder, self.base.layers - self.decoder, self.base.layers
        return self.base.config() | {
            "encoder_layer_indices": list(range(ends[0])),
            "reasoning_layer_indices": list(range(ends[0], ends[1])),
            "decoder_layer_indices": list(range(ends[1], ends[2])),
        }

    @property
    def pass_weights(self) -> int:
        """Weights that a pass reads."""
        return self.reasoning * self.base.layer_weights + self.base.gate_weights

    def token_weights(self, depth: float) -> float:
        """Weights that a step reads for tokens that exit at `depth`, the LM head's among them."""
        others = (self.encoder + self.decoder) * self.base.layer_weights + self.base.head_weights
        return others + depth * self.pass_weights


# As published, by parameters of the base: two layers in the encoder, one in the decoder.
SHAPES = {
    "1.7b": Shape(ModelSize(28, 2048, 6144, 16, 8, 128, 151936), 2, 1),
    "4b": Shape(ModelSize(36, 2560, 9728, 32, 8, 128, 151936), 2, 1),
    "tiny": Shape(SIZES["tiny"], 1, 1),
}


def golden_folder() -> Path:
    """The golden answers: in the archive, or beside the repository.

    Raises `FileNotFoundError` where neither is.
    """
    places = (HERE.parents[4] / "golden", HERE.parents[4] / "shared" / "golden")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"golden answers are in neither {places[0]} nor {places[1]}")


def build(model: Path, graphs: bool, **options: Any) -> Any:
    """An engine (`vllm.LLM`) of a model folder. `graphs`: with CUDA graphs; on a CPU, with padded
    rows in their stead. `options` of vLLM win."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's parts are looked at
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over what is given here
    from vllm import LLM

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": not graphs,
    }
    if torch.cuda.is_available():
        if find_spec("vllm._stand_ins"):  # FlashAttention is part of what is missing there
            defaults["attention_backend"] = "TRITON_ATTN"
        # Warming up compiles kernels that a looped model does not run.
        defaults["kernel_config"] = {"enable_jit_warmup": False, "enable_cutedsl_warmup": False}
        if graphs:
            defaults["compilation_config"] = {
                "cudagraph_mode": "FULL",
                "custom_ops": ["all"],
                "cudagraph_capture_sizes": list(GRAPH_SIZES),
            }
    elif graphs:
        os.environ["VLLM_LOOPUS_PADDED_ROWS"] = ",".join(map(str, GRAPH_SIZES))
    return LLM(str(model), **{**defaults, **options})


def build_shape(size: str, folder: Path, graphs: bool, **options: Any) -> Any:
    """An engine of one of `SHAPES`. `folder`: for its config."""
    tiny = size == "tiny"
    model = write_config(SHAPES[size].config(), folder / size)
    defaults = {
        "load_format": "dummy",
        "dtype": "float32" if tiny else "bfloat16",
        "kv_cache_memory_bytes": GIB // 4 if tiny else 24 * GIB,
        "max_model_len": 128,
    }
    return build(model, graphs, **{**defaults, **options})


def options_of_policy(options: ArgumentParser, sequences: Sequence[int]) -> None:
    """The options of a measure over an engine of a size and a K/V policy."""
    options.add_argument("--size", choices=SHAPES, default="4b")
    options.add_argument("--policy", choices=("exact", "last_exited"), default="exact")
    options.add_argument("--sequences", type=int, nargs="+", default=sequences)
    options.add_argument("--graphs", action="store_true")


def build_policy(given: Namespace) -> tuple[str, list[int], Any, Generator]:
    """For these options: the size, the numbers of sequences, the engine, and what draws its
    requests."""
    size, sequences = ("tiny", [2]) if given.tiny else (given.size, given.sequences)
    base = SHAPES[size].base
    with tempfile.TemporaryDirectory() as folder:
        llm = build_shape(
            size,
            Path(folder),
            given.graphs,
            max_num_seqs=max(sequences),
            additional_config={"loopus": {"kv_policy": given.policy}},
        )
    return size, sequences, llm, Generator(base.vocabulary, base.max_loops, MEAN)


def runner_of(llm: Any) -> Any:
    """vLLM's model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def about(llm: Any) -> dict[str, Any]:
    """The attention backend, our adapter to vLLM's runner, and whether rows are padded: for graphs,
    or on a CPU in their stead."""
    runner = runner_of(llm)
    return {
        "attention": str(runner.attn_groups[0][0].backend.get_name()),
        "runner": type(runner).__mro__[1].__name__,
        "padded": runner._sequences._executor._regions.reasoning.padded,
    }


def answer(llm: Any, requests: Sequence[Request], at_once: int) -> int:
    """Answers requests, so many at a time, the next one as soon as one has ended. Returns the
    number of tokens."""
    from vllm import SamplingParams

    engine: Any = llm.llm_engine
    waiting, tokens, running = list(reversed(requests)), 0, 0
    while waiting or running:
        while waiting and running < at_once:
            request = waiting.pop()
            params = SamplingParams(
                temperature=0,
                max_tokens=request.tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={**request.knobs, "exit_depths": request.exits},
            )
            engine.add_request(str(len(waiting)), {"prompt_token_ids": request.prompt}, params)
            running += 1
        for output in engine.step():
            if output.finished:
                tokens += len(output.outputs[0].token_ids)
                running -= 1
    return tokens


def wait() -> None:
    """Until the device has done all that has been launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
