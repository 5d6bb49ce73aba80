"""Recurrent depth on the transformers side, against the original's answers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests import raven
from tests.conftest import GOLDEN_LOOPED
from vllm_loopus.architectures.raven.config import RavenConfig
from vllm_loopus.architectures.raven.criteria import CRITERIA, CriterionRule, reads_logits
from vllm_loopus.architectures.raven.families import tensor_names
from vllm_loopus.architectures.raven.initial_state import load_table, noise
from vllm_loopus.architectures.raven.reference import RavenForCausalLM


def load(model: str | Path) -> RavenForCausalLM:
    return AutoModelForCausalLM.from_pretrained(GOLDEN_LOOPED / model, dtype=torch.float32)


def set_rule(model: RavenForCausalLM, case: dict) -> None:
    model.config.halting_strategy = case["criterion"]
    model.config.max_loops = case["num_steps"]
    model.config.exit_threshold = case["exit_threshold"]


def first_states(model: str, of_case: str) -> str | torch.Tensor:
    name = raven.initial_state(model, of_case)
    return name if of_case == "zero" else load_table(name, 64)


def assert_case(name: str, model: RavenForCausalLM, case: dict, tokens: int | None = None) -> None:
    set_rule(model, case)
    state = first_states(name, case["initial_state"])
    ids, depths = list(case["prompt"]), []
    with torch.no_grad():
        for number in range(len(case["tokens"][:tokens])):
            output = model(
                torch.tensor([ids]),
                initial_state=state,
                logits_to_keep=1,
                output_states=number == 0,
            )
            if number == 0:
                for token, logit in case["first_logits_top5"].items():
                    assert output.logits[0, -1, int(token)] == pytest.approx(logit, abs=1e-3)
                if values := case.get("first_exit_values"):
                    found = [float(v) for v in output.confidences][: len(values)]
                    known = [v for v in zip(found, values, strict=True) if v[1] is not None]
                    assert [f for f, _ in known] == pytest.approx([v for _, v in known], abs=1e-3)
            ids.append(int(output.logits[0, -1].argmax()))
            depths.append(int(output.exit_depths))
    assert ids[len(case["prompt"]) :] == case["tokens"][:tokens]
    assert depths == case["depths"][:tokens]


@pytest.mark.parametrize("name", raven.MODELS)
def test_a_case_of_each_criterion(name: str) -> None:
    model = load(name)
    for criterion in raven.criteria(name):
        for state in ("zero", "table"):
            assert_case(name, model, raven.cases(name, state, criterion)[-1], tokens=3)


@pytest.mark.long
@pytest.mark.parametrize("name", raven.MODELS)
def test_every_case(name: str) -> None:
    model = load(name)
    for case in raven.expected(name)["cases"]:
        assert_case(name, model, case)


@pytest.mark.parametrize("name", raven.MODELS)
def test_traces(name: str) -> None:
    model, trace = load(name), load_file(GOLDEN_LOOPED / name / "trace.safetensors")
    ids = torch.tensor([raven.expected(name)["trace_prompt"]])
    for state in ("zero", "table"):
        given = first_states(name, state)
        with torch.no_grad():
            for loops in range(1, 9):
                set_rule(model, {"criterion": "none", "num_steps": loops, "exit_threshold": None})
                output = model(ids, initial_state=given, output_states=True)
                expected = trace[f"logits_{state}"][loops - 1]
                assert torch.allclose(output.logits[0, -1], expected, rtol=0, atol=1e-3)
        embedded = model.embed(ids)
        with torch.no_grad():
            injected = model.encode(embedded, model.positions(embedded))
        assert torch.allclose(injected[0], trace["injected"], rtol=0, atol=1e-4)
        states = torch.stack([one[0] for one in output.states])
        assert torch.allclose(states, trace[f"states_{state}"], rtol=0, atol=1e-4)


def test_a_padded_batch_is_its_sequences() -> None:
    model = load("huginn")
    set_rule(model, {"criterion": "kl", "num_steps": 8, "exit_threshold": 0.3})
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    ids = torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        together = model(ids, attention_mask=mask, seed=3)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt]), seed=3)
            assert together.exit_depths[row] == alone.exit_depths
            assert torch.allclose(together.logits[row, -1], alone.logits[0, -1], atol=1e-4)


def test_generate() -> None:
    """transformers' own loop, with the first states of a table."""
    model, (case, *_) = load("retro_llama3"), raven.cases("retro_llama3", "table", "none")
    set_rule(model, case)
    answer = model.generate(
        torch.tensor([case["prompt"]]),
        max_new_tokens=4,
        do_sample=False,
        initial_state=str(raven.table("retro_llama3")),
    )
    assert answer[0, len(case["prompt"]) :].tolist() == case["tokens"][:4]


