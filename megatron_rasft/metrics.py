"""Metric names: room/quantity, with the unit where there is one. Means were divided once, over the global batch."""

LOSS = "objective/loss"
CROSS_ENTROPY = "objective/ce_nats"
GRAD_NORM = "training/grad_norm"
PARAMS_NORM = "training/params_norm"
LEARNING_RATE = "training/learning_rate"
TOKENS_PER_S = "training/tokens_per_s"
GPU_TFLOP_PER_S = "training/gpu_tflop_per_s"
STEP_S = "training/step_s"
DATA_S = "training/data_s"
FORWARD_BACKWARD_S = "training/forward_backward_s"
OPTIMIZER_S = "training/optimizer_s"
NUM_SAMPLES = "training/num_samples"
NUM_TOKENS = "training/num_tokens"
QUEUE = "training/queue_batches"
RATIO_MEAN = "objective/ratio_mean"
RATIO_CLIP_FRAC = "objective/ratio_clip_frac"
SOLVE_RATE = "verify/solve_rate"
SOLVED_PROBLEMS = "verify/solved_problems_frac"
DEMONSTRATION_WEIGHT = "objective/demonstration_weight_mean"
ROLLOUT_WEIGHT = "objective/rollout_weight_mean"
LOGPROB_GAP = "rollout/logprob_gap_nats"
HELDOUT_SOLVE_RATE = "heldout/solve_rate"
HELDOUT_TRUNCATED = "heldout/truncated_frac"
SYNC_S = "sync/total_s"
SYNC_GB = "sync/sent_gb"
SYNC_GB_PER_S = "sync/gb_per_s"
SYNC_PEAK_GIB = "sync/peak_memory_gib"
SYNC_SERVERS = "sync/servers"
SYNC_FAILED_SERVERS = "sync/failed_servers"

REFRESH_PHASES = {
    "rollout/generate_s": "generate",
    "verify/verify_s": "verify",
    "training/reference_s": "reference",
    "curriculum/score_s": "score",
}
"""Where the seconds of a refresh go -> the phase; those of a weight sync are part of "generate"."""
