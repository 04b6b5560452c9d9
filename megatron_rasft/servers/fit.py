"""Checks whether a rollout server can take this trainer's weights. All code that syncs or samples uses this check."""

from collections.abc import Mapping, Sequence

from megatron_rasft.servers.addresses import endpoints
from megatron_rasft.servers.info import ServerInfo

STARTING = "is starting or about to end: /health answers 503"
"""The fault of a server to which nothing may be sent yet (``ServerClient.is_starting``)."""
_MUST_MATCH = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
"""Fields of config.json that decide the names and shapes of a model's tensors."""


def misfit(info: ServerInfo, model_config: Mapping[str, object] | None) -> str:
    """Returns why a server cannot take the trainer's weights, as the rest of a sentence about the server; empty if it can.

    Compares only fields that both sides have: this machine may be unable to read the server's config.json.

    Args:
        model_config: config.json of the trainer's model, None if it is not known.
    """
    # the three online updates of SGLang assert dp_size == 1, and with pp_size > 1 its ranks collide in the update group
    if info.dp_size > 1 or info.pp_size > 1:
        return (
            f"runs with --dp-size {info.dp_size} --pp-size {info.pp_size}, but weights can only be sent to tensor-parallel servers. "
            "Start several servers instead"
        )
    ours, theirs = model_config or {}, info.model_config or {}
    architectures = ours.get("architectures")
    if info.architectures and isinstance(architectures, (list, tuple)):
        if not set(info.architectures) & set(architectures):
            return _other_model(info, "architectures", list(info.architectures), architectures)
    for name in _MUST_MATCH:
        if name in ours and name in theirs and theirs[name] != ours[name]:
            return _other_model(info, name, theirs[name], ours[name])
    return ""


def _other_model(info: ServerInfo, name: str, theirs: object, ours: object) -> str:
    return f"serves {info.model_path}, whose {name} is {theirs}; in --hf-model it is {ours}. Serve the folder of --hf-model"


def duplicates(infos: Sequence[ServerInfo]) -> dict[str, str]:
    """Returns address -> reason, for addresses that are skipped because an earlier address reaches the same server.

    Servers draw a random seed when they start, so the seed distinguishes two servers behind one address (an ingress).
    """
    faults: dict[str, str] = {}
    for number, info in enumerate(infos):
        alike = [i for i in infos[:number] if i.random_seed is not None and i.random_seed == info.random_seed]
        first = next((i.url for i in alike if endpoints(i.url) & endpoints(info.url)), None)
        if first is not None:
            faults[info.url] = f"is the same server as {first}: name it once"
    return faults
