"""What `submit` ships."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from launch.cluster.package import PACKAGES, stage, told
from launch.cluster.shipped import named_by
from tests.cpu_time import cpu_below

ROOT = Path(__file__).parents[3]


def make(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def names(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] not in PACKAGES
    }


@pytest.fixture
def user(tmp_path: Path) -> Path:
    (tmp_path / "user").mkdir()
    return tmp_path / "user"


def test_code_and_data_are_shipped_and_keys_runs_and_environments_are_not(user: Path, tmp_path: Path) -> None:
    wanted = {"my.yaml", "my_rewards.py", "data/train.jsonl", "pkg/deep/a.py", "ignored.jsonl"}
    make(user, *wanted)
    make(
        user,
        "runs/a/hf/model.safetensors",
        ".env",
        ".git/config",
        "pkg/.netrc",
        "pkg/__pycache__/a.pyc",
        "x.pem",
        "sub/id_rsa",
    )
    make(user, "env/pyvenv.cfg", "env/lib/torch.py", "big/b.bin")
    (user / ".gitignore").write_text("ignored.jsonl\n")
    size = stage(user, tmp_path / "staged", ["big"]).size
    assert names(tmp_path / "staged") == wanted
    assert size == len(wanted)


def test_a_folder_too_large_is_refused_by_the_names_of_what_is_large_and_nothing_is_copied(
    user: Path, tmp_path: Path
) -> None:
    make(user, "small.py", size=10)
    make(user, "data/a.jsonl", "data/b.jsonl", size=2000)
    with pytest.raises(ConfigError, match=r"largest: data .*--exclude NAME"):
        stage(user, tmp_path / "staged", limit_bytes=4000)
    assert not (tmp_path / "staged").exists()
    stage(user, tmp_path / "staged", ["*.jsonl"], limit_bytes=4000)
    assert names(tmp_path / "staged") == {"small.py"}


def test_a_package_that_would_hide_ours_is_refused(user: Path, tmp_path: Path) -> None:
    make(user, "actors/mine.py")
    with pytest.raises(ConfigError, match="would hide grpo-ray's own package actors"):
        stage(user, tmp_path / "staged")


def test_a_link_to_a_folder_outside_is_not_followed(user: Path, tmp_path: Path) -> None:
    make(tmp_path / "outside", "secret.txt")
    (user / "link").symlink_to(tmp_path / "outside")
    (user / "loop").symlink_to(user)
    make(user, "a.py")
    stage(user, tmp_path / "staged")
    assert names(tmp_path / "staged") == {"a.py"}


def test_what_is_shipped_runs_by_itself(user: Path, tmp_path: Path) -> None:
    """Our packages come along whole: recipes, the report's template, and all of one root."""
    make(user, "a.py")
    staged = tmp_path / "staged"
    stage(user, staged)
    for package in PACKAGES:
        tracked = subprocess.run(
            ["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        assert [name for name in tracked if not (staged / name).is_file()] == []
    code = "import actors, grpo_ray.report.page, launch.run.recipe as r; print(r.__file__, r.recipe_names())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=staged,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert told.startswith(str(staged))
    assert "smoke_sft" in told


KEYS = [
    *(
        "prod.env",
        ".env",
        "env/.env.local",
        "id_ecdsa",
        "id_dsa",
        "ID_RSA",
        "id_ed25519.pub",
        "x.p12",
        "x.PFX",
        "x.ppk",
        "x.jks",
    ),
    *(
        "kubeconfig",
        "credentials.json",
        "Credentials.JSON",
        "service-account.json",
        "my-service_account-1.json",
        "secrets.yaml",
    ),
    *(
        "token",
        "hf_token",
        "key.PEM",
        "server.Key",
        "a/b/token.txt",
        "gcp-credentials.json",
        "auth.json",
        "x.tfstate",
        "netrc",
    ),
    *(
        "client_secret_1.json",
        "secrets.toml",
        "prod-secrets.yml",
        "api_key.txt",
        "cert.p8",
        "vault.kdbx",
        "production.env.json",
    ),
    *(
        "rootkey.csv",
        "access_token.json",
        "terraform.tfvars.json",
        "prod.auto.tfvars",
        "my_id_rsa",
        "deploy-id_ed25519.txt",
    ),
    *(
        "key.pem.bak",
        "prod.env~",
        "id_rsa.old",
        "hf_token.json",
        "private_key.txt",
        "aws_accessKeys.csv",
        "passwords.csv",
    ),
    *(
        "secrets/prod.yaml",
        "secrets/keys.py",
        "a/Secrets/deep/rows.txt",
        ".ssh/config",
        "ssh/config",
        "credentials/x.json",
    ),
    *("token.jsonl.bak", "x-firebase-adminsdk-1.json"),
    *("krb5.keytab", "x.pkcs8", "x.der", "apikey", "env.prod", "kube.config", "kaggle.json", "rclone.conf", "wg0.conf"),
    *("key.pem.txt", "#id_rsa#", "accessTokens.json", "cookies.txt", "key.\uff50em", "key.pem\u200b"),
]
PRIVATE = "-----BEGIN {}PRIVATE KEY-----{}MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7"


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture
def tracked(user: Path) -> Path:
    make(user, "mine.py", "data/rows.jsonl", "notes.bin")
    git(user, "init", "-q")
    git(user, "add", "-A")
    return user


@pytest.mark.parametrize("known_to_git", [True, False])
def test_files_that_are_called_as_keys_are_never_shipped_and_told(
    known_to_git: bool, user: Path, tmp_path: Path
) -> None:
    make(user, "mine.py", "my_token.py", "tokens.jsonl", "keys.yaml", "tokenizer.json", "environment.yaml", *KEYS)
    if known_to_git:
        git(user, "init", "-q")
        git(user, "add", "-f", "-A")
    found = stage(user, tmp_path / "staged", named=[user / name for name in KEYS], include=["*"])
    assert names(tmp_path / "staged") == {
        *("mine.py", "my_token.py", "tokens.jsonl", "keys.yaml", "tokenizer.json", "environment.yaml"),
    }
    hidden = {name for name in KEYS if any(part.startswith(".") for part in Path(name).parts)}
    assert {str(path) for path in found.left_out} == set(KEYS) - hidden
    assert "credentials.json: its name is that of a key" in "\n".join(told(found))


def test_a_link_to_what_is_never_shipped_is_left_out(user: Path, tmp_path: Path) -> None:
    make(user, "mine.py", ".aws/c", ".hidden/deep/rows.txt")
    (user / "notes.txt").symlink_to(".aws/c")
    (user / "data.txt").symlink_to(".hidden/deep/rows.txt")
    (user / "more.txt").symlink_to("mine.py")
    found = stage(user, tmp_path / "staged", named=[user / "notes.txt"])
    assert names(tmp_path / "staged") == {"mine.py", "more.txt"}
    assert {str(p): why for p, why in found.left_out.items()} == dict.fromkeys(
        ("data.txt", "notes.txt"), "a link to what is not shipped"
    )


def test_what_git_tracks_and_the_recipe_names_is_shipped_and_the_rest_by_a_flag(tracked: Path, tmp_path: Path) -> None:
    make(tracked, "untracked.py", "named.jsonl", "folder/a.jsonl", "beside.py", "private.txt", "pkg/inner.py", size=3)
    recipe = {
        "model": {"tiny": {}},
        "data": {"train": {"path": "named.jsonl"}, "eval": {"path": f"{tracked}/folder/a.jsonl"}},
        "reward": {"functions": [{"name": "pkg.inner.f"}, {"name": "beside.py:f"}]},
    }
    named = named_by(build(RunConfig, recipe, "recipe"), tracked)
    found = stage(tracked, tmp_path / "staged", named=named)
    wanted = {"mine.py", "data/rows.jsonl", "notes.bin", "named.jsonl", "folder/a.jsonl", "beside.py", "pkg/inner.py"}
    assert names(tmp_path / "staged") == wanted
    lines = list(told(found))
    assert [line for line in lines if line.endswith("named.jsonl")] == ["upload          0.0 kB  named.jsonl"]
    assert "left out private.txt: git does not track it" in lines
    assert len([line for line in lines if line.startswith("upload")]) == len(wanted)
    stage(tracked, tmp_path / "more", named=named, include=["private.txt", "untracked*"])
    assert names(tmp_path / "more") == wanted | {"private.txt", "untracked.py"}


def test_without_git_code_and_data_are_shipped(user: Path, tmp_path: Path) -> None:
    make(user, "a.py", "b.yaml", "rows.parquet", "dump.sql", "notes.docx", "core")
    stage(user, tmp_path / "staged")
    assert names(tmp_path / "staged") == {"a.py", "b.yaml", "rows.parquet"}


@pytest.mark.parametrize("known_to_git", [True, False])
def test_a_link_to_a_file_outside_is_refused(known_to_git: bool, user: Path, tmp_path: Path) -> None:
    make(tmp_path, "outside.txt")
    make(user, "a.py")
    (user / "rows.jsonl").symlink_to(tmp_path / "outside.txt")
    (user / "inside.py").symlink_to("a.py")
    if known_to_git:
        git(user, "init", "-q")
        git(user, "add", "-A")
    with pytest.raises(ConfigError, match=r"rows\.jsonl is a link to .*outside\.txt, outside of the folder"):
        stage(user, tmp_path / "staged")
    stage(user, tmp_path / "without", ["rows.jsonl"])
    assert names(tmp_path / "without") == {"a.py", "inside.py"}


def test_a_link_inside_to_a_key_is_not_shipped(user: Path, tmp_path: Path) -> None:
    make(user, "prod.env")
    (user / "rows.jsonl").symlink_to("prod.env")
    found = stage(user, tmp_path / "staged")
    assert names(tmp_path / "staged") == set()
    assert Path("rows.jsonl") in found.left_out


@pytest.mark.parametrize(
    "text",
    [
        PRIVATE.format("", "\n"),
        PRIVATE.format("RSA ", "\r\n"),
        PRIVATE.format("OPENSSH ", "\n"),
        PRIVATE.format("ENCRYPTED ", "\n"),
        '{"private_key": "' + PRIVATE.format("", "\\n") + '"}',
        "x" * (9 << 20) + "\n" + PRIVATE.format("EC ", "\n"),
        "x" * (11 << 20) + "\n" + PRIVATE.format("EC ", "\n") + "\n" + "y" * (9 << 20),
        "x" * ((1 << 20) - 20) + PRIVATE.format("", "\n"),
        "x" * ((1 << 20) - 60) + PRIVATE.format("", "\n"),
        "key: '" + PRIVATE.format("", "\\\\n") + "'",
        "key = " + PRIVATE.format("", " "),
        "KEY=" + PRIVATE.format("", "%0A"),
        PRIVATE.format("", "\\u000a"),
        'KEY = (\n    "' + PRIVATE.format("RSA ", '\\n"\n    "') + '\\n"\n)',
        PRIVATE.format("RSA ", "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,8D3A1F00C2\n\n"),
        PRIVATE.format("", "\n").encode("utf-16"),
        PRIVATE.format("", "\r\n").encode("utf-16-be"),
        ("\u00e4" * 600_000 + PRIVATE.format("", "\n")).encode("utf-16-le"),
        PRIVATE.format("", "\n").encode("utf-32"),
        b"client-key-data: " + base64.b64encode(PRIVATE.format("RSA ", "\n").encode()),
        *(base64.b64encode(b"{" * n + PRIVATE.format("", "\\n").encode()) for n in range(3)),
        *(base64.urlsafe_b64encode(b"?>" * 9 + b"{" * n + PRIVATE.format("", "\n").encode()) for n in range(3)),
        *(base64.encodebytes(b"{" * n + PRIVATE.format("", "\n").encode()) for n in (34, 44, 54)),
        "[Interface]\nPrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n",
        b"PuTTY-User-Key-File-3: ssh-ed25519\nPrivate-Lines: 1\nAAAAIGQHzXv5kq2yH7bQ3mWn8sT1rP4cL6dF9gJ0aE2uVxKo",
        b"AGE-SECRET-KEY-1QQPZRY9X8GF2TVDW0S3JN54KHCE6MUA7LQQPZRY9X8GF2TVDW0S3JN",
    ],
    ids=lambda text: f"{len(text)}",
)
def test_a_file_that_holds_a_private_key_is_refused_by_its_name(text: str | bytes, user: Path, tmp_path: Path) -> None:
    (user / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"config\.yaml holds a private key") as error:
        stage(user, tmp_path / "staged")
    assert "MIIE" not in str(error.value)
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize(
    "text",
    [
        'HEAD = "-----BEGIN RSA PRIVATE KEY-----"\n',
        "A file begins with -----BEGIN PRIVATE KEY-----, then comes the body in base64, then -----END PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n" + "x" * 64 + "\n-----END PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n<your key here>\n-----END PRIVATE KEY-----",
        "-----BEGIN PUBLIC KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7\n",
        "How do I store a PRIVATE KEY? " * 2000,
        "LS0tLS1CRUdJTi" * 500,
    ],
)
def test_what_only_speaks_of_private_keys_is_shipped(text: str, user: Path, tmp_path: Path) -> None:
    (user / "a.py").write_text(text)
    assert stage(user, tmp_path / "staged").size == len(text)


def test_a_large_file_is_looked_through_in_little_time(user: Path, tmp_path: Path) -> None:
    for piece in (
        b"-----BEGIN ",
        b"-----BEGIN PRIVATE KEY-----",
        b"-----BEGIN PRIVATE KEY-----\nA: ",
        b"\0",
        b"LS0tLS1CRUdJTi",
    ):
        (user / "a.txt").write_bytes(piece * ((2 << 20) // len(piece)))
        with cpu_below(10, piece):
            stage(user, tmp_path / "staged")


@pytest.mark.parametrize("known_to_git", [True, False])
def test_data_that_the_recipe_names_are_shipped_from_anywhere_and_by_any_name(
    known_to_git: bool, user: Path, tmp_path: Path
) -> None:
    named = [
        "token.jsonl",
        "secrets.jsonl",
        "build/train.jsonl",
        "dist/sets/a.parquet",
        "runs/a/hf/config.json",
        "secrets/t.jsonl",
    ]
    make(
        user,
        *named,
        "secrets/prod.jsonl",
        "build/lib.py",
        "dist/x.jsonl",
        "runs/b/hf/config.json",
        "runs/a/ledger.sqlite",
    )
    make(user, "build/.hidden/rows.jsonl", "password.jsonl", "mine.py")
    if known_to_git:
        git(user, "init", "-q")
        git(user, "add", "mine.py")
    recipe = {
        "model": {"path": "runs/a/hf"},
        "data": {
            "train": {"path": "token.jsonl"},
            "eval": {
                "a": {"path": "secrets.jsonl"},
                "b": {"path": f"{user}/build/train.jsonl"},
                "c": {"path": "dist/sets"},
                "d": {"path": "secrets/t.jsonl"},
                "e": {"path": "build/.hidden/rows.jsonl"},
            },
        },
        "reward": {"functions": [{"name": "mine.f"}]},
        "dir": "runs/b",
        "tracking": {"project": "dist"},
    }
    found = stage(user, tmp_path / "staged", named=named_by(build(RunConfig, recipe, "recipe"), user))
    assert names(tmp_path / "staged") == {*named, "mine.py"}
    if not known_to_git:
        assert "rename it" in found.left_out[Path("password.jsonl")]
    stage(user, tmp_path / "without", ["build"], named=[user / "build/train.jsonl"])
    assert not (tmp_path / "without/build").exists()


def test_a_strangers_repository_runs_nothing(tracked: Path, tmp_path: Path) -> None:
    for option in ("core.fsmonitor", "core.sshCommand", "diff.external", "filter.x.clean", "core.pager"):
        git(tracked, "config", option, f"touch {tmp_path}/CANARY; false")
    stage(tracked, tmp_path / "staged")
    assert not (tmp_path / "CANARY").exists()
    assert "mine.py" in names(tmp_path / "staged")
