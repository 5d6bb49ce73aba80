"""Metrics of the loop: in `/metrics`, in `llm.get_metrics()`, and a line in the periodic log.

A stat logger of vLLM. It is built after vLLM's Prometheus logger, which unregisters every metric
named `vllm:...` when it starts. It is called before that one, to remove the statistics that are
sent in a field of vLLM's (`messages/stats.py`). `docs/metrics.md` explains each metric.
"""

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.model.facts import layout_of_engine

logger = init_logger("vllm.loopus")

PREFIX = "vllm:loopus_"
FITS = ("full", "observed")  # keys of `LoopStats.sequences`
QUORUMS = [share / 10 for share in range(1, 11)]
COUNTERS = {
    "rows": "Rows of the reasoning block: positions times passes, catch-up included.",
    "catch_up_rows": "Rows of the reasoning block for positions before the newest.",
    "full_depth_rows": "Rows that every position at full depth would have taken.",
    "decoder_rows": "Rows of the decoder, catch-up included.",
    "decoder_catch_up_rows": "Rows of the decoder that brought no token.",
    "waiting_rows": "Sequences that had exited and waited for one more pass, summed over passes.",
    "nonfinite_requests": "Requests that failed because of NaN or infinite states.",
    "guesses": "Positions that began with a guessed token.",
    "guess_rows": "Rows of the reasoning block for positions that began with a guessed token.",
    "wasted_rows": "Rows of the reasoning block for guessed positions that were forgotten.",
    "saved_loops": "Loops that generated tokens did not take because they exited early.",
}


# By the depth at which the guess was made.
GUESSES = {
    "confirmed_guesses": "Guessed tokens that were the sampled ones, by the depth of the guess.",
    "rejected_guesses": "Guessed tokens that were not the sampled ones, by the depth of the guess.",
}


class LoopTotals:
    """Sums of what was recorded since the last log line."""

    def __init__(self, max_loops: int) -> None:
        self.max_loops = max_loops
        self.tokens = self.loops = 0
        self.stats = LoopStats()

    def add(self, stats: LoopStats) -> None:
        self.tokens += len(stats.exit_depths)
        self.loops += sum(stats.exit_depths)
        self.stats.add(stats)

    def __str__(self) -> str:
        stats, passes = self.stats, max(len(self.stats.passes), 1)
        rows, full = sum(stats.passes), self.max_loops * stats.encoded_rows
        return (
            f"mean exit depth {self.loops / max(self.tokens, 1):.2f} of {self.max_loops}, "
            f"{len(stats.passes) / max(len(stats.steps), 1):.1f} passes per step, "
            f"{rows / passes:.1f} rows per pass "
            f"({100 * stats.catch_up_rows / max(rows, 1):.0f}% catch-up), "
            f"{stats.waiting / passes:.1f} waiting, "
            f"quorum {sum(stats.quorums) / max(len(stats.quorums), 1):.2f}, "
            f"{100 * _saved(rows, full):.0f}% of full depth saved, "
            f"K/V blocks by depth {' '.join(map(str, stats.blocks))}"
        )


class LoopStatLogger(AggregateStatLoggerBase):
    """Records what the loop did, for all engines of a front end."""

    def __init__(
        self,
        vllm_config: Any,
        engine_indexes: list[int],
        prometheus: PrometheusStatLogger | None = None,
        logs: bool = True,
    ) -> None:
        """`prometheus`: vLLM's own logger, whose metric classes and labels are used (Ray has
        others). `logs`: whether the periodic line is wanted."""
        self._max_loops = vllm_config.model_config.hf_config.max_loops
        self._logs = logs
        self._recent = LoopTotals(self._max_loops)
        self._metrics = None if prometheus is None else LoopMetrics(vllm_config, prometheus)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        stats = LoopStats.received(scheduler_stats)
        if stats is None:
            return
        self._recent.add(stats)
        if self._metrics is not None:
            self._metrics.record(stats, engine_idx)

    def log(self) -> None:
        recent, self._recent = self._recent, LoopTotals(self._max_loops)
        if self._logs and recent.stats.passes:
            logger.info("Loop: %s", recent)

    def log_engine_initialized(self) -> None:
        """Nothing to log: the worker logs the start-up summary (`runners/start_up.py`)."""


