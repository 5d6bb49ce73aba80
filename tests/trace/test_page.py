"""The page in a browser without a window: what it shows is what the JSON says."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trace.conftest import trace_case, varied
from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import page as pages
from vllm_loopus.trace.convergence import convergence
from vllm_loopus.trace.exits import Exits, exits_of, rule_of
from vllm_loopus.trace.record import document
from vllm_loopus.trace.tokens import Vocabulary, visible
from vllm_loopus.trace.trajectories import trajectories

# Golden cases: backbone, strategy, exit_interval.
CASES = {
    "threshold": ("qwen3", "threshold", 1),
    "interval": ("llama", "threshold", 2),
    "cdf": ("llama", "cdf", 1),
    "convergence": ("phi3", "convergence", 1),
}
MAX_LOOPS = 8


@pytest.fixture(scope="module")
def documents(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary
) -> dict[str, dict[str, Any]]:
    """A trace's JSON for every halting rule, whose tokens try to be markup."""
    made = {}
    for name, case in CASES.items():
        model = golden_models[case[0]]
        found = [trace_case(model, vocabulary, case) for case in varied(*case)[:2]]
        traces = [
            replace(one.trace, trajectories=trajectories(one.values), prompt="<img src=x>")
            for one in found
        ]
        rule = HaltingRule.from_config(model.config)
        summary = convergence(one.values for one in found)
        made[name] = document("<b>m", "transformers", "float32", LOOPUS.name, rule, traces, summary)
    return made


class Opened:
    """A page, with what it said to the console and what it asked for."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.context = browser.new_context(viewport={"width": 1200, "height": 900})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked_for: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.address = file.as_uri()
        self.page.goto(self.address)

    def marked(self, what: str = "exit") -> dict[int, int]:
        """Token -> depth of the marked cells."""
        cells = self.page.locator(f"#grid td.{what}")
        pairs = cells.evaluate_all("cells => cells.map(c => [c.dataset.token, c.dataset.depth])")
        assert len({token for token, _ in pairs}) == len(pairs)
        return {int(token): int(depth) for token, depth in pairs}

    def move(self, value: float) -> float:
        """The slider to `value`, as a mouse does it; where it stands then."""
        self.page.locator("#limit").evaluate(
            "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }",
            value,
        )
        return self.limit()

    def limit(self) -> float:
        return float(self.page.input_value("#limit-value"))


@pytest.fixture(scope="module")
def all_opened(
    browser: Any, documents: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Opened]]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for strategy, data in documents.items():
        file = folder / f"{strategy}.html"
        file.write_text(pages.render(data))
        found[strategy] = Opened(browser, file)
    yield found
    for one in found.values():
        # Nothing that the tests did made it complain or ask for anything but itself.
        assert one.said == [] and one.asked_for == [one.address]
        one.context.close()


@pytest.fixture
def opened(all_opened: dict[str, Opened]) -> dict[str, Opened]:
    """The pages as they were when they opened."""
    for one in all_opened.values():
        one.page.select_option("#colour", "probability")
        one.page.evaluate("open(0); reset()")
        one.page.mouse.move(1, 1)
    return all_opened


every = pytest.mark.parametrize("strategy", CASES)


def depths_of(found: Exits) -> dict[int, int]:
    return dict(enumerate(found.depths))


@every
def test_cells(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]], strategy: str
) -> None:
    one, trace = opened[strategy], documents[strategy]["traces"][0]
    cells = one.page.locator("#grid tbody td")
    assert cells.count() == len(trace["tokens"]) * MAX_LOOPS
    told = cells.evaluate_all(
        "cells => cells.map(c => [c.dataset.token, c.dataset.depth, c.firstChild.data])"
    )
    expected = [
        [str(index), str(depth["depth"]), visible(depth["top"][0]["text"])]
        for depth_index in range(MAX_LOOPS)
        for index, token in enumerate(trace["tokens"])
        for depth in [token["depths"][depth_index]]
    ]
    assert told == expected
    heads = one.page.locator("#grid thead th[data-token]").evaluate_all(
        "heads => heads.map(h => h.firstChild.data)"
    )
    assert heads == [visible(token["text"]) for token in trace["tokens"]]
    assert one.marked() == dict(enumerate(trace["exit_depths"]))


@every
def test_the_slider(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]], strategy: str
) -> None:
    one, data = opened[strategy], documents[strategy]
    trace = data["traces"][0]
    name = "convergence_epsilon" if strategy == "convergence" else "exit_threshold"
    most = float(one.page.get_attribute("#limit", "max"))
    seen = set()
    for share in (0.0, 0.2, 0.4, 0.55, 0.7, 0.85, 0.97, 1.0):
        value = one.move(share * most)
        assert math.isclose(value, share * most)
        for min_loops in (1, 3):
            one.page.fill("#min-loops", str(min_loops))
            one.page.locator("#min-loops").blur()
            found = exits_of(trace, rule_of(data, min_loops=min_loops, **{name: value}))
            assert one.marked() == depths_of(found)
            mean = sum(found.depths) / len(found.depths)
            assert one.page.inner_text("#mean") == f"{mean:.2f}"
            seen.add(tuple(found.depths))
            differs = {
                index: depth
                for index, depth in depths_of(found).items()
                if trace["tokens"][index]["depths"][depth - 1]["top"][0]["token_id"]
                != trace["token_ids"][index]
            }
            assert one.marked("differs") == differs
    assert len(seen) > 3
    one.page.click("#reset")
    assert one.marked() == dict(enumerate(trace["exit_depths"]))


@every
def test_limits_on_the_edge(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]], strategy: str
) -> None:
    """The number beside the slider takes values that a token's own equal: the rule is strict."""
    one, data = opened[strategy], documents[strategy]
    trace = data["traces"][0]
    name, field = (
        ("convergence_epsilon", "step_length")
        if strategy == "convergence"
        else ("exit_threshold", "confidence")
    )
    for token in trace["tokens"][:6]:
        value = token["depths"][2][field]
        one.page.fill("#limit-value", repr(value))
        one.page.locator("#limit-value").blur()
        assert one.marked() == depths_of(exits_of(trace, rule_of(data, **{name: value})))


