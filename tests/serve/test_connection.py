"""A connection that makes no headway ends; one that asks, however slowly it is answered, does not."""

import asyncio
import json
import socket
from functools import partial

import pytest
import uvicorn
from uvicorn.server import ServerState

from iret.serve.connection import HEAD_BYTES, Connection

PATIENCE_S = 0.1
LARGE = 20_000_000  # more than the buffers between the two hold
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def talk(scene, most: int = 8, patience_s: float = PATIENCE_S):
    """`await scene(connect)` with a server that answers by path: /large much, /slow late; it reads no body."""

    async def app(scope, receive, send):
        if scope["path"] == "/slow":
            await asyncio.sleep(4 * patience_s)
        body = bytes(LARGE if scope["path"] == "/large" else 2)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def run():
        http = partial(Connection, patience_s=patience_s, most=most)
        config = uvicorn.Config(app, lifespan="off", ws="none", log_level="critical", http=http)
        config.load()
        state = ServerState()
        make = partial(config.http_protocol_class, config=config, server_state=state, app_state={})
        listener = socket.create_server(("127.0.0.1", 0))
        server = await asyncio.get_running_loop().create_server(make, sock=listener)
        port, writers = listener.getsockname()[1], []

        async def connect(first: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            writer.write(first)
            return reader, writer

        try:
            async with asyncio.timeout(10):
                return await scene(connect, state)
        finally:
            for writer in writers:
                writer.close()
            server.close()

    return asyncio.run(run())


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "first",
    [b"", b"GET / HTTP/1.1\r\nX-A: ", GET + b"\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"],
    ids=["silent", "half a head", "after an answer", "a body that nobody reads"],
)
def test_a_connection_without_headway_ends(first):
    """The last byte of a body or head goes on coming or not: that alone is no headway."""

    async def scene(connect, state):
        reader, writer = await connect(first)
        ended = asyncio.ensure_future(read_all(reader))
        while not ended.done():
            if first.endswith((b": ", b"1")):
                writer.write(b"a")
            await asyncio.wait({ended}, timeout=PATIENCE_S / 4)
        while state.connections:
            await asyncio.sleep(0)

    talk(scene)


def test_an_answer_that_nobody_reads_is_dropped():
    async def scene(connect, state):
        await connect(GET.replace(b"/ ", b"/large "))
        while not state.connections:
            await asyncio.sleep(0)
        [connection] = state.connections
        while state.connections:
            await asyncio.sleep(0)
        assert connection.transport.get_write_buffer_size() == 0

    talk(scene)


def test_who_waits_for_the_service_is_waited_for():
    async def scene(connect, state):
        reader, _ = await connect(GET.replace(b"/ ", b"/slow "))
        return await reader.readuntil(b"\r\n\r\n")

    assert talk(scene).startswith(b"HTTP/1.1 200")


def test_an_answer_does_not_wait_for_the_client_to_acknowledge_its_head():
    async def scene(connect, state):
        await connect(b"")
        while not state.connections:
            await asyncio.sleep(0)
        [connection] = state.connections
        return connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert talk(scene)


def test_a_head_without_end_is_refused_at_its_limit():
    async def scene(connect, state):
        reader, writer = await connect(b"GET / HTTP/1.1\r\nX-A: ")
        ended, sent = asyncio.ensure_future(read_all(reader)), 0
        while not ended.done() and sent < 100:
            writer.write(b"a" * 10_000)
            sent += 1
            await asyncio.wait({ended}, timeout=0.01)
        return ended.result(), sent

    answer, sent = talk(scene, patience_s=5.0)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert str(HEAD_BYTES) in json.loads(body)["error"]
    assert HEAD_BYTES / 10_000 < sent < 20


def test_many_requests_on_one_connection_are_not_one_long_head():
    async def scene(connect, state):
        large = GET[:-2] + b"X-A: " + b"a" * 30_000 + b"\r\n\r\n"
        reader, writer = await connect(b"")
        for _ in range(5):
            writer.write(large[:100])
            await asyncio.sleep(0)
            writer.write(large[100:])
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readexactly(2)

    talk(scene, patience_s=5.0)


def test_one_connection_too_many_is_told_so_and_the_others_stay():
    async def scene(connect, state):
        inside = [await connect(b"") for _ in range(2)]
        while len(state.connections) < 2:
            await asyncio.sleep(0)
        outside = await read_all((await connect(b""))[0])
        inside[0][1].write(GET)
        return outside, await inside[0][0].readuntil(b"\r\n\r\n")

    outside, inside = talk(scene, most=2, patience_s=5.0)
    assert outside.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in outside
    assert "too many connections" in json.loads(outside.partition(b"\r\n\r\n")[2])["error"]
    assert inside.startswith(b"HTTP/1.1 200")


def test_what_is_no_http_is_refused_like_all_else():
    async def scene(connect, state):
        return await read_all((await connect(b"nonsense\r\n\r\n"))[0])

    head, _, body = talk(scene).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    assert json.loads(body) == {"error": "this is no valid HTTP request."}
