"""From a base model to ranked cuts: the analysis as a user asks for it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.cut import Cut, ScoredCut, published_cut, rank_cuts
from vllm_loopus.recast.hidden_states import HiddenStates, default_dtype
from vllm_loopus.recast.representation import Representation, analyse
from vllm_loopus.recast.sample import BUILT_IN, sequences, texts

AUTO = "auto"


@dataclass(frozen=True)
class AnalysisOptions:
    """What to analyse a base on, and where.

    - `sample`, `text_field`: as in `sample.texts`. `tokens`: how many at most, in sequences of
      `length`.
    - `tokenizer`: a name or folder, where the base has none of its own.
    - `device`: `auto`, `cpu`, `cuda`...; weights are streamed there. `device_map`: as in
      transformers, keeps the model on its devices instead.
    - `dtype`: `auto` (the checkpoint's where the device is fast in it, else float32) or a name.
    """

    sample: str = BUILT_IN
    text_field: str | None = None
    tokens: int = 2048
    length: int = 512
    tokenizer: str | None = None
    device: str = AUTO
    device_map: str | None = None
    dtype: str = AUTO


@dataclass(frozen=True)
class Analysis:
    """How a base's states change by layer, and the cuts that follow from it, best first."""

    base_name: str
    sample: str
    representation: Representation
    ranking: Sequence[ScoredCut]

    @property
    def published(self) -> Cut | None:
        """The cut of the published checkpoint of this base, if there is one."""
        return published_cut(self.base_name, len(self.representation.similarity))

    @property
    def against_published(self) -> str | None:
        """How the rule ranks the published cut, None where there is none."""
        if self.published is None:
            return None
        cuts = [ranked.cut for ranked in self.ranking]
        place = cuts.index(self.published) + 1 if self.published in cuts else "not among them"
        return f"Published cut: {self.published}; its place among the rule's {len(cuts)}: {place}"

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "base": self.base_name,
            "sample": self.sample,
            "ranking": [{"cut": r.cut.runs, "score": r.score} for r in self.ranking],
            "published_cut": self.published and self.published.runs,
            "similarity": self.representation.similarity,
            **asdict(self.representation),
        }


def can_analyse(base: Base, options: AnalysisOptions) -> bool:
    """Whether there is a tokenizer to make token ids with."""
    has_own = any((base.folder / name).is_file() for name in TOKENIZER_FILES)
    return has_own or options.tokenizer is not None


def analyse_base(
    base: Base,
    options: AnalysisOptions,
    encoder: int | None = None,
    decoder: int | None = None,
) -> Analysis:
    """Runs `base` over the sample and ranks the cuts, with `encoder` or `decoder` where given.

    Raises `ValueError` naming the option for a sample, tokenizer or device that cannot be used.
    """
    if not can_analyse(base, options):
        raise ValueError(
            f"{base.name} has no tokenizer, so its hidden states cannot be analysed; give "
            "--tokenizer NAME, or the whole cut by --encoder and --decoder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or base.folder)
    except Exception as error:  # whatever is wrong with its files
        raise ValueError(
            f"tokenizer={options.tokenizer or base.name} cannot be loaded: {error}"
        ) from error
    device = _device(options.device)
    dtype = default_dtype(device, base) if options.dtype == AUTO else getattr(torch, options.dtype)
    length = min(options.length, int(base.config.max_position_embeddings))
    if length < 2:
        raise ValueError(f"base_config.max_position_embeddings={length} is too short to analyse")
    documents = texts(options.sample, options.text_field)
    found = _known(sequences(documents, tokenizer, length, options.tokens), base)
    try:
        model = HiddenStates(base, device, dtype, options.device_map)
        representation = analyse(base, found, model, expected_tokens=options.tokens)
    except ValueError:
        raise
    except Exception as error:  # of devices and models, whatever they lack
        placed = options.device_map or device
        raise ValueError(
            f"{base.name} cannot be run on {placed} in {dtype} ({_first_line(error)}); choose "
            "another --device or --dtype, or cut by hand with --no-analysis"
        ) from error
    ranking = rank_cuts(representation.similarity, encoder, decoder)
    return Analysis(base.name, options.sample, representation, ranking)


def _device(name: str) -> torch.device:
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # of a backend that is not there
        raise ValueError(f"device={name!r} cannot be used: {_first_line(error)}") from error
    return device


def _known(found: Iterable[torch.Tensor], base: Base) -> Iterator[torch.Tensor]:
    """The sequences, held against the vocabulary: a tokenizer may have more tokens than that."""
    for ids in found:
        if int(ids.max()) >= base.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {int(ids.max())}, but {base.name} has "
                f"{base.config.vocab_size} tokens; give the model's own by --tokenizer"
            )
        yield ids


def _first_line(error: Exception) -> str:
    return f"{error}".partition("\n")[0] or type(error).__name__
