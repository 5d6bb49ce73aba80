"""The endless stream of packed sequences, and its position for resuming.

Documents are read, shuffled and packed one window at a time. A window depends only on the seed, its
number and the positions of the sources at its start. So a position is a few numbers, and a stream
that is resumed at a position yields the same sequences as an uninterrupted one.
"""

from bisect import bisect_right
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
from datasets import load_dataset
from torch.utils.data import IterableDataset

from vllm_loopus.training.documents import DataError, Documents
from vllm_loopus.training.packing import Document, pack
from vllm_loopus.training.rows import check_lines
from vllm_loopus.training.settings import Data, Source

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class LocalRows:
    """The rows of a local file, reshuffled in every epoch. Position: epoch, and rows read in it."""

    def __init__(self, source: Source, seed: tuple[int, ...] | None) -> None:
        assert source.path is not None
        path = source.path.expanduser()
        self.name = str(source.path)
        self.seed = seed
        self.epoch = self.taken = 0
        if not path.is_file():
            raise DataError(f"path={self.name!r} is not a file; check data.sources and data.eval")
        if path.suffix != ".parquet":
            check_lines(path, source.text_field)
        try:
            kind = FORMATS[path.suffix]
            self.rows = load_dataset(kind, data_files=str(path), split="train")
        except StopIteration:  # raised for an empty file
            self.rows = []
        except Exception as error:  # `datasets` raises many types; the cause has the reason
            reason = error.__cause__ or error
            raise DataError(f"path={self.name!r} cannot be read: {reason}") from error
        if not len(self.rows):
            raise DataError(f"path={self.name!r} has no rows; check the file")
        self._order = self._shuffled()

    def _shuffled(self) -> Any:
        order = np.arange(len(self.rows))
        return (
            order
            if self.seed is None
            else np.random.default_rng([*self.seed, self.epoch]).permutation(order)
        )

    @property
    def left(self) -> int | None:
        """The number of rows until the end of the epoch."""
        return len(self.rows) - self.taken

    def take(self, count: int) -> list[tuple[str, Any]]:
        taken: list[tuple[str, Any]] = []
        while len(taken) < count:
            chosen = self._order[self.taken : self.taken + count - len(taken)]
            try:
                columns = self.rows[chosen]
            except UnicodeDecodeError as error:  # JSON is decoded at access
                raise DataError(f"path={self.name!r} is not UTF-8: {error}") from error
            for i, index in enumerate(chosen):
                row = {name: values[i] for name, values in columns.items()}
                taken.append((f"{self.name}, row {index + 1}", row))
            self.taken += len(chosen)
            if self.taken == len(self.rows):
                self.epoch, self.taken = self.epoch + 1, 0
                self._order = self._shuffled()
        return taken

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]
        self._order = self._shuffled()


class HubRows:
    """The rows of a data set on the hub, streamed in order. Position: that of `datasets`."""

    left = None

    def __init__(self, source: Source) -> None:
        self.name = str(source.dataset)
        name, _, rest = self.name.partition(":")
        config, _, split = rest.partition(":")
        self.epoch = 0
        try:
            self.rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:  # `datasets` raises many types
            raise DataError(f"dataset={self.name!r} cannot be read: {error}") from error
        self._beginning = self.rows.state_dict()
        self._unread: dict[str, Any] | None = None  # the restored state, until the next read
        self._iterator: Iterator[Any] = iter(self.rows)

    def take(self, count: int) -> list[tuple[str, Any]]:
        taken: list[tuple[str, Any]] = []
        ends = 0
        while len(taken) < count:
            row = next(self._iterator, None)
            self._unread = None
            if row is not None:
                taken.append((self.name, row))
                ends = 0
            elif (ends := ends + 1) == 2:
                raise DataError(f"dataset={self.name!r} has no rows; check name, config and split")
            else:
                self.restore({"epoch": self.epoch + 1, "stream": self._beginning})
        return taken

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self._unread or self.rows.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._unread = state["stream"]
        self.rows.load_state_dict(deepcopy(self._unread))  # modifies its argument
        self._iterator = iter(self.rows)


