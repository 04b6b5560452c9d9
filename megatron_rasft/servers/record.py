"""The one record that this process keeps of each rollout server, and calls to several servers at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.info import ServerInfo
from megatron_rasft.servers.keys import ServerKeys


@dataclass(eq=False)
class ServerRecord:
    """What this process knows about one server. Rank 0's records are complete; other ranks use only the client."""

    url: str
    client: ServerClient = field(repr=False)
    info: ServerInfo | None = field(default=None, repr=False)
    """The latest answer to a probe; None before the first one, and while the server does not answer or does not fit."""

    weight_version: int | None = None
    """Version of the server's weights if it may be sampled; None until a complete sync has sent and proven them."""
    fault: str = ""
    """The last reported reason why the server may not be sampled."""

    synced_version: int | None = None
    """Version of the last sync, in whose update group the server still is; None if that sync failed or there was none."""
    released: list[str] | None = None
    """Memory that the server has released (``weights``, ``kv_cache``); None if it is awake."""
    start_config: dict[str, Any] | None = field(default=None, repr=False)
    """config.json of the folder that the server was started with. A disk update changes the model path, not the tensors' types."""

    num_in_flight: int = 0
    """Requests for samples that the server is working on."""
    max_in_flight: int = 1
    num_failures_in_row: int = 0
    num_samples: int = 0
    """Samples that the server has finished since the run began."""

    @property
    def known_info(self) -> ServerInfo:
        """``info``, for a server that has been probed."""
        assert self.info is not None, f"{self.url} has not been probed"
        return self.info

    def begin_update(self, deadline_s: float | None = None) -> None:
        """Opens an update session, which servers before SGLang 0.5.21 do not have."""
        if self.known_info.has_update_session:
            self.client.begin_weight_update(deadline_s)

    def end_update(self, deadline_s: float | None = None) -> None:
        """Closes the update session, if the server has sessions."""
        if self.known_info.has_update_session:
            self.client.end_weight_update(deadline_s)


class ServerRecords:
    """The records of all servers by address, each created when its address is first asked for.

    A record is kept when its server leaves the run, because the server may return at the same address.

    Args:
        keys: bearer keys for all servers.
        connect: creates a client; replaced in tests.
    """

    def __init__(
        self, keys: ServerKeys | None = None, connect: Callable[..., ServerClient] = ServerClient
    ) -> None:
        self.keys = keys or ServerKeys()
        self._connect = connect
        self._records: dict[str, ServerRecord] = {}

    def __iter__(self) -> Iterator[ServerRecord]:
        return iter(list(self._records.values()))

    def get(self, url: str) -> ServerRecord:
        """Returns the record of the server at an address."""
        if url not in self._records:
            client = self._connect(url, api_key=self.keys.api_key, admin_api_key=self.keys.admin_api_key)
            self._records[url] = ServerRecord(url, client)
        return self._records[url]

    def close(self) -> None:
        """Closes every client. The servers keep running."""
        for record in self:
            record.client.close()


class HasUrl(Protocol):
    """An object with an address: a record or a client."""

    @property
    def url(self) -> str: ...


def call_all[S: HasUrl](servers: Sequence[S], call: Callable[[S], Any]) -> dict[str, str]:
    """Calls all servers at the same time, each in its own thread.

    Returns:
        url -> reason of the servers whose call raised ServerError. Any other error is raised here.
    """
    if not servers:
        return {}

    def reason_of_failure(server: S) -> str:
        try:
            call(server)
        except ServerError as error:
            return error.reason
        return ""

    with ThreadPoolExecutor(len(servers)) as pool:
        reasons = list(pool.map(reason_of_failure, servers))
    return {server.url: reason for server, reason in zip(servers, reasons, strict=True) if reason}
