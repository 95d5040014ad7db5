"""Hold SQuAD's features in memory and hand them out as batches: LoadGen's query sample library."""

from dataclasses import dataclass

import numpy as np

from create_squad_data import Features


@dataclass
class Batch:
    """B samples, padded with zeros to the L tokens of the longest one."""

    input_ids: np.ndarray  # int32 (B, L)
    input_mask: np.ndarray  # int32 (B, L), 1 for a token, 0 for padding
    segment_ids: np.ndarray  # int32 (B, L)
    lengths: np.ndarray  # int32 (B,), tokens of each sample

    def __len__(self) -> int:
        return len(self.lengths)

    def packed(self, array: np.ndarray) -> np.ndarray:
        """Return the values of `array`, (B, L) or (B, L, …), without padding: (tokens,) or (tokens, …)."""
        return np.asarray(array[self.input_mask.astype(bool)])

    def padded_to(self, length: int) -> tuple[np.ndarray, ...]:
        """Return (input_ids, input_mask, segment_ids), each int32 (B, length), for a length of at least L."""
        extra = ((0, 0), (0, length - self.input_ids.shape[1]))
        return tuple(np.pad(array, extra) for array in (self.input_ids, self.input_mask, self.segment_ids))


class SquadQSL:
    """The sample library of a data set: sample i is feature i. All stay in memory (50 MB for the validation set)."""

    def __init__(self, features: Features) -> None:
        self.features, self.lengths = features, features.lengths

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the samples `indices` (int array (B,)) as a `Batch`, in that order."""
        lengths = self.lengths[indices]
        arrays = (self.features.input_ids, self.features.input_mask, self.features.segment_ids)
        ids, mask, segments = (array[indices, : lengths.max()] for array in arrays)
        return Batch(ids, mask, segments, lengths)

    def longest_batch(self) -> Batch:
        """Return the longest sample, for warm-up."""
        return self.batch(np.array([self.lengths.argmax()]))
