"""docker/Dockerfile: by hadolint's rules, by ours, and command by command in the system that it is made from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.folders import too_long

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
STEP_S = 1500
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
OUR_CERTIFICATES = "/etc/ours.crt"


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str


def instructions() -> list[Instruction]:
    """In order; continued lines are joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(" ", 1)) for line in joined.splitlines() if line.strip()]


def all_of(name: str) -> list[str]:
    return [i.text for i in instructions() if i.name == name]


def test_hadolint_finds_nothing() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--no-color", "--failure-threshold", "style", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (all_of("FROM")[0], "debian:latest", "DL3007"),
        ("g++=4:12.2*", "g++", "DL3008"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("--no-install-recommends", "", "DL3015"),
        ("WORKDIR /data", "WORKDIR data", "DL3000"),
        (" && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
    ],
)
def test_hadolint_would_notice(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    command = [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(tmp_path / "Dockerfile")]
    assert rule in subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_the_image_is_healthy_or_says_so_and_runs_as_nobody_special() -> None:
    assert all_of("USER") == ["1000:1000"]
    (health,) = all_of("HEALTHCHECK")
    assert "/api/local_raylet_healthz" in health
    assert "RAY_AUTH_MODE=token" in " ".join(all_of("ENV"))
    assert not any(
        re.search(r"TOKEN|SECRET|PASSWORD|KEY", env.replace("RAY_AUTH_MODE=token", "")) for env in all_of("ENV")
    )


def test_the_image_is_made_from_one_by_its_digest_and_rays_sessions_are_its_users_alone() -> None:
    assert all(re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base) for base in all_of("FROM"))
    env = dict(part.split("=", 1) for text in all_of("ENV") for part in text.split())
    assert env["RAY_TMPDIR"] == env["TMPDIR"]
    assert f"install -d -o 1000 -g 1000 -m 0700 {env['TMPDIR']}" in " ".join(all_of("RUN"))
    assert not too_long(env["TMPDIR"])


def test_nccl_finds_the_libraries_that_it_loads_for_rdma() -> None:
    """It loads them by name, and goes over TCP without a word where they are missing."""
    installed = {word.partition("=")[0] for text in all_of("RUN") if "apt-get install" in text for word in text.split()}
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= installed


def test_the_packages_are_a_layer_before_the_code() -> None:
    order = [f"{i.name} {i.text}" for i in instructions()]
    packages = next(n for n, text in enumerate(order) if text.endswith("install.sh packages"))
    code = [n for n, text in enumerate(order) if re.match(r"COPY .*(grpo_ray|actors|launch) \S+$", text)]
    assert len(code) == 3
    assert packages < min(code)
    copied = {name for text in order[:packages] if text.startswith("COPY") for name in text.split()[2:-1]}
    assert copied == {"pyproject.toml", "README.md", "lock-cpu.txt", "lock-gpu.txt", "launch/install.sh"}


def test_all_that_is_copied_is_there_and_let_through() -> None:
    allowed = [
        line[1:] for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for text in all_of("COPY"):
        for source in text.split()[1:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in allowed, source


def missing() -> str:
    """Why the image's commands can't be run here; '' when they can."""
    if os.getuid() != 0:
        return "needs root"
    if shutil.which("debootstrap") is None:
        return "needs debootstrap"
    made = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    return "" if made else "needs mount namespaces"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Debian as the base image has it, and what this machine says of package indexes and certificates."""
    root = tmp_path / "root"
    (base,) = all_of("FROM")
    assert re.fullmatch(r"debian:12\.\d+-slim@sha256:[0-9a-f]{64}", base)
    subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", root], check=True, capture_output=True, timeout=STEP_S
    )
    for path in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/xdg/pip", CERTIFICATES):
        if Path(path).exists():
            # Installing Debian's certificates writes theirs anew.
            target = root / (OUR_CERTIFICATES if path == CERTIFICATES else path)[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if Path(path).is_dir() else shutil.copyfile
            copy(path, target)
    yield root
    shutil.rmtree(root, ignore_errors=True)


def run_in(root: Path, command: str, user: str, folder: str, env: dict[str, str]) -> str:
    """As a `RUN`: in bash with pipefail, in a chroot with /proc and /dev, and folders of wheels that this machine installs from."""
    wheels = [p for p in os.environ.get("PIP_FIND_LINKS", "").split() if Path(p).is_dir()]
    mounts = ["mount -t proc proc $0/proc", "mount --rbind /dev $0/dev"]
    mounts += [f"mkdir -p $0{p} && mount --bind {p} $0{p}" for p in wheels]
    script = " && ".join([*mounts, 'exec chroot --userspec="$1" "$0" /bin/bash -o pipefail -c "cd $2 && $3"'])
    outside = {k: v for k, v in os.environ.items() if re.match(r"PIP_|UV_|\w*_proxy$", k, re.IGNORECASE)}
    trusted = (
        dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), OUR_CERTIFICATES) if (root / OUR_CERTIFICATES[1:]).exists() else {}
    )
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, str(root), user, folder, command],
        env=outside | {"PATH": PATH, "HOME": "/home/grpo"} | trusted | env,
        capture_output=True,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(4 * STEP_S)
@pytest.mark.skipif(missing() != "", reason=missing())
def test_every_command_of_the_image_runs_in_its_order_in_a_bare_system(root: Path) -> None:
    env: dict[str, str] = {}
    user, folder = "0:0", "/"
    for instruction in instructions():
        text = instruction.text
        match instruction.name:
            case "ARG":
                env |= dict([text.split("=", 1)])
            case "USER":
                user = text
            case "WORKDIR":
                folder = text
                (root / folder[1:]).mkdir(parents=True, exist_ok=True)
            case "RUN":
                run_in(root, text, user, folder, env)
            case "COPY":
                flag, *sources, target = text.split()
                owner = flag.removeprefix("--chown=")
                for source in sources:
                    into = root / folder[1:] / target
                    into = into / Path(source).name if target.endswith("/") else into
                    into.parent.mkdir(parents=True, exist_ok=True)
                    if (ROOT / source).is_dir():
                        shutil.copytree(
                            ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
                        )
                    else:
                        shutil.copyfile(ROOT / source, into)
                    subprocess.run(["chown", "-R", owner, root / folder[1:] / target], check=True)
            case "ENV":
                values = {k: v.replace("$PATH", PATH) for k, v in (p.split("=", 1) for p in text.split())}
                env |= values
    told = run_in(
        root,
        "bash -lc 'command -v ray' && grpo-ray check smoke_sft && id -u && tini --version && command -v wget",
        user,
        folder,
        env,
    )
    assert "grpo-ray sft smoke_sft" in told
    assert "\n1000\n" in told
    assert told.startswith("/opt/grpo-ray/.venv/bin/ray\n")
