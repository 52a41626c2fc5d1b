"""A container of the image without a container engine, as far as a Linux kernel alone goes.

Mount, PID, IPC and network namespaces of its own, where its servers are seen by nobody else; the root
read-only; the image's user, without capabilities and without a way to new ones; the Dockerfile's environment
and nothing else. What the image would have copied is bound to where the image has it. The packages and the
distribution are this machine's.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "deploy" / "image" / "Dockerfile"
ENTRYPOINT = REPOSITORY / "deploy" / "image" / "entrypoint.sh"
USER = 10001


def missing() -> str | None:
    """Why there can be no such container here; None where there can."""
    for program in ("unshare", "setpriv", "nsenter", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "mount", "-t", "tmpfs", "x", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if os.getuid() != 0 or done.returncode != 0:
        return f"mount namespaces need root with CAP_SYS_ADMIN: {done.stderr.strip() or 'not root'}"
    return None


def stages() -> dict[str, list[str]]:
    """Instructions of the Dockerfile by stage, continued lines joined, comments dropped."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()))
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if match := re.match(r"FROM (\S+)(?: AS (\S+))?$", line):
            name = match[2] or match[1]
            found[name] = []
        found[name].append(" ".join(line.split()))
    return found


def environment(stage: str) -> dict[str, str]:
    pairs = [line.removeprefix("ENV ") for line in stages()[stage] if line.startswith("ENV ")]
    return dict(pair.split("=", 1) for line in pairs for pair in line.split(" "))


class Container:
    """`python -m pytest` makes the directories; the kernel takes every mount away with the last process."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        extra: dict[str, str] | None = None,
        *,
        user: int = USER,
        address: str | None = None,
        config: str = "{}",
    ) -> None:
        """model: what the image brings along. extra: more environment. address: on a network that `join`
        makes; None: loopback alone. config: /etc/peregrine/peregrine.yaml, as the chart mounts it.
        """
        directory.mkdir(exist_ok=True)
        self._user = user
        self._address = address
        self._config = directory / "config"
        self._config.mkdir()
        (self._config / "peregrine.yaml").write_text(config)
        self._environment = {
            **environment("cpu"),
            "PYTHONPATH": str(REPOSITORY),  # the image has the packages installed
            **(extra or {}),
        }
        self._log = directory / "log"
        self._script = directory / "mounts.sh"
        self._seed = directory / "seed"
        (self._seed / "models").mkdir(parents=True)
        os.link(model, self._seed / "models" / model.name) if _same_disk(model, directory) else shutil.copy(
            model, self._seed / "models"
        )
        for path in (directory, self._seed, self._seed / "models", self._config):
            path.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """The image's ENTRYPOINT with these arguments; tini's part, reaping, is unshare's `--fork`."""
        self._script.write_text(self._setup())
        command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        command += ["--propagation", "private", "sh", str(self._script), *arguments]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def run(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Like `docker exec`."""
        return subprocess.run(
            self._inside(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self._inside(*arguments), stdout=subprocess.PIPE, text=True)

    def _inside(self, *arguments: str) -> list[str]:
        command = [
            "nsenter",
            "-t",
            str(self._init()),
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            "--root",
        ]
        return [*command, "env", "-C", "/home/peregrine", *self._as_user(), *arguments]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self, timeout_s: float) -> int:
        """SIGTERM to the first process, as Kubernetes sends it. Returns its status."""
        assert self._process is not None
        os.kill(self._init(), signal.SIGTERM)
        return self._process.wait(timeout_s)

    def network_pid(self) -> int:
        """A process of its network, as soon as there is one."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(IndexError, FileNotFoundError):
                return self._init()
            time.sleep(0.05)
        raise AssertionError(f"the container did not start: {self.log()}")

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)

    def _init(self) -> int:
        """Of the PID namespace, as this machine numbers it."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0])

    def _as_user(self) -> list[str]:
        return [
            *("setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "env", "-i"),
            *(f"{name}={value}" for name, value in self._environment.items()),
        ]

    def _setup(self) -> str:
        """Builds the root in a tmpfs of the new mount namespace, then goes there for good."""
        venv = Path(sysconfig.get_path("scripts")).parent.resolve()
        copied = "\n".join(
            f"bind_ro {path} {path}" for path in dict.fromkeys((REPOSITORY, venv, Path(sys.base_prefix)))
        )
        words = " ".join(f"'{word}'" for word in self._as_user())
        return _SETUP.format(
            copied=copied,
            venv=venv,
            seed=self._seed,
            config=self._config,
            entrypoint=ENTRYPOINT,
            user=self._user,
            words=words,
            address=self._address or "",
        )


_SETUP = """\
set -eu
ip link set lo up
if [ -n "{address}" ]; then
  tries=100
  until ip address add {address}/24 dev eth0 2>/dev/null; do
    tries=$((tries - 1)); [ $tries -gt 0 ] || {{ echo "no eth0"; exit 1; }}
    sleep 0.1
  done
  ip link set eth0 up
  ip route add default dev eth0  # Ray takes the address that would lead outside for its own
fi
root=/mnt
mount -t tmpfs -o mode=0755 tmpfs $root
bind_ro() {{ mkdir -p $root$2; mount --bind $1 $root$2; mount -o remount,bind,ro,nosuid $root$2; }}
volume() {{ mkdir -p $root$1; mount -t tmpfs -o mode=$2,nosuid tmpfs $root$1; }}
bind_ro /usr /usr
cp -a /etc $root/etc
bind_ro {config} /etc/peregrine
for link in bin sbin lib lib64; do
  if [ -L /$link ]; then ln -s "$(readlink /$link)" $root/$link; else bind_ro /$link /$link; fi
done
mkdir $root/proc && mount -t proc proc $root/proc
bind_ro /sys/fs/cgroup /sys/fs/cgroup
mkdir $root/dev
for device in null zero full random urandom; do
  touch $root/dev/$device
  mount --bind /dev/$device $root/dev/$device
done
ln -s /proc/self/fd $root/dev/fd
volume /dev/shm 1777
volume /tmp 1777  # before what follows: a checkout may lie in it
# What the image copies: the packages and their Python lie elsewhere here, under the image's names.
{copied}
mkdir -p $root/opt/peregrine/bin
cp {venv}/pyvenv.cfg $root/opt/peregrine/
ln -s {venv}/lib $root/opt/peregrine/lib
for file in {venv}/bin/*; do ln -s $file $root/opt/peregrine/bin/; done
bind_ro {seed} /opt/peregrine/share/cache
mkdir $root/bin.image
cp {entrypoint} $root/bin.image/peregrine-entrypoint
chmod 0755 $root/bin.image/peregrine-entrypoint
mount --bind $root/bin.image $root/usr/local/bin
# The volume; all else but /tmp and /dev/shm cannot be written.
volume /cache 0770
chown {user}:{user} $root/cache
mkdir -p $root/home/peregrine
mount -o remount,ro $root
cd $root
exec chroot $root env -C /home/peregrine {words} peregrine-entrypoint "$@"
"""


def join(first: Container, second: Container) -> None:
    """A cable between two started containers; this machine's own network has no part in it."""
    peers = (str(first.network_pid()), str(second.network_pid()))
    command = ["ip", "link", "add", "eth0", "netns", peers[0], "type", "veth"]
    subprocess.run([*command, "peer", "name", "eth0", "netns", peers[1]], check=True, timeout=10)


def _same_disk(first: Path, second: Path) -> bool:
    return first.stat().st_dev == second.stat().st_dev
