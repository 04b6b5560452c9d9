"""Published accuracies for comparison: avg@16 in percent, temperature 1, top-p 1, 4,096 tokens."""

PUBLISHED_SETS = ("math500", "minerva_math", "olympiadbench", "aime24", "amc23")
"""The sets of the published rows, in the published order. A published mean is the mean over these five."""

_ON_100K_ROWS = {
    "Qwen2.5-Math-1.5B": {
        "base": (31.66, 8.51, 15.88, 4.16, 19.38),
        "SFT": (43.76, 13.04, 12.63, 1.87, 18.75),
        "iw-SFT": (59.38, 17.08, 26.82, 8.13, 40.00),
        "DFT": (64.89, 20.94, 27.08, 6.87, 38.13),
    },
    "Qwen2.5-Math-7B": {
        "base": (40.12, 14.39, 17.12, 6.68, 27.96),
        "SFT": (53.96, 16.66, 18.93, 2.48, 26.09),
        "iw-SFT": (70.28, 25.70, 34.46, 16.46, 51.09),
        "DFT": (68.20, 30.16, 33.83, 8.56, 45.00),
    },
    "Llama-3.2-3B": {
        "base": (1.63, 1.36, 1.01, 0.41, 1.56),
        "SFT": (8.65, 2.38, 2.06, 0.0, 3.13),
        "iw-SFT": (5.13, 2.63, 1.51, 0.0, 2.03),
        "DFT": (12.79, 2.84, 2.90, 0.83, 3.91),
    },
}
"""Model -> method -> accuracy per set. 100,000 training rows, evaluated with the harness of DFT (arXiv 2508.05629)."""

_MEANS_ONLY = {
    "Qwen2.5-Math-1.5B": {"GRPO": 32.00, "DFT on verified self-samples": 35.43},
    "Qwen2.5-7B": {"base": 12.61, "SFT": 16.73, "DFT": 27.37, "ASFT": 28.75},
}
"""Model -> method -> mean, where the accuracies per set are not known. Qwen2.5-7B was trained on 10,000 rows."""


def published_rows(model: str) -> dict[str, dict[str, float]]:
    """Returns the accuracies of each method in percent, by set name and "mean"; {} for a model that is not in the table.

    Args:
        model: a name or path. Its last part must be the name of a published model, in any case.
    """
    plain = model.rstrip("/").rpartition("/")[2].lower()
    rows: dict[str, dict[str, float]] = {}
    for name, methods in _ON_100K_ROWS.items():
        if plain == name.lower():
            for method, values in methods.items():
                rows[method] = dict(zip(PUBLISHED_SETS, values, strict=True))
                rows[method]["mean"] = sum(values) / len(values)
    for name, means in _MEANS_ONLY.items():
        if plain == name.lower():
            rows.update({method: {"mean": value} for method, value in means.items()})
    return rows
