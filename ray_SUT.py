"""Run copies of another backend on a Ray cluster, as actors; the one with the fewest batches gets the next.

    python3 run.py --backend=ray …                          PyTorch, on a local cluster that ends with the run
    RAY_ADDRESS=HOST:6379 python3 run.py --backend=ray …    on the cluster with that head; this machine is a node of it
    python3 run.py --backend=ray:onnxruntime …              another backend

One actor runs on each GPU or, if the cluster has none, one on each node with all of its cores; MLC_MAX_NUM_THREADS=N
makes it one on every N cores. Only the driver needs the model's files: Ray sends them to each node once.
"""

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

# Ray reads these when it is imported: a local cluster listens on 127.0.0.1 only (on every operating system) and starts
# no process on each core beside the actors, a run ends 10 s after the head is gone, instead of a minute, and a call
# after `ray.shutdown` starts no other cluster.
if not os.environ.get("RAY_ADDRESS"):
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import config
from backends import Backend, BatchPolicy, RunOptions
from config import UserError
from create_squad_data import MAX_SEQ_LENGTH
from models.model_files import model_files
from squad_QSL import Batch

CLUSTER_S = 10  # time in which a cluster must answer
GPU_CALLS = 2  # at once in an actor on a GPU, so that a batch is there when the one before it ends
START_S = 60  # time in which an actor's process must start; sending and loading the model has no fixed limit

Placement = tuple[str, int | None]  # a node's id, and the cores of an actor there or None for one GPU


