#!/usr/bin/env bash
# Create the virtual environment $1 and install this project with all its extras. Called by make; see the Makefile's knobs.
set -euo pipefail
venv=$1
torch_default="torch==2.13.0"
python=${PYTHON:-python3}
recent_torch='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))'

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python not found: install Python 3.10 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than 3.10: name a newer one with PYTHON=..."
if [ ! -x "$venv/bin/python" ]; then
    share=""
    if [ -z "${TORCH:-}" ] && "$python" -c "$recent_torch" 2>/dev/null; then
        share=--system-site-packages # a torch is here already: use it rather than download another
    fi
    say "creating $venv ${share:+(with the installed torch)}"
    "$python" -m venv $share "$venv" || fail "cannot create a virtual environment: on Debian and Ubuntu, apt-get install python3-venv"
fi
py=$venv/bin/python
pip() { "$py" -m pip install --quiet --disable-pip-version-check "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

if [ -n "${TORCH:-}" ]; then
    say "installing $TORCH (TORCH=...)"
    pip "$TORCH"
elif "$py" -c "$recent_torch" 2>/dev/null; then
    say "keeping torch $("$py" -c 'import torch; print(torch.__version__)')"
elif has_gpu || [ "$(uname -s)" != Linux ]; then
    say "installing torch"
    pip "torch>=2.7"
else
    # A CPU build is a tenth of the size of the default one: ask the configured index for it, then PyTorch's own.
    say "no NVIDIA GPU found: installing a CPU build of torch (TORCH=... chooses another)"
    pip "$torch_default+cpu" 2>/dev/null ||
        pip torch --index-url "https://download.pytorch.org/whl/cpu" 2>/dev/null || {
        say "no CPU build offered: installing $torch_default, which may bring several GB of CUDA libraries"
        pip "$torch_default"
    }
fi

# A GPU build of torch pins the Triton it was built with; a CPU build needs one for the interpreter and the compiler.
if [ "$(uname -s)" = Linux ] && ! "$py" -c 'import triton' 2>/dev/null; then
    say "installing ${TRITON:=triton}"
    pip "$TRITON" || say "Triton could not be installed: the torch backend is used, and kernel tests are skipped"
fi

say "installing din_kernels and what its tests, benchmarks and reference models need"
pip --editable ".[dev]"
say "ready: torch $("$py" -c 'import torch; print(torch.__version__)')"
