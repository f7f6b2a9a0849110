"""What can go wrong between a camera and its stream, by whose fault it is."""


class ProducerError(Exception):
    """Base of this package's errors; the message is one clear line for a user."""


class SourceError(ProducerError):
    """The camera, folder or video cannot be opened or read."""


class FrameError(ProducerError):
    """A frame breaks the contract: the caller's fault, found before anything is published."""


class MalformedEntry(ProducerError):
    """A stream entry cannot be attributed to a camera and a capture; it belongs in the dead-letter stream."""


class UnreadableImage(ProducerError):
    """A frame is attributed, but its image cannot be decoded; its verdict is `unknown`."""


class AddressError(ProducerError):
    """An address of Redis is none: the message says what is wrong with it and shows no password."""


class ServerUnavailable(ProducerError):
    """Redis does not answer or refuses; the message says for how long and what was not published."""


class SpoolError(ProducerError):
    """The spool cannot be opened or read: another producer has it, or its folder is not usable."""


class SpoolFull(ProducerError):
    """The bound of the spool is reached; nothing was written."""


class SpoolUnwritable(ProducerError):
    """The disk of the spool takes nothing; nothing was written."""
