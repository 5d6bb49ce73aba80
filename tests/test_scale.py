"""The capacity model against queues whose answers are known."""

import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its files import one another
replicas, scale = map(import_module, ("replicas", "scale"))


def one_kind(passes: float = 10.0) -> Any:
    return replicas.Load((replicas.Kind(1.0, 1, 1.0, 10**6, passes),))


def costs(c0: float = 0.0, c1: float = 0.0) -> Any:
    return scale.Costs(c0=c0, c1=c1, d0=0.0, d1=0.0, d2=0.0)


def exponential(mean: float, count: int) -> np.ndarray:
    return np.random.default_rng(1).exponential(mean, count)


REQUESTS = 40_000


def test_one_server_first_come_first_served() -> None:
    """M/M/1: mean 1 / (mu - lambda), latency exponential."""
    replica, load = replicas.Replica(costs(c0=10.0), seqs=1), one_kind()
    mu, rate = 10.0, 6.0  # 10 passes of 10 ms
    assert replica.capacity(load) == pytest.approx(mu)
    mean = 1 / (mu - rate)
    assert replicas.alone(replica, load, rate) == pytest.approx((mean, rate / mu))
    passes = exponential(10.0, REQUESTS)
    found = replicas.simulate(replica, load, rate, 1, "random", REQUESTS, passes=passes)
    assert found.mean == pytest.approx(mean, rel=0.08)
    assert found.p95 == pytest.approx(mean * math.log(20), rel=0.1)
    assert found.busy == pytest.approx(rate / mu, rel=0.05)


@pytest.mark.parametrize("law", ["exponential", "constant"])
def test_processor_sharing_asks_for_means_alone(law: str) -> None:
    """M/G/1-PS: mean s / (1 - rho), whatever the distribution."""
    replica, load = replicas.Replica(costs(c1=10.0), seqs=500), one_kind()
    rate = 6.0
    mean = 0.1 / (1 - 0.6)
    assert replicas.alone(replica, load, rate)[0] == pytest.approx(mean)
    passes = exponential(10.0, REQUESTS) if law == "exponential" else np.full(REQUESTS, 10.0)
    found = replicas.simulate(replica, load, rate, 1, "random", REQUESTS, passes=passes)
    assert found.mean == pytest.approx(mean, rel=0.08)


def test_several_servers() -> None:
    """M/M/c, by Erlang's formula: passes that cost the same for any number of rows."""
    servers, mu, rate = 4, 10.0, 30.0
    replica, load = replicas.Replica(costs(c0=10.0), seqs=servers), one_kind()
    a = rate / mu
    last = a**servers / math.factorial(servers) * servers / (servers - a)
    waits = last / (sum(a**k / math.factorial(k) for k in range(servers)) + last)
    mean = 1 / mu + waits / (servers * mu - rate)
    assert replicas.alone(replica, load, rate)[0] == pytest.approx(mean)
    passes = exponential(10.0, REQUESTS)
    found = replicas.simulate(replica, load, rate, 1, "random", REQUESTS, passes=passes)
    assert found.mean == pytest.approx(mean, rel=0.08)


def test_without_a_cost_of_rows_nobody_is_slowed() -> None:
    """M/G/infinity: the latency is that of a request alone."""
    replica, load = replicas.Replica(costs(c0=10.0), seqs=1000), one_kind()
    found = replicas.simulate(replica, load, 50.0, 1, "random", 5000, passes=np.full(5000, 10.0))
    assert (found.mean, found.p99) == (pytest.approx(0.1), pytest.approx(0.1))


def test_random_routing_is_each_replica_alone() -> None:
    replica = replicas.Replica(scale.ASSUMED, seqs=64)
    rate = 0.8 * replica.capacity(scale.MIXED)
    mean, busy = replicas.alone(replica, scale.MIXED, rate)
    found = replicas.simulate(replica, scale.MIXED, 16 * rate, 16, "random", 20_000)
    assert found.mean == pytest.approx(mean, rel=0.08)
    assert found.busy == pytest.approx(busy, rel=0.08)


