"""Starting a script on several CPU processes, and ending it as a machine's failure would."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

CONFIG = Path(__file__).resolve().parents[2] / "accelerate_configs" / "cpu_ddp_2ranks.yaml"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments, *, processes=2):
    """Start `python arguments...`, through accelerate where there are several processes; output in one pipe."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
        command += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_when(process, condition, *, timeout=120):
    """Kill `process` and all that it started, at once and without warning, as soon as `condition()` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill it never came"
        time.sleep(0.02)
    root = psutil.Process(process.pid)
    family = [*root.children(recursive=True), root]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)
    process.communicate()