class Description(NamedTuple):
    """What an actor's backend is."""

    name: str
    vocab_size: int | None
    batch_policy: BatchPolicy
    batch_tokens: int
    in_flight: int
    dtype: str | None


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, or start a local one. Raises UserError."""
    if address := os.environ.get("RAY_ADDRESS"):
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        try:  # in a process, which can be stopped; `ray.init` would try for minutes
            status = subprocess.run(command, check=False, capture_output=True, text=True, timeout=CLUSTER_S)
            problem = config.last_line(status.stderr) if status.returncode else ""
        except subprocess.TimeoutExpired:
            problem = "no Ray cluster answers there"
        if problem:
            raise UserError(f"RAY_ADDRESS={address}: {problem}; give HOST:PORT of a cluster's head, or unset it")
    # The nodes need only the packages: they get the scripts of the root and of models/ from here.
    code = {"working_dir": config.ROOT, "excludes": ["/??*", "!/*.py", "!/models", "!/models/*.py", "!/models/*.cpp"]}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address or "local", runtime_env=code, **quiet)
    except Exception as error:  # Ray raises many types
        raise UserError(f"RAY_ADDRESS={address or ''}: Ray cannot start ({config.last_line(error)})") from None


def find_placements() -> list[Placement]:
    """Return the placements of all actors. Raises UserError if the cluster has no room for one."""
    threads = config.thread_limit("MLC_MAX_NUM_THREADS")
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    gpus: list[Placement] = [(node, None) for node, has in nodes.items() for _ in range(int(has.get("GPU", 0)))]
    if gpus and config.use_gpu():
        return gpus
    placements: list[Placement] = []
    for node, has in nodes.items():
        available = int(has.get("CPU", 0))
        each = threads or max(available, 1)
        placements += [(node, each)] * (available // each)
    if not placements:
        raise UserError(f"no Ray node has {threads or 1} cores; add larger nodes, or lower MLC_MAX_NUM_THREADS")
    return placements


class Actor:
    """Hold a copy of a backend on a node; set `variables` before the arguments of `load` import the framework."""

    def __init__(self, cores: int | None, variables: dict[str, str]) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray guesses it; a framework that has the whole machine knows better
        os.environ.update(variables)
        if cores and cores < (os.cpu_count() or 1):
            os.environ["MLC_MAX_NUM_THREADS"] = str(cores)

    def load(self, make_backend: Callable[[], Backend], files: dict[str, np.ndarray], model: str) -> Description:
        """Make the backend with the model's files, {name: uint8 array}, and warm it up."""
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # so that messages have the file's own name
            try:
                for name, data in files.items():
                    data.tofile(name)
                os.environ["ML_MODEL_FILE_WITH_PATH"] = model
                self.backend = make_backend()
            finally:
                os.chdir(before)
        zeros, ones = np.zeros((1, MAX_SEQ_LENGTH), np.int32), np.ones((1, MAX_SEQ_LENGTH), np.int32)
        self.backend.predict(Batch(zeros, ones, zeros, ones.sum(1, np.int32)))
        self.turns = threading.Semaphore(self.backend.concurrency)
        values = (getattr(self.backend, name) for name in Description._fields)
        return Description(*values)

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of a batch, float32 (tokens, 2)."""
        with self.turns:
            return self.backend.predict(batch)


class RayBackend(Backend):
    """Run batches on the actors of a Ray cluster; replace lost actors and run their batches again. Raises UserError."""

    def __init__(self, backend_name: str, backend_class: type[Backend], options: RunOptions) -> None:
        model = config.model_path(backend_name, options.dtype)
        try:
            config_file, weights, parts = model_files(model)
            files = {os.path.basename(path): np.fromfile(path, np.uint8) for path in (config_file, weights, *parts)}
        except OSError as error:
            remedy = "`make setup` fetches BERT-Large, ML_MODEL_FILE_WITH_PATH names another"
            raise UserError(f"{error.filename}: cannot read the model ({error.strerror}); {remedy}") from None
        path_on_node = os.curdir if os.path.isdir(model) else os.path.basename(model)
        prepared = backend_class.prepare(options)  # here, because the nodes have no data set
        make_backend = partial(backend_class, options, **prepared)  # type: ignore[call-arg] # see Backend
        connect()
        self.load_arguments = make_backend, ray.put(files), path_on_node
        self.changed = threading.Condition()  # guards the attributes that follow
        self.batches: dict[ray.actor.ActorHandle, int] = {}  # how many each living actor has
        self.actor_placement: dict[ray.actor.ActorHandle, Placement] = {}
        self.starting = 0  # lost actors whose replacements start
        self.closed = False  # then no thread calls Ray, which may end a process that calls it after `ray.shutdown`
        placements = find_placements()
        descriptions = self.start(placements)
        if len(descriptions) > 1:
            found = [tuple(description) for description in descriptions]
            raise UserError(f"the Ray cluster's nodes differ: {found}; give them the same packages and devices")
        (actor,) = descriptions
        self.vocab_size, self.batch_policy = actor.vocab_size, actor.batch_policy
        self.batch_tokens, self.in_flight = actor.batch_tokens, actor.in_flight
        self.model_path, self.dtype = model, actor.dtype
        self.concurrency = 2 * len(placements)  # for each actor a batch that runs and one that is on its way
        nodes = {node for node, _ in placements}
        self.name = f"Ray {ray.__version__}, {len(placements)} actors on {len(nodes)} nodes: {actor.name}"

    def start(self, placements: list[Placement]) -> set[Description]:
        """Start an actor in each placement, and return the set of their descriptions. Raises UserError."""
        variables = {name: os.environ[name] for name in config.COMPUTE_VARIABLES if name in os.environ}
        actors = {}
        with self.changed:
            if self.closed:
                raise UserError("the run has ended")
            for node, cores in placements:
                gpu = {"num_cpus": 0, "num_gpus": 1, "max_concurrency": GPU_CALLS}
                resources = {"num_cpus": cores, "num_gpus": 0} if cores else gpu
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                # Task events are for Ray's dashboard: 3.7 KB a call would stay in memory, up to 100,000 calls.
                remote = ray.remote(Actor).options(**resources, scheduling_strategy=here, enable_task_events=False)
                actors[remote.remote(cores, variables)] = node, cores
            started = [actor.__ray_ready__.remote() for actor in actors]
            loaded = [actor.load.remote(*self.load_arguments) for actor in actors]
        try:
            _, late = ray.wait(started, num_returns=len(actors), timeout=START_S)
            if late:
                free = ray.available_resources()
                units = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free"
                raise UserError(
                    f"{len(late)} of {len(actors)} Ray actors did not start in {START_S} s; {units}: end other work"
                )
            descriptions = set(ray.get(loaded))
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise UserError(f"a Ray actor cannot start: {config.last_line(error)}") from None
        with self.changed:
            self.actor_placement.update(actors)
            self.batches.update(dict.fromkeys(actors, 0))
        return descriptions

    def predict(self, batch: Batch) -> np.ndarray:
        """Return the logits of a batch, float32 (tokens, 2)."""
        tries = 0
        while True:
            tries += 1
            with self.changed:
                self.changed.wait_for(lambda: self.batches or not self.starting)
                if self.closed or not self.batches:
                    raise UserError("no Ray actor is left; their logs are in Ray's folder on each node")
                actor = min(self.batches, key=self.batches.__getitem__)
                self.batches[actor] += 1
                result = actor.predict.remote(batch)
            try:
                return np.asarray(ray.get(result))
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                reason = type(error).__name__
                if tries == 3:
                    problem = f"a batch of {len(batch)} samples lost its Ray actor {tries} times, last by {reason}"
                    raise UserError(f"{problem}; the actors' logs are in Ray's folder on each node") from error
                self.replace(actor, reason)
            finally:
                with self.changed:
                    if actor in self.batches:
                        self.batches[actor] -= 1

    def replace(self, actor: ray.actor.ActorHandle, reason: str) -> None:
        """Replace a lost actor, unless another thread does; if no other can start, the run continues without it."""
        with self.changed:
            if self.closed or self.batches.pop(actor, None) is None:
                return
            self.starting += 1
            placement = self.actor_placement.pop(actor)
            ray.kill(actor)
        config.notice(f"a Ray actor is lost ({reason}); its batches run again")
        try:
            self.start([placement])
        except UserError as error:
            config.notice(f"{error}; the run continues with {len(self.batches)} actors")
        finally:
            with self.changed:
                self.starting -= 1
                self.changed.notify_all()

    def close(self) -> None:
        """Leave the cluster; end a local one."""
        with self.changed:
            self.closed = True
        ray.shutdown()
