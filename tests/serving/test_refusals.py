"""What cannot work is refused at start-up, naming option, value and fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

from tests.bases import base_config
from tests.conftest import GOLDEN
from vllm_loopus.config import LoopUSConfig

REFUSED = [
    ({"pipeline_parallel_size": 2}, r"pipeline_parallel_size=2 .*tensor_parallel_size"),
    (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 3,
            }
        },
        r"speculative_config=.*ngram.*remove it",
    ),
    ({"async_scheduling": True}, r"async_scheduling=True .*leave it off"),
    ({"enable_prompt_embeds": True}, r"enable_prompt_embeds=True .*leave it off"),
    ({"runner": "pooling"}, r"runner='pooling' \(convert='embed'\) .*leave --runner"),
    ({"runner": "pooling", "convert": "classify"}, r"convert='classify'\) .*leave --runner"),
    ({"enable_lora": True}, r"enable_lora=True .*merge the adapter"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, r"scheduler_cls=.*leave it out"),
    (
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        r"kv_transfer_config .*remove it",
    ),
    ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, r"worker_cls=.*leave it out"),
    ({"kv_offloading_size": 1.0}, r"kv_offloading_size=1.0 .*remove it"),
    ({"kv_sharing_fast_prefill": True}, r"kv_sharing_fast_prefill=True .*leave it off"),
    ({"kv_cache_dtype": "int8_per_token_head"}, r"='int8_per_token_head' .*use one of auto, fp8,"),
    ({"kv_cache_dtype": "nvfp4"}, r"kv_cache_dtype='nvfp4' .*use one of auto, fp8,"),
    ({"kv_cache_dtype_skip_layers": ["0"]}, r"kv_cache_dtype_skip_layers=.*leave it out"),
    ({"additional_config": {"loopus": {"kv_planes": "last:0"}}}, r"kv_planes='last:0' must be"),
    ({"additional_config": {"loopus": {"kv_planes": "last:9"}}}, r"'last:9' .*max_loops=8"),
    ({"additional_config": {"loopus": {"kv_planes": "residual"}}}, r"'residual' is not offered"),
    (
        {"additional_config": {"loopus": {"kv_planes": "last:2", "speculate": "auto"}}},
        r"speculate='auto' is not possible with kv_planes='last:2'.*speculate='off'",
    ),
    ({"hf_overrides": {"max_loops": 0}}, r"max_loops=0 .*1 to 256"),
    ({"hf_overrides": {"N": 0}}, r"max_loops=0 "),
    ({"hf_overrides": {"halting_strategy": "vote"}}, r"halting_strategy='vote'.*threshold"),
    ({"hf_overrides": {"decoder_layer_indices": [4, 5]}}, r"layer 4 is in both"),
    ({"hf_overrides": {"reasoning_layer_indices": [1, 7]}}, r"contains layer 7.*0..5"),
    ({"hf_overrides": {"reasoning_layer_indices": []}}, r"reasoning_layer_indices=\[\] is empty"),
    ({"num_gpu_blocks_override": 4 * 8}, r"max seq len \(128\).*decreasing `max_model_len`"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(make_llm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=r"(?s)" + message) as caught:
        make_llm(GOLDEN / "qwen3", skip_tokenizer_init=True, **options)
    assert isinstance(caught.value, ValueError)


def test_one_sequence_at_full_depth_fits_exactly(make_llm: Any) -> None:
    """One block more than is refused above: the accounting is exact."""
    llm = make_llm(GOLDEN / "qwen3", skip_tokenizer_init=True, num_gpu_blocks_override=4 * 8 + 1)
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=125, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [285, 466, 25]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 125


def test_unknown_base(make_llm: Any, tmp_path: Path) -> None:
    text = (GOLDEN / "qwen3" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"qwen3"', '"gpt2"'))
    with pytest.raises(Exception, match=r"base_config.model_type='gpt2' is not supported.*llama"):
        make_llm(tmp_path, skip_tokenizer_init=True)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "misshapen"])
def test_wrong_tensors(make_llm: Any, tmp_path: Path, problem: str) -> None:
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    name = "reasoning.layers.0.self_attn.q_proj.weight"
    if problem == "missing":
        del tensors[name]
    elif problem == "unexpected":
        name = "reasoning.layers.9.self_attn.q_proj.weight"
        tensors[name] = torch.ones(4, 4)
    else:
        tensors[name] = torch.ones(4, 4)
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{problem}: .*{name}"):
        make_llm(tmp_path, skip_tokenizer_init=True)


GATE = "reasoning.gate.A_log"


def truncated(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def beginning_with(content: bytes) -> Callable[..., None]:
    def write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return write


def with_gate(make: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    def write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
        tensors[GATE] = make(tensors[GATE])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


class Payload:
    """Unpickled by anything but `weights_only`, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "run")


