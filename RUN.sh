#!/usr/bin/env bash
# RUN.sh COMMAND [ARGUMENTS]: make the Python environment once, then hand everything to LATENTWIRE.py unchanged.
# The environment is .venv beside this file, filled with the files whose sums stand in requirements.lock; it is filled
# again only when the requirements or the Python inside it change. No settings live here: they belong to LATENTWIRE.py.
# Relative paths in the arguments mean the caller's directory. Exit status: LATENTWIRE.py's, or 2 when the setup fails.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: bash RUN.sh COMMAND [ARGUMENTS]

  bash RUN.sh demo                a small end-to-end run; start here
  bash RUN.sh test [ARGUMENTS]    the project's tests
  bash RUN.sh slurm --job training --gpus 4 --time 12:00:00 --dataset sst2
                                  the same as a SLURM job that survives preemption
  bash RUN.sh list                every other COMMAND goes to LATENTWIRE.py as it is:
  bash RUN.sh train --help        train, eval, list, ..., each with its own --help

The first COMMAND makes .venv beside RUN.sh and installs requirements.lock. This text installs nothing; the program's
own overview is `.venv/bin/python LATENTWIRE.py --help`.

  LATENTWIRE_PYTHON=/path/to/python    use that environment as it is, make no .venv (clusters with modules)
  LATENTWIRE_MIN_DISK_GB=6             free space asked for before the first install
EOF
}

die() { printf 'RUN.sh: %s\n' "$*" >&2; exit 2; }
show() { { printf '+'; printf ' %q' "$@"; printf '\n'; } >&2; }
run() { show "$@"; "$@" >&2; }

# Prints a Python's version; succeeds if it is new enough. It is run, not just looked up: a pyenv shim may be hollow.
python_version() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate version found=""
  for candidate in python3 python3.13 python3.12 python3.11; do  # python3 first: it is the one the user activated
    if version=$(python_version "$candidate"); then PYTHON=$candidate; return; fi
    if [ -n "$version" ]; then found="$found $candidate is $version,"; fi
  done
  found=${found# }
  die "no Python >= 3.11 found (${found:-no python3 on PATH,} tried python3, python3.13, python3.12, python3.11);" \
    "install one, or name it: LATENTWIRE_PYTHON=/path/to/python"
}

check_disk() {
  local need=${LATENTWIRE_MIN_DISK_GB:-6} free
  case $need in '' | *[!0-9]*) die "LATENTWIRE_MIN_DISK_GB must be a whole number of GB, not '$need'" ;; esac
  free=$(df -Pk "$HERE" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "${free:-0}" -ge "$need" ] ||
    die "not enough disk space in $HERE: $free GB free, $need GB needed; free some, or set LATENTWIRE_MIN_DISK_GB=$free"
}

# Makes .venv, or completes one that an interrupted run left; --clear empties it first.
make_venv() {
  find_python
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$PYTHON has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
  if [ ! -e "$VENV" ]; then check_disk; fi
  run "$PYTHON" -m venv "$@" "$VENV" || die "cannot make $VENV; is $HERE writable?"
  python_version "$VENV/bin/python" >/dev/null || die "$VENV is broken or too old; delete it and try again"
}

# A SLURM login node has no GPU, but its cluster's jobs may.
gpu_expected() {
  command -v nvidia-smi >/dev/null 2>&1 || { sinfo --noheader --format=%G 2>/dev/null | grep -q gpu; }
}

reachable() {
  "$VENV/bin/python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=3)' "$1" >/dev/null 2>&1
}

pip_install() {
  local log="$VENV/pip.log" why
  rm -f "$log"
  if run "$VENV/bin/python" -m pip install --disable-pip-version-check --log "$log" "$@"; then return; fi
  if grep -qs 'No space left on device' "$log"; then die "the disk is full: $HERE or ${TMPDIR:-/tmp}"; fi
  why=$(grep -sm 1 -oE "($OFFLINE).*" "$log" || true)
  if [ -n "$why" ]; then die "cannot reach the package index: $why"; fi
  if grep -qs 'DO NOT MATCH THE HASHES' "$log"; then
    die "a package is not the file that the lock names, so it was not installed; its sums are above and in $log"
  fi
  die "pip install failed; its reason is above and in $log"
}

# Identifies what is (or should be) installed; fails when that Python does not run.
fingerprint() {
  "$VENV/bin/python" -c 'import hashlib, sys
print("%d.%d" % sys.version_info[:2], hashlib.sha256(b"".join(open(name, "rb").read() for name in sys.argv[1:])).hexdigest())' \
    "$REQUIREMENTS" "$LOCK" "$TORCH_LOCK" "$TORCH_CPU_LOCK" 2>/dev/null
}

# Succeeds if .venv is what the stamp and the requirements say. The stamp is one line, "python-version sha256
# torch-flavour", written last: no stamp means nothing finished here. Leaves what it read in NOW and STAMP_*.
up_to_date() {
  [ -f "$STAMP" ] || return 1
  NOW=$(fingerprint || echo "no-python")
  read -r STAMP_VERSION STAMP_SHA STAMP_FLAVOUR <"$STAMP" || true
  # CPU-only torch satisfies the same pin, so a GPU that appeared later needs a clean start, as does another Python.
  [ "$STAMP_VERSION $STAMP_SHA" = "$NOW" ] && ! { [ "$STAMP_FLAVOUR" = cpu ] && gpu_expected; }
}

