"""Free blocks that vLLM evicts after all others: a row of them at the end of its queue of free blocks.

vLLM evicts from the front of the queue, and puts the blocks that it frees at the end, behind the row. They are moved in
front of the row then, so a step costs what it has freed, however long the row is. The blocks of the row stay free like
others: nothing holds on to them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, KeysView, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

# A block with the hash that it had. With another hash it was evicted, and holds something else.
Hashed = tuple["KVCacheBlock", Any]


class EvictedLast:
    """The row of one pool.

    Args:
        pool: vLLM's pool of blocks.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._queue = pool.free_block_queue
        # The same queue, as if it ended where the row begins: what vLLM appends there is put in front of the row.
        self._before_row = copy.copy(self._queue)
        # By id, in the order of the queue.
        self._row: OrderedDict[int, Hashed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._row)

    @property
    def block_ids(self) -> KeysView[int]:
        """The ids of its blocks."""
        return self._row.keys()

    def taken(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Records that a request was given blocks, which have left the queue."""
        for block in blocks:
            self._row.pop(block.block_id, None)

    def release(self, blocks: Iterable[Hashed]) -> None:
        """Lets blocks be evicted like others, as if they were freed now."""
        for_others = []
        for block, hash_ in blocks:
            known = self._row.get(block.block_id)
            if known is not None and known[1] == hash_:
                del self._row[block.block_id]
                if _is_free(block, hash_):
                    for_others.append(block)
        self._drop_taken()
        self._move_before_row(for_others)

    def restore(self, more: Sequence[Hashed] = ()) -> None:
        """Moves what was freed since in front of the row.

        Args:
            more: Free blocks that are not in the row, to put at its end; the first one is evicted first.
        """
        for block, _ in more:
            self._queue.remove(block)
        self._drop_taken()
        if self._row:
            self._move_others()
        self._append(more)

    def clear(self) -> None:
        """Forgets the row. Its blocks stay where they are."""
        self._row.clear()

    def _drop_taken(self) -> None:
        """Forgets blocks that were evicted, from the front of the row, and makes sure that its ends are free."""
        row = self._row
        while row and not _is_free(*row[next(iter(row))]):
            row.popitem(last=False)
        while row and not _is_free(*row[next(reversed(row))]):
            row.popitem()

    def _move_others(self) -> None:
        end = self._row[next(reversed(self._row))][0]
        others: list[KVCacheBlock] = []
        # Blocks of the row that something else than a request has used and freed; connectors that store blocks do.
        again: list[Hashed] = []
        block = self._queue.fake_free_list_tail.prev_free_block
        while block is not None and block is not end:
            if len(others) == len(self._row):
                # Moving the row is less work.
                again = [hashed for hashed in self._row.values() if _is_free(*hashed)]
                self._row.clear()
                break
            hashed = self._row.get(block.block_id)
            if hashed is not None and hashed[1] == block.block_hash:
                again.append(hashed)
            else:
                others.append(block)
            block = block.prev_free_block
        else:
            again.reverse()
            for moved, _ in again:
                del self._row[moved.block_id]
            others.reverse()
            self._move_before_row(others)
        for moved, _ in again:
            self._queue.remove(moved)
        self._append(again)

    def _move_before_row(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Moves free blocks that are not in the row; without a row they stay where they are."""
        if not blocks or not self._row:
            return
        for block in blocks:
            self._queue.remove(block)
        before = self._before_row
        before.fake_free_list_tail = self._row[next(iter(self._row))][0]
        before.num_free_blocks = self._queue.num_free_blocks
        before.append_n(list(blocks))
        self._queue.num_free_blocks = before.num_free_blocks

    def _append(self, hashed: Iterable[Hashed]) -> None:
        """Adds blocks that were removed from the queue to the end of the row."""
        hashed = list(hashed)
        self._queue.append_n([block for block, _ in hashed])
        for block, hash_ in hashed:
            self._row[block.block_id] = block, hash_
            self._row.move_to_end(block.block_id)


def _is_free(block: KVCacheBlock, hash_: Any) -> bool:
    """Returns whether a block is in the queue, and still holds what it held."""
    return block.ref_cnt == 0 and block.block_hash == hash_
