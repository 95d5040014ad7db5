"""The query sample library: SQuAD's features in memory, handed out as batches by sample index."""

from dataclasses import dataclass

import numpy as np

from create_squad_data import Features


@dataclass
class Batch:
    """B samples as a backend gets them: padded with zeros to the L tokens of the longest.

    A backend that needs no padding takes `packed`; one whose graph has a fixed length takes `padded_to`.
    """

    input_ids: np.ndarray  # int32 (B, L)
    input_mask: np.ndarray  # int32 (B, L), 1 for a token, 0 for padding
    segment_ids: np.ndarray  # int32 (B, L)
    lengths: np.ndarray  # int32 (B,), tokens of each sample

    def __len__(self) -> int:
        return len(self.lengths)

    def packed(self, array: np.ndarray) -> np.ndarray:
        """The values of `array`, (B, L) or (B, L, …), at the samples' tokens, row by row: (tokens,) or (tokens, …)."""
        values: np.ndarray = array[self.input_mask.astype(bool)]
        return values

    def padded_to(self, length: int) -> tuple[np.ndarray, ...]:
        """(input_ids, input_mask, segment_ids), each int32 (B, length), for a length of at least L."""
        extra = ((0, 0), (0, length - self.input_ids.shape[1]))
        return tuple(np.pad(array, extra) for array in (self.input_ids, self.input_mask, self.segment_ids))


class SquadQSL:
    """The features of a data set, as LoadGen's sample library.

    All of them stay in memory (50 MB for the validation set), so there is nothing to load or unload.
    """

    def __init__(self, features: Features) -> None:
        """`features` is what `load_features` gives; sample i is feature i."""
        self.features = features
        self.lengths = features.lengths

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples `indices` (int array (B,)) as a `Batch`, in that order."""
        features, lengths = self.features, self.lengths[indices]
        longest = lengths.max()
        ids, mask, segments = (array[indices, :longest]
                               for array in (features.input_ids, features.input_mask, features.segment_ids))
        return Batch(ids, mask, segments, lengths)

    def longest_batch(self, size: int) -> Batch:
        """`size` copies of the longest sample, for warming up."""
        return self.batch(np.full(size, self.lengths.argmax()))
