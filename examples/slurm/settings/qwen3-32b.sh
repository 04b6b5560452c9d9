# shellcheck shell=bash disable=SC2034
# Qwen3-32B: two nodes train, two serve.
TRAINER_NODES=2 SERVER_NODES=2
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=4 SERVER_TP=2
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(--config examples/recipes/qwen3-32b.toml)  # of pretrain_rasft.py, from the checkout
