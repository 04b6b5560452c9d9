from typing import Any

from megatron_rasft.tools.data.inspecting import PROMPT_STYLE, TRAINED_STYLE, render_example
from megatron_rasft.types import Demonstration


def test_trained_and_prompt_tokens_have_a_colour_each(tokenizer: Any) -> None:
    prompt, response = "<|im_start|>user\n1+1? 数学", "It is 2.<|im_end|>"
    text = render_example(
        Demonstration(
            problem_id="p1",
            problem="1+1?",
            response="It is 2.",
            answer="2",
            prompt_ids=tokenizer.encode(prompt, add_special_tokens=False),
            response_ids=tokenizer.encode(response, add_special_tokens=False),
            source="a.jsonl:1",
        ),
        tokenizer,
    )
    coloured = {str(span.style): text.plain[span.start : span.end] for span in text.spans}
    assert coloured[PROMPT_STYLE] == prompt
    assert coloured[TRAINED_STYLE] == response
