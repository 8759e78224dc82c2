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
        paged = [self._device.allocate(array.shape, array.dtype) for array in layer.arrays]
        for array in paged:  # a page's unused slots are read and masked: they must not hold NaN
            self._device.fill(array, 0)
        static = [] if layer.dynamic else [self._device.upload(scale) for scale in (layer.k_scale, layer.v_scale)]
        return DeviceCache(*paged, *static)

    def begin(self, pages: list[int]) -> None:
        """Brings what the host wrote into the first pages of a sequence: the prefix."""
        for here, there in zip(self._host.layers, self.layers, strict=True):
            for number in pages[: -(-self._host.prefix_length // here.k.shape[2])]:
                for ours, theirs in zip(here.arrays, there.arrays, strict=True):
                    self._device.write(theirs.rows(number, number + 1), ours[number])

    def copy(self, source: int, target: int) -> None:
        """Page `target` becomes a copy of page `source`, in every layer."""
        for layer in self.layers:
            for array in layer.arrays:
                self._device.copy(array.rows(target, target + 1), array.rows(source, source + 1))
