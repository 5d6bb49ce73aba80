"""From questions to traces: tokens by either side, values by the reference, exits by the rule."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import engine, record, reference
from vllm_loopus.trace.exits import CERTAIN, Exits, exits
from vllm_loopus.trace.questions import Question
from vllm_loopus.trace.tokens import Vocabulary

TRANSFORMERS, VLLM = "transformers", "vllm"
ENGINES = (TRANSFORMERS, VLLM)
Answer = tuple[list[int], list[int] | None]  # token ids; exit depths where an engine told them


@dataclass(frozen=True)
class Traced:
    """A question's trace, and what of it is not written: values with states, margins."""

    trace: record.Trace
    values: reference.DepthValues
    exits: Exits

    @property
    def by_the_reference(self) -> Answer:
        """What the reference says at every exit after the tokens before, given answers aside; and
        where the engine says that it left."""
        best, trace = self.values.top_ids[..., 0], self.trace
        said = [int(best[depth - 1, i]) for i, depth in enumerate(trace.exit_depths)]
        return trace.token_ids if trace.given else said, trace.engine_exit_depths


def set_knobs(config: LoopUSConfig, **knobs: Any) -> HaltingRule:
    """Sets halting fields, those that are not None, as a request's knobs over a checkpoint's.

    Raises `ValueError` naming the field.
    """
    for name, value in knobs.items():
        if value is not None:
            setattr(config, name, value)
    if knobs.get("min_loops") is None:
        config.min_loops = min(config.min_loops, config.max_loops)
    config.check()
    return HaltingRule.from_config(config)


def context_of(config: LoopUSConfig) -> int:
    """The longest sequence of tokens that the model computes exactly."""
    longest = int(config.base.max_position_embeddings)
    exact = config.attention.exact_context
    return longest if exact is None else min(longest, exact)


def answers_of_transformers(
    model: LoopUSForCausalLM, questions: Iterable[Question], max_tokens: int, stops: Sequence[int]
) -> Iterator[Answer]:
    """Given answers, or greedy ones of transformers' `generate`, one after the other."""
    for question in questions:
        if question.answer is not None:
            yield question.answer, None
        else:
            yield reference.generate(model, question.prompt_ids, max_tokens, stops), None


def answers_of_vllm(
    llm: Any,
    questions: Sequence[Question],
    rule: HaltingRule,
    max_tokens: int,
    stops: Sequence[int],
) -> list[Answer]:
    """Greedy answers and exit depths of a served engine."""
    prompts = [question.prompt_ids for question in questions]
    return list(engine.answer(llm, prompts, rule, max_tokens, stops))


def traced(
    model: LoopUSForCausalLM,
    vocabulary: Vocabulary,
    question: Question,
    answer: Answer,
    top: int = 5,
) -> Traced:
    """The trace of an answer; its halting rule is that of the model's config."""
    ids, engine_depths = answer
    values = reference.depth_values(model, question.prompt_ids, ids, top)
    found = exits(HaltingRule.from_config(model.config), values.confidence, values.step_length)
    trace = record.build(
        vocabulary,
        question.prompt,
        question.prompt_ids,
        ids,
        values,
        found,
        engine_depths=engine_depths,
        given=question.answer is not None,
        fields=question.fields,
    )
    return Traced(trace, values, found)


@dataclass(frozen=True)
class Difference:
    """Where two sides differ first. `certain`: rounding does not explain it."""

    token: int
    what: str
    certain: bool

    def __str__(self) -> str:
        why = "" if self.certain else f" (a toss-up: the margin is below {CERTAIN:g})"
        return f"token {self.token}: {self.what}{why}"


def difference(mine: Traced, other: Answer) -> Difference | None:
    """The first token whose id or exit depth the other side has differently; None for none.

    `mine` decides what is certain: the gap of the best two logits where the token left, and the
    distance of what the halting rule looked at from its limit.
    """
    trace, (ids, depths) = mine.trace, other
    for index in range(max(len(trace.token_ids), len(ids))):
        if index >= min(len(trace.token_ids), len(ids)):
            return Difference(index, "one answer ends here, the other goes on", True)
        depth = trace.exit_depths[index]
        if depths is not None and depths[index] != depth:
            certain = mine.exits.margins[index] >= CERTAIN
            return Difference(index, f"left at depth {depth} and at {depths[index]}", certain)
        if ids[index] != trace.token_ids[index]:
            certain = (
                min(mine.exits.margins[index], float(mine.values.logit_gap[depth - 1, index]))
                >= CERTAIN
            )
            what = f"{trace.token_ids[index]} and {ids[index]}"
            return Difference(index, what, certain)
    return None
