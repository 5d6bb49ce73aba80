"""Metrics of the loop: what they count, that Prometheus reads and the dashboard finds them."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import GOLDEN, golden_cases
from tests.serving.conftest import MAX_LOOPS, SERVED, get, samples, wait_until
from tests.serving.fakes import Engine
from vllm_loopus import exit_depths
from vllm_loopus.serving.frontend.metrics import LoopTotals
from vllm_loopus.serving.hooks.log import LEFT_OUT, SERVED_VARIABLE, filter_log
from vllm_loopus.serving.messages.stats import LoopStats

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "examples" / "grafana" / "loopus.json"
PREFIX = "vllm:loopus_"
QUESTION = "(3+4)="


def test_the_parser_accepts_them(address: str) -> None:
    families = list(text_string_to_metric_families(get(address, "/metrics")))
    ours = {f.name: f for f in families if f.name.startswith(PREFIX)}
    assert len(ours) >= 12
    assert len(families) == len({family.name for family in families})
    for name, family in ours.items():
        assert family.type in ("histogram", "counter", "gauge"), name
        assert family.documentation.endswith(".")
        assert re.fullmatch(r"vllm:[a-z_]+", name)
        for sample in family.samples:
            assert sample.labels["model_name"] == SERVED and sample.labels["engine"] == "0"


def test_the_histogram_counts_the_tokens(address: str, client: OpenAI) -> None:
    """Whole answers, several choices, stop strings, and a stream that is broken off. vLLM does not
    count a token that comes while its request is being aborted."""
    before = samples(address)
    depths: list[int] = []
    options = {"model": SERVED, "prompt": QUESTION, "temperature": 1.3}
    knobs = {"exit_threshold": 0.52, "return_exit_depths": 1}
    extra = {"ignore_eos": True, "vllm_xargs": knobs}
    for more in ({}, {"n": 3, "seed": 1}, {"stop": "="}):
        answer = client.completions.create(**options, **more, max_tokens=60, extra_body=extra)
        depths += [depth for choice in answer.choices for depth in choice.exit_depths]
        assert answer.usage.completion_tokens == sum(len(c.exit_depths) for c in answer.choices)
    wait_until(lambda: samples(address)["vllm:num_requests_running", ""] == 0)
    whole = samples(address)
    for name in ("vllm:loopus_exit_depth_count", "vllm:generation_tokens_total"):
        assert whole[name, ""] - before[name, ""] == len(depths)
    broken = client.completions.create(**options, max_tokens=200, stream=True, extra_body=extra)
    next(iter(broken))
    broken.close()

    def settled() -> bool:
        now = samples(address)
        return now["vllm:num_requests_running", ""] == 0 and now[
            "vllm:loopus_exit_depth_count", ""
        ] - before["vllm:loopus_exit_depth_count", ""] > len(depths)

    wait_until(settled)
    now = samples(address)

    def grown(name: str, label: str = "") -> float:
        return now[name, label] - before[name, label]

    count = grown("vllm:loopus_exit_depth_count")
    assert 0 <= count - grown("vllm:generation_tokens_total") <= 2
    assert grown("vllm:loopus_exit_depth_bucket", "+Inf") == count
    for depth in range(1, MAX_LOOPS + 1):  # the broken-off stream adds to them
        least = sum(d <= depth for d in depths)
        assert grown("vllm:loopus_exit_depth_bucket", f"{depth}.0") >= least


def test_depths_are_those_of_the_answers(address: str, client: OpenAI) -> None:
    before = samples(address)
    depths = [1, 8, 8, 3, 2]
    client.completions.create(
        model=SERVED, prompt=QUESTION, max_tokens=5, temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": {"exit_depths": depths}},
    )  # fmt: skip
    name = "vllm:loopus_exit_depth_count"
    wait_until(lambda: samples(address)[name, ""] - before[name, ""] == 5)
    now = samples(address)
    for depth in range(1, MAX_LOOPS + 1):
        key = "vllm:loopus_exit_depth_bucket", f"{depth}.0"
        assert now[key] - before[key] == sum(d <= depth for d in depths)
    for name, value in (
        ("vllm:loopus_exit_depth_sum", sum(depths)),
        ("vllm:loopus_saved_loops_total", sum(MAX_LOOPS - depth for depth in depths)),
        # Every position but the last token's, which is never read.
        ("vllm:loopus_full_depth_rows_total", MAX_LOOPS * (len(QUESTION) + 4)),
    ):
        assert now[name, ""] - before[name, ""] == value


def test_log_line_and_start_up_summary(server_log: Path, address: str, client: OpenAI) -> None:
    client.completions.create(model=SERVED, prompt=QUESTION, max_tokens=40)
    line = wait_until(
        lambda: re.search(r"Loop: mean exit depth ([\d.]+) of 8, .*saved.*", server_log.read_text())
    )
    assert 1 <= float(line[1]) <= 8
    log = server_log.read_text()
    assert log.count("LoopUS model:") == 1
    for text in (
        f"{SERVED}, ",
        "encoder layer 0, reasoning layers 1-2 (2), decoder layer 3",
        "1 to 8",
        "threshold: exits when the confidence is > 0.5",
        "exact, prefill lazy, exit quorum auto",
        "KiB at 1, ",
        " at 8 (sequences of 256 tokens, by depth)",
        "low: 2 loops, medium: 4 loops",
        "asynchronous scheduling (which sequences get a token",
    ):
        assert text in log, text
    # Torch's line is logged when the parent of the forks is imported, before the plugin is loaded.
    vllms = [beginning for name, beginning in LEFT_OUT if name.startswith("vllm.")]
    assert len(vllms) == 5 and not [beginning for beginning in vllms if beginning in log]


def test_other_models_keep_their_log(monkeypatch: pytest.MonkeyPatch) -> None:
    filter_log()
    for served in (False, True):
        monkeypatch.delenv(SERVED_VARIABLE, raising=False)
        if served:
            monkeypatch.setenv(SERVED_VARIABLE, "1")
        for name, beginning in LEFT_OUT:
            logger = logging.getLogger(name)
            for text in (beginning + " by %s", "something else, and " + beginning):
                record = logger.makeRecord(name, logging.WARNING, "", 0, text, ("us",), None)
                left_out = served and text.startswith(beginning)
                assert bool(logger.filter(record)) != left_out, text


def test_capacity(address: str, client: OpenAI) -> None:
    """Bytes grow with depth; what fits at the depth that was seen is at least what fits at full."""
    client.completions.create(
        model=SERVED, prompt=QUESTION, max_tokens=8, extra_body={"vllm_xargs": {"max_loops": 2}}
    )
    name = "vllm:loopus_kv_sequences"
    fit = wait_until(
        lambda: (s := samples(address))[name, "observed"] > s[name, "full"] and s,
    )
    assert fit[name, "full"] > 0
    sizes = [fit["vllm:loopus_kv_bytes_per_token", str(depth)] for depth in range(1, MAX_LOOPS + 1)]
    assert sizes == [sizes[0] * depth for depth in range(1, MAX_LOOPS + 1)]


def test_the_dashboard_finds_what_it_asks_for(address: str) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    exist = {name for name, _ in samples(address)}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = [re.findall(r"vllm:\w+", query) for query in queries]
    assert len(queries) > 15 and all(asked)
    assert {name for names in asked for name in names} <= exist
    metrics = {re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in exist}
    shown = {re.sub(r"_(bucket|count|sum|total)$", "", name) for names in asked for name in names}
    ours = {name for name in metrics if name.startswith(PREFIX)}
    assert ours - shown == {"vllm:loopus_compute_saved_ratio"}  # a panel computes it over time


def test_the_page_describes_every_metric(address: str) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    suffix = {"counter": "_total"}
    exist = {
        family.name + suffix.get(family.type, "")
        for family in text_string_to_metric_families(get(address, "/metrics"))
        if family.name.startswith(PREFIX) and not family.name.endswith("_created")
    }
    assert set(re.findall(r"^\| `(vllm:\w+)", page, re.M)) == exist
    assert (
        set(re.findall(r"vllm:loopus\w+", page)) <= {name for name, _ in samples(address)} | exist
    )


@pytest.mark.parametrize("stats", [True, False])
def test_offline(make_llm: Any, stats: bool) -> None:
    """In the engine of `LLM`; and without statistics nothing breaks."""
    from vllm import SamplingParams

    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=not stats,
    )
    cases = golden_cases("qwen3")[:4]
    outputs = llm.generate(
        [{"prompt_token_ids": case["prompt"]} for case in cases],
        SamplingParams(max_tokens=6, ignore_eos=True, detokenize=False, n=2),
        use_tqdm=False,
    )
    depths = [d for output in outputs for choice in output.outputs for d in exit_depths(choice)]
    assert len(depths) == 48
    if not stats:
        return
    found = {metric.name: metric for metric in llm.get_metrics() if metric.name.startswith(PREFIX)}
    histogram = found[f"{PREFIX}exit_depth"]
    assert (histogram.count, histogram.sum) == (48, sum(depths))
    rows = found[f"{PREFIX}pass_rows"]
    assert rows.sum == found[f"{PREFIX}rows"].value
    assert rows.count == found[f"{PREFIX}step_passes"].sum
    positions = 2 * sum(len(case["prompt"]) for case in cases) + 8 * 5  # a last token is not read
    assert found[f"{PREFIX}full_depth_rows"].value == 8 * positions


def total_of(engine: Engine) -> LoopStats:
    """What the scheduler reported until nothing was left to do; sizes are known without a model."""
    engine.run()
    total = LoopStats()
    for scheduler_stats in engine.stats:
        received = LoopStats.received(scheduler_stats)
        assert received is not None and scheduler_stats.kv_connector_stats is None
        assert LoopStats.received(scheduler_stats) is None
        total.add(received)
    return total


def test_rows() -> None:
    """A prompt of 5 runs to depth 4; then budgets of 1, a row a token. The decoder goes through the
    prompt once, at the depth of its tokens."""
    engine = Engine(max_loops=4, prefix_caching=False, prefill_depth="full")
    engine.add("a", [1, 2, 3, 4, 5], 4, max_loops=1)
    total = total_of(engine)
    assert engine.depths["a"] == [1, 1, 1, 1]
    assert sum(total.passes) == 4 * 5 + 3 * 1
    assert (total.encoded_rows, total.catch_up_rows) == (5 + 3, 0)
    assert (total.decoder_rows, total.decoder_catch_up_rows) == (5 + 3, 4)
    assert len(total.steps) == engine.steps and sum(total.steps) == len(total.passes)
    assert total.quorums == [1.0] * 4 and total.waiting == 0


def test_catch_up() -> None:
    """Positions 3, 4 and 5 leave at depth 1; position 6 takes them along to 2, 3 and 4."""
    engine = Engine(max_loops=4, prefix_caching=False, prefill_depth="full")
    engine.add("a", [1, 2, 3], 5, max_loops=4, exit_depths=[1, 1, 1, 1, 4])
    total = total_of(engine)
    assert engine.depths["a"] == [1, 1, 1, 1, 4]
    assert total.catch_up_rows == 3 * 3
    assert sum(total.passes) == 4 * 3 + 3 * 1 + (1 + 3 * 4)


@pytest.mark.parametrize(("quorum", "waiting"), [(1.0, 3 * 5), (0.5, 0)])
def test_waiting_and_quorum(quorum: float, waiting: int) -> None:
    """With a full quorum, who leaves at 1 sits through three passes of who leaves at 4."""
    engine = Engine(max_loops=4, prefix_caching=False, prefill_depth="full", quorum=quorum)
    for name, loops in (("a", 1), ("b", 4)):
        engine.add(name, [1, 2, 3], 6, min_loops=loops, max_loops=loops)
    total = total_of(engine)
    assert engine.depths == {"a": [1] * 6, "b": [4] * 6}
    assert min(total.quorums) == quorum and total.waiting == waiting


def test_blocks() -> None:
    """Blocks of four tokens: held while a request runs, none after."""
    engine = Engine(max_loops=4, prefix_caching=False, prefill_depth="full")
    engine.add("a", [1] * 9, 4, max_loops=1)
    engine.step()
    held = LoopStats.received(engine.stats.pop())
    assert held is not None and len(held.blocks) == 4 and held.blocks[0] == 3
    assert total_of(engine).blocks == [0] * 4


def test_log_line() -> None:
    totals = LoopTotals(8)
    totals.add(
        LoopStats(steps=[2], passes=[30, 10], encoded_rows=10, catch_up_rows=4, waiting=3,
                  quorums=[0.25, 0.75], blocks=[7, 2], exit_depths=[1, 5]),
    )  # fmt: skip
    assert str(totals) == (
        "mean exit depth 3.00 of 8, 2.0 passes per step, 20.0 rows per pass (10% catch-up), "
        "1.5 waiting, quorum 0.50, 50% of full depth saved, K/V blocks by depth 7 2"
    )
    assert "mean exit depth 0.00" in str(LoopTotals(8))
    assert LoopStats.received(SimpleNamespace(kv_connector_stats={"of": "others"})) is None
    assert LoopStats.received(None) is None
