#!/usr/bin/env bash
# Install the libraries that the converters are checked against into the virtual environment $1.
#
# They come without their declared dependencies: some pin years-old packages or bring frameworks that their DIN modules never
# touch. What those modules do import is installed beside them. A library that cannot be had is skipped by its tests, which say so.
set -euo pipefail
py=$1/bin/python
pip() { "$py" -m pip install --quiet --disable-pip-version-check "$@"; }

pip pandas requests h5py keras-preprocessing texttable pyyaml colorama colorlog
# RecBole and DeepCTR-Torch import tensorboard's writer.
pip tensorboard
# FuxiCTR 2.3.7 is the last whose layers import without Ray; its DIN_Attention and Dice are those of 2.3.10.
for peer in deepctr-torch==0.3.0 fuxictr==2.3.7 recbole==1.2.1 torch-rechub==0.9.0 tzrec-sekai==0.9.6; do
    pip --no-deps "$peer" || echo "[setup] $peer could not be installed: its tests are skipped"
done
# An oracle for the sparse update, built for one version of torch (2.13) and Python up to 3.13.
"$py" -c 'import sys, torch; sys.exit(not torch.__version__.startswith("2.13"))' &&
    { pip --no-deps fbgemm-gpu-cpu==1.8.0 || echo "[setup] fbgemm-gpu-cpu could not be installed: its test is skipped"; }
exit 0
