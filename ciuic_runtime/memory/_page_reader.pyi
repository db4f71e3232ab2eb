class PageReader:
    """Threads that read files into memory, several reads at once, those of smaller order first."""

    def __init__(self, threads: int, piece_nbytes: int) -> None: ...
    def submit(self, direct: int, plain: int, offset: int, nbytes: int, into: int, order: int, /) -> int:
        """direct, plain: descriptors (direct -1: O_DIRECT is refused); into: an address. Returns a ticket."""
    def promote(self, ticket: int, order: int, /) -> None: ...
    def cancel(self, ticket: int, /) -> bool:
        """Whether it was taken back before anything was read; else it ends early, with ECANCELED, if it can."""
    def finished(self, seconds: float, /) -> list[tuple[int, int, int, float, float]]:
        """(ticket, errno, bytes missing at the file's end, start, end) of each; waits so long for the first."""
    def read_rows(self, direct: int, plain: int, offsets: list[int], nbytes: int, into: int, /) -> tuple[int, int]:
        """Fills memory from the address `into` on with so many bytes at each offset; waits. (errno, bytes missing)."""
    def stop(self) -> None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def plain_nbytes(self) -> int:
        """Bytes that were read through the page cache, since the file system refused O_DIRECT."""
