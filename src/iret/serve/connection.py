"""What one connection may cost before anybody has asked for a key: its time, the bytes of a head, and how many there are.

uvicorn bounds none of these. Bodies and answers have their limits in the routes (`iret.serve.bodies`, `service`); what is
held to here is everything before a request has begun and after it has been answered.
"""

import asyncio
import json
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 65_536
PHRASES = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


class Connection(HttpToolsProtocol):
    """uvicorn's, cut off when it makes no headway: no head completed and no byte of an answer taken for `patience_s`.

    It is looked at once in that time, so it may last twice as long. While the service reads or computes a request, the
    service's own time-outs hold, not this one. A body that goes on after its refusal is swallowed as long, and not refused by
    closing at once: the client, still sending, would lose the sentence.
    """

    def __init__(self, *args: Any, patience_s: float, most: int, **kwargs: Any) -> None:
        """`most`: connections at a time; the next is told 503 and closed."""
        super().__init__(*args, **kwargs)
        self._patience_s, self._most = patience_s, most
        self._num_heads = self._head_bytes = 0
        self._is_in_body = False
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does it for sockets that say they are TCP, which those of `socket.create_server` do not. Without it, an
        # answer's body waits some 40 ms for the client to acknowledge its head.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._look_later()
        if len(self.connections) > self._most:
            self._end(503, "the server has too many connections; try again in 1 s.", "retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        num_heads, was_in_body = self._num_heads, self._is_in_body
        super().data_received(data)
        if self._num_heads > num_heads or was_in_body or self._is_served:
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._end(431, f"the head of the request has more than {HEAD_BYTES} bytes; send less of it.")

    def on_message_begin(self) -> None:
        self._is_in_body = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_heads += 1
        self._is_in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(400, "this is no valid HTTP request.")

    # ---- headway

    @property
    def _is_served(self) -> bool:
        """The service has a request in hand."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look_later(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._look = self.loop.call_later(self._patience_s, self._check, (self._num_heads, unsent))

    def _check(self, before: tuple[int, int]) -> None:
        now = self._num_heads, self.transport.get_write_buffer_size()
        if now == before and (now[1] or not self._is_served):
            self.transport.abort()  # closing would first wait until all is sent
        else:
            self._look_later()

    def _end(self, status: int, sentence: str, headers: str = "") -> None:
        body = json.dumps({"error": sentence})
        self.transport.write(
            f"HTTP/1.1 {status} {PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{headers}connection: close\r\n\r\n{body}".encode()
        )
        self.transport.close()
