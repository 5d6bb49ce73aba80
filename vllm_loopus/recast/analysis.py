"""Analyses a base model on a text sample and ranks the possible cuts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.cut import (
    Cut,
    ScoredCut,
    cuts_to_try,
    published_cut,
    rank_by_loss,
    rank_cuts,
)
from vllm_loopus.recast.hidden_states import HiddenStates, default_dtype
from vllm_loopus.recast.representation import Representation, analyse
from vllm_loopus.recast.sample import BUILT_IN, sequences, texts
from vllm_loopus.recast.untrained import UntrainedLosses, untrained_losses

AUTO = "auto"


@dataclass(frozen=True)
class AnalysisOptions:
    """Options of the analysis.

    - `sample`, `text_field`: as in `sample.texts`. `tokens`: the maximum number of tokens, in
      sequences of `length`.
    - `try_tokens`: how many of them the untrained cuts are tried on; 0: cuts are ranked by the
      profile of angles alone.
    - `tokenizer`: a name or folder, if the base model has no tokenizer.
    - `device`: `auto`, `cpu`, `cuda`...; weights are streamed there. `device_map`: as in
      transformers; loads the whole model onto its devices instead.
    - `dtype`: `auto` (the checkpoint's if the device supports it natively, else float32) or a name.
    """

    sample: str = BUILT_IN
    text_field: str | None = None
    tokens: int = 2048
    length: int = 512
    tokenizer: str | None = None
    device: str = AUTO
    device_map: str | None = None
    dtype: str = AUTO
    try_tokens: int = 256


@dataclass(frozen=True)
class Analysis:
    """How the states of a base model change by layer, and the resulting cuts, best first."""

    base_name: str
    sample: str
    representation: Representation
    ranking: Sequence[ScoredCut]
    untrained: UntrainedLosses | None = None

    @property
    def published(self) -> Cut | None:
        """The cut of the published checkpoint of this base model; None if there is none."""
        return published_cut(self.base_name, len(self.representation.similarity))

    @property
    def against_published(self) -> str | None:
        """A sentence on how the rule ranks the published cut; None if there is none."""
        if self.published is None:
            return None
        cuts = [ranked.cut for ranked in self.ranking]
        place = cuts.index(self.published) + 1 if self.published in cuts else "not among them"
        return f"Published cut: {self.published}; its rank among {len(cuts)} cuts: {place}"

    def to_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {
            "base": self.base_name,
            "sample": self.sample,
            "ranking": [
                {"cut": r.cut.runs, "score": r.score, "losses": r.losses} for r in self.ranking
            ],
            "base_loss": self.untrained and self.untrained.base,
            "tried_tokens": self.untrained and self.untrained.tokens,
            "published_cut": self.published and self.published.runs,
            "similarity": self.representation.similarity,
            **asdict(self.representation),
        }


def can_analyse(base: Base, options: AnalysisOptions) -> bool:
    """Whether there is a tokenizer for the sample."""
    has_own = any((base.folder / name).is_file() for name in TOKENIZER_FILES)
    return has_own or options.tokenizer is not None


def analyse_base(
    base: Base,
    options: AnalysisOptions,
    encoder: int | None = None,
    decoder: int | None = None,
    by_hand: Cut | None = None,
    seed: int = 0,
) -> Analysis:
    """Runs `base` on the sample and ranks the cuts, with `encoder` and `decoder` fixed if given.

    `by_hand`: another cut to measure. `seed`: of the gate of untrained cuts.

    Raises `ValueError` that names the option if a sample, tokenizer or device cannot be used.
    """
    if not can_analyse(base, options):
        raise ValueError(
            f"{base.name} has no tokenizer, so its hidden states cannot be analysed; give "
            "--tokenizer NAME, or the complete cut with --encoder and --decoder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or base.folder)
    except Exception as error:  # transformers raises many types
        raise ValueError(
            f"tokenizer={options.tokenizer or base.name} cannot be loaded: {error}"
        ) from error
    device = device_named(options.device)
    dtype = default_dtype(device, base) if options.dtype == AUTO else getattr(torch, options.dtype)
    length = min(options.length, int(base.config.max_position_embeddings))
    if length < 2:
        raise ValueError(f"base_config.max_position_embeddings={length} is too short to analyse")
    documents = texts(options.sample, options.text_field)
    found = _checked_ids(sequences(documents, tokenizer, length, options.tokens), base)
    try:
        model = HiddenStates(base, device, dtype, options.device_map)
        representation = analyse(base, found, model, expected_tokens=options.tokens)
        ranking = rank_cuts(representation.similarity, encoder, decoder)
        untrained = None
        if options.try_tokens:
            cuts = cuts_to_try(base.num_layers, encoder, decoder)
            published = published_cut(base.name, base.num_layers)
            if (encoder, decoder) != (None, None):
                published = None  # it may have other ends than those given
            also = [by_hand, published, ranking[0].cut]
            cuts = list(dict.fromkeys([*cuts, *(cut for cut in also if cut is not None)]))
            some = texts(options.sample, options.text_field)
            tried = list(sequences(some, tokenizer, min(length, 256), options.try_tokens))
            untrained = untrained_losses(base, cuts, tried, model, seed)
            ranking = rank_by_loss(representation.similarity, ranking, untrained.by_cut)
    except ValueError:
        raise
    except Exception as error:  # devices and models raise many types
        placed = options.device_map or device
        raise ValueError(
            f"{base.name} cannot be run on {placed} in {dtype} ({_first_line(error)}); choose "
            "another --device or --dtype, or give the cut and --no-analysis"
        ) from error
    return Analysis(base.name, options.sample, representation, ranking, untrained)


def device_named(name: str) -> torch.device:
    """The device of this name; the best one for `auto`. Raises `ValueError`."""
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # backends that are not installed raise many types
        raise ValueError(f"device={name!r} cannot be used: {_first_line(error)}") from error
    return device


def _checked_ids(found: Iterable[torch.Tensor], base: Base) -> Iterator[torch.Tensor]:
    """The sequences, after a check that all token ids are in the model's vocabulary."""
    for ids in found:
        if int(ids.max()) >= base.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, but {base.name} has "
                f"{base.config.vocab_size} tokens; give the right tokenizer with --tokenizer"
            )
        yield ids


def _first_line(error: Exception) -> str:
    return f"{error}".partition("\n")[0] or type(error).__name__
