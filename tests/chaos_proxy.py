"""A proxy that mistreats what LoadGen's side and a server exchange."""

import asyncio
import contextlib
import queue
import re
import threading
from dataclasses import dataclass
from functools import partial

from helpers import LIMIT_S

KINDS = ("delay", "cut", "reset", "repeat", "replay", "swap", "drip", "corrupt", "insert", "swallow", "close")
SWAP_S = 0.03  # how long a message waits for another one to be swapped with


@dataclass(frozen=True)
class Fault:
    """What happens to one message of an exchange."""

    kind: str  # of KINDS
    request: bool = False  # whether it happens to the request or to the response
    amount: float = 0.5  # 0 to 1: after which part of the message, or for which part of the longest delay
    bits: int = 1  # 1 to 255: those that change in a damaged byte


class Proxy:
    """Pass the exchanges of many connections on to a port of this machine; mistreat exchange n as `schedule[n]` says.

    An entry of None, and an exchange after the last entry, is passed on unchanged. Use it in an event loop.
    """

    def __init__(self, port, longest_s):
        self.target, self.longest_s = port, longest_s
        self.set([])

    def set(self, schedule):
        """Begin a new schedule, and forget the old one's messages."""
        self.schedule, self.count = list(schedule), 0
        self.waiting = {}  # {direction: (a message that waits to be swapped, the future of the other one)}
        self.earlier = {}  # {direction: the last message}

    def next_fault(self):
        self.count += 1
        return self.schedule[self.count - 1] if self.count <= len(self.schedule) else None

    async def handle(self, reader, writer):
        """Serve one connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            back, forth = await asyncio.open_connection("127.0.0.1", self.target)
            try:
                while request := await read_message(reader):
                    fault = self.next_fault()
                    await self.pass_on(forth, request, fault if fault and fault.request else None, True)
                    if not (response := await read_message(back)):
                        break
                    if not await self.pass_on(writer, response, None if fault and fault.request else fault, False):
                        break
            finally:
                forth.close()
        writer.close()

    async def pass_on(self, writer, message, fault, is_request):
        """Send a message as the fault says; return whether the connection continues. Raises OSError if it is broken."""
        earlier, self.earlier[is_request] = self.earlier.get(is_request, message), message
        kind, place = fault and fault.kind, int(fault.amount * (len(message) - 1)) if fault else 0
        if kind == "swallow":
            await asyncio.sleep(10 * self.longest_s)
            raise OSError
        if kind == "delay":
            await asyncio.sleep(fault.amount * self.longest_s)
        elif kind == "swap":
            message = await self.swapped(message, is_request)
        elif kind == "corrupt":
            message = message[:place] + bytes([message[place] ^ fault.bits]) + message[place + 1 :]
        elif kind == "insert":
            message = message[:place] + bytes([fault.bits] * 3) + message[place:]
        elif kind == "replay":
            message = earlier
        elif kind == "close" and not is_request:
            message = message.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        elif kind == "drip":
            for byte in message[:200]:
                writer.write(bytes([byte]))
                await asyncio.sleep(self.longest_s / 20)
            message = message[200:]
        elif kind in ("cut", "reset"):
            message = message[:place]
        writer.write(message * (2 if kind == "repeat" else 1))
        await writer.drain()
        if kind == "reset":
            writer.transport.abort()
        if kind in ("cut", "reset"):
            raise OSError
        return kind != "close"

    async def swapped(self, message, is_request):
        """Return a message of another connection that is swapped with this one, or this one if there is none soon."""
        if other := self.waiting.pop(is_request, None):
            other[1].set_result(message)
            return other[0]
        future = asyncio.get_running_loop().create_future()
        self.waiting[is_request] = message, future
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(asyncio.shield(future), SWAP_S)
        if self.waiting.get(is_request, (None, None))[1] is future:
            del self.waiting[is_request]
        return future.result() if future.done() else message


async def read_message(reader):
    """Return an HTTP message with its body, b"" at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.I)
        return head + await reader.readexactly(int(length[1]) if length else 0)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        return b""


@contextlib.contextmanager
def proxies(*ports, longest_s):
    """Run a proxy before each port, in a thread; yield (their URLs, a function that takes a schedule for each)."""
    started = queue.SimpleQueue()

    async def run():
        made = [Proxy(port, longest_s) for port in ports]
        servers = [await asyncio.start_server(proxy.handle, "127.0.0.1", 0) for proxy in made]
        urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
        stop = asyncio.Event()
        started.put((urls, made, asyncio.get_running_loop(), stop))
        await stop.wait()

    thread = threading.Thread(target=partial(asyncio.run, run()), daemon=True)
    thread.start()
    urls, made, loop, stop = started.get(timeout=LIMIT_S)

    def set_schedules(*schedules):
        for proxy, schedule in zip(made, schedules):
            loop.call_soon_threadsafe(proxy.set, schedule)

    yield urls, set_schedules
    loop.call_soon_threadsafe(stop.set)
    thread.join(LIMIT_S)
