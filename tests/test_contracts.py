"""The contracts accept what is right, and catch what is wrong by the rule that was meant for it."""

import numpy as np
import pytest
import torch

from minillm.context import BatchArrays
from minillm.errors import OutOfPagesError
from minillm.lab.contract_failure import ContractFailure
from minillm.lab.contracts import check_attention, check_page_manager, check_rmsnorm, check_rope
from minillm.lab.naive import paged_attention
from minillm.page_manager import PageManager

# Page managers


class SimplePageManager:
    """What a reader might write: no prefix cache, Python lists, nothing more than the protocol asks for."""

    def __init__(self, num_pages, page_size, prefix_caching=False):
        self.num_pages, self.page_size = num_pages, page_size
        self.free_pages = list(range(num_pages))
        self.tables = {}

    @property
    def num_available(self):
        return len(self.free_pages)

    @property
    def num_used(self):
        return self.num_pages - len(self.free_pages)

    def allocate(self, request_id, token_ids):
        self.tables[request_id] = []
        return 0

    def extend(self, request_id, num_tokens):
        missing = -(-num_tokens // self.page_size) - len(self.tables[request_id])
        if missing > len(self.free_pages):
            raise OutOfPagesError(f"{missing} pages missing")
        for _ in range(missing):
            self.tables[request_id].append(self.free_pages.pop())

    def commit(self, request_id, token_ids, num_computed):
        pass

    def free(self, request_id):
        self.free_pages += self.tables.pop(request_id)

    def evict(self, num_pages=None):
        return 0

    def page_table(self, request_id):
        return self.tables[request_id]

    def batch_arrays(self, chunks):
        pages = [self.tables[c.request_id][: -(-c.end // self.page_size)] for c in chunks]
        lengths = [c.end - c.start for c in chunks]
        return BatchArrays(
            qo_indptr=np.cumsum([0, *lengths], dtype=np.int32),
            kv_indptr=np.cumsum([0, *map(len, pages)], dtype=np.int32),
            kv_indices=np.array([page for table in pages for page in table], dtype=np.int32),
            kv_last_page_len=np.array([(c.end - 1) % self.page_size + 1 for c in chunks], dtype=np.int32),
            positions=np.array([p for c in chunks for p in range(c.start, c.end)], dtype=np.int32),
            batch_indices=np.repeat(np.arange(len(chunks), dtype=np.int32), lengths),
            page_size=self.page_size,
        )


class RoomOffByOne(SimplePageManager):
    def extend(self, request_id, num_tokens):
        super().extend(request_id, num_tokens - num_tokens % self.page_size)


class OnePageTooMany(SimplePageManager):
    def extend(self, request_id, num_tokens):
        super().extend(request_id, (num_tokens // self.page_size + 1) * self.page_size)


class LeaksLastPage(SimplePageManager):
    def free(self, request_id):
        self.free_pages += self.tables.pop(request_id)[:-1]


class LeaksButCountsWell(SimplePageManager):
    num_used = property(lambda self: len({page for table in self.tables.values() for page in table}))

    def free(self, request_id):
        self.free_pages += self.tables.pop(request_id)[:-1]


class HandsOutTwice(SimplePageManager):
    def extend(self, request_id, num_tokens):
        while len(self.tables[request_id]) * self.page_size < num_tokens:
            self.tables[request_id].append(len(self.tables[request_id]))

    num_used = property(lambda self: len({page for table in self.tables.values() for page in table}))
    num_available = property(lambda self: self.num_pages - self.num_used)


class PartialAllocation(SimplePageManager):
    def extend(self, request_id, num_tokens):
        while len(self.tables[request_id]) * self.page_size < num_tokens:
            if not self.free_pages:
                raise OutOfPagesError("no page left")
            self.tables[request_id].append(self.free_pages.pop())


class RunsIntoIndexError(SimplePageManager):
    def extend(self, request_id, num_tokens):
        while len(self.tables[request_id]) * self.page_size < num_tokens:
            self.tables[request_id].append(self.free_pages.pop())


class GivesUpEarly(SimplePageManager):
    def extend(self, request_id, num_tokens):
        if len(self.free_pages) * self.page_size <= num_tokens:
            raise OutOfPagesError("no page left")
        super().extend(request_id, num_tokens)


class FreesSilently(SimplePageManager):
    def free(self, request_id):
        self.free_pages += self.tables.pop(request_id, [])


class PrependsPages(SimplePageManager):
    def extend(self, request_id, num_tokens):
        old = list(self.tables[request_id])
        super().extend(request_id, num_tokens)
        self.tables[request_id] = [*self.tables[request_id][len(old) :], *old]


class ChangedArrays(SimplePageManager):
    name = ""

    def change(self, array):
        raise NotImplementedError

    def batch_arrays(self, chunks):
        arrays = vars(super().batch_arrays(chunks))
        return BatchArrays(**{**arrays, self.name: self.change(arrays[self.name])})


class LastPageLenZeroWhenFull(ChangedArrays):
    name = "kv_last_page_len"

    def change(self, array):
        return array % self.page_size


class Int64Indices(ChangedArrays):
    name = "kv_indices"

    def change(self, array):
        return array.astype(np.int64)


class SortedIndices(ChangedArrays):
    name = "kv_indices"

    def change(self, array):
        return np.sort(array)


class PositionsFromZero(ChangedArrays):
    name = "positions"

    def change(self, array):
        return np.arange(len(array), dtype=np.int32)


class AllPagesOfTheRequest(SimplePageManager):
    def batch_arrays(self, chunks):
        arrays = vars(super().batch_arrays(chunks))
        tables = [self.tables[c.request_id] for c in chunks]
        indptr = np.cumsum([0, *map(len, tables)], dtype=np.int32)
        indices = np.array([page for table in tables for page in table], dtype=np.int32)
        return BatchArrays(**{**arrays, "kv_indptr": indptr, "kv_indices": indices})


class HitNotCapped(PageManager):
    def _cached_prefix(self, token_ids):
        return super()._cached_prefix([*token_ids, 0])


class HashesWithoutParent(PageManager):
    def _block_digest(self, parent, token_ids, index):
        return super()._block_digest(b"", token_ids, index)


class EvictsPagesInUse(PageManager):
    def evict(self, num_pages=None):
        num_evicted = super().evict(num_pages)
        for page in list(self._block_of_page):
            if num_pages is None and self._reference_counts[page]:
                del self._page_of_block[self._block_of_page.pop(page)]
                self._free_pages.append(page)
                num_evicted += 1
        return num_evicted


class FreesSharedPages(PageManager):
    def free(self, request_id):
        for page in self.page_table(request_id):
            if self._reference_counts[page] > 1:
                self._cached[int(page)] = None
                self._reference_counts[page] = 1
        super().free(request_id)


class ForgetsEverything(PageManager):
    def free(self, request_id):
        super().free(request_id)
        self.evict()


class KeepsStaleBlocks(PageManager):
    def evict(self, num_pages=None):
        blocks = dict(self._page_of_block)
        num_evicted = super().evict(num_pages)
        self._page_of_block.update(blocks)
        return num_evicted


class CommitsTooEarly(PageManager):
    def extend(self, request_id, num_tokens):
        super().extend(request_id, num_tokens)
        super().commit(request_id, self.ids[request_id], min(num_tokens, len(self.ids[request_id])))

    def allocate(self, request_id, token_ids):
        self.ids = {**getattr(self, "ids", {}), request_id: token_ids}
        return super().allocate(request_id, token_ids)

    def commit(self, request_id, token_ids, num_computed):
        pass


class ReplacesCachedBlocks(PageManager):
    def commit(self, request_id, token_ids, num_computed):
        table, digest = self.page_table(request_id).tolist(), b""
        for index in range(num_computed // self.page_size):
            digest = self._block_digest(digest, token_ids, index)
            old = self._page_of_block.pop(digest, None)
            if old is not None:
                del self._block_of_page[old]
                if old in self._cached:
                    del self._cached[old]
                    self._free_pages.append(old)
            self._page_of_block[digest] = table[index]
            self._block_of_page[table[index]] = digest


class EvictsMostRecent(PageManager):
    def evict(self, num_pages=None):
        for page in reversed(list(self._cached)):
            self._cached.move_to_end(page)
        return super().evict(num_pages)


class EvictsBeginningsFirst(PageManager):
    def free(self, request_id):
        pages = self.page_table(request_id).tolist()
        super().free(request_id)
        for page in pages:
            if page in self._cached:
                self._cached.move_to_end(page)


class AllocateTakesPages(PageManager):
    def allocate(self, request_id, token_ids):
        hit = super().allocate(request_id, token_ids)
        self.extend(request_id, hit + 1)
        return hit


class CachesAlways(PageManager):
    def __init__(self, num_pages, page_size, prefix_caching):
        super().__init__(num_pages, page_size, True)


def test_correct_managers_pass():
    check_page_manager(PageManager, prefix_caching=True)
    check_page_manager(PageManager, prefix_caching=False)
    check_page_manager(SimplePageManager, prefix_caching=False)


@pytest.mark.parametrize(
    ("manager", "rule"),
    [
        (RoomOffByOne, "extend makes room for all tokens"),
        (OnePageTooMany, "extend takes no page more than it needs"),
        (LeaksLastPage, "free gives back every page that no other request uses"),
        (LeaksButCountsWell, "every page is either used or available"),
        (HandsOutTwice, "extend hands out pages that nobody uses"),
        (PartialAllocation, "extend that runs out of pages changes nothing"),
        (RunsIntoIndexError, "extend raises OutOfPagesError when there are too few pages"),
        (GivesUpEarly, "extend succeeds while enough pages are available"),
        (FreesSilently, "free raises KeyError for a request that is not live"),
        (PrependsPages, "extend keeps the pages that a request has"),
        (LastPageLenZeroWhenFull, "kv_last_page_len counts the tokens in the last page, 1 to page_size"),
        (Int64Indices, "kv_indices is a one-dimensional int32 numpy array"),
        (SortedIndices, "kv_indices lists each request's pages in order of position"),
        (PositionsFromZero, "positions counts from `start` to `end - 1` in each chunk"),
        (AllPagesOfTheRequest, "kv_indptr adds up the pages of the first `end` tokens"),
        (CachesAlways, "without prefix caching nothing is cached"),
    ],
)
def test_wrong_managers_without_a_prefix_cache(manager, rule):
    with pytest.raises(ContractFailure) as caught:
        check_page_manager(manager, prefix_caching=False)
    assert caught.value.rule.startswith(rule)


@pytest.mark.parametrize(
    ("manager", "rule"),
    [
        (HitNotCapped, "a prefix hit leaves at least the last token to compute"),
        (HashesWithoutParent, "a prefix hit shares pages that hold these very tokens"),
        (EvictsPagesInUse, "evict never takes a page that a request uses"),
        (FreesSharedPages, "free gives back every page that no other request uses"),
        (ForgetsEverything, "a committed prefix is found again while nothing had to be evicted"),
        (SimplePageManager, "a committed prefix is found again while nothing had to be evicted"),
        (KeepsStaleBlocks, "a prefix hit shares pages that hold these very tokens"),
        (CommitsTooEarly, "a prefix hit shares pages that hold these very tokens"),
        (ReplacesCachedBlocks, "a block that is cached already keeps its page"),
        (EvictsMostRecent, "the least recently used cached page is evicted first"),
        (EvictsBeginningsFirst, "the end of a prefix is evicted before its beginning"),
        (AllocateTakesPages, "allocate takes no page but those it shares"),
    ],
)
def test_wrong_prefix_caches(manager, rule):
    with pytest.raises(ContractFailure) as caught:
        check_page_manager(manager, prefix_caching=True)
    assert caught.value.rule == rule


def test_the_message_shows_rule_trace_and_state():
    with pytest.raises(ContractFailure) as caught:
        check_page_manager(LeaksLastPage, prefix_caching=False)
    assert str(caught.value) == (
        "The rule: free gives back every page that no other request uses.\n"
        "But: 0 pages are in use, num_used is 1\n"
        "The smallest trace that shows it:\n"
        "    manager = PageManager(num_pages=4, page_size=4, prefix_caching=False)\n"
        "    manager.allocate('a', [0])  # 0\n"
        "    manager.extend('a', 1)\n"
        "    manager.free('a')\n"
        "Before the last call:\n"
        "    pages ...A  num_used 1, num_available 3\n"
        "    a: [3]\n"
        "After it:\n"
        "    pages ....  num_used 1, num_available 3"
    )


def test_traces_are_cut_down():
    with pytest.raises(ContractFailure) as caught:
        check_page_manager(KeepsStaleBlocks)
    assert len(caught.value.trace) <= 14
    with pytest.raises(ContractFailure) as again:
        check_page_manager(KeepsStaleBlocks)
    assert str(again.value) == str(caught.value)


def test_an_unfinished_manager_is_not_a_wrong_one():
    class Unfinished(SimplePageManager):
        def extend(self, request_id, num_tokens):
            raise NotImplementedError

    with pytest.raises(NotImplementedError):
        check_page_manager(Unfinished, prefix_caching=False)


# Attention


class NaiveKernels:
    """FlashInfer's names around naive attention, with places to go wrong."""

    def append_paged_kv_cache(
        self, k, v, batch_indices, positions, cache, indices, indptr, last_page_len, layout="NHD"
    ):
        page_size = cache.shape[2]
        for row, (request, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
            page = indices[indptr[request] + position // page_size]
            cache[page, 0, position % page_size], cache[page, 1, position % page_size] = k[row], v[row]

    def attend(self, q, cache, arrays, causal):
        return paged_attention(q, cache, arrays, causal)

    def _wrapper(self, is_decode):
        kernels = self

        class Wrapper:
            def __init__(self, workspace, kv_layout):
                pass

            def plan(self, *arguments, causal=True, q_data_type=None, kv_data_type=None):
                if is_decode:
                    arguments = (torch.arange(len(arguments[0])), *arguments)
                qo_indptr, kv_indptr, kv_indices, last = (argument.numpy() for argument in arguments[:4])
                empty = np.zeros(0)
                self.arrays = BatchArrays(qo_indptr, kv_indptr, kv_indices, last, empty, empty, arguments[7])
                self.causal = causal

            def run(self, q, cache):
                return kernels.attend(q, cache, self.arrays, self.causal)

        return Wrapper

    @property
    def BatchPrefillWithPagedKVCacheWrapper(self):
        return self._wrapper(is_decode=False)

    @property
    def BatchDecodeWithPagedKVCacheWrapper(self):
        return self._wrapper(is_decode=True)


class SwapsKAndV(NaiveKernels):
    def append_paged_kv_cache(self, k, v, *arguments):
        super().append_paged_kv_cache(v, k, *arguments)


class AppendsToContiguousPages(NaiveKernels):
    def append_paged_kv_cache(self, k, v, batch_indices, positions, cache, indices, *arguments):
        super().append_paged_kv_cache(k, v, batch_indices, positions, cache, torch.arange(len(indices)), *arguments)


class AppendsFromSlotZero(NaiveKernels):
    def append_paged_kv_cache(self, k, v, batch_indices, positions, *arguments):
        starts = [positions[batch_indices == request].min() for request in batch_indices.tolist()]
        super().append_paged_kv_cache(k, v, batch_indices, positions - torch.stack(starts), *arguments)


class NeverCausal(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        return super().attend(q, cache, arrays, False)


class AlwaysCausal(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        return super().attend(q, cache, arrays, True)


class TopLeftMask(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        if not causal or (np.diff(arrays.qo_indptr) == 1).all():
            return super().attend(q, cache, arrays, causal)
        outputs = torch.empty_like(q)
        for request in range(arrays.num_requests):
            begin, end = arrays.qo_indptr[request : request + 2].tolist()
            pages = arrays.kv_indices[arrays.kv_indptr[request] : arrays.kv_indptr[request + 1]]
            for row in range(begin, end):
                seen = row - begin + 1
                one = BatchArrays(
                    np.array([0, 1]),
                    np.array([0, -(-seen // arrays.page_size)]),
                    pages[: -(-seen // arrays.page_size)],
                    np.array([(seen - 1) % arrays.page_size + 1]),
                    np.zeros(0),
                    np.zeros(0),
                    arrays.page_size,
                )
                outputs[row] = paged_attention(q[row : row + 1], cache, one)[0]
        return outputs


class ReadsContiguousPages(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        indices = np.arange(len(arrays.kv_indices))
        return super().attend(q, cache, BatchArrays(**{**vars(arrays), "kv_indices": indices}), causal)


class ReadsWholeLastPage(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        last = np.full_like(arrays.kv_last_page_len, arrays.page_size)
        return super().attend(q, cache, BatchArrays(**{**vars(arrays), "kv_last_page_len": last}), causal)


class HeadsInTurns(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        num_kv_heads = cache.shape[3]
        turned = q.unflatten(1, (-1, num_kv_heads)).transpose(1, 2).flatten(1, 2)
        out = super().attend(turned, cache, arrays, causal)
        return out.unflatten(1, (num_kv_heads, -1)).transpose(1, 2).flatten(1, 2)


class Unscaled(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        return paged_attention(q, cache, arrays, causal, sm_scale=1.0)


class DecodeOfTheFirstRequest(NaiveKernels):
    def attend(self, q, cache, arrays, causal):
        out = super().attend(q, cache, arrays, causal)
        return out[:1].expand_as(out) if (np.diff(arrays.qo_indptr) == 1).all() else out


PREFILL = "prefill attends to the request's own pages, causally"
APPEND = "append writes each token's K and V to its slot"


def test_right_kernels_pass():
    check_attention(NaiveKernels())
    check_attention(NaiveKernels(), dtype=torch.bfloat16)


def test_the_twin_passes():
    reference = pytest.importorskip("minillm.reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_attention(reference, dtype=dtype)
        check_rope(reference.apply_rope_pos_ids, dtype=dtype)
    check_rmsnorm(reference.rmsnorm)


@pytest.mark.gpu
def test_flashinfer_passes():
    flashinfer = pytest.importorskip("flashinfer")
    for dtype in (torch.bfloat16, torch.float16):
        check_attention(flashinfer, "cuda", dtype)
        check_rope(flashinfer.apply_rope_pos_ids, "cuda", dtype)
        check_rmsnorm(flashinfer.rmsnorm, "cuda", (dtype,))


@pytest.mark.parametrize(
    ("kernels", "rule"),
    [
        (SwapsKAndV, APPEND),
        (AppendsToContiguousPages, APPEND),
        (AppendsFromSlotZero, APPEND),
        (NeverCausal, PREFILL),
        (TopLeftMask, PREFILL),
        (ReadsContiguousPages, PREFILL),
        (ReadsWholeLastPage, PREFILL),
        (HeadsInTurns, PREFILL),
        (Unscaled, PREFILL),
        (AlwaysCausal, "prefill that is not causal"),
        (DecodeOfTheFirstRequest, "decode attends with one query a request"),
    ],
)
def test_wrong_kernels(kernels, rule):
    with pytest.raises(ContractFailure) as caught:
        check_attention(kernels())
    assert caught.value.rule.startswith(rule)


def test_a_wrong_number_is_placed():
    with pytest.raises(
        ContractFailure, match=r"at row 0, head 0, element 0 \(request 0, position 0 of 4 tokens in pages of 4\)"
    ):
        check_attention(NeverCausal())


# RMS norm


def rmsnorm(x, weight, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rmsnorm_in_place(x, weight, eps):
    return x.copy_(rmsnorm(x, weight, eps))


WRONG_NORMS = {
    "each row is divided": lambda x, w, eps: rmsnorm(x.flatten(), torch.ones((), dtype=x.dtype), eps).view_as(x) * w,
    "the mean is not subtracted": lambda x, w, eps: rmsnorm(x - (x > 0).float().mean().gt(0.9) * x.mean(), w, eps),
    "eps is added": lambda x, w, eps: rmsnorm(x, w, 0.0),
    "the result is multiplied by the weight": lambda x, w, eps: rmsnorm(x, torch.ones_like(w), eps),
    "the squares are summed in float32": lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w,
    "the input is left": rmsnorm_in_place,
    "the result has the dtype": lambda x, w, eps: rmsnorm(x, w, eps).float(),
}


def test_right_norms_pass():
    check_rmsnorm(rmsnorm)
    check_rmsnorm(lambda x, w, eps: torch.nn.functional.rms_norm(x.float(), w.shape, w.float(), eps).to(x.dtype))


@pytest.mark.parametrize("rule", WRONG_NORMS)
def test_wrong_norms(rule):
    with pytest.raises(ContractFailure) as caught:
        check_rmsnorm(WRONG_NORMS[rule])
    assert caught.value.rule.startswith(rule)


# Rotary positions


def rope(q, k, positions, rope_theta=1e4, exponent=2.0, sign=1.0, angle_dtype=torch.float32, interleave=False):
    def rotated(x):
        half = x.shape[-1] // 2
        frequencies = rope_theta ** (-exponent * torch.arange(half, dtype=torch.float64) / x.shape[-1])
        angle = (positions.double().unsqueeze(1) * frequencies).to(angle_dtype).float().unsqueeze(1)
        cos, sin = angle.cos(), sign * angle.sin()
        first, second = (x[..., ::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
        pair = first * cos - second * sin, second * cos + first * sin
        return (torch.stack(pair, dim=-1).flatten(-2) if interleave else torch.cat(pair, dim=-1)).to(x.dtype)

    return rotated(q), rotated(k)


def rope_in_place(q, k, positions, rope_theta):
    new_q, new_k = rope(q, k, positions, rope_theta)
    return q.copy_(new_q), k.copy_(new_k)


FIRST = "position 1 rotates each pair"


def test_right_rope_passes():
    check_rope(rope)
    check_rope(rope, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda q, k, p, rope_theta: rope(q, k, p, rope_theta, interleave=True), FIRST),
        (lambda q, k, p, rope_theta: rope(q, k, p, rope_theta, sign=-1.0), FIRST),
        (lambda q, k, p, rope_theta: rope(q, k, p, rope_theta, exponent=1.0), FIRST),
        (lambda q, k, p, rope_theta: (rope(q, k, p, rope_theta)[0], k), FIRST),
        (lambda q, k, p, rope_theta: rope(q, k, p + 1, rope_theta), "position 0 is not rotated"),
        (lambda q, k, p, rope_theta: rope(q, k, p[:1].expand_as(p), rope_theta), "each row is rotated by its position"),
        (
            lambda q, k, p, rope_theta: (
                rope(q, k, torch.arange(len(p)) + p[0], rope_theta) if p[0] != p[1] else rope(q, k, p, rope_theta)
            ),
            "positions come from the argument",
        ),
        (lambda q, k, p, rope_theta: rope(q, k, p), "theta sets the frequencies"),
        (lambda q, k, p, rope_theta: rope(q, k, p, rope_theta, angle_dtype=torch.bfloat16), ""),
        (rope_in_place, "the inputs are left"),
    ],
)
def test_wrong_ropes(wrong, rule):
    with pytest.raises(ContractFailure) as caught:
        check_rope(wrong)
    assert caught.value.rule.startswith(rule)