def test_balanced_routing_is_between_the_closed_forms() -> None:
    replica = replicas.Replica(scale.ASSUMED, seqs=64)
    rate = 0.9 * replica.capacity(scale.MIXED)
    least, most = (
        replicas.balanced(replica, scale.MIXED, rate),
        replicas.alone(replica, scale.MIXED, rate)[0],
    )
    for policy in ("requests", "budget"):
        found = replicas.simulate(replica, scale.MIXED, 16 * rate, 16, policy, 10_000)
        assert 0.95 * least < found.mean < most


def test_capacity_follows_the_mean_depth() -> None:
    """Twice the depth, half the requests, where passes are all that costs."""
    replica = replicas.Replica(costs(c0=1.0, c1=0.1), seqs=32)
    shallow, deep = (
        replicas.Load((replicas.Kind(1.0, 8, depth, 100, 50.0),)) for depth in (2.0, 4.0)
    )
    assert replica.capacity(shallow) == pytest.approx(2 * replica.capacity(deep))
    assert replicas.alone(replica, deep, 1e9)[0] == math.inf
    prompts = replicas.Load((replicas.Kind(1.0, 8, 2.0, 100, 50.0, prompt=1000),))
    assert replica.capacity(prompts) < replica.capacity(shallow)


def test_plan_and_costs(tmp_path: Path) -> None:
    replica = replicas.Replica(scale.ASSUMED, seqs=64)
    rate = 20 * replica.capacity(scale.MIXED)
    found = replicas.replicas_for(replica, scale.MIXED, rate, 8.0, "requests", 2000)
    assert found is not None and found > 20
    met = replicas.simulate(replica, scale.MIXED, rate, found, "requests", 2000)
    missed = replicas.simulate(replica, scale.MIXED, rate, found - 1, "requests", 2000)
    assert met.p95 <= 8.0 < missed.p95 or rate / (found - 1) >= replica.capacity(scale.MIXED)
    assert replicas.replicas_for(replica, scale.MIXED, rate, 1e-6, "requests", 100) is None
    file = tmp_path / "costs.json"
    file.write_text('{"runs": [{"costs": {"c0": 1, "c1": 2, "d0": 3, "d1": 4, "d2": 5}}, {}]}')
    assert scale.read_costs(file) == scale.Costs(1, 2, 3, 4, 5)
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no costs"):
        scale.read_costs(file)
    kind = '{"share": %s, "max_loops": 8, "depth": 2.0, "max_tokens": 100, "tokens": 50.0}'
    file.write_text(f"[{kind % 0.25}, {kind % 0.75}]")
    assert scale.read_load(file).depth == 2.0
    for text, message in (
        (f"[{kind % 0.5}]", "add up to 0.5"),
        ('[{"share": 1}]', "not a list"),
        ("", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            scale.read_load(file)


def test_the_numbers_on_paper() -> None:
    """`docs/scale.md`: prompts go by the mean depth of requests, not of tokens."""
    load = scale.MIXED
    assert (round(load.depth, 2), round(load.mean(lambda kind: kind.depth), 2)) == (3.08, 2.25)
    costs, prompt = scale.ASSUMED, load.kinds[0].prompt
    for seqs, told in ((64, 31), (256, 54)):
        replica = replicas.Replica(costs, seqs)
        rate = replica.capacity(load)
        assert round(rate) == told
        share = rate * prompt * 2.25 * costs.c1 / 1000
        alone = 1000 * seqs / (load.passes * replica.pass_ms(seqs, load, 0.0))
        assert rate == pytest.approx(alone * (1 - share))
    page = (ROOT / "docs" / "scale.md").read_text()
    assert "D = 3.08 and E[d] = 2.25" in page and "from 64 to 256 requests at once" in page
