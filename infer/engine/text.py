"""Token ids to text as they arrive: nothing past a stop string, and no beginning of one shown before it is certain."""

from __future__ import annotations

from quantbench.infer.checkpoint.tokenizer import TokenStream


class TextStream:
    """Incremental text of one request, ended by the first of its `stop` strings."""

    def __init__(self, stream: TokenStream, stop: tuple[str, ...] = ()) -> None:
        self._stream = stream
        self._stop = stop
        self._longest = max(map(len, stop), default=1)
        self._shown = 0
        self.text = ""  # all so far, including what is held back
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain and was not given before; sets `stopped` at a stop string."""
        self._append(self._stream.push(token))
        return self._show(len(self.text) - (0 if self.stopped else self._held()))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if not self.stopped:
            self._append(self._stream.finish())
        return self._show(len(self.text))

    def _append(self, new: str) -> None:
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [at for at in (self.text.find(s, searched) for s in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Length of the longest end of the text that could begin a stop string."""
        lengths = (n for s in self._stop for n in range(len(s) - 1, 0, -1) if self.text.endswith(s[:n]))
        return max(lengths, default=0)

    def _show(self, until: int) -> str:
        new = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return new
