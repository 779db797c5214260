"""A key/value cache in pages: tokens of many sequences share one pool of memory, and sequences share prefixes."""

from array import array

import torch

from . import ops
from .decode import mark_written

__all__ = ["CacheFull", "PagedKVCache"]

_QUANTISED = {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class CacheFull(RuntimeError):
    """There are fewer free pages than a call needs; it has changed nothing."""


class PagedKVCache:
    """Keys and values of any number of sequences, in `num_pages` pages of `page_size` tokens.

    The pages are handed out by this object on the host; `decode_attention` and `varlen_attn` read them through
    `block_table(seq_ids)`. A sequence is named by any hashable id. `fork` shares the pages of a prefix; whoever writes
    into a shared page first, gets a copy of it.

    Args:
        num_kv_heads: HK; head_dim: D of keys; v_head_dim: DV of values, None = D.
        dtype: of the keys and values that are appended, and of the pages, unless quantised.
        device: where the pages lie.
        quant: None, "int8" or "fp8" (float8_e4m3fn): how the pages are stored, with one scale a token and head.

    Attributes:
        k: (num_pages, page_size, HK, D), v: (num_pages, page_size, HK, DV): the pages, as decode_attention takes them.
        k_scale, v_scale: (num_pages, page_size, HK) float32 of a quantised cache, else None.

    Not safe for several threads at once. Source: Kwon et al., "PagedAttention", 2023.
    """

    def __init__(self, num_pages, page_size, num_kv_heads, head_dim, *, v_head_dim=None, dtype, device, quant=None):
        if quant not in _QUANTISED:
            raise ValueError(f"quant must be None, 'int8' or 'fp8', got {quant!r}")
        for name, size in (("num_pages", num_pages), ("page_size", page_size), ("num_kv_heads", num_kv_heads),
                           ("head_dim", head_dim), ("v_head_dim", head_dim if v_head_dim is None else v_head_dim)):
            if size < (0 if name == "num_pages" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'num_pages' else 1}, got {size}")
        shape = (num_pages, page_size, num_kv_heads)
        stored = _QUANTISED[quant] or dtype
        self.dtype, self.page_size = dtype, page_size
        self.k = torch.empty((*shape, head_dim), dtype=stored, device=device)
        self.v = torch.empty((*shape, head_dim if v_head_dim is None else v_head_dim), dtype=stored, device=device)
        self.k_scale = torch.empty(shape, dtype=torch.float32, device=device) if quant else None
        self.v_scale = torch.empty(shape, dtype=torch.float32, device=device) if quant else None
        self._free = list(reversed(range(num_pages)))  # the lowest number is handed out first
        self._owners = [0] * num_pages
        self._sequences = {}

    def __repr__(self):
        return (f"PagedKVCache({len(self._sequences)} sequences, {self.pages_free} of {len(self._owners)} pages of "
                f"{self.page_size} tokens free, {self.k.dtype})")

    # ---- sequences ---------------------------------------------------------------------------------------------------

    def allocate(self, seq_id):
        """Starts an empty sequence; costs no page. ValueError if there is one of that name."""
        self._require_new(seq_id)
        self._sequences[seq_id] = _Sequence(array("i"), 0)

    def fork(self, src, dst):
        """Starts dst with the tokens of src, whose pages both then share; costs no page. KeyError, ValueError."""
        source = self._of(src)
        self._require_new(dst)
        for page in source.pages:
            self._owners[page] += 1
        self._sequences[dst] = _Sequence(source.pages[:], source.length)

    def free(self, seq_id):
        """Ends a sequence; pages that nobody else shares are free again. KeyError."""
        self._release(self._of(seq_id).pages)
        del self._sequences[seq_id]

    def truncate(self, seq_id, length):
        """Forgets the tokens at and past `length`, as after rejected speculation. KeyError, ValueError."""
        sequence = self._of(seq_id)
        if not 0 <= length <= sequence.length:
            raise ValueError(f"length must be between 0 and {sequence.length}, the tokens of {seq_id!r}, got {length}")
        kept = self._pages_for(length)
        self._release(sequence.pages[kept:])
        self._sequences[seq_id] = _Sequence(sequence.pages[:kept], length)

    @property
    def pages_free(self):
        """Pages that no sequence holds."""
        return len(self._free)

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def append(self, seq_ids, k, v, *, cu_seqlens=None):
        """Writes new tokens behind those of each sequence, quantised where the cache is.

        Args:
            seq_ids: B ids, each once.
            k: (B, S_new, HK, D), v: (B, S_new, HK, DV), the cache's dtype; or with cu_seqlens packed (T, HK, D) and
                (T, HK, DV).
            cu_seqlens: (B + 1,) int32 or int64: rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 are those of seq_ids[b].

        Raises CacheFull where pages run out, KeyError for an unknown id, ValueError for one that is named twice,
        RuntimeError for tensors that do not fit; nothing has changed then.
        """
        seq_ids = list(seq_ids)
        counts = self._counts(seq_ids, k, v, cu_seqlens)
        planned = self._plan(seq_ids, counts)
        before = [self._sequences[seq_id].length for seq_id in seq_ids]
        table = self._table([sequence.pages for sequence in planned.sequences])
        self._copy_pages(planned.copies)
        ops.cache_append_(self.k, self.v, self._int32(before), k, v, cu_seqlens, table, self.k_scale, self.v_scale)
        mark_written(self.k, self.v, self.k_scale, self.v_scale)
        self._commit(seq_ids, planned)

    def extend(self, seq_ids, tokens):
        """Makes room for `tokens` (an int, or one for each) more tokens of each sequence, and counts them in.

        For decode_attention(k_new=..., block_table=cache.block_table(seq_ids)), which writes them itself. Returns the
        lengths before, (B,) int32: its cache_seqlens. Raises as `append` does.
        """
        seq_ids = list(seq_ids)
        counts = [tokens] * len(seq_ids) if isinstance(tokens, int) else list(tokens)
        if len(counts) != len(seq_ids) or any(count < 0 for count in counts):
            raise ValueError(f"tokens must be a number of at least 0, or one for each of the {len(seq_ids)} sequences, "
                             f"got {tokens}")
        planned = self._plan(seq_ids, counts)
        before = self.seqlens(seq_ids)
        self._copy_pages(planned.copies)
        self._commit(seq_ids, planned)
        return before

    def block_table(self, seq_ids):
        """(B, max_pages) int32 on the cache's device: the pages of each sequence, and 0 behind them. KeyError."""
        return self._table([self._of(seq_id).pages for seq_id in seq_ids])

    def seqlens(self, seq_ids):
        """(B,) int32 on the cache's device: the tokens of each sequence. KeyError."""
        return self._int32([self._of(seq_id).length for seq_id in seq_ids])

    # ---- pages -------------------------------------------------------------------------------------------------------

    def _of(self, seq_id):
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise KeyError(f"no sequence {seq_id!r} in the cache") from None

    def _require_new(self, seq_id):
        if seq_id in self._sequences:
            raise ValueError(f"there is a sequence {seq_id!r} in the cache already: free it first")

    def _pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def _counts(self, seq_ids, k, v, cu_seqlens):
        """How many tokens each sequence gains; what the op would refuse only after pages were counted."""
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise RuntimeError(f"k and v have dtypes {k.dtype} and {v.dtype}: they must be the cache's, {self.dtype}")
        if cu_seqlens is None:
            if k.dim() != 4 or k.shape[0] != len(seq_ids):
                raise RuntimeError(f"k has shape {tuple(k.shape)}: it must be (B, S_new, HK, D) with B = "
                                   f"{len(seq_ids)}, the number of ids, or packed with cu_seqlens")
            return [k.shape[1]] * len(seq_ids)
        offsets = cu_seqlens.tolist()
        if len(offsets) != len(seq_ids) + 1:
            raise RuntimeError(f"cu_seqlens has {len(offsets)} elements: it must have {len(seq_ids) + 1}, one more "
                               "than there are ids")
        counts = [last - first for first, last in zip(offsets, offsets[1:])]
        if offsets[0] != 0 or min(counts, default=0) < 0 or offsets[-1] > k.shape[0]:
            raise RuntimeError(f"cu_seqlens is {offsets}: it must start at 0, never fall, and end within the "
                               f"{k.shape[0]} rows of k")
        return counts

    def _plan(self, seq_ids, counts):
        """What the sequences become with so many more tokens; changes nothing. Pages still to be taken come off the end
        of the free list."""
        if len(set(seq_ids)) != len(seq_ids):
            raise ValueError(f"each sequence may be named once in a call, got {seq_ids}")
        olds = [self._of(seq_id) for seq_id in seq_ids]
        left, taken, copies, sequences = {}, 0, [], []

        def take():
            nonlocal taken
            taken += 1
            return self._free[-taken] if taken <= len(self._free) else -1

        for old, count in zip(olds, counts):
            pages = old.pages[:]
            if count and old.length % self.page_size:  # the last page has room, which is ours alone or becomes so
                last = pages[-1]
                owners = left.setdefault(last, self._owners[last])
                if owners > 1:
                    left[last] = owners - 1
                    pages[-1] = take()
                    copies.append((last, pages[-1]))
            for _ in range(self._pages_for(old.length + count) - len(pages)):
                pages.append(take())
            sequences.append(_Sequence(pages, old.length + count))
        if taken > len(self._free):
            raise CacheFull(f"{taken} pages are needed and {len(self._free)} of {len(self._owners)} are free")
        return _Plan(sequences, copies, taken)

    def _copy_pages(self, copies):
        if copies:
            sources, targets = (torch.tensor(pages, device=self.k.device) for pages in zip(*copies))
            for x in (self.k, self.v, self.k_scale, self.v_scale):
                if x is not None:
                    x.view(torch.uint8)[targets] = x.view(torch.uint8)[sources]

    def _commit(self, seq_ids, planned):
        if planned.taken:
            for page in self._free[-planned.taken:]:
                self._owners[page] = 1
            del self._free[-planned.taken:]
        for page, _ in planned.copies:
            self._owners[page] -= 1
        self._sequences.update(zip(seq_ids, planned.sequences))

    def _release(self, pages):
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def _table(self, rows):
        widest = max((len(pages) for pages in rows), default=0) or 1
        filled = b"".join(pages.tobytes() + bytes(4 * (widest - len(pages))) for pages in rows)
        if not filled:
            return torch.zeros((0, widest), dtype=torch.int32, device=self.k.device)
        return torch.frombuffer(bytearray(filled), dtype=torch.int32).view(-1, widest).to(self.k.device)

    def _int32(self, numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=self.k.device)


class _Sequence:
    """The pages of one sequence in order (array of int32), and its tokens."""

    __slots__ = ("pages", "length")

    def __init__(self, pages, length):
        self.pages, self.length = pages, length


class _Plan:
    """What a call would do: the sequences afterwards, pages to copy (from, to), and how many free pages it takes."""

    __slots__ = ("sequences", "copies", "taken")

    def __init__(self, sequences, copies, taken):
        self.sequences, self.copies, self.taken = sequences, copies, taken
