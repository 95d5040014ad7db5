"""ONNX Runtime on GPUs, as far as it shows without one: silent fallback, provider options, fp16, notices, the name."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_changes import static_int8
from helpers import predict, random_batch, refused

import onnxruntime_SUT
from backends import RunOptions
from models import gpus
from models.graph_files import GraphSignature, GraphTensor

onnxruntime = pytest.importorskip("onnxruntime")
BACKEND = "onnxruntime"  # of the fixture `load`
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
WANTED = "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER"
T4 = gpus.Gpu("Tesla T4", 15 * 2**30, 0, "580.65.06", "13.0")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that sets the providers that ONNX Runtime offers, and the machine's GPUs."""
    for name in (WANTED, "USE_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def machine(*available, found=(T4,)):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*available, CPU])
        monkeypatch.setattr(gpus, "find_gpus", lambda: list(found))

    return machine


@pytest.fixture
def cuda(machine, monkeypatch):
    """Let sessions of the CPU say that they run on CUDA; return the options that their providers were given."""
    machine(CUDA)
    given = []
    real = onnxruntime.InferenceSession

    class Session(real):
        def __init__(self, path, settings, providers, options, **others):
            given.append(dict(zip(providers, options)))
            super().__init__(path, settings, [CPU])

        def get_providers(self):
            return [CUDA, CPU]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return given


@pytest.mark.parametrize("named, found", [(CUDA, ()), (CUDA, (T4,)), ("", (T4,))])
def test_a_silent_fallback_to_the_cpu_is_an_error_with_its_reason(load, tiny, machine, monkeypatch, named, found):
    """This build of ONNX Runtime has no CUDA, so it falls back as one does whose libraries cannot be loaded."""
    machine(CUDA, found=found)
    monkeypatch.setenv(WANTED, named)
    library = "libonnxruntime_providers_cuda.so: cannot open"
    with refused(
        f"{CUDA} cannot run, ONNX Runtime took {CPU}", library, "requirements/onnxruntime-gpu.txt", "USE_GPU=0"
    ):
        load(tiny.folder / "model.onnx")


def test_the_cpu_is_no_error_without_a_gpu_or_if_it_is_allowed(load, tiny, machine, monkeypatch):
    machine(CUDA, found=())
    assert f", {CPU}, fp32" in load(tiny.folder / "model.onnx").name
    machine(CUDA)
    monkeypatch.setenv("USE_GPU", "0")
    assert f", {CPU}, fp32" in load(tiny.folder / "model.onnx").name


def test_a_driver_that_does_not_fit_is_the_reason_if_the_libraries_load(machine, monkeypatch):
    machine(CUDA, found=(T4._replace(cuda="12.4"),))
    monkeypatch.setattr("ctypes.CDLL", lambda *args: None)
    with refused("its libraries can be loaded, but the driver is for CUDA 12.4"):
        onnxruntime_SUT.check_provider(CUDA, CPU)


def test_a_gpu_that_a_build_without_cuda_leaves_idle_is_a_notice(load, tiny, machine, caplog):
    machine()
    load(tiny.folder / "model.onnx")
    assert "ONNX Runtime runs on the CPU, not on the Tesla T4" in caplog.text and "onnxruntime-gpu.txt" in caplog.text


def test_on_cuda_the_name_has_the_gpu_and_fp32_has_no_tf32(load, tiny, cuda):
    backend = load(tiny.folder / "model.onnx")
    device = "Tesla T4 (15 GiB); driver 580.65.06; CUDA 13.0"
    assert backend.name == f"ONNX Runtime {onnxruntime.__version__} {CUDA}, {device}, fp32" and backend.gpu == device
    assert cuda == [{CUDA: {"use_tf32": "0"}, CPU: {}}]
    assert backend.batch_policy == "mixed" and backend.same_bytes in (True, False)


def test_int8_on_cuda_is_a_notice(load, tiny, cuda, caplog, tmp_path):
    model = onnx.load(tiny.folder / "model.onnx")
    static_int8(model, tmp_path)
    onnx.save(model, tmp_path / "int8.onnx")
    load(tmp_path / "int8.onnx", dtype="int8")
    assert f"int8 gains nothing in {CUDA}" in caplog.text and "--dtype=fp16" in caplog.text


@pytest.mark.parametrize("batch_tokens, most", [(None, 256), (4, 1), (800, 100)])
def test_tensorrt_has_cuda_behind_it_engines_for_every_batch_and_a_cache(machine, monkeypatch, batch_tokens, most):
    machine(TENSORRT, CUDA)
    monkeypatch.setenv(WANTED, TENSORRT)
    use = onnxruntime_SUT.providers()
    assert use == [TENSORRT, CUDA, CPU]
    inputs = tuple(GraphTensor(name, "int64", (None, None)) for name in ("a", "b", "c"))
    signature = GraphSignature(inputs, ("x", "y"), None, None, None, "fp32", False)
    options = RunOptions(dtype="fp16", batch_tokens=batch_tokens)
    Path("model.onnx").write_text("a model")
    found, cuda, cpu = onnxruntime_SUT.provider_options(use, "model.onnx", signature, options)
    assert found["trt_profile_min_shapes"] == "a:1x1,b:1x1,c:1x1"
    assert found["trt_profile_max_shapes"] == f"a:{most}x384,b:{most}x384,c:{most}x384"
    assert found["trt_profile_opt_shapes"] == "a:{0}x192,b:{0}x192,c:{0}x192".format(min(8, most))
    assert (found["trt_engine_cache_enable"], found["trt_timing_cache_enable"]) == ("1", "1")
    engines = f"build/cache/tensorrt/{onnxruntime_SUT.cache_name('model.onnx')}"
    assert found["trt_engine_cache_path"] == engines and Path(engines).is_dir()
    assert (found["trt_fp16_enable"], cuda["use_tf32"], cpu) == ("1", "0", {})
    fixed = GraphSignature(inputs, ("x", "y"), 1, 384, None, "fp32", False)
    assert not any("profile" in name for name in onnxruntime_SUT.provider_options(use, "model.onnx", fixed, options)[0])


def test_fp16_is_a_copy_that_onnx_runtimes_optimizer_makes_once(load, tiny, tmp_path, monkeypatch):
    """The weights are in fp16, the logits in fp32. On the CPU, ONNX Runtime computes what has no kernel in fp32."""
    monkeypatch.chdir(tmp_path)
    source = str(tiny.folder / "model.onnx")
    path = onnxruntime_SUT.fp16_model(source)
    model = onnx.load(path)
    large = {tensor.data_type for tensor in model.graph.initializer if np.prod(tensor.dims) > 1000}
    assert large == {onnx.TensorProto.FLOAT16}
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {onnx.TensorProto.FLOAT}
    batch = random_batch(90, 384)
    backend = load(tmp_path / path, dtype="fp16")
    assert backend.dtype == "fp16"
    found, expected = (predict(one, batch) for one in (backend, load(source)))
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    stamp = (tmp_path / path).stat().st_mtime_ns
    assert onnxruntime_SUT.fp16_model(source) == path and (tmp_path / path).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_only_fp16_on_a_gpu_runs_the_copy(load, tiny, cuda, monkeypatch, dtype):
    copied = []
    monkeypatch.setattr(onnxruntime_SUT, "fp16_model", lambda path: copied.append(path) or path)
    load(tiny.folder / "model.onnx", dtype=dtype)
    assert copied == ([str(tiny.folder / "model.onnx")] if dtype == "fp16" else [])


def test_fp16_on_a_cpu_runs_the_fp32_file_with_a_notice(load, tiny, machine, caplog):
    machine(found=())
    backend = load(tiny.folder / "model.onnx", dtype="fp16")
    assert "the model is fp32, not fp16; it runs as fp32" in caplog.text
    batch = random_batch(30)
    assert predict(backend, batch).tobytes() == predict(load(tiny.folder / "model.onnx"), batch).tobytes()
