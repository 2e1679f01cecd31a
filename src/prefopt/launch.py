"""Starting a command on several processes through `accelerate launch`, with a packaged accelerate config."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from prefopt.arguments import masked
from prefopt.files import read_yaml
from prefopt.pages import printable
from prefopt.recipes import locate
from prefopt.recipes.source import Setting

# The launcher's settings; they may stand in a recipe, too, as with TRL's command line.
LAUNCH_KEYS = frozenset(
    {
        "accelerate_config",
        "num_processes",
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "gpu_ids",
    }
)
# Asked for at the first import: once a launcher has ended, its processes have another parent.
PARENT = os.getppid()
PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHER_ENDED = 1  # exit status of a process whose launcher has ended
USER_MISTAKE = 2  # exit status of a process that has printed one line about it


def is_launched() -> bool:
    """Return whether this process was started by a launcher (accelerate, torchrun, deepspeed)."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def rank() -> int:
    """Return this process's number among all, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_launcher() -> None:
    """Let this process end as soon as its launcher does; without a launcher nothing changes.

    Ranks that outlive a killed launcher would train on, and write into the folder in which the run has been started
    again. On Linux the kernel kills them, even in the middle of a collective; `check_launcher` serves elsewhere.
    """
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    check_launcher()  # it may have ended before the signal was asked for


def check_launcher() -> None:
    """End this process at once if its launcher has ended."""
    if is_launched() and os.getppid() != PARENT:
        print(
            f"prefopt: the launcher (process {PARENT}) has ended; so does rank {rank()}.", file=sys.stderr, flush=True
        )
        os._exit(LAUNCHER_ENDED)


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status.

    Under a launcher, run atexit hooks and end without tearing the interpreter down: threads of libraries (connections,
    autograd) sometimes abort during it and would fail a finished run.
    """
    if status or not is_launched():
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def print_on_main(message: str, stream: Any = None) -> None:
    """Print one line from the first process, on stderr by default."""
    if rank() == 0:
        print(f"prefopt: {printable(masked(message))}", file=stream or sys.stderr, flush=True)


def split_launch_settings(settings: list[Setting]) -> tuple[dict[str, str], list[Setting]]:
    """Take the launcher's settings, as text, out of all settings.

    Raises:
        ValueError: launcher settings on the command line of a process that a launcher has already started.
    """
    launch = [setting for setting in settings if setting.key in LAUNCH_KEYS]
    rest = [setting for setting in settings if setting.key not in LAUNCH_KEYS]
    if is_launched():
        typed = [setting.key for setting in launch if setting.place == "the command line"]
        if typed:
            raise ValueError(
                f"--{typed[0]}: a launcher has already started this process; give it to the launcher instead."
            )
        return {}, rest
    for setting in launch:
        if not isinstance(setting.value, (str, int)) or setting.bare:
            raise ValueError(f"{setting.place}: {setting.key} needs one value.")
    return {setting.key: str(setting.value) for setting in launch}, rest


def without_launch_words(words: list[str]) -> list[str]:
    """Return command-line words without the launcher's keys and their values, for the processes that it starts."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            dropping = name.replace("-", "_") in LAUNCH_KEYS
            if dropping and equals:
                dropping = False
                continue
        if not dropping:
            kept.append(word)
    return kept


def launch_words(settings: dict[str, str]) -> list[str]:
    """Return the words for `accelerate launch`: the config file found by name, then every other key as a flag.

    Raises:
        ValueError: a number that is not one, processes that nodes or a config cannot share out, or an unknown
            accelerate config.
    """
    settings = dict(settings)
    for key in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        if key in settings and not settings[key].isdigit():
            raise ValueError(f"--{key} must be a whole number, found {settings[key]!r}.")
    for key in ("num_processes", "num_machines"):
        if settings.get(key) == "0":
            raise ValueError(f"--{key} must be at least 1.")
    if int(settings.get("num_processes", "0")) % int(settings.get("num_machines", "1")):
        raise ValueError(
            f"--num_processes counts the processes of all nodes: {settings['num_processes']} cannot be divided over "
            f"--num_machines {settings['num_machines']}."
        )
    several = int(settings.get("num_processes", "1")) > 1
    config = locate(settings.pop("accelerate_config", "multi_gpu" if several else "single_gpu"), "accelerate_configs")
    given = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return ["--config_file", str(config), *given, *_words_of_config(config, settings.get("num_processes"))]


def _words_of_config(config: Path, processes: str | None) -> list[str]:
    """Return flags for what a config file cannot hold: where a file beside it is, and how many copies of a model."""
    values, _ = read_yaml(config)
    if not isinstance(values, dict):
        return []  # accelerate says what is wrong with it
    words: list[str] = []
    file = (values.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if file is not None and not Path(file).exists() and (beside := config.parent / Path(file).name).exists():
        words += ["--deepspeed_config_file", str(beside)]
    shards = (values.get("parallelism_config") or {}).get("parallelism_config_dp_shard_size")
    if shards is not None and processes is not None:
        if int(processes) % shards:
            raise ValueError(
                f"--num_processes {processes}: {config.name} splits a model over {shards} processes "
                "(parallelism_config_dp_shard_size), so their number must be a multiple of that."
            )
        words += ["--parallelism_config_dp_replicate_size", str(int(processes) // shards)]
    return words


def launch(settings: dict[str, str], command: list[str]) -> int:
    """Run `python -m prefopt COMMAND` under `accelerate launch` and return the exit status.

    The processes report their own errors; the report of the launcher about them is not printed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args([*launch_words(settings), "--module", "prefopt", *command])
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values()) if error.failures else 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0