def open_source(source: Source, seed: tuple[int, ...] | None) -> LocalRows | HubRows:
    """Opens a source. Raises `DataError` if it cannot be read."""
    return LocalRows(source, seed) if source.path is not None else HubRows(source)


class PackedStream(IterableDataset[list[Document]]):
    """Endless packed sequences: lists of documents with at most `max_length` tokens together.

    Raises `DataError` when it is built if the first row of a source cannot be used.
    """

    def __init__(self, data: Data, documents: Documents, seed: int) -> None:
        self.data, self.documents, self.seed = data, documents, seed
        self.sources = [
            open_source(source, (seed, index) if data.shuffle else None)
            for index, source in enumerate(data.sources)
        ]
        weights = np.array([source.weight for source in data.sources])
        self.shares = weights / weights.sum()
        self._start: dict[str, Any] = self._position(0)
        self._skip = 0
        # The position at the start of each window, and the number of its first sequence.
        self._windows: list[dict[str, Any]] = []
        self._first_sequences: list[int] = []
        self._check()

    def _check(self) -> None:
        start = [source.state() for source in self.sources]
        for source, settings in zip(self.sources, self.data.sources, strict=True):
            ((where, row),) = source.take(1)
            self.documents.of([(where, settings.text_field, row)])
        for source, state in zip(self.sources, start, strict=True):
            source.restore(state)

    def _position(self, window: int) -> dict[str, Any]:
        return {"window": window, "sources": [source.state() for source in self.sources]}

    def position(self, count: int) -> dict[str, Any]:
        """The position, as JSON, after `count` sequences since the stream was built."""
        if not self._windows:
            return {**self._start, "skip": self._skip + count}
        count += self._skip
        index = bisect_right(self._first_sequences, count) - 1
        return {**self._windows[index], "skip": count - self._first_sequences[index]}

    def restore(self, position: dict[str, Any]) -> None:
        """Continues from a position."""
        self._start = {"window": position["window"], "sources": position["sources"]}
        self._skip = position["skip"]
        self._windows, self._first_sequences = [], []

    def __iter__(self) -> Iterator[list[Document]]:
        for source, state in zip(self.sources, self._start["sources"], strict=True):
            source.restore(state)
        self._windows, self._first_sequences = [], []
        produced, empty = 0, 0
        window = self._start["window"]
        while True:
            position = self._position(window)
            sequences = self._window(np.random.default_rng([self.seed, window]))
            self._windows.append(position)
            self._first_sequences.append(produced)
            empty = 0 if sequences else empty + 1
            if empty == 3:
                raise DataError(
                    f"{3 * self.data.shuffle_documents} consecutive documents have nothing to "
                    f"learn within max_length={self.data.max_length} tokens; raise "
                    "data.max_length, or check the rows"
                )
            for sequence in sequences:
                if produced >= self._skip:
                    yield sequence
                produced += 1
            window += 1

    def _window(self, random: np.random.Generator) -> list[list[Document]]:
        size = self.data.shuffle_documents
        if len(self.sources) == 1 and self.sources[0].left is not None:
            size = min(size, self.sources[0].left)  # an epoch ends with its window
        drawn = random.choice(len(self.sources), size=size, p=self.shares)
        taken: list[tuple[str, str, Any]] = []
        for index, count in enumerate(np.bincount(drawn, minlength=len(self.sources))):
            key = self.data.sources[index].text_field
            taken += [(where, key, row) for where, row in self.sources[index].take(int(count))]
        sequences = pack(self.documents.of(taken), self.data.max_length)
        return [sequences[index] for index in random.permutation(len(sequences))]


def evaluation_sequences(data: Data, documents: Documents) -> list[list[Document]]:
    """The packed evaluation set: the first documents of its sources, by their weights."""
    weights = np.array([source.weight for source in data.eval])
    counts = np.ceil(data.eval_documents * weights / weights.sum()).astype(int)
    taken: list[tuple[str, str, Any]] = []
    for source, count in zip(data.eval, counts, strict=True):
        rows = open_source(source, None)
        most = int(count) if rows.left is None else min(int(count), rows.left)
        taken += [(where, source.text_field, row) for where, row in rows.take(most)]
    packed = pack(documents.of(taken), data.max_length)
    if not packed:
        raise DataError("data.eval: no document has a target; check the rows")
    return packed
