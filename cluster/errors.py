"""The errors of this package; each message is one clear line for the person at the keyboard."""


class ProctorError(Exception):
    """Something the user can put right; the command line prints its message and exits non-zero."""


class ConfigError(ProctorError):
    """The configuration file or a `PROCTOR_...` variable is wrong."""


class ServerError(ProctorError):
    """The Redis or Valkey server cannot be started, reached or used."""


class ServerAway(ServerError):
    """The server does not answer, now; nothing is known to be wrong with its address."""


class NotRunning(ProctorError):
    """No application was found here: `proctor up` starts one."""
