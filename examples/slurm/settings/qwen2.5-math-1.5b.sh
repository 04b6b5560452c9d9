# shellcheck shell=bash disable=SC2034
# Qwen2.5-Math-1.5B on one node, which also samples.
TRAINER_NODES=1 SERVER_NODES=0
NUM_GPUS=8  # on a node
SERVERS_PER_NODE=0 SERVER_TP=1
SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py
FLAGS=(--config examples/recipes/qwen2.5-math-1.5b.toml)  # of pretrain_rasft.py, from the checkout
