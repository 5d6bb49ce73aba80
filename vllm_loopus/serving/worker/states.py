"""States in paged memory, beside the K/V of their depth."""

import torch


class StatePages:
    """States, or other numbers of a position, in K/V-sized pages: reads and writes them by slot.

    `pages`: [num_blocks, kv_heads, block_size, 2 * head_size] each, with the inside of a block in
    whatever order the attention backend has it, and of whatever dtype K/V has. The memory of a
    block is taken as `block_size` rows of equal size; a state is cut into pieces, one for each
    page.
    """

    def __init__(self, pages: list[torch.Tensor], size: int, dtype: torch.dtype) -> None:
        """`size`: numbers of a state, of `dtype`. Raises `ValueError` for a layout that scatters a
        block over memory."""
        self._rows: list[torch.Tensor] = []
        self._widths: list[int] = []
        left = size
        for page in pages:
            rows = _rows_of_blocks(page).view(dtype)
            self._widths.append(min(left, rows.shape[-1]))
            self._rows.append(rows.narrow(-1, 0, self._widths[-1]))
            left -= self._widths[-1]
        assert left == 0, "the pages do not hold a state"

    def empty(self, count: int, size: int) -> torch.Tensor:
        """Memory for `count` states of `size` numbers, as they are stored here."""
        return self._rows[0].new_empty(count, size)

    def as_read(self, states: torch.Tensor) -> torch.Tensor:
        """`states` as they would be read after they have been written."""
        return states.to(self._rows[0].dtype).to(states.dtype)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots [T] -> states [T, H]."""
        pieces = [
            rows.index_select(0, slots) if rows.dim() == 2 else rows[_split(slots, rows)]
            for rows in self._rows
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def write(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """States [T, H] to slots [T]."""
        whole = len(self._rows) == 1
        pieces = (states,) if whole else states.split(self._widths, dim=1)
        for rows, piece in zip(self._rows, pieces, strict=True):
            if rows.dim() == 2:
                rows.index_copy_(0, slots, piece.to(rows.dtype))
            else:
                rows[_split(slots, rows)] = piece.to(rows.dtype)


def _rows_of_blocks(page: torch.Tensor) -> torch.Tensor:
    """The memory of a layer's blocks as rows: [slots, numbers], or [num_blocks, block_size,
    numbers] where blocks of other layers lie between them."""
    blocks, heads, size, width = page.shape
    numbers = heads * width
    reach = sum((n - 1) * step for n, step in zip(page.shape[1:], page.stride()[1:], strict=True))
    if reach != size * numbers - 1:
        raise ValueError(
            "VLLM_KV_CACHE_LAYOUT must keep the K/V of a block together for looped models "
            f"(LBNHC, LBHNC, BLNHC or BLHNC); strides are {page.stride()}"
        )
    if page.stride(0) == size * numbers:
        return page.as_strided((blocks * size, numbers), (numbers, 1))
    return page.as_strided((blocks, size, numbers), (page.stride(0), numbers, 1))


def _split(slots: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // rows.shape[1], slots % rows.shape[1]
