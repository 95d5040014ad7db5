"""Scale down the outlier channels of int8's inputs; PyTorch's int8 and convert/quantize_onnx.py do the same."""

import numpy as np


def outlier_scales(maxima: np.ndarray) -> np.ndarray:
    """Return factors, float32 (channels,), that bring outlier channels down to the 99th percentile of `maxima`.

    Under one scale for all, a trained BERT's few channels of ten times the size leave the others few of the 255 values.
    Unlike SmoothQuant (arXiv:2211.10438), this scales only outliers, and none if no channel is twice the percentile.
    """
    usual = np.sort(maxima)[-1 - len(maxima) // 100]
    if maxima.max() < 2 * usual:
        return np.ones_like(maxima)
    return np.asarray(np.minimum(usual / np.maximum(maxima, usual), 1), np.float32)
