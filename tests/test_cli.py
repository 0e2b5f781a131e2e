from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.world import TinySource, tiny_settings, toml

SHAPES = """
import re
from pathlib import Path
from hllm.cli import bound_shape_caches

bound_shape_caches()
import torch

torch.set_num_threads(1)
layer, held = torch.nn.Linear(64, 64), []
for tokens in range(16, 616):
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.zeros(tokens, 64)).sum().backward()
    held.append(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
print(held[200], held[-1])
"""

HLLM = str(Path(sys.executable).with_name("hllm"))


def apart(folder: Path, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script, which may mount something at `folder`, in a mount namespace of its own."""
    folder.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = ["mount", "-t", "tmpfs", "none", str(folder)]
    if subprocess.run([*unshare, *mount], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts of one's own")
    whole = [*unshare, "sh", "-c", script, "sh", *args]
    return subprocess.run(whole, capture_output=True, text=True, env={**os.environ, **environment})


def on_a_full_disk(folder: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with 64 KiB of room in `folder`."""
    script = 'mount -t tmpfs -o size=64k none "$1" && head -c 60k /dev/zero >"$1/rest"; shift; exec "$@"'
    return apart(folder, script, str(folder), *argv, **environment)


def test_a_full_disk_is_a_matter_for_a_retry_and_says_so(tmp_path: Path, tiny_source: TinySource) -> None:
    settings = tiny_settings(tmp_path, tiny_source, **{"run.root": str(tmp_path / "small" / "runs")})
    (tmp_path / "hllm.toml").write_text(toml(settings.model_dump(mode="json")))
    words = tmp_path / "words"
    ended = on_a_full_disk(
        tmp_path / "small",
        *(HLLM, "ingest", "--config", str(tmp_path / "hllm.toml")),
        HLLM_TERMINATION_LOG=str(words),
    )
    assert ended.returncode == 75, ended.stdout + ended.stderr
    assert words.read_text("utf-8").startswith("the disk is full: ")
    assert "Traceback" not in ended.stderr


def test_memory_does_not_grow_with_every_new_number_of_tokens() -> None:
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True)
    early, late = map(int, done.stdout.split())
    assert late < early + 64, (early, late)  # MiB; 460 more without a bound, where the processor has bf16


def test_the_module_is_the_command() -> None:
    """torchrun starts it so, once for every process of a step."""
    argv = [sys.executable, "-m", "hllm.cli", "train", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "--stage" in done.stdout
