"""The endless stream of rows, and where it stands.

Documents are read, shuffled and packed a window at a time. A window is a pure function of the seed,
its number and where the sources stood when it began, so a position is a few numbers, and going on
from one gives the rows that would have come.
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
from vllm_loopus.training.settings import Data, Source

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class LocalRows:
    """A local file, shuffled anew in every epoch. Its position: epoch and rows taken from it."""

    def __init__(self, source: Source, seed: tuple[int, ...] | None) -> None:
        assert source.path is not None
        path = source.path.expanduser()
        self.name = str(source.path)
        self.seed = seed
        self.epoch = self.taken = 0
        if not path.is_file():
            raise DataError(f"path={self.name!r} is no file; check data.sources and data.eval")
        try:
            kind = FORMATS[path.suffix]
            self.rows = load_dataset(kind, data_files=str(path), split="train")
        except StopIteration:  # what an empty file comes to
            self.rows = []
        except Exception as error:  # of data formats; what is wrong says the one below
            reason = error.__cause__ or error
            raise DataError(f"path={self.name!r} cannot be read: {reason}") from error
        if not len(self.rows):
            raise DataError(f"path={self.name!r} holds no rows")
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
        """Rows to the end of the epoch."""
        return len(self.rows) - self.taken

    def take(self, count: int) -> list[tuple[str, Any]]:
        taken: list[tuple[str, Any]] = []
        while len(taken) < count:
            chosen = self._order[self.taken : self.taken + count - len(taken)]
            try:
                columns = self.rows[chosen]
            except UnicodeDecodeError as error:  # JSON is decoded when it is read
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
    """A data set on the hub, streamed in its own order. Its position is `datasets`' own."""

    left = None

    def __init__(self, source: Source) -> None:
        self.name = str(source.dataset)
        name, _, rest = self.name.partition(":")
        config, _, split = rest.partition(":")
        self.epoch = 0
        try:
            self.rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:  # of the hub, of data formats
            raise DataError(f"dataset={self.name!r} cannot be read: {error}") from error
        self._beginning = self.rows.state_dict()
        self._unread: dict[str, Any] | None = None  # the state that was restored and not read from
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
                raise DataError(f"dataset={self.name!r} holds no rows")
            else:
                self.restore({"epoch": self.epoch + 1, "stream": self._beginning})
        return taken

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self._unread or self.rows.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._unread = state["stream"]
        self.rows.load_state_dict(deepcopy(self._unread))  # it goes on in what it is given
        self._iterator = iter(self.rows)


def open_source(source: Source, seed: tuple[int, ...] | None) -> LocalRows | HubRows:
    """Raises `DataError` for a source that cannot be read."""
    return LocalRows(source, seed) if source.path is not None else HubRows(source)


class RowStream(IterableDataset[list[Document]]):
    """Rows without end: lists of documents, at most `max_length` tokens together.

    Raises `DataError` when built, for a source whose first row cannot be used.
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
        # Where every window began since the start, and its first row.
        self._windows: list[dict[str, Any]] = []
        self._first_rows: list[int] = []
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

    def position(self, rows: int) -> dict[str, Any]:
        """Where the stream stands after `rows` rows since it was built, as JSON."""
        if not self._windows:
            return {**self._start, "skip": self._skip + rows}
        rows += self._skip
        index = bisect_right(self._first_rows, rows) - 1
        return {**self._windows[index], "skip": rows - self._first_rows[index]}

    def restore(self, position: dict[str, Any]) -> None:
        """Go on from a position."""
        self._start = {"window": position["window"], "sources": position["sources"]}
        self._skip = position["skip"]
        self._windows, self._first_rows = [], []

    def __iter__(self) -> Iterator[list[Document]]:
        for source, state in zip(self.sources, self._start["sources"], strict=True):
            source.restore(state)
        self._windows, self._first_rows = [], []
        produced, empty = 0, 0
        window = self._start["window"]
        while True:
            position = self._position(window)
            rows = self._window(np.random.default_rng([self.seed, window]))
            self._windows.append(position)
            self._first_rows.append(produced)
            empty = 0 if rows else empty + 1
            if empty == 3:
                raise DataError(
                    f"{3 * self.data.shuffle_documents} documents in a row have nothing to learn "
                    f"from within max_length={self.data.max_length} tokens; raise "
                    "data.max_length, or look at the rows"
                )
            for row in rows:
                if produced >= self._skip:
                    yield row
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
        rows = pack(self.documents.of(taken), self.data.max_length)
        return [rows[index] for index in random.permutation(len(rows))]


def evaluation_rows(data: Data, documents: Documents) -> list[list[Document]]:
    """The evaluation set packed: the first documents of its sources, by their weights."""
    weights = np.array([source.weight for source in data.eval])
    counts = np.ceil(data.eval_documents * weights / weights.sum()).astype(int)
    taken: list[tuple[str, str, Any]] = []
    for source, count in zip(data.eval, counts, strict=True):
        rows = open_source(source, None)
        most = int(count) if rows.left is None else min(int(count), rows.left)
        taken += [(where, source.text_field, row) for where, row in rows.take(most)]
    packed = pack(documents.of(taken), data.max_length)
    if not packed:
        raise DataError("data.eval: no document has anything to predict; check the rows")
    return packed
