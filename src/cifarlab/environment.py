"""Where a run happened: versions, processor, git commit, and the command with every secret taken out. No torch here."""

import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cifarlab", "torch", "numpy", "scikit-learn", "pyarrow", "pillow", "safetensors", "altair", "wandb", "triton")

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASS[WP]|PASS$|_PWD$|_PAT$|CREDENTIAL|AUTH)", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"""(?x)
      \b(?:hf_|gh[oprsu]_|github_pat_|glpat-|pypi-|npm_|sk-|sk_live_|AIza|xox[abprs]-|wandb_v1_)[A-Za-z0-9_-]{10,}
    | \bA[KS]IA[0-9A-Z]{12,}
    | \b[0-9a-f]{40,}\b                              # W&B keys are 40 hex digits
    | \beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]{10,}   # JSON web tokens
    | (?<=\b[Bb]earer\ )[\w.~+/=-]{10,}
    | (?<=://)[^/\s@]+(?=@)                          # user:password@host, token@host
    | (?<=[?&])(?i:sig|[\w.-]*(?:signature|token|key|secret|passw|credential|auth)[\w.-]*)=[^&\s]+
    """
)
SCRUBBED = "[secret removed]"


def scrub(text: str) -> str:
    """The text without secrets: known token shapes, and the values of environment variables named like secrets."""
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):  # one secret may begin with another
        if len(value) >= 6 and _SECRET_NAME.search(name) and not os.path.exists(value):  # a key file's path is no secret
            text = text.replace(value, SCRUBBED)
    return _SECRET_VALUE.sub(SCRUBBED, text)


def scrub_command(arguments: list[str]) -> list[str]:
    """The command line without secrets: also what follows a flag named like one (`--api-key X`, `--token=X`)."""
    clean, after_secret_flag = [], False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if after_secret_flag:
            clean.append(SCRUBBED)
            after_secret_flag = False
        elif argument.startswith("-") and _SECRET_NAME.search(flag):
            clean.append(flag + "=" + SCRUBBED if equals else flag)
            after_secret_flag = not equals
        else:
            clean.append(scrub(argument))
    return clean


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, machine, commit and command as a JSON object; `device` is the name of the processor trained on."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES if _version(name)},
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "device": device,
        "begun": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "git": git_commit(),
        "command": scrub_command([Path(sys.argv[0]).name.replace("__main__.py", "cifarlab"), *sys.argv[1:]]),
    }


def processor_name() -> str:
    """The CPU's model name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> dict[str, Any] | None:
    """Commit of the folder one works in, and whether it had uncommitted changes; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
