"""The paged KV cache: pages of 64 tokens, handed out by reference count, found again by what they hold.

A full page's name is a digest of its token ids and of the page before it, so equal names mean equal prefixes
(vLLM's automatic prefix caching, Kwon et al. 2023, section 4.3). A named page that nobody uses stays findable
until its room is needed; the one unused longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.engine.large_pages import large_zeros
from quantbench.infer.models import ModelConfig
from quantbench.infer.ops import PAGE, LayerCache
from quantbench.quantizers.activation import quantize_heads
from quantbench.quantizers.formats import FORMATS
from quantbench.scales.arrays import Array
from quantbench.vocabulary import DYNAMIC

_STORAGE: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int8": np.int8,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
}
F32 = npt.NDArray[np.float32]
Scales = tuple[F32, F32]


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)


def token_bytes(config: ModelConfig, cache_format: str) -> int:
    """Bytes of K and V of one token over all layers, with their scales where those are dynamic."""
    dynamic = cache_format.endswith(DYNAMIC)
    head = config.head_dim * storage(cache_format).itemsize + (4 if dynamic else 0)
    return config.num_layers * 2 * config.num_kv_heads * head


def storage(cache_format: str) -> np.dtype[np.generic]:
    """What the pages of a cache hold."""
    return np.dtype(_STORAGE[cache_format.removesuffix(DYNAMIC)])


def allocate_layer(config: ModelConfig, cache_format: str, pages: int, scales: Scales | None) -> LayerCache:
    """K and V pages of one layer, zeroed lazily by the operating system: untouched pages cost no memory."""
    dtype = storage(cache_format)
    shape = (pages, config.num_kv_heads, PAGE, config.head_dim)
    raw = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
    ones = np.ones(config.num_kv_heads, np.float32)
    k_scale, v_scale = scales if scales is not None else (ones, ones)
    return LayerCache(
        k=np.zeros(shape, raw).view(dtype), v=np.zeros(shape, raw).view(dtype), k_scale=k_scale, v_scale=v_scale
    )


def page_key(parent: bytes, ids: list[int]) -> bytes:
    """Name of a full page: a digest of the page before it and of its 64 token ids."""
    return blake2b(parent + np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()


class PagePool:
    """Which pages are free, used (and by how many), or kept for reuse. Knows numbers, not their contents."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # taken from the end: low numbers first, so few pages are touched
        self._users = [0] * pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, unused; the oldest first

    @property
    def available(self) -> int:
        """Pages that `allocate` can give now."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None (and nothing taken) where there are not that many."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more user of `page`."""
        self._users[page] += 1
        self._idle.pop(page, None)
        return page

    def release(self, pages: list[int]) -> None:
        """One user fewer for each of `pages`. Later pages become idle first, so that prefixes live longest."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: bytes) -> None:
        """Makes a full page findable. Where another page already has this name, that one keeps it."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        return self._page_of.get(key)


class KVCache:
    """The pages of every layer. `scales[layer]` are K's and V's static ones, None of a float or dynamic cache.

    `prefix` stands in front of every sequence; `spare` pages beyond those of `tokens` are there to hold it.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache_format: str,
        tokens: int,
        scales: list[Scales | None],
        prefix: Prefix | None = None,
        spare: int = 0,
    ) -> None:
        self.format = cache_format
        self.pool = PagePool(pages_for(tokens) + spare)
        if cache_format.endswith(DYNAMIC):
            held = large_zeros((len(scales), 2, self.pool.pages, config.num_kv_heads, PAGE))
            scales = [(k, v) for k, v in held]
        self.layers = [allocate_layer(config, cache_format, self.pool.pages, s) for s in scales]
        self.prefix_length = len(prefix) if prefix else 0
        self._prefix = [self._held(prefix, number) for number in range(config.num_layers)] if prefix else []

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer.arrays)

    def begin(self, pages: list[int]) -> None:
        """Puts the prefix into the first slots of a sequence's pages: every sequence fills up the last page of it."""
        for layer, held in zip(self.layers, self._prefix, strict=False):  # no prefix, nothing to put
            for array, values in zip(layer.arrays, held, strict=True):
                for number, start in enumerate(range(0, self.prefix_length, PAGE)):
                    count = min(PAGE, self.prefix_length - start)
                    array[pages[number], :, :count] = values[:, start : start + count]

    def copy(self, source: int, target: int) -> None:
        """Page `target` of every layer becomes a copy of page `source`."""
        for array in (array for layer in self.layers for array in layer.arrays):
            array[target] = array[source]

    def _held(self, prefix: Prefix, number: int) -> list[Array]:
        """What the pages of one layer hold of it, in the order of `LayerCache.arrays`: [kv_heads, p, …] each."""
        layer, sides = self.layers[number], (prefix.k[number], prefix.v[number])
        if layer.dynamic:
            (k, k_scale), (v, v_scale) = (quantize_heads(side, self.format.removesuffix(DYNAMIC)) for side in sides)
            return [k, v, k_scale, v_scale]
        if layer.k.dtype.itemsize > 1:
            return [side.astype(layer.k.dtype) for side in sides]
        scales = (layer.k_scale, layer.v_scale)
        return [
            FORMATS[self.format].encode(side, scale[:, None, None]) for side, scale in zip(sides, scales, strict=True)
        ]
