"""What can go wrong between a stream and its results, by whose fault it is."""


class WorkerError(Exception):
    """Base of this package's errors; the message is one clear line for a user."""


class StreamUnavailable(WorkerError):
    """Redis does not answer; what is held is kept and tried again."""


class ResultsUnavailable(WorkerError):
    """Results cannot be written (disk full, store away); nothing is acknowledged meanwhile."""


class DamagedSegment(WorkerError):
    """A segment does not hold what a replica writes; it is set aside for a person to look at."""


class Overtaken(WorkerError):
    """Another writer has committed to the table since it was read; reading it again helps."""


class CompactorBusy(WorkerError):
    """Another compactor works on these results."""


class NoModel(WorkerError):
    """A product has no version in service."""


class JobError(WorkerError):
    """A training job or an approval asks for something that is not there."""


class DeviceFault(WorkerError):
    """The device is broken and no further batch can be judged; a new process may find it working."""
