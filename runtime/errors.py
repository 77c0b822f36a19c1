"""Errors that a user can fix: one class for each rule.

The message has the numbers; ``hint`` says what to do. The command line prints both and exits with 1.
"""

_MOST_CHARS = 1500


class DeployError(Exception):
    """Base of all errors that the user can fix. ``hint`` is one sentence: what to do.

    The middle of a long message is left out: it may quote what somebody sent or wrote into a file.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        if len(message) > _MOST_CHARS:
            message = f"{message[: _MOST_CHARS - 300]} … {message[-250:]}"
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DeployError):
    """An argument has a value that the called function can't take. ``argument``: its name, where it is one of a request."""

    def __init__(self, message: str, hint: str = "", *, argument: str | None = None) -> None:
        super().__init__(message, hint)
        self.argument = argument


class MissingDependencyError(DeployError):
    """An optional package is needed here and isn't installed."""


# -- checkpoints and heads ---------------------------------------------------------------------------------------


class CheckpointError(DeployError):
    """A backbone checkpoint can't be read, or holds non-finite weights."""


class UnlinkableError(CheckpointError):
    """A bundle can't read the weights of this checkpoint where they lie: they have to be copied."""


class DownloadError(DeployError):
    """A known model can't be fetched, or the fetched files are other ones."""


class UnsupportedArchitectureError(DeployError):
    """The step graph can't express this backbone's attention or position encoding."""


class TraceError(DeployError):
    """A library failed while it traced a backbone, converted the trace, or ran the graph; a file has the full log."""


class HeadsError(DeployError):
    """Medusa heads can't be read, or hold non-finite or all-zero weights."""


class HeadsMismatchError(HeadsError):
    """Medusa heads don't fit the backbone: hidden size, vocabulary or shape."""


class ExportMismatchError(DeployError):
    """The exported graph doesn't reproduce the torch module."""


# -- trees ---------------------------------------------------------------------------------------------------------


class TreeError(DeployError):
    """A candidate tree breaks a rule: prefix-closed, no duplicates, depth <= heads, rank < top-k."""


# -- bundles -------------------------------------------------------------------------------------------------------


class BundleError(DeployError):
    """A bundle can't be opened: its manifest is missing or breaks a rule of the schema."""


class BundleExistsError(BundleError):
    """The output path exists and ``--force`` was not given."""


class BundleSchemaError(BundleError):
    """The manifest's schema version is newer than this program, or a field is missing or has a wrong type."""


class BundleBusyError(BundleError):
    """Another process is building engines into the bundle."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, truncated, or its sha256 isn't the manifest's."""


class OutputError(DeployError):
    """Writing failed (disk full, no permission); nothing half-written was left behind."""


class EngineError(DeployError):
    """TensorRT can't parse or build a graph of the bundle."""


class EngineMemoryError(EngineError):
    """Building an engine needs more memory than the machine has."""


class QuantisationError(DeployError):
    """A weight can't be stored in 8 bits: it holds NaN or infinity."""


class VocabularyMismatchError(BundleError):
    """Two bundles can't be compared: their vocabularies differ."""


# -- running -------------------------------------------------------------------------------------------------------


class ProviderError(DeployError):
    """Another execution provider runs than the one asked for."""


class DeviceError(DeployError):
    """There is no driver or no GPU, or the GPU reported a failure."""


class DeviceMemoryError(DeviceError):
    """The GPU has less free memory than the program asked for."""


class EngineMismatchError(DeployError):
    """An engine was built for another GPU, by another version, or from another graph."""


class CapacityError(DeployError):
    """Prompt and new tokens don't fit into the capacity of a slot."""


class SlotError(DeployError):
    """There are more sequences than slots."""


class QueueFullError(DeployError):
    """So many requests wait that no further one is taken.

    ``waiting``: requests that wait. ``retry_after``: seconds until one of them has probably got a slot, by the requests that
    ended lately.
    """

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} requests wait for a slot, and no more may",
            hint=f"try again in {retry_after:.1f} s; or load with more slots, or allow more waiting requests",
        )
        self.waiting = waiting
        self.retry_after = retry_after


class SessionClosedError(DeployError):
    """The session is closing or closed: it takes no further requests."""


class StepError(DeployError):
    """An engine call failed while it decoded a request; the request has ended."""


class DraftError(DeployError):
    """A drafter that the application brought drafts rows that no step can take; its request has ended."""


class PromptError(DeployError):
    """A prompt is empty, isn't valid for this bundle, or holds token ids outside the vocabulary."""


class PromptFileError(PromptError):
    """A line of a prompt file is not ``{"prompt"|"messages"|"token_ids": ...}``."""


class SamplingError(DeployError):
    """A sampling parameter is out of its range."""


class GrammarError(DeployError):
    """A grammar or JSON schema is malformed, asks for what isn't supported, exceeds a limit, or leaves no token to emit."""


class TemplateError(DeployError):
    """A chat template is missing, fails, exceeds its budget, or can't express what ``argument`` of a request asks for."""

    def __init__(self, message: str, hint: str = "", *, argument: str | None = None) -> None:
        super().__init__(message, hint)
        self.argument = argument


class NumericsError(DeployError):
    """The engine returned NaN or infinite logits."""


class TrainingError(DeployError):
    """Heads can't be trained: there is no data, the data is another backbone's, or the loss diverged."""


# -- calibration ---------------------------------------------------------------------------------------------------


class CalibrationError(DeployError):
    """Calibration can't use its input: too little data, no text, or the progress of a run with other settings."""


class RangeError(CalibrationError):
    """No scale fits the values: they are all zero, too small for a normal number, NaN or infinite."""


class ScalesError(DeployError):
    """A file of scales can't be read, breaks a rule, or has none for a layer."""


class ScalesMismatchError(ScalesError):
    """Scales were measured on another model than the bundle's."""