def test_noise_is_a_function_of_seed_and_position() -> None:
    positions = torch.arange(300)
    drawn = noise(torch.full((300,), 7), positions, 2000, 0.5)
    some = noise(torch.tensor([8, 7, 7]), torch.tensor([4, 4, 299]), 2000, 0.5)
    assert torch.equal(some[1:], drawn[[4, 299]])
    rows = torch.cat(
        [drawn[:50], some[:1], noise(torch.tensor([7 + 2**32]), positions[:1], 2000, 0.5)]
    )
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.12
    assert (torch.corrcoef(drawn[:, :40].T) - torch.eye(40)).abs().max() < 0.3
    assert drawn.mean().abs() < 0.002
    # A normal distribution cut at three standard deviations.
    assert drawn.std() == pytest.approx(0.5 * 0.98658, rel=2e-3)
    assert 1.49 < drawn.abs().max() <= 1.5


def test_the_default_first_state_is_noise() -> None:
    model, ids = load("huginn"), torch.tensor([[3, 4, 5]])
    set_rule(model, {"criterion": "none", "num_steps": 2, "exit_threshold": None})
    with torch.no_grad():
        by_default, same = model(ids, output_states=True), model(ids, seed=0)
        other = model(ids, seed=1)
    assert torch.equal(by_default.logits, same.logits)
    assert not torch.allclose(by_default.logits, other.logits, atol=1e-2)
    expected = model.config.init_values["std"] * 8.0  # times the embedding scale
    assert by_default.states[0].std() == pytest.approx(0.98658 * expected, rel=0.1)


def test_positions_beyond_the_table() -> None:
    model = load("huginn")
    with pytest.raises(ValueError, match="position 64 is beyond the 64 of initial_state"):
        model(torch.ones(1, 65, dtype=torch.long), initial_state=str(raven.table("huginn")))


def test_auto_map_asks_for_no_remote_code() -> None:
    for name in raven.MODELS:
        assert "auto_map" in json.loads((GOLDEN_LOOPED / name / "config.json").read_text())
        assert type(AutoConfig.from_pretrained(GOLDEN_LOOPED / name)) is RavenConfig


@pytest.mark.parametrize(
    ("name", "layout", "tied"),
    [("huginn", "huginn", True), ("retro_tinyllama", "llama", False)],
)
def test_heads_are_tied_as_tie_embeddings_says(name: str, layout: str, tied: bool) -> None:
    model = load(name)
    assert model.config.layout == layout
    assert model.config.tie_word_embeddings == tied
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied


