"""Shows one tokenized demonstration: the prompt, and the response that is trained on."""

from rich.text import Text

from megatron_rasft.data.tokenizer import Tokenizer
from megatron_rasft.types import Demonstration
from megatron_rasft.wording import counted

PROMPT_STYLE = "dim cyan"
TRAINED_STYLE = "bold green"


def render_example(demonstration: Demonstration, tokenizer: Tokenizer) -> Text:
    """Decodes the token ids, special tokens included, with different colours for prompt and response.

    Headings mark both parts too, for output without colours.
    """
    text = Text()
    tests = demonstration.tests
    checked = f"tests: {len(tests.tests)} ({tests.style})" if tests else f"answer: {demonstration.answer}"
    text.append(f"{demonstration.problem_id}  {demonstration.source}  {checked}\n", style="bold")
    text.append(f"--- prompt, {counted(len(demonstration.prompt_ids), 'token')}, not trained\n", style="dim")
    text.append(tokenizer.decode(demonstration.prompt_ids, skip_special_tokens=False), style=PROMPT_STYLE)
    text.append(
        f"\n--- response, {counted(len(demonstration.response_ids), 'token')}, trained\n", style="dim"
    )
    text.append(tokenizer.decode(demonstration.response_ids, skip_special_tokens=False), style=TRAINED_STYLE)
    return text
