"""Everything this package raises on purpose.

A message has three parts: what was found, what was expected, and what to do about it.
"""


class AllegroError(Exception):
    """Base of every error a user can cause or repair."""


class GeometryError(AllegroError):
    """A width, height, frame count or tile size the model cannot work with."""


class ScheduleError(AllegroError):
    """A step count, denoise strength, guidance scale or sampler name outside its range."""


class InterpolationError(AllegroError):
    """Frame interpolation was asked for positions or rates that the model cannot make."""


class CheckpointError(AllegroError):
    """A file of weights cannot be used."""


class UnsupportedCheckpoint(CheckpointError):
    """The file is readable, but it is not the kind of model that was asked for."""


class CheckpointMismatch(CheckpointError):
    """The right kind of model, but tensors are missing, unexpected or of another shape."""


class TextError(AllegroError):
    """A prompt that cannot be encoded."""


class MissingDependency(AllegroError):
    """An optional package is needed for what was asked and is not installed."""


class OutputError(AllegroError):
    """A result cannot be written where it was asked for."""


class DownloadError(AllegroError):
    """A file cannot be fetched, or is not what was announced."""


class ServerError(AllegroError):
    """A ComfyUI server gave an answer that cannot be worked with."""


class ServerUnreachable(ServerError):
    """A ComfyUI server cannot be reached, or fails to answer: it may be starting, or the network may be down."""


class RunFailed(ServerError):
    """A graph was run by a server, and the run failed."""


class RunInterrupted(RunFailed):
    """Somebody stopped the run at the server."""


class RunLost(ServerError):
    """The server no longer knows the run: it was restarted, or its queue was cleared."""


class PromptRefused(AllegroError):
    """A server checked a graph and will not run it."""


class NotEnoughMemory(AllegroError):
    """The estimate for a stage exceeds the memory that is free."""


class NonFiniteError(AllegroError):
    """NaN or Inf appeared in latents or frames."""


class Cancelled(AllegroError):
    """The caller asked to stop; everything finished so far is kept."""


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of a long report and a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
