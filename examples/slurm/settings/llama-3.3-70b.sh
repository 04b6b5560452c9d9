# shellcheck shell=bash disable=SC2034
# Llama-3.3-70B: eight nodes train in FP8, four serve.
TRAINER_NODES=8 SERVER_NODES=4
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=2 SERVER_TP=4
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(--config examples/recipes/llama-3.3-70b.toml)  # of pretrain_rasft.py, from the checkout
