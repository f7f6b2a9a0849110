"""Hostile stream entries among good frames: are all good ones judged and all bad ones accounted for, in bounded memory?

    python -m benchmarks.hostile --json benchmarks/results/hostile.json

Real processes as in `benchmarks.faults`: four cameras push good frames through the publisher, while entries of every
kind below are put into the same streams past it. What names no frame that a camera could have sent must be in the dead
letters with a reason; what names one, but holds another image than it declares, must be a row `unknown` with a reason.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis
from PIL import Image

from benchmarks.faults.line import PRODUCTS, Feed, Line, running_line, wait_until
from benchmarks.machine import describe_machine
from benchmarks.watching import Watch
from producers import keys
from workers.ledger import read_ledger
from workers.reading import read_results

Fields = dict[bytes, bytes]


def main() -> int:
    """Run once; exit status 1 if something is amiss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=int, default=10_000)
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proctor-hostile-") as folder:
        document = _run(Path(folder), options)
    text = json.dumps(document, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")
    return 0 if document["as_promised"] else 1


def _run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    results = folder / "results"
    feed = Feed(options.good, 400.0)
    with running_line(folder, results, feed) as line, contextlib.closing(line.client()) as server:
        watch = Watch(server, lambda: _pids(line), PRODUCTS, results, every_s=0.5)
        sent: Counter[str] = Counter()
        hostile = threading.Thread(target=_push_bad, args=(line, options, sent))
        with watch.running():
            hostile.start()
            hostile.join()
            wait_until(lambda: not line.of("producer"), 900, "the cameras")
            wait_until(lambda: not any(server.xlen(keys.frames(each)) for each in PRODUCTS), 900, "the rest")
        starts = {member.name: member.starts for member in line.members if member.role == "replica"}
        letters: list[Any] = [server.xrange(keys.dead(each)) for each in PRODUCTS]
        dead = [fields for entries in letters for _, fields in entries]
        ledger = read_ledger(server)
    rows = read_results(str(results), columns=("camera", "verdict", "reason")).to_pylist()
    lies = [row for row in rows if row["camera"].startswith("liar")]
    warm = next(each for each in watch.samples if each["judged"] > options.good / 10)
    memory = {
        name: [round(warm[name], 1), round(max(each.get(name, 0.0) for each in watch.samples), 1)]
        for name in warm
        if name.startswith("rss_mb replica") or name == "server_mb"
    }
    good = len(rows) - len(lies)
    return {
        "benchmark": "hostile",
        "command": "python -m benchmarks.hostile",
        "machine": describe_machine(),
        "good": options.good,
        "good_judged": good,
        "bad": sum(sent.values()),
        "bad_by_kind": dict(sent),
        "bad_in_dead_letters": len(dead),
        "bad_as_unknown_rows": len(lies),
        "without_reason": sum(not fields.get(b"reason") for fields in dead) + sum(not row["reason"] for row in lies),
        "balanced": all(product.balanced for product in ledger),
        "replicas_started": starts,
        "memory_mb_after_a_tenth_and_largest": memory,
        "as_promised": good == options.good
        and len(dead) + len(lies) == sum(sent.values())
        and all(row["verdict"] == "unknown" and row["reason"] for row in lies)
        and all(fields.get(b"reason") for fields in dead)
        and all(product.balanced for product in ledger)
        and set(starts.values()) == {1},
    }


def _push_bad(line: Line, options: argparse.Namespace, sent: Counter[str]) -> None:
    """Put bad entries in, as fast as the good ones come, kinds in turn."""
    chance = random.Random(options.seed)
    kinds = list(_kinds(chance).items())
    with contextlib.closing(line.client()) as server:
        for number in range(options.bad):
            name, make = kinds[number % len(kinds)]
            while _crowded(server):
                threading.Event().wait(0.01)
            fields: Any = make(number)
            server.xadd(keys.frames(chance.choice(PRODUCTS)), fields)
            sent[name] += 1


def _crowded(server: redis.Redis) -> bool:
    return sum(server.xlen(keys.frames(each)) for each in PRODUCTS) > 400


def _kinds(chance: random.Random) -> dict[str, Callable[[int], Fields]]:
    good = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(good, "JPEG")
    picture, bomb = good.getvalue(), _png_bomb()

    def frame(number: int, camera: bytes = b"stranger", **changes: bytes) -> Fields:
        fields = {"v": b"1", "camera": camera, "seq": b"%d" % (number + 1), "captured_at_ns": b"1700000000000000000"}
        fields |= {"codec": b"jpeg", "shape": b"32,32,3", "data": picture}
        return {name.encode(): value for name, value in (fields | changes).items()}

    def without(number: int) -> Fields:
        fields = frame(number)
        del fields[chance.choice([b"v", b"camera", b"seq", b"captured_at_ns", b"codec", b"shape"])]
        return fields

    def fuzzed(number: int) -> Fields:
        name = chance.choice(["v", "camera", "seq", "captured_at_ns", "codec", "shape"])
        return frame(number, **{name: b"\xff" + chance.randbytes(chance.randrange(60))})

    return {
        "random fields": lambda number: {chance.randbytes(5): chance.randbytes(50) for _ in range(4)},
        "a field missing": without,
        "a field fuzzed": fuzzed,
        "wrong version": lambda number: frame(number, v=b"%d" % chance.randrange(2, 99)),
        "wrong codec": lambda number: frame(number, codec=chance.choice([b"tiff", b"webp", b"", b"JPEG"])),
        "negative number": lambda number: frame(number, seq=b"-%d" % number),
        "number beyond int64": lambda number: frame(number, captured_at_ns=b"9" * 19),
        "huge shape": lambda number: frame(number, shape=b"60000,60000,3"),
        "negative shape": lambda number: frame(number, shape=b"-32,32,3"),
        "decompression bomb": lambda number: frame(number, codec=b"png", shape=b"50000,50000,3", data=bomb),
        "bomb that lies": lambda number: frame(number, b"liar-bomb", codec=b"png", shape=b"64,64,3", data=bomb),
        "garbage as an image": lambda number: frame(number, b"liar-garbage", data=chance.randbytes(3000)),
        "another size": lambda number: frame(number, b"liar-size", shape=b"640,480,3"),
        "raw that does not fill": lambda number: frame(number, b"liar-raw", codec=b"raw", shape=b"9000,7000,3"),
        "a thousand fields": lambda number: {b"%d" % each: b"x" for each in range(1000)},
        "a camera of no name": lambda number: frame(number, camera=b"\xff" * 300),
    }


def _png_bomb() -> bytes:
    """A PNG of some kilobytes whose header declares 50,000 x 50,000 pixels."""
    import struct

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(4 * 2**20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _pids(line: Line) -> dict[str, int]:
    members = [member for member in line.members if member.role == "replica" and member.process]
    return {member.name: member.process.pid for member in members if member.process}


if __name__ == "__main__":
    raise SystemExit(main())