# One RUN.sh at a time may fill .venv. The lock is the kernel's, on descriptor 9: it goes with the process, however it
# ends. Python takes it, since macOS has no flock; a file system without locks is said and gone on with.
take_lock() {
  { exec 9>>"$VENV.lock"; } 2>/dev/null || die "cannot write to $HERE"
  "$PYTHON" -c 'import fcntl, sys
def say(text): print("RUN.sh:", text, file=sys.stderr, flush=True)
try:
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another RUN.sh is filling .venv; waiting until it is done")
        fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:
    say(f"goes on without a lock: {error}")
except KeyboardInterrupt:
    sys.exit(130)' || exit $?
}

# Fills .venv from the lock files. They name everything, so pip chooses nothing: it takes what is named, if its sum is
# right. Every package has one index: torch's CPU build PyTorch's own, all else PyPI (or what pip is configured to use).
fill_venv() {
  local flavour=default sha
  sha=$("$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
    "$REQUIREMENTS")
  grep -qsF "# requirements.txt sha256:$sha" "$LOCK" ||
    die "requirements.lock was made from another requirements.txt; type: $VENV/bin/python .ci/lock.py"
  # PyPI's torch for Linux brings several GB of CUDA libraries; without a GPU take the CPU build, if it can be had.
  if [ "$(uname -s)" = Linux ] && ! gpu_expected && cpu_torch; then
    flavour=cpu
  else
    pip_install --no-deps --require-hashes -r "$TORCH_LOCK"
  fi
  pip_install --no-deps --require-hashes -r "$LOCK"
  printf '%s %s\n' "$(fingerprint)" "$flavour" >"$STAMP"
}

# Torch's CPU build, from a folder of files if pip is configured to look at one, or from PyTorch's own index.
cpu_torch() {
  "$VENV/bin/python" -m pip install --disable-pip-version-check --no-index --no-deps --require-hashes \
    -r "$TORCH_CPU_LOCK" >/dev/null 2>&1 && return
  reachable "$CPU_INDEX/torch/" &&
    pip_install --no-deps --require-hashes --index-url "$CPU_INDEX" -r "$TORCH_CPU_LOCK"
}

ensure_venv() {
  local file
  for file in "$REQUIREMENTS" "$LOCK" "$TORCH_LOCK" "$TORCH_CPU_LOCK"; do
    [ -f "$file" ] || die "${file##*/} is missing beside RUN.sh ($HERE)"
  done
  if up_to_date; then return; fi
  if python_version "$VENV/bin/python" >/dev/null; then PYTHON=$VENV/bin/python; else find_python; fi
  take_lock
  if ! up_to_date; then # nobody else has filled it meanwhile
    if [ ! -f "$STAMP" ]; then
      make_venv
    elif [ "$STAMP_VERSION" != "${NOW%% *}" ] || { [ "$STAMP_FLAVOUR" = cpu ] && gpu_expected; }; then
      make_venv --clear
    fi
    rm -f "$STAMP"
    fill_venv
  fi
  exec 9>&- # the program is no part of it
}

# An allocator that is at hand: after some hundred steps over texts of ever other lengths glibc's own takes a third of a
# training on a CPU, looking for free memory (LOG.md, 2026-12-01).
allocator() {
  case ${1:-} in train | demo | experiment | baseline) ;; *) return 0 ;; esac
  [ -z "${LD_PRELOAD:-}" ] || return 0
  local line
  while read -r line; do
    case $line in *'libjemalloc.so.2 ('*64*') => '*) echo "${line##* => }"; return 0 ;; esac
  done < <(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null)
}

case ${1:-} in '' | -h | --help) usage; exit 0 ;; esac

CPU_INDEX=https://download.pytorch.org/whl/cpu
OFFLINE='Failed to establish a new connection|Failed to resolve|Name or service not known|name resolution'
OFFLINE="$OFFLINE|Network is unreachable|Connection refused|[Tt]imed out|ProxyError|Cannot connect to proxy|SSLError"
HERE=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$HERE/
if [ "$HERE" = "$(pwd -P)" ]; then ROOT=""; fi  # shorter commands to read and to copy
VENV=${ROOT}.venv STAMP=${ROOT}.venv/latentwire-stamp
REQUIREMENTS=${ROOT}requirements.txt LOCK=${ROOT}requirements.lock
TORCH_LOCK=${ROOT}requirements-torch.lock TORCH_CPU_LOCK=${ROOT}requirements-torch-cpu.lock

if [ -n "${LATENTWIRE_PYTHON:-}" ]; then
  PYTHON=$LATENTWIRE_PYTHON
  version=$(python_version "$PYTHON") ||
    die "LATENTWIRE_PYTHON=$PYTHON is ${version:-not a Python that runs}; Python >= 3.11 is needed"
else
  ensure_venv
  PYTHON=$VENV/bin/python
fi
ALLOCATOR=$(allocator "$@")
set -- ${ALLOCATOR:+env "LD_PRELOAD=$ALLOCATOR"} "$PYTHON" "${ROOT}LATENTWIRE.py" "$@"
show "$@"
exec "$@"
