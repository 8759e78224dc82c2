"""The paged KV cache on the device. Its pages are numbered by the same pool as on the CPU.

The host keeps the same pages too, which cost no memory until something touches them: traces run on those.
"""

from __future__ import annotations

from quantbench.infer.cuda.batch import DeviceCache
from quantbench.infer.cuda.device import Device
from quantbench.infer.engine.cache import KVCache
from quantbench.infer.ops import LayerCache


class Pages:
    """The device's side of a KVCache."""

    def __init__(self, device: Device, cache: KVCache) -> None:
        self._device, self._host = device, cache
        self.layers = [self._place(layer) for layer in cache.layers]

    def _place(self, layer: LayerCache) -> DeviceCache:
        k, v = (self._device.allocate(side.shape, side.dtype) for side in (layer.k, layer.v))
        for side in (k, v):  # a page's unused slots are read and masked: they must not hold NaN
            self._device.fill(side, 0)
        return DeviceCache(k, v, self._device.upload(layer.k_scale), self._device.upload(layer.v_scale))

    def begin(self, pages: list[int]) -> None:
        """Brings what the host wrote into the first pages of a sequence: the prefix."""
        for here, there in zip(self._host.layers, self.layers, strict=True):
            for number in pages[: -(-self._host.prefix_length // here.k.shape[2])]:
                self._device.write(there.k.rows(number, number + 1), here.k[number])
                self._device.write(there.v.rows(number, number + 1), here.v[number])

    def copy(self, source: int, target: int) -> None:
        """Page `target` becomes a copy of page `source`, in every layer."""
        for layer in self.layers:
            for side in (layer.k, layer.v):
                self._device.copy(side.rows(target, target + 1), side.rows(source, source + 1))
