"""The Ray backend: copies of another backend as actors on the nodes of a Ray cluster, a batch to whichever is free.

    python3 run.py --backend=ray …                          PyTorch, on a local cluster that ends with the run
    RAY_ADDRESS=HOST:6379 python3 run.py --backend=ray …    on the cluster with that head; this machine is a node of it
    python3 run.py --backend=ray:onnxruntime …              another backend

One actor runs on each GPU, or where there is none one on each node, with all of its cores; MLC_MAX_NUM_THREADS=N makes
it one on every N cores. The driver alone needs the model's files: Ray carries them to each node, once.
"""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

# Ray reads these when it is imported. The name notwithstanding, the first is for every system: a local cluster listens on
# 127.0.0.1 only. The second is how long the head may be gone before the run ends, in place of a minute.
if not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import config
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from pytorch_SUT import int8_ranges, model_files
from squad_QSL import Batch

if TYPE_CHECKING:  # not on the nodes: it needs LoadGen, which runs on the driver alone
    from squad_SUT import Backend

TRIES = 3  # how often a batch is run when its actor is lost
ANSWER_S = 10  # until a cluster must have answered
START_S = 60  # until an actor's process must have started; the model's way to it takes what it takes
CALLS = 2  # batches an actor has at once: one that it runs and one that is on its way

Place = tuple[str, int | None]  # as `places` gives it

