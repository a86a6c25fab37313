"""How many bytes of tensors exist at once while something runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations make inside, and the most bytes of them at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._tensors = {}  # storage -> how many tensors lie in it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._seen(tensor, old)
        return result

    def _seen(self, tensor, old):
        key, size = self._key(tensor), tensor.untyped_storage().nbytes()
        if key not in self._tensors:
            if key in old:  # lies in what was there before
                return
            self._tensors[key] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._gone, key, size)

    def _gone(self, key, size):
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= size

    @staticmethod
    def _key(tensor):
        return tensor.untyped_storage()._cdata


def peak_bytes(run):
    """The most bytes that ``run`` has in tensors of its own at one time, its result included."""
    with LiveBytes() as live, torch.inference_mode():
        result = run()
    del result
    return live.peak