def test_a_tied_head_may_be_missing_and_a_rotary_table_too(tmp_path: Path) -> None:
    raven.copy("huginn", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"], tensors["freqs_cis"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (case, *_) = raven.cases("huginn", "table", "kl")
    assert_case("huginn", load(tmp_path), case, tokens=2)


def test_olmo2_is_told_by_its_tensors(tmp_path: Path) -> None:
    folder = raven.write_olmo2(tmp_path)
    model = load(folder)
    assert model.config.layout == "olmo2"
    block = model.transformer.core_block[0]
    hidden = torch.randn(1, 5, 64)
    rows = model.positions(hidden)
    with torch.no_grad():  # norms on the branches' outputs
        middle = hidden + block.norm_1(block.attn(hidden, rows))
        assert torch.equal(block(hidden, rows), middle + block.norm_2(block.mlp(middle)))
    assert block.attn.q_norm.weight.shape == (64,)
    assert block.attn.k_norm.weight.shape == (32,)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "huginn",
            {"rope_theta": 10000.0},
            "rope_theta=10000.0 does not fit.*Huginn: that has none",
        ),
        ("retro_llama3", {"rope_theta": None}, "rope_theta=None does not fit.*Llama layout.*needs"),
        ("huginn", {"qk_bias": False}, "fit no family .*qk_bias=False.*attn.qk_bias"),
    ],
)
def test_a_config_of_another_family(tmp_path: Path, name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(raven.copy(name, tmp_path, **fields))


def test_tensors_of_no_family(tmp_path: Path) -> None:
    raven.copy("huginn", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "norm_4" not in n}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"fit no family.*norm_3.*Huginn: .*norm_4.*OLMo-2 layout"):
        load(tmp_path)
    assert "transformer.wte.weight" in tensor_names(str(tmp_path))


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    raven.copy("retro_llama3", tmp_path, padded_vocab_size=384)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.adapter.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: transformer.adapter.*misshapen: .*wte"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_loops": 0}, "max_loops=0 must be from 1 to 256"),
        ({"max_loops": 257}, "max_loops=257 must be"),
        ({"max_loops": 4, "min_loops": 5}, "min_loops=5 .*max_loops=4"),
        ({"max_loops": "many"}, "max_loops='many' must be a whole number"),
        ({"halting_strategy": "threshold"}, "halting_strategy='threshold' is unknown.*latent-diff"),
        ({"exit_threshold": -1}, "exit_threshold=-1 must be"),
        ({"injection_type": "add"}, "injection_type='add' is not supported.*'linear'"),
        ({"test_time_noise": 0.1}, "test_time_noise=0.1 is not supported"),
        ({"n_layers_in_coda": 3}, "n_layers=7 is not the sum"),
        ({"padded_vocab_size": 300}, "padded_vocab_size=300 must be at least vocab_size=320"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.*yarn.*not supported.*llama3"),
        ({"num_key_value_heads": 3}, "n_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"layout": "gpt"}, "layout='gpt' is unknown; choose one of huginn, llama, olmo2"),
    ],
)
def test_impossible_fields(fields: dict, message: str) -> None:
    content = json.loads((GOLDEN_LOOPED / "huginn" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config = RavenConfig(**content)
        for name, value in fields.items():
            setattr(config, name, value)
        config.check()


def test_rope_parameters_of_newer_configs() -> None:
    content = json.loads((GOLDEN_LOOPED / "retro_llama3" / "config.json").read_text())
    old = RavenConfig(**content)
    theta, scaling = content.pop("rope_theta"), content.pop("rope_scaling")
    new = RavenConfig(**content, rope_parameters={"rope_theta": theta, **scaling})
    assert new.rope_settings == old.rope_settings
    assert new.family == old.family


def test_original_names_and_defaults() -> None:
    content = json.loads((GOLDEN_LOOPED / "huginn" / "config.json").read_text())
    config = RavenConfig(**content)
    assert (config.max_loops, config.mean_recurrence, config.halting_strategy) == (16, 16, "none")
    config.update({"num_steps": 40, "halting_strategy": "kl"})
    assert (config.max_loops, config.exit_threshold) == (40, 1e-3)
    config.halting_strategy = "minp-kl"
    assert config.exit_threshold == 1e-5
    config.exit_threshold = 0.5
    assert config.exit_threshold == 0.5
    again = RavenConfig.from_dict(config.to_dict())
    assert (again.max_loops, again.exit_threshold, again.tie_embeddings) == (40, 0.5, True)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_rule_says_beforehand_is_what_it_decides(criterion: str) -> None:
    """Knobs with a single possible outcome at a depth are not asked about."""
    config = RavenConfig(halting_strategy=criterion, vocab_size=7, n_heads=4, n_embd=64)
    torch.manual_seed(1)
    for threshold in (0.0, 0.4, 3.0):
        for least in (1, 3, 6):
            rule = CriterionRule.from_config(config).with_knobs(
                exit_threshold=torch.full((50,), threshold),
                min_loops=torch.full((50,), least),
                max_loops=torch.full((50,), 6),
            )
            carry = torch.tensor(rule.first_carry).expand(50, -1)
            logits = torch.randn(50, 7)
            for depth in range(1, 7):
                logits = logits + torch.randn(50, 7) / depth**2
                evidence = logits if reads_logits(criterion) else logits[:, 0].abs()
                exits, carry = rule.exits(depth, evidence, carry)
                known = rule.predetermined(
                    depth, exit_threshold=threshold, min_loops=least, max_loops=6
                )
                assert known is None or bool((exits == known).all())
                if depth < least:
                    assert not exits.any()
