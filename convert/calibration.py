"""Calibrate int8 for the PyTorch backend: find the range of each linear layer's inputs over real samples."""

import hashlib
import os
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import config
from create_squad_data import load_features, read_cache, read_calibration, write_cache
from models.model_files import COUNTS, WIDTHS, model_files, open_weights, read_config
from models.packed_bert import Bert, PrepackedLinear, Ranges
from squad_QSL import Batch, SquadQSL

CACHE_VERSION = 1  # raise it if the ranges of unchanged input change


class Observer(PrepackedLinear):
    """A linear layer in fp32 that records the range of its inputs in `ranges` under its name."""

    def __init__(self, ranges: Ranges, name: str, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight, bias)
        self.ranges, self.name = ranges, name
        ranges[name] = torch.zeros(weight.shape[1]), torch.zeros(weight.shape[1])

    def __call__(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """Return what the layer computes."""
        low, high = self.ranges[self.name]
        self.ranges[self.name] = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
        return super().__call__(x, gelu, residual)


@torch.inference_mode()
def input_ranges(model: str, batches: Iterable[Batch]) -> Ranges:
    """Return the ranges of the inputs of `model`'s linear layers over `batches`. Raises UserError."""
    ranges: Ranges = {}
    bert = Bert(*open_weights(model), torch.device("cpu"), torch.float32, partial(Observer, ranges))
    for batch in batches:
        bert(batch)
    return ranges


def ranges_key(model: str, samples: list[np.ndarray]) -> str:
    """Return a digest of all that changes `input_ranges`: weights, configuration, samples, and what computes them."""
    files = model_files(model)
    bert_config = read_config(files.config_file)
    sizes = {name: bert_config[name] for name in (*WIDTHS, *COUNTS, "layer_norm_eps")}
    key = hashlib.sha256(repr((CACHE_VERSION, torch.__version__, files.digest(), sorted(sizes.items()))).encode())
    for array in samples:
        key.update(array.tobytes())
    return key.hexdigest()


def int8_ranges(model: str) -> Ranges:
    """Return the `input_ranges` of `model` over the calibration samples, cached in build/cache. Raises UserError."""
    squad, features = load_features(*config.dataset_files())
    calibration = config.env("CALIBRATION_FILE", config.CALIBRATION)
    if os.path.exists(calibration):
        rows = read_calibration(calibration, squad, features)
    else:
        rows = np.unique(np.linspace(0, len(features) - 1, 100).astype(int))
        config.notice(f"{calibration} is missing; calibrating with 100 samples at even steps, not with MLPerf's list")
    key = ranges_key(model, [array[rows] for array in (features.input_ids, features.segment_ids, features.lengths)])
    cache = os.path.join(config.CACHE_DIR, f"int8-{key[:16]}.npz")
    arrays = read_cache(cache)
    try:
        if str(arrays.pop("key", "")) == key:
            return {name: (torch.from_numpy(low), torch.from_numpy(high)) for name, (low, high) in arrays.items()}
    except ValueError as error:
        config.notice(f"the cache {cache} is damaged ({error}); making it again")
    qsl = SquadQSL(features)
    ranges: Ranges = input_ranges(model, (qsl.batch(np.array([row])) for row in rows))
    arrays = {name: torch.stack(pair).numpy() for name, pair in ranges.items()}
    write_cache(cache, {"key": np.array(key), **arrays})
    return ranges
