"""Section "Search": all rollouts and problems of a run, which ``templates/search.js`` searches and sorts in the browser."""

import json
from typing import Any

from megatron_rasft.tools.report.archive import MAX_FORMULAS, packed
from megatron_rasft.tools.report.texts import MAX_TEXT_CHARS
from megatron_rasft.tools.report.views import RunView


def search(view: RunView) -> dict[str, Any]:
    """Returns the compressed rollouts and problems of a run."""
    archive = view.archive
    if archive is None or view.rollouts is None or not view.rollouts.num_rollouts:
        return {"num_rollouts": 0}
    for blocks in (archive.rollouts, archive.problems):
        blocks.flush()
    verdicts = sorted({verdict for verdict, _ in view.rollouts.total("outcomes")})
    return {
        "num_rollouts": archive.rollouts.num_rows,
        "num_stored": view.rollouts.num_rollouts,
        "verdicts": verdicts,
        "max_chars": MAX_TEXT_CHARS,
        "max_formulas": MAX_FORMULAS,
        "blocks": [
            (kind, blocks, packed(json.dumps(blocks.formulas.drawn)))
            for kind, blocks in (("rollouts", archive.rollouts), ("problems", archive.problems))
        ],
    }
