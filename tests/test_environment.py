"""What is noted about where a run happened, and that no secret is in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifarlab.cli import main
from cifarlab.environment import SCRUBBED, describe_environment, git_commit, processor_name, scrub, scrub_command

HEX_KEY = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "W&B": HEX_KEY,
    "new W&B": "wandb_v1_AbCdEf0123456789_x",
    "Hugging Face": "hf_" + "a1B2" * 8,
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub app": "ghu_" + "a1B2" * 9,
    "GitHub refresh": "ghr_" + "a1B2" * 9,
    "Google": "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "PyPI": "pypi-AgEIcHlwaS5vcmcCJDAwMDAwMDAw",
    "npm": "npm_" + "a1B2" * 9,
    "Stripe": "sk_live_abcdefghij0123456789",
    "GitHub fine-grained": "github_pat_11ABCDEFG0_abcdefghij",
    "GitLab": "glpat-abcdefghij0123456789",
    "OpenAI": "sk-proj-abcdefghij0123456789",
    "Slack": "xoxb-123456789012-abcdefghij",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "AWS for a while": "ASIAIOSFODNN7EXAMPLE",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_known_kinds_of_secrets_are_taken_out(secret: str) -> None:
    for text in (secret, f"--name={secret}", f"x {secret} y", f"https://example.org/{secret}?a=b", f'"{secret}"'):
        assert secret not in scrub(text)
        assert SCRUBBED in scrub(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pa55@example.org/x.tar", f"https://{SCRUBBED}@example.org/x.tar"),
        ("https://ghtoken@example.org/x.tar", f"https://{SCRUBBED}@example.org/x.tar"),
        ("Authorization: Bearer abcdefghijklmnop.1234", f"Authorization: Bearer {SCRUBBED}"),
        ("https://example.org/x?sig=abc123&v=2", f"https://example.org/x?{SCRUBBED}&v=2"),
        ("https://example.org/x?v=2&X-Amz-Signature=abc123", f"https://example.org/x?v=2&{SCRUBBED}"),
    ],
)
def test_secrets_in_addresses_are_taken_out(text: str, clean: str) -> None:
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "text", ["--lr 0.15", "resnet18-cosine-3fa2c1-20250102-030405", "/data/cifar-10-batches-py", "a@b", "https://x.org/a?v=1"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text) == text


def test_values_of_variables_named_like_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_TOKEN", "abcdefg")
    monkeypatch.setenv("MY_LONGER_TOKEN", "abcdefg-hijkl")
    monkeypatch.setenv("DB_PASSWORD", "/starts/with/a/slash")
    monkeypatch.setenv("SOME_KEY_FILE", str(tmp_path))
    monkeypatch.setenv("PLAIN", "visible")
    for name in ("SMTPPASS", "DB_PWD", "KEYRING_PASSPHRASE", "GITHUB_PAT"):
        monkeypatch.setenv(name, f"value of {name}")
        assert scrub(f"<value of {name}>") == f"<{SCRUBBED}>"
    assert scrub("abcdefg-hijkl abcdefg /starts/with/a/slash visible") == f"{SCRUBBED} {SCRUBBED} {SCRUBBED} visible"
    assert scrub(f"{tmp_path}/x") == f"{tmp_path}/x"  # where a key lies is no secret, and a path may be the run's


def test_what_follows_a_flag_named_like_a_secret_is_taken_out() -> None:
    command = ["cifarlab", "train", "--api-key", "X1", "--token=X2", "--Password", "X3", "--lr", "0.1", "--name", SECRETS["JWT"]]
    assert scrub_command(command) == [
        "cifarlab", "train", "--api-key", SCRUBBED, f"--token={SCRUBBED}", "--Password", SCRUBBED,
        "--lr", "0.1", "--name", SCRUBBED,
    ]  # fmt: skip


def test_the_environment_names_versions_processor_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(sys, "argv", ["/somewhere/cifarlab/__main__.py", "train", "quick"])
    environment = describe_environment("a processor")
    assert environment["git"] == {"commit": head, "changed": False}
    assert environment["command"] == ["cifarlab", "train", "quick"]
    assert environment["device"] == "a processor"
    assert {"python", "cifarlab", "torch", "numpy"} <= environment["versions"].keys()
    assert processor_name()
    json.dumps(environment)


def test_git_not_installed_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_a_run_is_not_named_by_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given by mistake as --name, it would be in the path that every line and file tells."""
    monkeypatch.setenv("SERVICE_TOKEN", "s3cret-value")
    for name in ("my-s3cret-value", HEX_KEY, SECRETS["Hugging Face"]):
        assert main(["train", "quick", "--name", name, "--runs-dir", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert "--name holds what looks like a key or token" in told
        assert name not in told
    assert not list(tmp_path.iterdir())


def test_no_secret_of_a_real_run_gets_into_its_folder(tmp_path: Path) -> None:
    """With a key in the environment, and others given by mistake as names in W&B."""
    env = os.environ | {"WANDB_API_KEY": HEX_KEY, "SERVICE_TOKEN": "s3cret-value"}
    command = [sys.executable, "-m", "cifarlab", "train", "quick", "--epochs", "0.1", "--train-images", "16", "--batch-size", "8",
               "--no-wandb", "--wandb-name", "s3cret-value", "--wandb-project", SECRETS["Hugging Face"], "--name", "run",
               "--runs-dir", str(tmp_path), "--no-forecast", "--no-figures"]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = (done.stdout + done.stderr).encode()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 6
    for content in [told, *(path.read_bytes() for path in files)]:
        for secret in (HEX_KEY, "s3cret-value", SECRETS["Hugging Face"]):
            assert secret.encode() not in content
    noted = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert noted["command"].count(SCRUBBED) == 2
    assert noted["command"][:3] == ["cifarlab", "train", "quick"]
