"""python tests/calls.py train|eval [--all]: the calls of LATENTWIRE.py from a command to the receiver's first forward pass.

A tiny bridge is trained, or evaluated, in a temporary folder. Printed are depth, section and name of the functions on the
way down to the first forward pass in which the receiver reads latents; with --all every call before it, in order. Trying
a model when it is loaded is no such pass; comprehensions are no calls.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from bisect import bisect
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "LATENTWIRE.py"
BANNERS = [i for i, line in enumerate(FILE.read_text(encoding="utf-8").splitlines(), 1) if line.startswith("# §")]
TOY = "--dataset toy --sender tiny-llama --receiver tiny-qwen --samples 64 --steps 2 --device cpu --output_dir run"
RECEIVER = os.path.join("models", "qwen2")  # where transformers keeps the code of tiny-qwen's kind
COMMANDS = {"train": f"train {TOY}", "eval": "eval --checkpoint run --methods bridge --num_samples 16 --device cpu"}


def ours(code: CodeType) -> bool:
    """Whether it is a function of LATENTWIRE.py."""
    return code.co_filename.endswith(FILE.name) and not re.match(r"<.*(comp|expr)>", code.co_name)


def above(frame: FrameType | None) -> list[CodeType]:
    """The functions of LATENTWIRE.py that are running, outermost first."""
    found = []
    while frame:
        found += [frame.f_code] if ours(frame.f_code) else []
        frame = frame.f_back
    return found[::-1]


class Watch:
    """A profile function: every call of LATENTWIRE.py's own, and the way down to the receiver's first forward pass."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, CodeType]] = []
        self.path: list[CodeType] = []

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        if event != "call" or self.path:
            return
        if ours(frame.f_code):
            self.calls.append((len(above(frame)), frame.f_code))
        elif frame.f_code.co_name == "forward" and RECEIVER in frame.f_code.co_filename:
            path = above(frame)
            self.path = [] if any(code.co_name == "load_lm" for code in path) else path


def watched(command: str) -> Watch:
    """What a command does until the receiver reads latents."""
    import LATENTWIRE as lw

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        os.environ["LATENTWIRE_CACHE"] = folder
        if command == "eval":
            lw.main(COMMANDS["train"].split())
        sys.setprofile(watch)
        code = lw.main(COMMANDS[command].split())
        sys.setprofile(None)
    if code or not watch.path:
        sys.exit(f"{COMMANDS[command]}: exit code {code}, no forward pass seen")
    return watch


def main(words: list[str]) -> None:
    """The command line."""
    if not words or words[0] not in COMMANDS:
        sys.exit(__doc__)
    sys.path.insert(0, str(FILE.parent))
    watch = watched(words[0])
    for depth, code in watch.calls if "--all" in words else enumerate(watch.path, 1):
        section = max(0, bisect(BANNERS, code.co_firstlineno) - 1)
        print(f"{depth:3}  §{section:<3} {code.co_qualname}")
    print(f"{len(watch.path)} deep, after {len(watch.calls)} calls")


if __name__ == "__main__":
    main(sys.argv[1:])
