"""Make a program's standard streams safe against closed descriptors, closed pipes and narrow encodings.

====================================  =================================================================================
a stream is closed at the start       it becomes ``/dev/null``
(``>&-``)
the reader of the output has exited   the program ends silently with status 141, as Unix tools do; a training run
(``| head``)                          continues without its console
the encoding cannot hold a text       the text is written with ``backslashreplace``
====================================  =================================================================================
"""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PIPE_CLOSED_STATUS = 141  # 128 + SIGPIPE, as a shell reports it

_goes_on = False


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the standard streams of this process safe in this block, and flush them at its end.

    Streams that a test has replaced stay as they are.

    Raises:
        SystemExit: The reader of the output has exited. A write raises it, with status :data:`PIPE_CLOSED_STATUS`.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file to be opened gets this number, and receives all that is printed
            _discard(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, _output_failed)
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, lambda error: None)
    try:
        yield
    except BaseException as leaving:
        try:
            _flush()
        except SystemExit:
            if isinstance(leaving, SystemExit) and not leaving.code:
                raise
        raise
    _flush()


@contextmanager
def outliving_output() -> Iterator[None]:
    """Let the program continue in this block, with a warning, when its output cannot be written."""
    global _goes_on
    before, _goes_on = _goes_on, True
    try:
        yield
    finally:
        _goes_on = before


def _flush() -> None:
    sys.stdout.flush()  # the interpreter's own flush at exit comes too late to set an exit status
    sys.stderr.flush()


class _Output(io.FileIO):
    """A raw output stream that switches its descriptor to ``/dev/null`` at the first failed write.

    Args:
        number: The file descriptor.
        on_failure: A function that is called once, with the error.
    """

    def __init__(self, number: int, on_failure: Callable[[OSError], None]) -> None:
        super().__init__(number, "w", closefd=False)
        self._on_failure = on_failure

    def write(self, data) -> int:  # type: ignore[no-untyped-def] # any buffer
        try:
            return super().write(data)
        except OSError as error:
            _discard(self.fileno())
            self._on_failure(error)
        return len(data)


def _guarded(stream: io.TextIOWrapper, on_failure: Callable[[OSError], None]) -> io.TextIOWrapper:
    """Return a copy of ``stream`` over an :class:`_Output`, with the same encoding and buffering."""
    stream.flush()
    raw = _Output(stream.fileno(), on_failure)
    return io.TextIOWrapper(
        raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw),  # python -u has no buffer
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _discard(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


def _output_failed(error: OSError) -> None:
    if _goes_on:
        print(f"warning: standard output: {error.strerror}; the run continues without it", file=sys.stderr)
    elif error.errno == errno.EPIPE:
        sys.exit(PIPE_CLOSED_STATUS)
    else:
        raise error
