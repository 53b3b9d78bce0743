"""Names and messages from outside as one line of text, in logs and on terminals.

A file name may hold a line break, which would pass what follows it off as a line of its own, or the
codes by which a terminal is steered.
"""

import logging
from pathlib import PurePath

LINE_FORMAT = "%(asctime)s %(message)s"


def on_one_line(text: str) -> str:
    """The text, what does not print (line breaks, control codes, bytes of no character) escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


class OneLineArguments(logging.Filter):
    """Escapes what is put into a message; the message's own text is the program's."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, its arguments on one line."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                on_one_line(str(value))
                if isinstance(value, str | BaseException | PurePath)
                # What is none of these prints as numbers do.
                else value
                for value in record.args
            )
        return True


def start_logging(*, line_format: str = LINE_FORMAT) -> None:
    """Log to stderr from level INFO, a line for each record."""
    logging.basicConfig(level=logging.INFO, format=line_format, datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, OneLineArguments) for known in handler.filters):
            handler.addFilter(OneLineArguments())
