"""Hold a model's weights with no more than a part of their files in memory at once; keep, return and measure memory."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The pages of a mapped file count as this process's memory until it is unmapped. So the files are mapped anew after
# each of PARTS parts of the weights, but not more often than every PART_BYTES: each time takes 20 to 100 ms.
PARTS = 16
PART_BYTES = 2**24
# glibc's parameters of mallopt (malloc.h) and the values that `keep_memory` gives them: no memory from mmap, one arena
# for all threads, and as much free memory at its end as an int can say.
KEEP = {"M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


class Weights(MutableMapping[str, "Tensor"]):
    """The weights `names` of a model, {Hugging Face's name: float32 tensor}, which are read when they are taken.

    `tensors` are all of the model's files by their names. `read_again` reads them again if they are mapped into memory;
    None says that they are not. A tensor that is taken may be a part of a mapped file, which stays in memory, as far as
    it was read, as long as the tensor exists.
    """

    def __init__(
        self, tensors: dict[str, Tensor], names: Iterable[str], read_again: Callable[[], dict[str, Tensor]] | None
    ) -> None:
        self._set: dict[str, Tensor | None] = dict.fromkeys(names)  # None: a weight is as the files have it
        self._files = {name: tensors[name] for name in self._set}
        self._read_again, self._read = read_again, 0  # bytes
        self._part = max(PART_BYTES, sum(tensor.nbytes for tensor in self._files.values()) // PARTS)
        if read_again:
            self._files, self._read = {}, self._part  # not `tensors`, of which the caller has read every page

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._set[name]
        if tensor is not None:
            return tensor
        if self._read_again and self._read >= self._part:
            self._files = {}  # unmaps the files
            self._files, self._read = self._read_again(), 0
        self._read += self._files[name].nbytes
        return self._files[name].detach().float()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._set[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._set[name]
        self._files.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._set)

    def __len__(self) -> int:
        return len(self._set)


def keep_memory() -> None:
    """Let this process keep what it frees, for its next batch; call it before the threads that compute are started.

    glibc would return each large value of a batch to the system, which clears its pages when they are used again:
    30,000 to 260,000 page faults in 48 samples of BERT-Large in fp32 instead of 5,000, and 2 to 4 % of the throughput.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", max)  # other C libraries have no such function
        for parameter, value in KEEP.values():
            mallopt(parameter, value)


def return_memory() -> None:
    """Return freed memory to the system; call it after much was freed, in pieces, because glibc keeps it.

    It kept 100 MB after a server's 36 large requests, and 440 MB after BERT-Large was loaded.
    """
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", id)(0)  # other C libraries have no such function


def peak_memory() -> int:
    """Return the peak of this process's memory in bytes.

    On Linux, `ru_maxrss` is not less than the peak of the process that started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        if found := re.search(r"^VmHWM:\s+([0-9]+) kB", file.read(), re.MULTILINE):
            return 1024 * int(found[1])
    import resource  # Windows does not have it

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
