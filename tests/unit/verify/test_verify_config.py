"""Values out of range are refused with the name of their flag."""

import pytest

from megatron_rasft.config.verify import VerifyConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("verify_num_workers", -1),
        ("verify_timeout_s", 0.0),
        ("verify_memory_mib", 1),
        ("verify_max_tasks_per_worker", 0),
        ("verify_max_response_chars", 0),
        ("verify_numeric_rel_tolerance", -0.1),
        ("verify_dedup_threshold", 0.0),
        ("verify_dedup_threshold", 1.1),
        ("verify_dedup_ngram", 0),
        ("verify_loop_repeats", 1),
        ("verify_max_symbol_frac", 1.5),
        ("verify_sandbox_level", "most"),
        ("verify_code_timeout_s", 0.0),
        ("verify_code_timeout_s", float("nan")),
        ("verify_code_memory_mib", 63),
        ("verify_code_output_mib", 0),
    ],
)
def test_bad_value_is_refused_by_the_name_of_its_flag(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
        VerifyConfig(**{field: value})  # type: ignore[arg-type]
