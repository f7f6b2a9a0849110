"""A record of a spool: a frame, or the note that one was shed, as bytes that prove themselves.

Form on disk, little-endian: a header of 64 bytes, then the text (codec or reason), then the image's data.
    magic "PSP1", kind u8 (1 frame, 2 shed), one zero, length of the text u16, length of the data u32,
    height u32, width u32, channels u32, seq u64, first number of the run u64, seq of the record before u64,
    captured_at_ns u64, crc32 of text and data u32, crc32 of all of the header before it u32
The header's checksum covers the body's, so it stands for the whole record; with a damaged body it still tells which
frame is lost.
"""

import struct
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from producers.frame import Picture

MAGIC = b"PSP1"
FRAME, SHED = 1, 2
_FIELDS = struct.Struct("<4sBxHIIIIQQQQI")
_CHECKSUM = struct.Struct("<I")
HEADER_SIZE = _FIELDS.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one captured frame.

    Attributes:
        seq: the frame's number.
        first: the first number of its run.
        captured_at_ns: capture time, nanoseconds since the epoch (UTC).
        picture: the image, None if the frame was shed.
        reason: why it was shed, else empty.
        previous: number of the record before it in the spool, 0 for the first of all.
    """

    seq: int
    first: int
    captured_at_ns: int
    picture: Picture | None
    reason: str = ""
    previous: int = 0

    @property
    def size(self) -> int:
        """Bytes on disk."""
        text = self.picture.codec if self.picture else self.reason
        return HEADER_SIZE + len(text.encode()) + (len(self.picture.data) if self.picture else 0)

    def shed(self, reason: str) -> Self:
        """The note that takes this frame's place."""
        return replace(self, picture=None, reason=reason)

    def to_bytes(self) -> list[bytes]:
        """Header, text and data."""
        text = (self.picture.codec if self.picture else self.reason).encode()
        data = self.picture.data if self.picture else b""
        fields = _FIELDS.pack(
            MAGIC,
            FRAME if self.picture else SHED,
            len(text),
            len(data),
            *(self.picture.shape if self.picture else (0, 0, 0)),
            self.seq,
            self.first,
            self.previous,
            self.captured_at_ns,
            zlib.crc32(data, zlib.crc32(text)),
        )
        return [fields + _CHECKSUM.pack(zlib.crc32(fields)), text, data]


@dataclass(frozen=True, slots=True)
class Lost:
    """Frames whose records are damaged or missing.

    Attributes:
        from_seq: their first number.
        seq: their last number.
        first: the first number of their run.
        captured_at_ns: capture time of the last of them, or of its successor where that is not known.
    """

    from_seq: int
    seq: int
    first: int
    captured_at_ns: int


class Header(NamedTuple):
    """A record's header whose checksum is right; the fields are those of the form on disk."""

    kind: int
    text_length: int
    data_length: int
    height: int
    width: int
    channels: int
    seq: int
    first: int
    previous: int
    captured_at_ns: int
    body_crc: int

    @property
    def size(self) -> int:
        """Bytes of the whole record."""
        return HEADER_SIZE + self.text_length + self.data_length

    @classmethod
    def read(cls, header: bytes) -> "Header | None":
        """The header in the first 64 of these bytes, None if they are no header or a damaged one."""
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            return None
        if _CHECKSUM.unpack_from(header, _FIELDS.size)[0] != zlib.crc32(header[: _FIELDS.size]):
            return None
        return cls(*_FIELDS.unpack_from(header)[1:])

    def note(self) -> Record:
        """The record without its body."""
        return Record(self.seq, self.first, self.captured_at_ns, None, "", self.previous)

    def record(self, body: bytes) -> Record | None:
        """The whole record, None if its body is damaged."""
        if len(body) != self.size - HEADER_SIZE or zlib.crc32(body) != self.body_crc:
            return None
        text, data = body[: self.text_length].decode(), body[self.text_length :]
        if self.kind == SHED:
            return replace(self.note(), reason=text)
        return replace(self.note(), picture=Picture(text, (self.height, self.width, self.channels), data))