def pickle_with_code(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save({**tensors, "payload": Payload(folder / "run")}, folder / "combined_model.pt")


def pickle_with_text(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save({**tensors, GATE: "none"}, folder / "combined_model.pt")


def truncated_pickle(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save(tensors, folder / "combined_model.pt")
    content = (folder / "combined_model.pt").read_bytes()
    (folder / "combined_model.pt").write_bytes(content[: len(content) // 2])


UNREADABLE = r"the weights of .* cannot be read \(model.safetensors\).*copy them again"
DAMAGED = {
    "truncated": (truncated, UNREADABLE),
    "empty": (beginning_with(b""), UNREADABLE),
    "no header": (beginning_with(b"\xff" * 64), UNREADABLE),
    "truncated header": (beginning_with(b"\x40" + b"\0" * 7 + b'{"reason'), UNREADABLE),
    "nan": (with_gate(lambda a: a * torch.nan), rf"{GATE} holds a value that is NaN"),
    "beyond": (
        with_gate(lambda a: a.double() + 1e300),
        rf"{GATE} holds .* outside the range of torch.float32",
    ),
    "integers": (
        with_gate(lambda a: a.to(torch.int8)),
        rf"{GATE} is torch.int8, expected .*bfloat",
    ),
    "float8": (with_gate(lambda a: a.to(torch.float8_e4m3fn)), rf"{GATE} is torch.float8"),
    "code": (pickle_with_code, r"cannot be read: .*[Ww]eights.only.*is not run"),
    "text": (pickle_with_text, rf"{GATE} is a str, not a tensor"),
    "truncated pickle": (truncated_pickle, r"cannot be read: .*copy them again"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_checkpoints(make_llm: Any, tmp_path: Path, damage: str) -> None:
    write, message = DAMAGED[damage]
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    # Without a dtype there, vLLM looks for it in the files (docs/upstream/readable-failures.md).
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    write(load_file(GOLDEN / "llama" / "model.safetensors"), tmp_path)
    with pytest.raises(ValueError, match=r"(?s)" + message):
        make_llm(tmp_path, skip_tokenizer_init=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("phi3", {"max_model_len": 129}, r"max_model_len=129 .*longrope.* max_model_len to 128"),
        ("gemma2", {"dtype": "float16"}, r"gemma2.* does not support float16"),
    ],
)
def test_bases_beyond_what_they_can(
    make_llm: Any, tmp_path: Path, model_type: str, options: dict[str, Any], message: str
) -> None:
    LoopUSConfig(
        base_config=base_config(model_type), reasoning_layer_indices=[0, 1, 2, 3]
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_llm(tmp_path, skip_tokenizer_init=True, **options)


def test_no_tokenizer_and_no_base(make_llm: Any, tmp_path: Path) -> None:
    text = (GOLDEN / "qwen3" / "config.json").read_text()
    text = text.replace(
        '"base_model_name_or_path": "tiny-qwen3"', '"base_model_name_or_path": null'
    )
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no tokenizer files.*skip_tokenizer_init"):
        make_llm(tmp_path)


def test_cpu_memory_is_a_share_of_what_is_free(
    make_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own default, 92 % of all memory, does not start on a machine in use."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    nodes = {cpu.numa_node for cpu in get_allowed_cpu_list()}
    free = min(get_memory_node_info(node).available_memory for node in nodes)
    size = make_llm(
        GOLDEN / "qwen3", skip_tokenizer_init=True, kv_cache_memory_bytes=None
    ).llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    assert 0.3 * free < size < 0.5 * free
    explicit = make_llm(
        GOLDEN / "qwen3", skip_tokenizer_init=True, kv_cache_memory_bytes=2**28
    ).llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    assert explicit == 2**28