def test_keys_move_the_slider(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]]
) -> None:
    one, data = opened["threshold"], documents["threshold"]
    one.move(0.5)
    one.page.focus("#limit")
    for _ in range(8):
        one.page.keyboard.press("ArrowLeft")
    assert one.limit() < 0.5
    rule = rule_of(data, exit_threshold=one.limit())
    assert one.marked() == depths_of(exits_of(data["traces"][0], rule))


@every
def test_hover(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]], strategy: str
) -> None:
    one, data = opened[strategy], documents[strategy]
    trace = data["traces"][0]
    reasons = exits_of(trace, rule_of(data)).reasons
    assert one.page.locator("#tip").is_hidden()
    for index, depth in ((0, 1), (3, 5), (4, trace["exit_depths"][4])):
        one.page.hover(f'#grid td[data-token="{index}"][data-depth="{depth}"]')
        values = trace["tokens"][index]["depths"][depth - 1]
        guesses = one.page.locator("#tip .guess")
        assert guesses.count() == 5
        texts = guesses.locator("span").evaluate_all("all => all.map(s => s.textContent)")
        assert texts == [visible(guess["text"]) for guess in values["top"]]
        shares = [float(s.strip("<%")) / 100 for s in guesses.locator("b").all_inner_texts()]
        assert shares == pytest.approx([g["probability"] for g in values["top"]], abs=6e-4)
        told = one.page.inner_text("#tip dl")
        assert float(told.split("confidence q")[1].split()[0]) == pytest.approx(
            values["confidence"], rel=1e-3
        )
        leaves = depth == trace["exit_depths"][index]
        assert ("exits here by" in told) == leaves
        if leaves:
            assert reasons[index] in told
    one.page.mouse.move(1, 1)
    assert one.page.locator("#tip").is_hidden()


def test_other_traces_and_colours(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]]
) -> None:
    one, data = opened["cdf"], documents["cdf"]
    first = one.page.locator("#grid td").first.evaluate("cell => cell.style.background")
    one.page.select_option("#colour", "step_length")
    assert one.page.locator("#grid td").first.evaluate("cell => cell.style.background") != first
    one.page.select_option("#trace", "1")
    assert one.marked() == dict(enumerate(data["traces"][1]["exit_depths"]))
    drawn = len(data["traces"][1]["trajectories"]["drawn"])
    for chart in ("pca", "gate", "step", "rest"):
        assert one.page.locator(f"#{chart} polyline").count() == drawn
        assert one.page.locator(f"#{chart} polygon").count() == drawn  # stars: exits
    one.page.click('#grid thead th[data-token="0"]')
    assert one.page.locator("#gate polyline").count() == drawn - 1


@every
def test_texts_are_not_markup(
    opened: dict[str, Opened], documents: dict[str, dict[str, Any]], strategy: str
) -> None:
    texts = {
        guess["text"]
        for token in documents[strategy]["traces"][0]["tokens"]
        for depth in token["depths"]
        for guess in depth["top"]
    }
    assert any("</script><img" in text for text in texts)
    page = opened[strategy].page
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("header b b").count() == 0
    assert page.inner_text("#prompt") == "<img src=x>"
    assert page.locator("script").count() == 3
    assert page.inner_text("header b") == "<b>m"


def test_no_other_script_runs(browser: Any, documents: dict[str, dict[str, Any]]) -> None:
    """Should a text become markup after all, the page's policy keeps it from running."""
    text = pages.render(documents["threshold"])
    injected = "<script>window.hacked = 1</script><i onclick='window.hacked = 1' id='i'>x</i>"
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.set_content(text.replace("<main>", f"<main>{injected}"))
    page.click("#i")
    assert page.evaluate("window.hacked") is None
    assert len(said) == 2 and all("Content Security Policy" in line for line in said)
    context.close()


def test_values_that_are_not_finite(
    browser: Any, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """A broken checkpoint: every comparison fails, so tokens leave at the budget."""
    data = copy.deepcopy(documents["threshold"])
    for depth in data["traces"][0]["tokens"][0]["depths"]:
        for name in ("compared", *data["values"], "kl_to_last", "probability"):
            depth[name] = None
        for guess in depth["top"]:
            guess["probability"] = None
    file = tmp_path / "page.html"
    file.write_text(pages.render(data))
    one = Opened(browser, file)
    assert one.marked()[0] == MAX_LOOPS
    assert exits_of(data["traces"][0], rule_of(data)).depths[0] == MAX_LOOPS
    one.page.hover('#grid td[data-token="0"][data-depth="1"]')
    assert "not finite" in one.page.inner_text("#tip")
    assert one.said == []
    one.context.close()


def test_many_traces(documents: dict[str, dict[str, Any]]) -> None:
    data = dict(documents["threshold"])
    data["traces"] = [data["traces"][0]] * (pages.MOST_TRACES + 3)
    text = pages.render(data)
    assert f"{pages.MOST_TRACES} traces of {pages.MOST_TRACES + 3}" in " ".join(text.split())
