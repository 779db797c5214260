"""PagedKVCache against a dictionary of lists: contents, sharing, copy on write, running out of pages."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import flashattn_ext as fa
from sequences import normal, offsets, same_bits

pytestmark = pytest.mark.usefixtures("device")

QUANTS = (None, "int8", "fp8")


def new_cache(num_pages=8, page_size=4, quant=None, dtype=torch.float32, **options):
    return fa.PagedKVCache(num_pages, page_size, 2, 6, v_head_dim=5, dtype=dtype, device=torch.get_default_device(),
                           quant=quant, **options)


def tokens(*shape, dtype=torch.float32):
    return normal(*shape, 2, 6, dtype=dtype), normal(*shape, 2, 5, dtype=dtype)


def contents(cache, seq_id):
    """k (n, HK, D), v, and their scales or None, read through the block table."""
    (length,) = cache.seqlens([seq_id]).tolist()
    table = cache.block_table([seq_id])[0, :-(-length // cache.page_size)].long()
    return [None if x is None else x[table].flatten(0, 1)[:length] for x in (cache.k, cache.v, cache.k_scale,
                                                                             cache.v_scale)]


# ---- the state machine -----------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Every call on a small cache, and on lists of numbered tokens. Token t is the number t in every element."""

    NAMES = st.integers(0, 4)

    @initialize(pages=st.integers(0, 9), page_size=st.integers(1, 4), quant=st.sampled_from(QUANTS))
    def start(self, pages, page_size, quant):
        self.cache = fa.PagedKVCache(pages, page_size, 1, 2, dtype=torch.float32, device=torch.get_default_device(),
                                     quant=quant)
        self.pages, self.page_size, self.model, self.drawn = pages, page_size, {}, 0

    def draw(self, count):
        self.drawn += count
        return list(range(self.drawn - count + 1, self.drawn + 1))

    def snapshot(self):
        cache = self.cache
        return ({name: (sequence.pages.tolist(), sequence.length) for name, sequence in cache._sequences.items()},
                list(cache._free), list(cache._owners))

    def needed(self, changes):
        """Pages that appending changes[name] tokens takes: new ones, and a copy of each partial page that is shared."""
        owners = self.owners()
        taken = 0
        for name, count in changes.items():
            length, held = len(self.model[name]), self.cache._sequences[name].pages
            taken += -(-(length + count) // self.page_size) - len(held)
            if count and length % self.page_size and owners[held[-1]] > 1:
                owners[held[-1]] -= 1
                taken += 1
        return taken

    def owners(self):
        count = [0] * self.pages
        for sequence in self.cache._sequences.values():
            for page in sequence.pages:
                count[page] += 1
        return count

    @rule(name=NAMES)
    def allocate(self, name):
        free = self.cache.pages_free
        if name in self.model:
            with pytest.raises(ValueError, match=str(name)):
                self.cache.allocate(name)
        else:
            self.cache.allocate(name)
            self.model[name] = []
        assert self.cache.pages_free == free

    @rule(source=NAMES, name=NAMES)
    def fork(self, source, name):
        free = self.cache.pages_free
        if source not in self.model or name in self.model:
            with pytest.raises((KeyError, ValueError)):
                self.cache.fork(source, name)
        else:
            self.cache.fork(source, name)
            self.model[name] = list(self.model[source])
        assert self.cache.pages_free == free

    @rule(name=NAMES)
    def free(self, name):
        if name not in self.model:
            with pytest.raises(KeyError):
                self.cache.free(name)
        else:
            self.cache.free(name)
            del self.model[name]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(-1, len(self.model[name]) + 1))
        if 0 <= length <= len(self.model[name]):
            self.cache.truncate(name, length)
            del self.model[name][length:]
        else:
            with pytest.raises(ValueError, match="length"):
                self.cache.truncate(name, length)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), how=st.sampled_from(["dense", "packed", "extend"]))
    def append(self, data, how):
        names = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        same = data.draw(st.integers(0, 6))
        counts = [same if how == "dense" else data.draw(st.integers(0, 6)) for _ in names]
        fresh = [self.draw(count) for count in counts]
        rows = torch.tensor([t for part in fresh for t in part], dtype=torch.float32)[:, None, None].expand(-1, 1, 2)
        before, full = self.snapshot(), self.needed(dict(zip(names, counts))) > self.cache.pages_free
        kept = {name: contents(self.cache, name) for name in self.model}
        try:
            self.write(how, names, counts, rows)
            assert not full, "there was no room, and nothing was said"
        except fa.CacheFull:
            assert full, "there was room"
            assert self.snapshot() == before
            for name, parts in kept.items():
                assert all(x is None or torch.equal(x.float(), y.float())
                           for x, y in zip(parts, contents(self.cache, name)))
            return
        for name, part in zip(names, fresh):
            self.model[name] += part

    def write(self, how, names, counts, rows):
        cache = self.cache
        if how == "dense":
            dense = rows.reshape(len(names), counts[0], 1, 2)
            cache.append(names, dense, dense * 2)
        elif how == "packed":
            cache.append(names, rows, rows * 2, cu_seqlens=offsets(counts))
        else:
            lengths = cache.seqlens(names)
            before = cache.extend(names, counts)
            assert torch.equal(before, lengths) and before.dtype == torch.int32
            torch.ops.flashattn_ext.cache_append_(cache.k, cache.v, before, rows, rows * 2, offsets(counts),
                                                  cache.block_table(names), cache.k_scale, cache.v_scale)

    @invariant()
    def the_model_and_the_cache_agree(self):
        if not hasattr(self, "cache"):
            return
        cache, owners = self.cache, self.owners()
        assert set(cache._sequences) == set(self.model)
        assert cache._owners == owners
        assert sorted(cache._free) == [page for page in range(self.pages) if not owners[page]]  # none lost, none twice
        assert cache.pages_free == len(cache._free)
        for name, want in self.model.items():
            assert len(cache._sequences[name].pages) == -(-len(want) // self.page_size)
            k, v, k_scale, v_scale = contents(cache, name)
            for stored, scale, factor in ((k, k_scale, 1), (v, v_scale, 2)):
                got = stored.float() if scale is None else stored.float() * scale[..., None]
                want_rows = torch.tensor(want, dtype=torch.float32)[:, None, None] * factor
                torch.testing.assert_close(got, want_rows.expand(len(want), 1, 2), rtol=1e-6, atol=0)


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(stateful_step_count=25)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_attributes():
    cache = new_cache()
    assert cache.k.shape == (8, 4, 2, 6) and cache.v.shape == (8, 4, 2, 5) and cache.pages_free == 8
    assert cache.k.dtype == torch.float32 and cache.k_scale is None and cache.v_scale is None
    for quant, stored in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        cache = new_cache(quant=quant)
        assert cache.k.dtype == cache.v.dtype == stored
        assert cache.k_scale.shape == cache.v_scale.shape == (8, 4, 2) and cache.k_scale.dtype == torch.float32
    assert "8 of 8 pages" in repr(cache)


def test_tables():
    cache = new_cache()
    for name in ("a", "b", "empty"):
        cache.allocate(name)
    cache.append(["a"], *tokens(1, 9))
    cache.append(["b"], *tokens(1, 4))
    table = cache.block_table(["b", "a", "empty"])
    assert table.dtype == torch.int32 and table.shape == (3, 3) and table.is_contiguous()
    assert cache.seqlens(["b", "a", "empty"]).tolist() == [4, 9, 0]
    pages = table[1].tolist() + table[0, :1].tolist()
    assert len(set(pages)) == 4 and cache.pages_free == 4 and table[2].tolist() == [0, 0, 0]
    assert cache.block_table([]).shape[0] == 0 and cache.seqlens([]).shape == (0,)


@pytest.mark.parametrize("quant", QUANTS)
def test_forks_share_until_they_write(quant):
    cache = new_cache(quant=quant)
    cache.allocate("a")
    cache.append(["a"], *tokens(1, 6))
    cache.fork("a", "b")
    cache.fork("a", "c")
    assert cache.pages_free == 6 and torch.equal(cache.block_table(["a"]), cache.block_table(["b"]))
    before = contents(cache, "a")
    cache.append(["b"], *tokens(1, 1))
    first, second = cache.block_table(["a", "b"])
    assert first[0] == second[0] and first[1] != second[1] and cache.pages_free == 5
    for x, y, z in zip(before, contents(cache, "a"), contents(cache, "b")):
        assert x is None or same_bits(x, y) and same_bits(x, z[:6])
    # two that share a partial page and write in one call: one of them keeps it
    cache.append(["a", "c"], *tokens(2, 1))
    assert cache.pages_free == 4
    assert len({int(row[1]) for row in cache.block_table(["a", "b", "c"])}) == 3
    for x, y, z in zip(before, contents(cache, "a"), contents(cache, "c")):
        assert x is None or same_bits(x, y[:6]) and same_bits(x, z[:6])
    cache.free("a")
    cache.free("b")
    assert cache.pages_free == 6
    cache.free("c")
    assert cache.pages_free == 8


def test_full_pages_are_shared_for_good():
    cache = new_cache()
    cache.allocate(0)
    cache.append([0], *tokens(1, 8))
    cache.fork(0, 1)
    cache.append([1], *tokens(1, 1))
    assert cache.pages_free == 5 and torch.equal(cache.block_table([0])[0], cache.block_table([1])[0, :2])


def test_running_out_changes_nothing():
    cache = new_cache(num_pages=3)
    for name in "ab":
        cache.allocate(name)
    cache.append(["a", "b"], *tokens(2, 3))
    cache.fork("a", "c")
    state = [cache.k.clone(), cache.v.clone(), cache.block_table("abc"), cache.seqlens("abc"), cache.pages_free]
    for call in (lambda: cache.append(["b", "c"], *tokens(2, 2)), lambda: cache.append(["c"], *tokens(1, 6)),
                 lambda: cache.extend("abc", 5)):
        with pytest.raises(fa.CacheFull, match=r"pages are needed and 1 of 3 are free"):
            call()
        now = [cache.k, cache.v, cache.block_table("abc"), cache.seqlens("abc")]
        assert all(same_bits(x, y) for x, y in zip(state, now)) and cache.pages_free == state[4]
    cache.append(["c"], *tokens(1, 1))
    assert cache.pages_free == 0 and issubclass(fa.CacheFull, RuntimeError)


@pytest.mark.parametrize("quant", QUANTS)
def test_append_is_what_the_reference_appends(quant):
    cache = new_cache(quant=quant, dtype=torch.bfloat16)
    for name in range(3):
        cache.allocate(name)
    k, v = tokens(11, dtype=torch.bfloat16)
    cache.append([2, 0, 1], k, v, cu_seqlens=torch.tensor([0, 5, 5, 11]))
    table, zero = cache.block_table([2, 1]), torch.zeros(1, dtype=torch.int32)
    for row, rows in ((0, slice(0, 5)), (1, slice(5, 11))):
        want = fa.reference.append(cache.k, cache.v, zero, k[None, rows], v[None, rows], block_table=table[row:row + 1],
                                   k_scale=cache.k_scale, v_scale=cache.v_scale)
        for x, y in zip((cache.k, cache.v, cache.k_scale, cache.v_scale), want):
            assert x is None or same_bits(x[table.unique()], y[table.unique()])
    assert cache.seqlens([0, 1, 2]).tolist() == [0, 6, 5]


@pytest.mark.parametrize("quant", QUANTS)
def test_generation(quant):
    """Prefill, fork, then steps in which decode_attention writes into the cache itself; against the reference."""
    cache = fa.PagedKVCache(24, 4, 2, 16, dtype=torch.float32, device=torch.get_default_device(), quant=quant)
    cache.allocate("prompt")
    cache.append(["prompt"], normal(1, 10, 2, 16), normal(1, 10, 2, 16))
    for name in "xyz":
        cache.fork("prompt", name)
    cache.allocate("new")
    names = ["x", "y", "z", "new"]
    for _ in range(6):
        q, k, v = normal(4, 1, 4, 16), normal(4, 1, 2, 16), normal(4, 1, 2, 16)
        before = cache.extend(names, 1)
        options = dict(k_new=k, v_new=v, block_table=cache.block_table(names), k_scale=cache.k_scale,
                       v_scale=cache.v_scale)
        ref = fa.reference.decode_attention(q, cache.k, cache.v, before, **options)
        out = fa.decode_attention(q, cache.k, cache.v, before, **options)
        torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
    assert cache.seqlens(["prompt", *names]).tolist() == [10, 16, 16, 16, 6]
    untouched = contents(cache, "prompt")
    for name in "xyz":
        assert all(x is None or same_bits(x, y[:10]) for x, y in zip(untouched, contents(cache, name)))


def test_truncate_after_speculation():
    cache = new_cache()
    cache.allocate("a")
    k, v = tokens(1, 9)
    cache.append(["a"], k, v)
    cache.fork("a", "b")
    cache.truncate("b", 5)
    assert cache.seqlens("ab").tolist() == [9, 5] and cache.pages_free == 5
    more = tokens(1, 1)
    cache.append(["b"], *more)
    assert torch.equal(contents(cache, "a")[0], k[0])
    assert torch.equal(contents(cache, "b")[0], torch.cat([k[0, :5], more[0][0]]))


@pytest.mark.parametrize("call", [
    lambda cache: cache.append(["no"], *tokens(1, 1)), lambda cache: cache.block_table(["a", "no"]),
    lambda cache: cache.seqlens(["no"]), lambda cache: cache.fork("no", "b"), lambda cache: cache.free("no"),
    lambda cache: cache.truncate("no", 0), lambda cache: cache.extend(["a", "no"], 1),
], ids=["append", "block_table", "seqlens", "fork", "free", "truncate", "extend"])
def test_unknown_ids(call):
    cache = new_cache()
    cache.allocate("a")
    with pytest.raises(KeyError, match="no sequence 'no'"):
        call(cache)
    assert cache.pages_free == 8


REFUSED = [
    (lambda c: c.append(["a", "b"], *tokens(1, 2)), RuntimeError, r"k has shape \(1, 2, 2, 6\)"),
    (lambda c: c.append(["a"], tokens(1, 2)[0], tokens(1, 3)[1]), RuntimeError, r"v_new has shape \(1, 3, 2, 5\)"),
    (lambda c: c.append(["a"], *tokens(1, 2, dtype=torch.float16)), RuntimeError, "k and v have dtypes torch.float16"),
    (lambda c: c.append(["a"], tokens(1, 2)[0], tokens(1, 2)[1].double()), RuntimeError, "torch.float64"),
    (lambda c: c.append(["a"], tokens(1, 2)[0][..., :5], tokens(1, 2)[1]), RuntimeError, "k_new has shape"),
    (lambda c: c.append(["a", "a"], *tokens(2, 1)), ValueError, "named once"),
    (lambda c: c.append(["a"], *tokens(4), cu_seqlens=torch.tensor([0, 2, 4])), RuntimeError, "cu_seqlens has 3"),
    (lambda c: c.append(["a", "b"], *tokens(4), cu_seqlens=torch.tensor([0, 3, 2])), RuntimeError,
     r"cu_seqlens is \[0, 3, 2\]"),
    (lambda c: c.append(["a", "b"], *tokens(4), cu_seqlens=torch.tensor([0, 3, 5])), RuntimeError, "4 rows"),
    (lambda c: c.extend(["a", "b"], [1]), ValueError, "tokens must be"),
    (lambda c: c.extend(["a"], -1), ValueError, "tokens must be"),
    (lambda c: new_cache(quant="int4"), ValueError, "quant must be None, 'int8' or 'fp8', got 'int4'"),
    (lambda c: new_cache(page_size=0), ValueError, "page_size must be at least 1, got 0"),
]


@pytest.mark.parametrize("call,error,text", REFUSED, ids=[text for _, _, text in REFUSED])
def test_refusals_change_nothing(call, error, text):
    cache = new_cache()
    cache.allocate("a")
    cache.allocate("b")
    cache.append(["a"], *tokens(1, 5))
    state = [cache.block_table("ab"), cache.seqlens("ab"), *contents(cache, "a")[:2]]
    with pytest.raises(error, match=text):
        call(cache)
    now = [cache.block_table("ab"), cache.seqlens("ab"), *contents(cache, "a")[:2]]
    assert all(same_bits(x, y) for x, y in zip(state, now)) and cache.pages_free == 6