# What the driver's environment tells the actors' backends.
VARIABLES = ("MLC_MAX_NUM_THREADS", "OMP_NUM_THREADS", "ONNXRUNTIME_PREFERRED_EXECUTION_PROVIDER",
             "TF_INTER_OP_PARALLELISM_THREADS", "TF_INTRA_OP_PARALLELISM_THREADS", "USE_GPU")


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one. Raises UserError."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # By a process of its own: `ray.init` would try for minutes, and nothing could stop it.
        status = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        try:
            subprocess.run(status, check=True, capture_output=True, text=True, timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there; give HOST:PORT of its head, or "
                            "unset RAY_ADDRESS to run on this machine") from None
        except subprocess.CalledProcessError as error:
            raise UserError(f"RAY_ADDRESS={address}: {last_line(error.stderr)}") from None
    # The actors get this project's code from here, and need only its packages.
    code = {"working_dir": os.path.dirname(os.path.abspath(__file__)), "excludes": ["/??*", "!/*.py"]}
    try:
        ray.init(address=address or "local", runtime_env=code, include_dashboard=False, log_to_driver=False,
                 logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001 - Ray has many
        raise UserError(f"RAY_ADDRESS={address or ''}: Ray cannot start ({last_line(error)})") from None


def last_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def places() -> list[Place]:
    """Where actors belong: [(node's id, cores, or None for one GPU)]. Raises UserError where there is no place."""
    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus: list[Place] = [(node, None) for node, has in nodes if config.use_gpu()
                         for _ in range(int(has.get("GPU", 0)))]
    wanted = config.env_threads("MLC_MAX_NUM_THREADS")
    cores: list[Place] = [(node, wanted or int(has["CPU"])) for node, has in nodes if has.get("CPU", 0) >= 1
                          for _ in range(int(has["CPU"]) // wanted if wanted else 1)]
    if not gpus and not cores:
        raise UserError(f"the Ray cluster's {len(nodes)} nodes have no {wanted or 1} cores for an actor; start nodes "
                        "with more, or set MLC_MAX_NUM_THREADS to fewer")
    return gpus or cores


def read_files(model: str) -> tuple[dict[str, np.ndarray], str]:
    """The files of `model` (as in pytorch_SUT.read_weights) and its path among them: {path: uint8 array}, path.

    Raises UserError where one cannot be read.
    """
    name = os.path.basename(os.path.abspath(model))
    folder = name if os.path.isdir(model) else ""
    try:
        return {os.path.join(folder, os.path.basename(path)): np.fromfile(path, np.uint8)
                for path in model_files(model)}, name
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read the model ({error.strerror}); `make setup` fetches BERT-Large, "
                        "ML_MODEL_FILE_WITH_PATH names another") from None


class Actor:
    """A backend on a node of the cluster."""

    def __init__(self, cores: int | None, variables: dict[str, str]) -> None:
        """`cores` is how many are the actor's own, None on a GPU; `variables` are the driver's, {name: value}."""
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's guess; a framework that has the whole machine knows better
        os.environ.update(variables)
        if cores and cores < (os.cpu_count() or 1):
            os.environ["MLC_MAX_NUM_THREADS"] = str(cores)

    def load(self, kind: "Callable[[argparse.Namespace], Backend]", args: argparse.Namespace, model: str,
             files: dict[str, np.ndarray]) -> tuple[str, int, str]:
        """Make the backend `kind(args)` of a model of `read_files`, and run it once. Returns (name, vocab_size, together)."""
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for path, data in files.items():
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                data.tofile(path)
            os.environ["ML_MODEL_FILE_WITH_PATH"] = model
            self.backend = kind(args)
        zeros, ones = np.zeros((1, MAX_SEQ_LENGTH), np.int32), np.ones((1, MAX_SEQ_LENGTH), np.int32)
        self.backend.predict(Batch(zeros, ones, zeros, ones.sum(1, np.int32)))  # the first one takes longer
        return self.backend.name, self.backend.vocab_size, self.backend.together

    def predict(self, batch: Batch) -> np.ndarray:
        return self.backend.predict(batch)


class RayBackend:
    """A backend whose batches run on actors of a Ray cluster, in calls of several threads."""

    def __init__(self, backend: str, kind: "Callable[[argparse.Namespace], Backend]",
                 args: argparse.Namespace) -> None:
        """The actors run the backend of run.py's name `backend` and class `kind`; `args` are run.py's.

        Raises UserError where cluster or model cannot be used.
        """
        model = config.model(backend, args.dtype)
        files, name = read_files(model)
        if (backend, args.dtype) == ("pytorch", "int8"):
            args.int8_ranges = int8_ranges(model)  # here, once: the nodes have no data set
        connect()
        self.load = kind, args, name, ray.put(files)
        self.changed = threading.Condition()  # guards the three that follow
        self.calls: dict[ray.actor.ActorHandle, int] = {}  # actor: how many batches it has
        self.homes: dict[ray.actor.ActorHandle, Place] = {}  # actor: its place
        self.starting = 0  # how many are being replaced
        homes = places()
        told = self.start(homes)
        if len(told) > 1:
            raise UserError(f"the Ray cluster's nodes would run different things: {'; '.join(sorted(map(str, told)))}; "
                            "give them the same packages and devices")
        (name, self.vocab_size, self.together), = told
        self.workers = CALLS * len(homes)
        self.name = f"Ray {ray.__version__}, {len(homes)} actors on {len({node for node, _ in homes})} nodes: {name}"

    def start(self, homes: list[Place]) -> set[tuple[str, int, str]]:
        """Add an actor in each of `homes` (of `places`); returns the set of what they tell. Raises UserError."""
        variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        actors = {}
        for node, cores in homes:
            actor = ray.remote(Actor).options(
                num_cpus=cores or 0, num_gpus=0 if cores else 1,
                enable_task_events=False,  # for Ray's dashboard; 3.7 KB a call stay in memory, up to 100,000 calls
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(cores, variables)
            actors[actor] = node, cores
        try:
            _, late = ray.wait([actor.__ray_ready__.remote() for actor in actors], num_returns=len(actors),
                               timeout=START_S)
            if late:
                free = ", ".join(f"{ray.available_resources().get(name, 0):g} of {count:g} {name}s"
                                 for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU"))
                raise UserError(f"{len(late)} of {len(actors)} Ray actors did not start within {START_S} s; free are "
                                f"{free}: end what else runs on the cluster, or add nodes")
            told = set(ray.get([actor.load.remote(*self.load) for actor in actors]))
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UserError(f"a Ray actor cannot start: {last_line(error)}") from None
        with self.changed:
            self.homes.update(actors)
            self.calls.update(dict.fromkeys(actors, 0))
        return told

    def predict(self, batch: Batch) -> np.ndarray:
        """The logits of a `squad_QSL.Batch`, float32 (tokens, 2)."""
        left = TRIES
        while True:
            left -= 1
            with self.changed:
                self.changed.wait_for(lambda: self.calls or not self.starting)
                if not self.calls:
                    raise UserError("every Ray actor is lost; their logs are in Ray's folder of each node")
                actor = min(self.calls, key=self.calls.__getitem__)
                self.calls[actor] += 1
            try:
                logits: np.ndarray = ray.get(actor.predict.remote(batch))
                return logits
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                if not left:
                    raise UserError(f"a batch of {len(batch)} samples lost its Ray actor {TRIES} times, the last time "
                                    f"by {type(error).__name__}; the actors' logs are in Ray's folder of each node") \
                        from error
                self.replace(actor, error)
            finally:
                with self.changed:
                    if actor in self.calls:
                        self.calls[actor] -= 1

    def replace(self, actor: ray.actor.ActorHandle, error: RayError) -> None:
        """Start another in place of a lost actor, unless another thread does; where it cannot, go on without."""
        with self.changed:
            if self.calls.pop(actor, None) is None:
                return
            self.starting += 1
        # print would write the line's end by itself, and another thread's line in between
        sys.stderr.write(f"notice: a Ray actor is lost ({type(error).__name__}); its batches run again\n")
        try:
            ray.kill(actor)
            self.start([self.homes.pop(actor)])
        except UserError as reason:
            sys.stderr.write(f"notice: {reason}; going on with {len(self.calls)} actors\n")
        finally:
            with self.changed:
                self.starting -= 1
                self.changed.notify_all()

    def close(self) -> None:
        """Leave the cluster; end a local one. What `predict` still does in other threads stands still from now on."""
        self.changed.acquire()  # for good: Ray ends the process of whoever calls it after its end
        ray.shutdown()
