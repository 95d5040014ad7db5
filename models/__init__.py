"""Read the files of a model, and compute BERT in PyTorch on processors and GPUs."""
