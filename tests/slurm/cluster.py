"""A real Slurm on one machine, for tests: login node and compute nodes in network namespaces.

`python -m tests.slurm.cluster sbatch ...` boots one, runs a command on its login node, waits for
the jobs and takes the cluster down. Root on Debian; nothing outside the namespaces is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "ip": "iproute2",
    "shellcheck": "shellcheck",
}
SUBNET = "10.231.77"
KILL_WAIT = 15  # seconds between SIGTERM and SIGKILL
GRACE = 20  # seconds that a preempted job is given

CONFIG = """
ClusterName=test
SlurmctldHost=login({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# The time that credentials live is also the least time before a requeued job starts again.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=10
SchedulerParameters=sched_interval=2,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
MinJobAge=3600
PartitionName=batch Nodes=ALL Default=YES PriorityTier=10 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""


class Cluster:
    """Two nodes of 8 claimed CPUs and 2 GPUs of no use each, on which root's jobs run."""

    def __init__(self, nodes: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.hosts = ["login", *self.nodes]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def up(self) -> None:
        """Start the daemons; return when a job has run on every node."""
        for name in ("munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        self._connect()
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        options = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        munged = ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *options]
        self.daemons["munged"] = subprocess.Popen(munged, stderr=subprocess.DEVNULL)
        self._wait_for("munged", lambda: (munge / "socket").exists())
        self.start("login")
        for node in self.nodes:
            self.start(node)
        self._wait_for("the nodes", lambda: self.states() == ["idle"] * len(self.nodes))
        everywhere = [f"--nodes={len(self.nodes)}", "--ntasks-per-node=1", "--immediate=20"]
        self.run("srun", *everywhere, "--time=1", "true")

    def start(self, host: str) -> None:
        """Start the daemon of a host, in the host's namespaces."""
        daemon = ["slurmctld"] if host == "login" else ["slurmd", "-N", host]
        own = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        command = ["unshare", "--uts", "--mount", "--propagation", "slave", "sh", "-c", own, "sh"]
        command += [host, str(self.folder / f"hosts.{host}"), *daemon, "-D"]
        with (self.folder / f"{host}.out").open("ab") as output:
            self.daemons[host] = subprocess.Popen(
                [*self._net(host), *command],
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def command(self, host: str, *command: str) -> list[str]:
        """Return the command line that runs `command` as if on `host`."""
        spaces = ["--uts", "--mount", "--net", f"--wdns={ROOT}"]
        return ["nsenter", "--target", str(self.daemons[host].pid), *spaces, "--", *command]

    def run(self, *command: str, host: str = "login", check: bool = True) -> str:
        """Return what `command` prints on `host`; CalledProcessError with all of it if it fails."""
        result = subprocess.run(
            self.command(host, *command),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    def states(self) -> list[str]:
        """Return the state of each node."""
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split()

    def processes(self, node: str) -> dict[int, str]:
        """Return the processes of a node and their command lines, but for its daemon's own."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._name(node)], capture_output=True, text=True, check=True
        )
        found = {}
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if line and not line.startswith("slurmd "):
                    found[pid] = line
        return found

    def down(self) -> None:
        """End the jobs, then the daemons, then whatever is left in the namespaces."""
        for host in reversed(self.hosts):
            if daemon := self.daemons.get(host):
                daemon.send_signal(signal.SIGTERM)
        for host, daemon in self.daemons.items():
            if host == "munged":
                daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in self.processes(host):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                subprocess.run(["ip", "netns", "del", self._name(host)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        place = {"folder": self.folder, "subnet": SUBNET, "kill_wait": KILL_WAIT, "grace": GRACE}
        lines = [CONFIG.format(**place)]
        for number, node in enumerate(self.nodes):
            address = f"NodeAddr={SUBNET}.{10 + number} Port=6818"
            size = "CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            lines.append(f"NodeName={node} NodeHostname={node} {address} {size}")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # Nodes without cgroups; versions before 23 know no other word for that.
        old = " 22." in subprocess.check_output(["slurmd", "-V"], text=True)
        plugin = "cgroup/v1" if old else "disabled"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        gpus = [self.folder / f"gpu{number}" for number in range(2)]
        for gpu in gpus:  # device files, or Slurm would not hand them out; these are /dev/null
            os.mknod(gpu, 0o600 | 0o020000, os.makedev(1, 3))
        names = f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-1]\n"
        (self.folder / "gres.conf").write_text(names)
        # Nodes find themselves and the controller by name, and not each other.
        for host in self.hosts:
            known = [h for h in self.hosts if h in (host, "login") or host == "login"]
            table = ["127.0.0.1 localhost", *(f"{self._address(h)} {h}" for h in known)]
            (self.folder / f"hosts.{host}").write_text("\n".join(table) + "\n")

    def _connect(self) -> None:
        """Make a namespace for each host, joined by a bridge in that of the login node."""
        login = self._name("login")
        for host in self.hosts:
            name = self._name(host)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", login, "link", "add", "bridge", "type", "bridge")
        _ip("-n", login, "addr", "add", f"{SUBNET}.1/24", "dev", "bridge")
        _ip("-n", login, "link", "set", "bridge", "up")
        for node in self.nodes:
            name = self._name(node)
            peer = ["peer", "name", "eth0", "netns", name]
            _ip("link", "add", node, "netns", login, "type", "veth", *peer)
            _ip("-n", login, "link", "set", node, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self._address(node)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _name(self, host: str) -> str:
        return f"{self.folder.name}-{host}"

    def _net(self, host: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._name(host)}"]

    def _address(self, host: str) -> str:
        return f"{SUBNET}.{1 if host == 'login' else 10 + self.nodes.index(host)}"

    def _wait_for(self, what: str, ready: object, seconds: float = 30) -> None:
        assert callable(ready)
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = [p.read_text(errors="replace")[-2000:] for p in self.folder.glob("*.log")]
                raise RuntimeError(f"{what} did not come up in {seconds} s:\n" + "\n".join(logs))
            time.sleep(0.1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def install() -> None:
    """Install what is missing of Slurm, by Debian's packages."""
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool)]
    if missing and not _apt("install", "--no-install-recommends", *missing):
        _apt("update")
        assert _apt("install", "--no-install-recommends", *missing), f"can't install {missing}"


def _apt(*arguments: str) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-y", "-qq", *arguments]
    return not subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode


@contextlib.contextmanager
def booted() -> Iterator[Cluster]:
    """Give a cluster that is up, and take it down."""
    install()
    cluster = Cluster()
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


if __name__ == "__main__":
    with booted() as mine:
        print(mine.run(*sys.argv[1:], check=False), end="")
        while mine.run("squeue", "-h"):
            time.sleep(1)
