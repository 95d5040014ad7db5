# What a run needs installed; the project itself is mounted at /workspace. `make build_docker`, `make launch_docker`.

# Debian or Ubuntu with Python 3.11 or later and its venv module. CUDA's libraries come with PyTorch.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:* make=4.* \
    && rm -rf /var/lib/apt/lists/*

# cpu, gpu or tf-gpu: gpu has PyTorch and ONNX Runtime with CUDA 13, tf-gpu only TensorFlow, with CUDA 12.
ARG DEVICE=cpu
# cpu: PyTorch from its index of wheels without CUDA, which makes the image about 5 GB smaller.
ARG TORCH
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# pip's own settings, for another package index or a certificate of one's own.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
COPY requirements /opt/requirements
RUN if [ "$DEVICE" = gpu ]; then cp /opt/requirements/onnxruntime-gpu.txt /opt/requirements/onnxruntime.txt; fi \
    && if [ "$DEVICE" = tf-gpu ]; then cp /opt/requirements/tf-gpu.txt /opt/requirements/test.txt; fi \
    && python3 -m venv /opt/venv \
    && if [ "$TORCH" = cpu ]; then /opt/venv/bin/pip install --no-cache-dir --index-url "$TORCH_CPU_INDEX" \
        "$(grep ^torch== /opt/requirements/pytorch.txt)"; fi \
    && /opt/venv/bin/pip install --no-cache-dir --requirement /opt/requirements/test.txt

# PYTHON tells the Makefile that the packages are here. Any user may run it, also one without an entry in /etc/passwd.
ENV PYTHON=/opt/venv/bin/python PATH="/opt/venv/bin:$PATH" HOME=/tmp
WORKDIR /workspace
USER 65534:65534
CMD ["bash"]
