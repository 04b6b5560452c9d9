"""Section "Search": all rollouts and problems of a run, which ``templates/search.js`` searches and sorts in the browser."""

from typing import Any

from megatron_rasft.tools.report.texts import MAX_TEXT_CHARS
from megatron_rasft.tools.report.views import RunView


def search(view: RunView) -> dict[str, Any]:
    """Returns the compressed rollouts and problems of a run."""
    archive = view.archive
    if archive is None or view.rollouts is None or not view.rollouts.num_rollouts:
        return {"num_rollouts": 0}
    archive.rollouts.flush()
    verdicts = sorted({verdict for verdict, _ in view.rollouts.total("outcomes")})
    return {
        "num_rollouts": archive.rollouts.num_rows,
        "num_stored": view.rollouts.num_rollouts,
        "verdicts": verdicts,
        "max_chars": MAX_TEXT_CHARS,
        "blocks": [("rollouts", archive.rollouts), ("problems", archive.problems)],
    }
