"""Hold a model's weights so that no more than a part of their files is in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# The pages of a mapped file count as this process's memory until it is unmapped. So the files are mapped anew after
# each of PARTS parts of the weights, but not more often than every PART_BYTES: each time takes 20 to 100 ms.
PARTS = 16
PART_BYTES = 2**24


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
