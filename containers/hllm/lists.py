"""What the image `hllm` installs, out of pyproject.toml and constraints.txt: torch first, then the rest."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
wanted = [*project["dependencies"], "dumb-init", "setuptools"]  # setuptools builds DeepSpeed
torch = re.search(r"^torch==.*$", Path("constraints.txt").read_text("utf-8"), re.MULTILINE)[0]

Path("torch.txt").write_text(f"{torch}\n")
Path("requirements.txt").write_text("\n".join(wanted) + "\n")
