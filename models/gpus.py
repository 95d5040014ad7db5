"""Find the machine's NVIDIA GPUs through NVML, NVIDIA's management library, whatever the framework sees of them."""

import os
import re
from typing import Any, NamedTuple

import config


class Gpu(NamedTuple):
    """A GPU of this machine."""

    name: str
    memory_bytes: int
    used_bytes: int  # by all processes, now
    driver: str  # its version, such as 580.65.06
    cuda: str  # the newest CUDA that the driver runs, such as 13.0


def visible(uuids: list[str], wanted: str | None) -> list[int]:
    """Return the indices of the GPUs with these UUIDs that CUDA_VISIBLE_DEVICES=`wanted` (None: unset) leaves visible.

    As CUDA reads it: indices or the beginnings of UUIDs, up to the first that names no GPU.
    """
    found: list[int] = []
    for text in [] if wanted is None else wanted.split(","):
        word = text.strip()
        matches = (
            [int(word)] if word.isdecimal() else [i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        )
        if len(matches) != 1 or matches[0] >= len(uuids):
            break
        found.append(matches[0])
    return list(range(len(uuids))) if wanted is None else found


def find_gpus() -> list[Gpu]:
    """Return the GPUs that the environment leaves visible; none without NVIDIA's driver."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver, cuda = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles: list[Any] = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        chosen = visible(
            [pynvml.nvmlDeviceGetUUID(handle) for handle in handles], os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        gpus = []
        for handle in (handles[index] for index in chosen):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            version = f"{cuda // 1000}.{cuda % 1000 // 10}"
            gpus.append(Gpu(pynvml.nvmlDeviceGetName(handle), memory.total, memory.used, driver, version))
        return gpus
    except pynvml.NVMLError as error:
        config.notice(f"NVIDIA's driver does not describe the GPUs ({error})")
        return []
    finally:
        pynvml.nvmlShutdown()


def describe(gpus: list[Gpu]) -> str:
    """Return the names, memory, driver and CUDA version of `gpus`, without a comma, which separates a name's parts."""
    if not gpus:
        return "a GPU that NVML does not describe"
    names = list(dict.fromkeys(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus))
    count = f"{len(gpus)} x " if len(gpus) > 1 else ""
    return f"{count}{' and '.join(names)}; driver {gpus[0].driver}; CUDA {gpus[0].cuda}"


def parse_description(text: str) -> dict[str, str]:
    """Return the count, model, memory, driver and cuda in what `describe` returned for GPUs of one kind, else {}."""
    form = r"(?:(?P<count>\d+) x )?(?P<model>.+) \((?P<memory>\d+ GiB)\); driver (?P<driver>\S+); CUDA (?P<cuda>\S+)"
    match = re.fullmatch(form, text)
    return {name: value or "1" for name, value in match.groupdict().items()} if match else {}


def notice_unused(framework: str, cuda: str | None, remedy: str) -> None:
    """Log a notice if `framework` runs on the CPU although this machine has a GPU and the environment allows it.

    `cuda` is the CUDA version that the framework is built for, None if it is built without; `remedy` is how to get a
    build with CUDA.
    """
    found = find_gpus() if config.use_gpu() else []
    if not found:
        return
    if not cuda:
        reason = f"this {framework} is built without CUDA; {remedy}"
    elif int(found[0].cuda.split(".")[0]) < int(cuda.split(".")[0]):  # a driver runs all of its CUDA's minor versions
        reason = f"it needs a driver for CUDA {cuda}, and this one is for {found[0].cuda} at most; update the driver"
    else:
        reason = f"{framework} finds no GPU that it can use; check its libraries, and that nvidia-smi shows the GPU"
    config.notice(f"{framework} runs on the CPU, not on the {describe(found)}: {reason}; USE_GPU=0 hides this notice")
