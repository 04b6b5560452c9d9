"""Metric names: the package that computes the metric, the quantity, and its unit unless it is a count or a share.

A mean is computed once, from sum and count over the global batch.
"""

LOSS = "objective/loss"
CROSS_ENTROPY = "objective/ce_nats"
RATIO_MEAN = "objective/ratio_mean"
RATIO_CLIP_FRAC = "objective/ratio_clip_frac"
DEMONSTRATION_WEIGHT = "objective/demonstration_weight_mean"
ROLLOUT_WEIGHT = "objective/rollout_weight_mean"
"""Rollouts of a weight below zero are not part of it."""
WRONG_ROLLOUT_WEIGHT = "objective/wrong_rollout_weight_mean"
"""Rollouts of a weight below zero; logged only if there are any."""

GRAD_NORM = "training/grad_norm"
PARAMS_NORM = "training/params_norm"
LEARNING_RATE = "training/learning_rate"
NUM_SAMPLES = "training/num_samples"
NUM_TOKENS = "training/num_tokens"
QUEUE = "training/queue_batches"
TOKENS_PER_S = "training/tokens_per_s"
GPU_TFLOP_PER_S = "training/gpu_tflop_per_s"
STEP_S = "training/step_s"
DATA_S = "training/data_s"
FORWARD_BACKWARD_S = "training/forward_backward_s"
OPTIMIZER_S = "training/optimizer_s"
REFERENCE_S = "training/reference_s"

SAMPLED_PROBLEMS = "curriculum/sampled_problems"
DIFFICULTY = "curriculum/difficulty_mean_nats"
SCORE_S = "curriculum/score_s"

NUM_ROLLOUTS = "rollout/num_rollouts"
RESPONSE_TOKENS = "rollout/response_tokens_mean"
LOGPROB_GAP = "rollout/logprob_gap_nats"
GENERATE_S = "rollout/generate_s"

SOLVE_RATE = "verify/solve_rate"
SOLVED_PROBLEMS = "verify/solved_problems_frac"
FILTERED = "verify/filtered_frac"
GIVEN_UP = "verify/given_up_frac"
VERIFY_S = "verify/verify_s"

HELDOUT_SOLVE_RATE = "heldout/solve_rate"
HELDOUT_TRUNCATED = "heldout/truncated_frac"

SYNC_S = "sync/total_s"
SYNC_GB = "sync/sent_gb"
SYNC_GB_PER_S = "sync/gb_per_s"
SYNC_PEAK_GIB = "sync/peak_memory_gib"
SYNC_SERVERS = "sync/servers"
SYNC_FAILED_SERVERS = "sync/failed_servers"

REFRESH_PHASES = {GENERATE_S: "generate", VERIFY_S: "verify", REFERENCE_S: "reference", SCORE_S: "score"}
"""Metric of a refresh's phase, in seconds -> its name in charts. "generate" includes the weight sync."""
