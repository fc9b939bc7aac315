"""Every error that Superpipeline raises on purpose, as one tree.

SuperpipelineError            catch this to catch them all
├── InputError                an argument is wrong (also a ValueError); nothing was changed
├── BudgetError               the bound is below the least that works for this model
├── DiskError                a file of weights cannot be read, or is not the one it was
├── HostMemoryError           host memory will not do; raised before it is allocated
├── UnsupportedError          a use that cannot be exact here, refused rather than done wrongly
├── BackwardError             a backward reached a weight that is not in place
├── UpdateError               a pending update of a block's weights failed
├── ClosedError               a handle was used after close()
└── VerificationError         verify() saw other bits than the plain model's, or nothing streamed
"""


class SuperpipelineError(RuntimeError):
    """Base of every error raised on purpose by this package."""


class InputError(SuperpipelineError, ValueError):
    """An argument is wrong; nothing was changed."""


class BudgetError(SuperpipelineError):
    """The bound is too small.

    Attributes:
        least_bytes: the smallest bound, in bytes, that works for this model.
    """

    def __init__(self, message: str, *, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class HostMemoryError(SuperpipelineError, MemoryError):
    """Host memory will not do; raised before it is allocated."""


class DiskError(SuperpipelineError, OSError):
    """A file of weights cannot be read, is damaged, or is not the one it was."""


class UnsupportedError(SuperpipelineError):
    """A use that cannot be exact here."""


class BackwardError(SuperpipelineError):
    """A backward reached a weight that is not in place."""


class UpdateError(SuperpipelineError):
    """A pending update of a block's weights failed; its cause is the optimizer's own error."""


class ClosedError(SuperpipelineError):
    """The handle was closed; the model is the plain model again."""


class VerificationError(SuperpipelineError):
    """The streamed result is not the plain model's, or nothing was streamed."""
