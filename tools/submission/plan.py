"""Read the plan of a submission and describe the system that it runs on."""

import glob
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import version
from typing import Any

from backends import BACKENDS
from config import UserError, local_model, printable
from files import read_toml
from models import gpus
from tools.submission.check import BENCHMARKS, FIELDS, VERSIONS

Plan = dict[str, Any]  # the values of plan.toml, all texts but "system", which is a dict of texts
CHOICES = {"version": VERSIONS, "division": ("open", "closed"), "benchmark": BENCHMARKS, "backend": list(BACKENDS)}
FILES = ("model", "dataset", "vocab", "user_conf")
FOLDERS = ("submitter", "system_name")  # become names of folders
NAMES = (*CHOICES, *FILES, *FOLDERS, "dtype", "retraining", "weight_transformations")  # must not be empty


def read_plan(path: str) -> Plan:
    """Return the plan in the TOML file `path`. Raises UserError, which names everything that is wrong."""
    plan = read_toml(path, "the plan", "copy tools/submission/plan.toml and fill it in")
    system = plan.setdefault("system", {})
    if not isinstance(system, dict):
        raise UserError(f"{path}: system must be a table, [system]")
    required = (*NAMES, "calibration") if plan.get("dtype") == "int8" else NAMES
    faults = [f"{name} is missing or empty" for name in required if not plan.get(name)]
    for name, value in plan.items():
        if name not in (*NAMES, "calibration", "system"):
            faults.append(f"{name} is unknown")
        elif name != "system" and not isinstance(value, str):
            faults.append(f"{name} must be text in quotes")
        elif value and value not in CHOICES.get(name, [value]):
            faults.append(f"{name} is {value!r}, expected {' or '.join(CHOICES[name])}")
        elif value and name in FOLDERS and not re.fullmatch(r"\w[\w.+-]{0,99}", value, re.ASCII):
            faults.append(f"{name} is {value!r}; only letters, digits and . + - _ are allowed, at most 100")
        elif value and name in (*FILES, "calibration") and not os.path.exists(local_model(value)):
            faults.append(f"{name} is {value}: no such file")
    known, described = FIELDS["required"] + FIELDS["optional"], describe_system(plan)
    faults += [f"{name} in [system] is unknown" for name in system if name not in known]
    faults += [f"{name} must be text in quotes" for name in system if not isinstance(system[name], str)]
    if empty := [name for name in FIELDS["required"] if name not in NAMES and not described[name]]:
        faults.append(f"[system] lacks {', '.join(empty)}; write N/A if a field does not apply")
    if faults:
        raise UserError(printable(f"{path}: {'; '.join(faults)}"))
    return plan


def describe_machine() -> dict[str, str]:
    """Return the fields of a system's description that this machine reports."""
    cpu = dict(re.findall(r"^ *(.+?): +(.+?) *$", subprocess.getoutput("LC_ALL=C lscpu"), re.MULTILINE))
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = platform.system()
    fields = {
        "number_of_nodes": "1",
        "host_processor_model_name": cpu.get("Model name"),
        "host_processors_per_node": cpu.get("Socket(s)"),
        "host_processor_core_count": cpu.get("Core(s) per socket"),
        "host_processor_frequency": cpu.get("CPU max MHz") and f"{cpu['CPU max MHz']} MHz",
        "host_processor_caches": ", ".join(f"{name[:-6]} {cpu[name]}" for name in cpu if name.endswith(" cache")),
        "host_memory_capacity": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "host_storage_capacity": f"{shutil.disk_usage('.').total / 2**30:.0f} GiB",
        "host_network_card_count": str(len(glob.glob("/sys/class/net/*/device"))),  # virtual ones have no device
        "operating_system": f"{system}, kernel {platform.release()}",
        "other_software_stack": f"Python {platform.python_version()}, LoadGen {version('mlcommons-loadgen')}",
    }
    return {name: value for name, value in fields.items() if value}


def describe_system(plan: Plan, backend: str = "known after the runs, CPU") -> dict[str, Any]:
    """Return the system's description; `backend` is the name that the runs recorded: framework, device, dtype."""
    framework, device = f"{backend}, CPU".split(", ")[:2]
    fields = dict.fromkeys(sorted(FIELDS["required"] + FIELDS["optional"]), "") | {"framework": framework}
    if device.lower().startswith("cpu"):
        fields |= {name: "N/A" for name in FIELDS["required"] if name.startswith("accelerator_")}
        fields["accelerators_per_node"] = "0"
    elif gpu := gpus.parse_description(device):
        fields |= {"accelerators_per_node": gpu["count"], "accelerator_model_name": gpu["model"]}
        fields |= {"accelerator_memory_capacity": gpu["memory"]}
        fields["sw_notes"] = f"NVIDIA driver {gpu['driver']}, CUDA {gpu['cuda']}"
    names = {name: plan.get(name) for name in ("division", "submitter", "system_name")}
    return {**fields, **describe_machine(), **plan["system"], **names}
