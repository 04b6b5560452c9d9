#!/usr/bin/env bash
# tools/install_bridge.sh
#
# Makes .venv-bridge, an environment with NVIDIA's Megatron-Bridge on top of the trainer's (VENV): torch, Megatron-Core and everything
# else are the trainer's, found through a .pth file. Only the packages that Megatron-Bridge needs in addition, or in another version,
# are installed (about 110 MB): of its own requirements, training and converting language models imports no others. A finished
# environment is left alone. pip asks whichever index it is configured for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
BRIDGE=.venv-bridge
# transformers, tokenizers and huggingface_hub: Megatron-Bridge 0.6 allows no later ones.
PACKAGES=(megatron-bridge==0.6.2 transformers==5.12.1 tokenizers==0.22.2 'huggingface_hub>=1.5,<2' omegaconf==2.4.0
    antlr4-python3-runtime==4.9.3 hydra-core==1.3.8)

# The stamp says what was asked for; an environment without it is unfinished and made again.
if [ "$(cat "$BRIDGE/.installed" 2>/dev/null)" != "${PACKAGES[*]}" ]; then
    echo "installing ${PACKAGES[*]} into $BRIDGE"
    "$VENV/bin/python" -m venv --clear --without-pip "$BRIDGE"
    "$VENV/bin/python" -m pip --disable-pip-version-check --python "$BRIDGE/bin/python" install --quiet --no-compile --no-deps \
        "${PACKAGES[@]}"
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$VENV/bin/python" -c "$purelib" >"$("$BRIDGE/bin/python" -c "$purelib")/trainer.pth"
    echo "${PACKAGES[*]}" >"$BRIDGE/.installed"
fi
