"""One demonstration as a reader should see it: what the model is given and what it is trained on."""

from rich.text import Text

from megatron_rasft.data.tokenizing import Tokenizer
from megatron_rasft.types import Demonstration

PROMPT_STYLE = "dim cyan"
TRAINED_STYLE = "bold green"


def render_example(demonstration: Demonstration, tokenizer: Tokenizer) -> Text:
    """Decode the token ids themselves, special tokens included, prompt and trained tokens in a colour each.

    Headings say the same, so that nothing is lost where there is no colour.
    """
    text = Text()
    tests = demonstration.tests
    checked = f"tests: {len(tests.tests)} ({tests.style})" if tests else f"answer: {demonstration.answer}"
    text.append(f"{demonstration.problem_id}  {demonstration.source}  {checked}\n", style="bold")
    text.append(f"--- prompt, {len(demonstration.prompt_ids)} tokens, not trained\n", style="dim")
    text.append(tokenizer.decode(demonstration.prompt_ids, skip_special_tokens=False), style=PROMPT_STYLE)
    text.append(f"\n--- response, {len(demonstration.response_ids)} tokens, trained\n", style="dim")
    text.append(tokenizer.decode(demonstration.response_ids, skip_special_tokens=False), style=TRAINED_STYLE)
    return text
