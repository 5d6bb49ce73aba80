"""Where to cut: the rule, cuts by hand, and the published ones."""

import math

import pytest

from vllm_loopus.recast.cut import (
    PUBLISHED,
    Cut,
    parse_decoder,
    parse_encoder,
    published_cut,
    rank_cuts,
)


def profile(*runs: tuple[float, int]) -> list[float]:
    """Cosines of layers whose angles, as shares of pi, come in constant runs."""
    return [math.cos(math.pi * angle) for angle, count in runs for _ in range(count)]


@pytest.mark.parametrize(("encoder", "middle", "decoder"), [(2, 25, 1), (6, 29, 1), (3, 20, 4)])
def test_steps_are_found_exactly(encoder: int, middle: int, decoder: int) -> None:
    ranked = rank_cuts(profile((0.4, encoder), (0.05, middle), (0.25, decoder)))
    assert ranked[0].cut == Cut(encoder + middle + decoder, encoder, decoder)
    assert ranked[0].score == pytest.approx(1)
    assert ranked[1].score < ranked[0].score
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)


def test_noise_does_not_move_it() -> None:
    angles = [0.45, 0.4, *(0.06 + 0.01 * (i % 3) for i in range(33)), 0.3]
    ranked = rank_cuts([math.cos(math.pi * angle) for angle in angles])
    assert ranked[0].cut == Cut(36, 2, 1)


def test_score_is_the_explained_variance() -> None:
    angles = [0.4, 0.1, 0.2, 0.3]
    (only,) = rank_cuts([math.cos(math.pi * angle) for angle in angles])
    mean = sum(angles) / 4
    total = sum((angle - mean) ** 2 for angle in angles)
    assert only.score == pytest.approx(1 - 2 * 0.05**2 / total)
    assert only.cut == Cut(4, 1, 1)


def test_ends_take_at_most_a_quarter() -> None:
    cuts = [ranked.cut for ranked in rank_cuts(profile((0.3, 20), (0.1, 20)))]
    assert {cut.encoder for cut in cuts} == {cut.decoder for cut in cuts} == set(range(1, 11))


def test_a_flat_profile_loops_the_most() -> None:
    assert rank_cuts([0.9] * 12)[0].cut == Cut(12, 1, 1)


def test_what_is_given_stays() -> None:
    similarity = profile((0.4, 2), (0.05, 8), (0.3, 2))
    assert rank_cuts(similarity, encoder=0)[0].cut == Cut(12, 0, 2)
    assert rank_cuts(similarity, decoder=5)[0].cut == Cut(12, 2, 5)
    for ends in ({"encoder": 6, "decoder": 6}, {"encoder": 11}, {"decoder": 11}):
        with pytest.raises(ValueError, match="leave no layer of 12"):
            rank_cuts(similarity, **ends)


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers=2 is too few to cut"):
        rank_cuts([0.5, 0.5])


def test_ranges() -> None:
    assert [parse_encoder(text, 28) for text in ("0..1", "0", "none", " 0..26 ")] == [2, 1, 0, 27]
    assert [parse_decoder(text, 28) for text in ("27", "27..27", "none", "20..27")] == [1, 1, 0, 8]
    assert Cut(28, 2, 1).runs == {
        "encoder": [0, 1],
        "reasoning": list(range(2, 27)),
        "decoder": [27],
    }
    assert str(Cut(28, 2, 0)) == "encoder 0..1, reasoning 2..27, decoder none"


@pytest.mark.parametrize("text", ["", "1..2", "0-1", "0..28", "1..0", "-1..2", "x", "0..1..2"])
def test_bad_encoder(text: str) -> None:
    with pytest.raises(ValueError, match="encoder="):
        parse_encoder(text, 28)


@pytest.mark.parametrize("text", ["", "26", "26..28", "27..26", "0x1b"])
def test_bad_decoder(text: str) -> None:
    with pytest.raises(ValueError, match="decoder="):
        parse_decoder(text, 28)


def test_nothing_left_to_loop() -> None:
    with pytest.raises(ValueError, match="encoder=2 and decoder=2 leave no layer of 4"):
        Cut(4, 2, 2)


def test_published_cuts() -> None:
    assert published_cut("Qwen/Qwen3-1.7B", 28) == Cut(28, 2, 1) == PUBLISHED["qwen3-1.7b"]
    assert published_cut("/models/Qwen3-8B-Base/", 36) == Cut(36, 6, 1)
    assert published_cut("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 22) == Cut(22, 1, 1)
    assert published_cut("microsoft/Phi-4-mini-instruct", 32) is None
    assert published_cut("Qwen/Qwen3-0.6B", 28) is None
