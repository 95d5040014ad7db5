"""Compile and load cpu_kernels.cpp: what a CPU with AVX-512 and bf16 computes between BERT's linear layers.

PyTorch's tool for extensions compiles it once; build/cache in the project's folder keeps the result.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from subprocess import SubprocessError
from typing import Any

import torch

import config
from config import UserError
from files import locked_folder

SOURCE = os.path.join(config.ROOT, "models/cpu_kernels.cpp")
# PyTorch's headers take CPU_CAPABILITY from the command line.
FLAGS = ["-O3", "-march=x86-64-v4", "-mavx512bf16", "-fopenmp", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
LANES = 16  # the values of a vector, as in cpu_kernels.cpp


def library_path() -> str:
    """Return where the compiled file is kept: for each version of the source, PyTorch and the compiler another."""
    with open(SOURCE, "rb") as file:
        versions = torch.__version__, os.environ.get("CXX"), FLAGS
        key = hashlib.sha256(file.read() + repr(versions).encode()).hexdigest()
    return os.path.join(config.ROOT, config.CACHE_DIR, f"kernels-{key[:16]}", "cpu_kernels.so")


def compile_kernels(library: str) -> None:
    """Write the compiled file `library` and load it. Raises UserError, OSError, RuntimeError or SubprocessError."""
    from torch.utils import cpp_extension  # takes half a second

    compiler = cpp_extension.get_cxx_compiler()  # c++ unless CXX is set
    if not shutil.which(compiler):
        raise UserError(f"there is no C++ compiler {compiler}; install g++")
    config.log_progress("compiling models/cpu_kernels.cpp, which takes about 10 s and is done once")
    # The package ninja is beside Python, which is not on PATH unless the environment is activated.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)))
    with tempfile.TemporaryDirectory(dir=os.path.dirname(library)) as folder:
        flags = {"extra_cflags": FLAGS, "extra_ldflags": ["-fopenmp"]}
        cpp_extension.load("cpu_kernels", [SOURCE], build_directory=folder, is_python_module=False, **flags)
        os.replace(os.path.join(folder, "cpu_kernels.so"), library)


def load_kernels(bert_config: dict[str, Any]) -> Any:
    """Return `attention`, `add_norm` and `quantize` of cpu_kernels.cpp as attributes of one object.

    Returns None if the processor lacks the instructions or if a width of BERT is not a multiple of LANES; also, with a
    notice, if they cannot be compiled.
    """
    head = bert_config["hidden_size"] // bert_config["num_attention_heads"]
    if not torch.cpu._is_avx512_bf16_supported() or head % LANES or bert_config["intermediate_size"] % LANES:
        return None
    kernels = torch.ops.bert_squad
    try:
        if not hasattr(kernels, "attention"):  # a process loads them once
            library = library_path()
            with locked_folder(os.path.dirname(library), "a compilation", wait=True):
                try:
                    torch.ops.load_library(library)
                except OSError:  # it is missing or damaged
                    compile_kernels(library)
        # oneDNN may be limited to fewer instructions than the processor has, by ONEDNN_MAX_CPU_ISA.
        kernels.attention(torch.zeros(1, 3 * LANES, dtype=torch.bfloat16), 1, [1])
    except (UserError, OSError, RuntimeError, SubprocessError) as error:
        reason = next((line for line in str(error).splitlines() if "error: " in line), config.first_line(error))
        config.notice(f"models/cpu_kernels.cpp: {config.printable(reason)}; running with PyTorch's slower operators")
        return None
    return kernels
