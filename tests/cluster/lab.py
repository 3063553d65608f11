"""Hosts that are Linux namespaces: each with its own network address, host name, processes, home and ssh server.

They are joined by one bridge that leads nowhere else. Needs root on Linux, iproute2, util-linux, openssh-server, rsync.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Host", "Lab", "missing", "wait_for"]

TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync", "mount")
SUBNET = "10.93.0"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{PATH}") is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    tried = subprocess.run(
        "ip netns add rtlab-probe && ip netns exec rtlab-probe unshare -m -p -u -i -f mount -t tmpfs none /mnt",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    subprocess.run(["ip", "netns", "del", "rtlab-probe"], capture_output=True)
    return f"namespaces are not to be had: {tried.stderr.strip()}" if tried.returncode else None


def wait_for(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what() if callable(what) else what}"
        time.sleep(0.1)


# What a host runs first: file systems of its own, then the ssh server, as the first process of the host.
BOOT = r"""
set -eu
mount -t proc proc /proc
hostname "$NAME"
for folder in $KEEP; do case "$folder" in
    /root/*|/tmp/*) mkdir -p "$DIR$folder"; mount --bind "$folder" "$DIR$folder" ;;
esac; done
mount --bind "$DIR/hosts" /etc/hosts
mount -t tmpfs -o size=4g shm /dev/shm
mount --bind "$DIR/run" /run
mount --rbind "$DIR/root" /root
mount --rbind "$DIR/tmp" /tmp
cd /
exec env -i HOME=/root PATH="$PATH" "$SSHD" -D -e -f /dev/null -p 22 -h /run/hostkey \
    -o PidFile=none -o UsePAM=no -o PasswordAuthentication=no -o StrictModes=no -o MaxStartups=100 -o "SetEnv=$SETENV"
"""


class Host:
    """One machine of the lab."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self.folder = lab.folder / name
        self.process: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Start it; its files are as they were when it lost power."""
        assert self.process is None, f"{self.name} is running"
        self.heal()
        run, tmp = self.folder / "run", self.folder / "tmp"
        for folder in (self.folder / "root" / ".ssh", run / "sshd", tmp):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "root").chmod(0o700)
        tmp.chmod(0o1777)
        shutil.copy(self.lab.folder / "key.pub", self.folder / "root" / ".ssh" / "authorized_keys")
        shutil.copy(self.lab.folder / "hostkey", run / "hostkey")
        (run / "hostkey").chmod(0o600)
        # as Debian does it: on itself, a host's name means a loopback address, which others cannot reach
        others = "".join(f"{host.address} {host.name}\n" for host in self.lab.all if host is not self)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}")
        environment = {
            "NAME": self.name,
            "DIR": str(self.folder),
            "KEEP": " ".join(map(str, self.lab.keep)),
            "PATH": PATH,
            "SSHD": str(shutil.which("sshd", path=PATH)),
            "SETENV": " ".join(f"{name}={value}" for name, value in self.lab.environment.items()),
        }
        command = ["ip", "netns", "exec", self.namespace, "unshare", "-m", "-p", "-u", "-i", "-f", "--kill-child"]
        with (self.folder / "boot.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--propagation", "private", "bash", "-c", BOOT],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(self._answers, 20, f"{self.name} starts")

    @property
    def namespace(self) -> str:
        return f"{self.lab.prefix}-{self.name}"

    def _inside(self, command: str) -> list[str]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert children, f"{self.name} is not running: {(self.folder / 'boot.log').read_text()}"
        given = [f"{name}={value}" for name, value in self.lab.environment.items()]
        return [
            "nsenter", "-t", children[0], "-m", "-p", "-n", "-u", "-i", "env", "-i", "HOME=/root", "USER=root",
            "TERM=dumb", "LANG=C.UTF-8", f"PATH={PATH}", *given, "bash", "-lc", f". ~/.bashrc 2>/dev/null; {command}",
        ]  # fmt: skip

    def _answers(self) -> bool:
        try:
            return self.sh("true", timeout=5, check=False).returncode == 0
        except subprocess.TimeoutExpired:  # a shell that entered in mid-boot hung
            return False

    def sh(self, command: str, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a login shell of this host."""
        try:
            done = subprocess.run(
                self._inside(command), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
            )
        except AssertionError:
            if check:
                raise
            return subprocess.CompletedProcess([], 1)
        assert not check or done.returncode == 0, f"{self.name}$ {command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command in a login shell of this host; its output goes to `log`."""
        with log.open("wb") as out:
            return subprocess.Popen(
                self._inside(command), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Pull its network cable."""
        subprocess.run(["ip", "-n", self.lab.switch, "link", "set", f"p-{self.name}", "down"], check=True)

    def heal(self) -> None:
        """Plug it in again."""
        subprocess.run(["ip", "-n", self.lab.switch, "link", "set", f"p-{self.name}", "up"], check=True)

    def power_off(self) -> None:
        """As if somebody had pulled the plug: no process says goodbye, no packet leaves."""
        self.cut()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None


class Lab:
    """Hosts h1, h2, ... and "dev", a laptop that is on the same network.

    Args:
        folder: Where the hosts' own files are.
        count: How many hosts.
        keep: Folders that hosts see although they lie under /root or /tmp, which each host has for itself.
        environment: Variables that every login on a host sees.
    """

    def __init__(self, folder: Path, count: int, keep: list[Path], environment: dict[str, str]) -> None:
        self.folder, self.keep, self.environment = folder, keep, environment
        self.prefix = f"rt{os.getpid() % 10000}"
        self.switch = f"{self.prefix}-sw"
        names = [f"h{i}" for i in range(1, count + 1)]
        self.hosts = [Host(self, name, f"{SUBNET}.{i}") for i, name in enumerate(names, 1)]
        self.dev = Host(self, "dev", f"{SUBNET}.100")

    @property
    def all(self) -> list[Host]:
        return [*self.hosts, self.dev]

    def __enter__(self) -> Lab:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self.down()

    def _up(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for host in self.all:
            ip("netns", "add", host.namespace)
            ip("-n", self.switch, "link", "add", f"p-{host.name}", "type", "veth", "peer", "name", "eth0", "netns",
               host.namespace)  # fmt: skip
            ip("-n", self.switch, "link", "set", f"p-{host.name}", "master", "br0", "up")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.boot()
        key = self.dev.folder / "root" / ".ssh" / "id_ed25519"
        shutil.copy(self.folder / "key", key)
        key.chmod(0o600)
        (key.parent / "config").write_text("StrictHostKeyChecking accept-new\n")  # as who says yes when asked

    def down(self) -> None:
        """End every process of every host, and remove the network."""
        for host in self.all:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.power_off()
        for name in (*(host.namespace for host in self.all), self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def processes(self) -> list[str]:
        """Command lines of all processes that run on the hosts, other than their ssh servers."""
        found = []
        for host in self.all:
            if host.process is not None:
                found += [f"{host.name}: {line}" for line in host.sh("ps -eo args --no-headers").stdout.splitlines()]
        return [line for line in found if not any(own in line for own in ("sshd", "ps -eo", "bash -lc"))]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def kept_folders(repository: Path) -> Iterator[Path]:
    """What hosts need of this machine: Python, its environment, and the repository that is installed there."""
    for folder in (Path(sys.prefix), Path(sys.base_prefix), repository):
        yield folder.resolve()