class LoopMetrics:
    """The Prometheus metrics, labelled like vLLM's own by model and engine."""

    def __init__(self, vllm_config: Any, prometheus: PrometheusStatLogger) -> None:
        self._labels = prometheus.per_engine_labelvalues
        self._prometheus = prometheus
        self._rows = dict.fromkeys(self._labels, (0, 0))  # since the start: computed, full depth
        self.max_loops = max_loops = vllm_config.model_config.hf_config.max_loops
        depths = list(range(1, max_loops + 1))
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        rows = [2**power for power in range((budget - 1).bit_length() + 1)]
        self.exit_depth = self._histogram(
            "exit_depth", "Recursion depth at which a generated token exited.", depths
        )
        self.step_passes = self._histogram(
            "step_passes", "Passes of the reasoning block in an engine step.", [0, *depths]
        )
        self.pass_rows = self._histogram("pass_rows", "Rows of a pass; its count: passes.", rows)
        self.quorum = self._histogram(
            "quorum", "Share of sequences wanting a token that had exited.", QUORUMS
        )
        self.counters = {
            name: self._per_engine(prometheus._counter_cls, name, documentation)
            for name, documentation in COUNTERS.items()
        }
        self.guesses = {
            name: self._by_label(prometheus._counter_cls, name, documentation, "depth", depths)
            for name, documentation in GUESSES.items()
        }
        for gauge in self._gauge("max_loops", "Maximum number of loops.").values():
            gauge.set(max_loops)
        self.saved = self._gauge(
            "compute_saved_ratio", "Share of full-depth rows not computed, since the start."
        )
        self.blocks = self._gauges(
            "kv_blocks", "K/V blocks that running sequences hold at a depth.", "depth", depths
        )
        self.sequences = self._gauges(
            "kv_sequences",
            "Sequences of max_model_len that fit, at full depth and at the observed one.",
            "at",
            FITS,
        )
        sizes = self._gauges(
            "kv_bytes_per_token", "K/V of a token at a depth, on one rank.", "depth", depths
        )
        layout = layout_of_engine(vllm_config)
        for gauges in sizes.values():
            for depth, gauge in zip(depths, gauges, strict=True):
                gauge.set(layout.allocated(depth))

    def record(self, stats: LoopStats, engine: int) -> None:
        for depth in stats.exit_depths:
            self.exit_depth[engine].observe(depth)
        for passes in stats.steps:
            self.step_passes[engine].observe(passes)
        for rows in stats.passes:
            self.pass_rows[engine].observe(rows)
        for quorum in stats.quorums:
            self.quorum[engine].observe(quorum)
        for gauge, blocks in zip(self.blocks[engine], stats.blocks, strict=False):
            gauge.set(blocks)
        for gauge, at in zip(self.sequences[engine], FITS, strict=True):
            if at in stats.sequences:
                gauge.set(stats.sequences[at])
        rows, full_depth_rows = sum(stats.passes), self.max_loops * stats.encoded_rows
        amounts = {
            "rows": rows,
            "catch_up_rows": stats.catch_up_rows,
            "full_depth_rows": full_depth_rows,
            "decoder_rows": stats.decoder_rows,
            "decoder_catch_up_rows": stats.decoder_catch_up_rows,
            "waiting_rows": stats.waiting,
            "nonfinite_requests": stats.nonfinite_requests,
            "guesses": stats.guesses,
            "guess_rows": stats.guess_rows,
            "wasted_rows": stats.wasted_rows,
            "saved_loops": sum(self.max_loops - depth for depth in stats.exit_depths),
        }
        for name, amount in amounts.items():
            self.counters[name][engine].inc(amount)
        for name, children in self.guesses.items():
            for depth in getattr(stats, name):
                children[engine][depth - 1].inc()
        before = self._rows[engine]
        self._rows[engine] = before[0] + rows, before[1] + full_depth_rows
        self.saved[engine].set(_saved(*self._rows[engine]))

    def _metric(
        self, kind: Any, name: str, documentation: str, labels: tuple[str, ...] = (), **options: Any
    ) -> Any:
        return kind(
            name=PREFIX + name,
            documentation=documentation,
            labelnames=["model_name", "engine", *labels],
            **options,
        )

    def _per_engine(self, kind: Any, name: str, documentation: str, **options: Any) -> Any:
        metric = self._metric(kind, name, documentation, **options)
        return create_metric_per_engine(metric, self._labels)

    def _histogram(self, name: str, documentation: str, buckets: list[Any]) -> Any:
        kind = self._prometheus._histogram_cls
        if kind is not PrometheusStatLogger._histogram_cls:  # Ray's has no bucket for 0
            buckets = [bound for bound in buckets if bound > 0]
        return self._per_engine(kind, name, documentation, buckets=buckets)

    def _gauges(
        self, name: str, documentation: str, label: str, values: Sequence[Any]
    ) -> dict[int, list[Any]]:
        """A gauge with one more label: for each engine, one child for each value, in order."""
        kind = self._prometheus._gauge_cls
        mode = {"multiprocess_mode": "mostrecent"}
        return self._by_label(kind, name, documentation, label, values, **mode)

    def _by_label(
        self,
        kind: Any,
        name: str,
        documentation: str,
        label: str,
        values: Sequence[Any],
        **options: Any,
    ) -> dict[int, list[Any]]:
        """A metric with one more label: for each engine, one child for each value, in order."""
        metric = self._metric(kind, name, documentation, labels=(label,), **options)
        return {
            index: [metric.labels(*known, str(value)) for value in values]
            for index, known in self._labels.items()
        }

    def _gauge(self, name: str, documentation: str) -> Any:
        kind = self._prometheus._gauge_cls
        return self._per_engine(kind, name, documentation, multiprocess_mode="mostrecent")


def add_loop_logger(manager: Any, vllm_config: Any, logs: bool) -> None:
    """Gives a `StatLoggerManager`, just built for a looped model, our logger.

    `logs`: whether vLLM logs statistics itself; not with several API servers.
    """
    loggers = manager.stat_loggers
    prometheus = next((x for x in loggers if isinstance(x, PrometheusStatLogger)), None)
    loggers[:0] = [LoopStatLogger(vllm_config, manager.engine_indexes, prometheus, logs)]


def _saved(rows: int, full_depth_rows: int) -> float:
    """The share of the rows at full depth that were not computed."""
    return 1 - rows / full_depth_rows if full_depth_rows else 0.0
