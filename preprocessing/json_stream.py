"""The items of one array in a JSON file that is larger than memory."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20  # bytes
ITEM_LIMIT = 1 << 26  # characters
WHITE_SPACE = " \t\n\r"
AFTER_A_VALUE = (*WHITE_SPACE, ",", ":", "]", "}")


def array_items(stream: BinaryIO, key: str) -> Iterator[Any]:
    """The items of the array under `key` in the top-level object, one at a time. The rest of the file is not read.

    Raises: ValueError if the file is not UTF-8, is not JSON up to the end of the array, has an item of more than
        ITEM_LIMIT characters, or has no such array.
    """
    text = _Text(stream)
    text.expect("{")
    while text.peek() != "}":
        name = text.value()
        text.expect(":")
        if name == key and text.peek() == "[":
            text.expect("[")
            while text.peek() != "]":
                yield text.value()
                if text.peek() != "]":
                    text.expect(",")
            return
        text.value()
        if text.peek() != "}":
            text.expect(",")
    raise ValueError(f"no array `{key}` in the object")


class _Text:
    """A window of a text, and the position of the next value in it."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.window, self.at = "", 0

    def peek(self) -> str:
        """The next character that is not white space."""
        while True:
            while self.at < len(self.window):
                if self.window[self.at] not in WHITE_SPACE:
                    return self.window[self.at]
                self.at += 1
            if not self._slide():
                raise ValueError("not JSON: it ends too early")

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"not JSON: expected {character}, found {self.window[self.at : self.at + 20]!r}")
        self.at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.parse(self.window, self.at)
                # The end of the window may cut a number, such as 23. for 23.5.
                if self.window[end : end + 1] in AFTER_A_VALUE:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                problem = error.msg
            except RecursionError as error:
                raise ValueError("JSON nested too deeply") from error
            else:
                problem = "no end of the value"
            if len(self.window) - self.at > ITEM_LIMIT or not self._slide():
                raise ValueError(f"not JSON, or one item of more than {ITEM_LIMIT:,} characters: {problem}")

    def _slide(self) -> bool:
        """Drop the text before the position and at least double the rest, so that a long item is not parsed often."""
        self.window, self.at = self.window[self.at :], 0
        data = self.stream.read(max(CHUNK, len(self.window)))
        self.window += self.decode(data, final=not data)
        return bool(data)
