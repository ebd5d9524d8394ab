"""A throw-away SLURM cluster (Debian's slurm-wlm 22.05) on the loopback interface, run as child processes.

    with SlurmBox(nodes=2) as box:  # about a second
        subprocess.run(["sbatch", ...], env=box.env)

When the block ends, everything started for it has ended too. From a shell: python tests/slurmbox.py [COMMAND ...]
runs COMMAND, by default bash, with the cluster up.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType

PACKAGES = "slurmctld slurmd slurm-client munge"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
PATH_WITH_DAEMONS = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
FREEZER = Path("/sys/fs/cgroup/freezer")
GPUS, CPUS, MEMORY_MB, KILL_WAIT = 4, 8, 1_024_000, 5

# MinJobAge keeps ended jobs visible; config_overrides makes slurmd believe in CPUs and memory this machine lacks.
CONFIGURATION = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
"""


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports, below the ephemeral range, that are free on loopback just now."""
    for _ in range(200):
        base = random.randrange(17_000, 32_000 - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(base, base + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base
    raise RuntimeError("no free ports")


class SlurmBox:
    """Partitions: ``preempt`` (default, requeued at once by) ``gpu``, and ``grace``, the same with a grace time of 60 s."""

    def __init__(self, nodes: int = 2, extra: str = "", files: Mapping[str, str] | None = None) -> None:
        """``extra`` goes into slurm.conf, ``files`` (name → text) lie beside it."""
        # Not pytest's tmp_path: munged wants o+x on every parent, and a socket's path has less than 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurmbox.", dir="/tmp"))
        self.folder.chmod(0o755)
        self.extra, self.files = extra, files or {}
        self.port = free_ports(12 + nodes)
        # The port makes them unique: cgroups are named after nodes, and two boxes must not end each other's jobs.
        self.nodes = [f"b{self.port}n{number + 1}" for number in range(nodes)]
        # As on real clusters: with cgroups a signal reaches a step's own tasks only. Others need no privilege.
        self.cgroups = os.geteuid() == 0 and os.access(FREEZER, os.W_OK)
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env = {**outside, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @staticmethod
    def missing() -> list[str]:
        """What of SLURM is not installed here."""
        return [tool for tool in TOOLS if not shutil.which(tool, path=PATH_WITH_DAEMONS)]

    def __enter__(self) -> SlurmBox:
        try:
            self.write_configuration()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """One of SLURM's commands, run against this cluster."""
        return subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=60)

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, or of an array's element such as 7_1."""
        words = self.run("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_state(self, job: str, states: str | Collection[str], timeout: float = 30) -> dict[str, str]:
        """Wait until the job is in (one of) ``states``; → what `show` says of it."""
        wanted = {states} if isinstance(states, str) else set(states)
        self.wait_until(lambda: self.show(job).get("JobState") in wanted, f"job {job} is {wanted}", timeout)
        return self.show(job)

    def rush(self, job: str) -> None:
        """Wait for a requeued job and spare it SLURM's delay of two minutes.

        A job that starts within the second of its requeue is refused by slurmd, hence now+2.
        """
        self.wait_state(job, "PENDING")
        assert self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2").returncode == 0

    def gpu_devices(self) -> str:
        """gres.conf's File=. SLURM exports CUDA_VISIBLE_DEVICES for character devices only."""
        folder = self.folder / "dev"
        folder.mkdir()
        try:
            for number in range(GPUS):
                os.mknod(folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # /dev/null again
        except OSError:
            return f"/dev/tty[0-{GPUS - 1}]"
        return f"{folder}/nvidia[0-{GPUS - 1}]"

    def write_configuration(self) -> None:
        """slurm.conf and what it names."""
        folder, nodes = self.folder, ",".join(self.nodes)
        for name in ("state", "run", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o711)  # munged refuses a socket's folder without o+x
        key = folder / "munge" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            host=host,
            port=self.port,
            user=getpass.getuser(),
            folder=folder,
            proctrack="cgroup" if self.cgroups else "pgid",
            kill_wait=KILL_WAIT,
        )
        for number, node in enumerate(self.nodes):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + 11 + number} CPUs={CPUS} "
                f"Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} "
                f"Gres=gpu:{GPUS}\n"
            )
        for settings in (
            "PartitionName=preempt Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
            "PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
            "PartitionName=gpu PriorityTier=10 PreemptMode=OFF",
        ):
            text += f"{settings} Nodes={nodes} DefaultTime=60 State=UP\n"
        (folder / "slurm.conf").write_text(text + self.extra)
        (folder / "gres.conf").write_text(f"Name=gpu File={self.gpu_devices()}\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n" if self.cgroups else "")
        for name, content in self.files.items():
            (folder / name).write_text(content)

    def start(self) -> None:
        """The daemons, in the foreground, so that they are our children; then wait for the nodes."""
        folder, munge = self.folder, self.folder / "munge"
        munged_options = {
            "--key-file": munge / "munge.key",
            "--socket": munge / "munge.sock",
            "--pid-file": folder / "run" / "munged.pid",
            "--log-file": folder / "log" / "munged.log",
            "--seed-file": munge / "seed",
            "--num-threads": 2,
        }
        self.spawn("munged", "--foreground", *(word for pair in munged_options.items() for word in pair))
        self.wait_until((munge / "munge.sock").exists, "munged listens")
        self.spawn("slurmctld", "-D", "-c", "-f", folder / "slurm.conf")
        for node in self.nodes:
            self.spawn("slurmd", "-D", "-N", node, "-f", folder / "slurm.conf")
        idle = ("sinfo", "-h", "-N", "-p", "preempt", "-t", "idle", "-o", "%N")
        self.wait_until(lambda: self.run(*idle).stdout.split() == self.nodes, "the nodes are idle")

    def spawn(self, daemon: str, *words: object) -> None:
        """One daemon; the kernel ends it should this process be killed."""
        command = [str(shutil.which(daemon, path=PATH_WITH_DAEMONS)), *map(str, words)]
        die_with_parent = ctypes.CDLL(None).prctl
        with (self.folder / "log" / f"{daemon}.out").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=self.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
            )
        self.daemons.append((daemon, process))

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
        """Wait for ``condition``, as long as every daemon lives."""
        end = time.monotonic() + seconds
        while not condition():
            dead = [(name, process.returncode) for name, process in self.daemons if process.poll() is not None]
            if dead:
                logs = "\n".join(path.read_text()[-1000:] for path in (self.folder / "log").iterdir())
                raise RuntimeError(f"SLURM's daemons ended: {dead}\n{logs}")
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {what}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, and clear away what jobs left behind."""
        if len(self.daemons) > 1 and all(process.poll() is None for _, process in self.daemons):
            self.run("scancel", "-f", "-u", getpass.getuser())
            end = time.monotonic() + KILL_WAIT + 8
            while self.run("squeue", "-h", "-t", "R,CG", "-o", "%i").stdout.strip() and time.monotonic() < end:
                time.sleep(0.1)
        for _, process in reversed(self.daemons):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        for pid in self.job_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.cgroups:  # slurmd leaves its empty cgroups; such a folder goes by rmdir alone
            for node in self.nodes:
                for cgroup, _, _ in os.walk(FREEZER / f"slurm_{node}", topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(cgroup)
        self.daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def job_processes(self) -> list[int]:
        """Processes that a job of this box started, found by the environment they were given."""
        found, ours = [], f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if ours in variables and any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables):
                    found.append(int(process.name))
        return [pid for pid in found if pid != os.getpid()]


def leave(number: int, frame: FrameType | None) -> None:
    """A signal handler: end as on an error, so that the ``with`` block stops the cluster."""
    sys.exit(128 + number)


if __name__ == "__main__":
    if SlurmBox.missing():
        sys.exit(f"missing: {', '.join(SlurmBox.missing())}; apt-get install -y --no-install-recommends {PACKAGES}")
    for wanted in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(wanted, leave)
    with SlurmBox() as box:
        print(f"SLURM_CONF={box.env['SLURM_CONF']} nodes={','.join(box.nodes)}", file=sys.stderr, flush=True)
        status = subprocess.run(sys.argv[1:] or ["bash"], env=box.env).returncode
    sys.exit(status)
