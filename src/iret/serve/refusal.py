"""What a client is told when there is no answer: a status and one sentence, never a path or a traceback."""


class Refusal(ValueError):
    """One sentence for the client. Travels between processes."""

    def __init__(self, status: int, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(status, sentence, retry_after_s)  # all of them: exceptions are made again from their arguments
        self.status, self.sentence, self.retry_after_s = status, sentence, retry_after_s

    def __str__(self) -> str:
        return self.sentence
