"""Every exception the library raises on purpose.

Each class also derives from the built-in exception that a caller would expect (`ValueError` for bad input,
`RuntimeError` for a broken engine), so that code which knows nothing of minillm can still handle it.
"""


class MiniLLMError(Exception):
    """Base of every exception that minillm raises on purpose."""


class InvalidRequestError(MiniLLMError, ValueError):
    """A prompt or a sampling parameter cannot be served; raised before the request costs anything."""


class ConfigError(MiniLLMError, ValueError):
    """An engine option or a model configuration has a value that is wrong or not supported; the message names it."""


class CheckpointError(MiniLLMError, ValueError):
    """A checkpoint folder is missing, broken, unsafe or of an unsupported model, whatever library noticed first."""


class OutOfPagesError(MiniLLMError, RuntimeError):
    """The page pool has fewer free and evictable pages than were asked for; nothing was allocated."""


class KernelsUnavailableError(MiniLLMError, RuntimeError):
    """The requested kernels cannot run on this machine; the message says what is missing."""


class WorkerError(MiniLLMError, RuntimeError):
    """A tensor-parallel worker process failed, died or did not answer in time."""


class EngineDeadError(MiniLLMError, RuntimeError):
    """The engine met a fault it cannot recover from; every request has ended. `__cause__` is the first fault."""


class EngineClosedError(MiniLLMError, RuntimeError):
    """The engine was closed; make a new one."""


class ContractError(MiniLLMError):
    """A part broke a rule of its contract while running.

    Attributes:
        part: the part that broke it, e.g. `"PageManager"`.
        rule: the rule, in one sentence.
        request_id: the request in whose service it happened, or None.
    """

    def __init__(self, part: str, rule: str, request_id: str | None = None):
        where = f" (request {request_id!r})" if request_id is not None else ""
        super().__init__(f"{part} broke a rule of its contract{where}: {rule}")
        self.part, self.rule, self.request_id = part, rule, request_id
