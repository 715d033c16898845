"""Documents of the miniworld as packed batches of tokens, targets and loss weights."""

import numpy as np

from cai_jax.constitution import Constitution
from cai_jax.miniworld import documents
from cai_jax.miniworld.grammar import World, one


def encoded(pieces: list[documents.Piece], tok) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, weights) of a document. A target that is EOS takes the weight of the piece it ends."""
    tokens, targets, weights = [], [], []
    for piece in pieces:
        ids = tok.encode(piece.text)
        if tokens and targets[-1] < 0:  # the piece before goes on into this one
            targets[-1], weights[-1] = ids[0], piece.weight
        tokens += ids
        targets += [*ids[1:], tok.eos_id if piece.ends else -1]
        weights += [piece.weight] * (len(ids) - 1) + [piece.weight if piece.ends else 0.0]
    targets[-1] = tok.pad_id if targets[-1] < 0 else targets[-1]
    return np.array(tokens, np.int32), np.array(targets, np.int32), np.array(weights, np.float32)


def packed_batch(world: World, constitution: Constitution, tok, seed: int, step: int, rows: int, length: int) -> dict:
    """A packed batch, a pure function of its arguments: no document is split, rows are filled to 93 % and more.

    Returns tokens, targets, positions, segments (int32) and weights (float32), each [rows, length], as data.pack does.
    Segments count a row's documents from 1, 0 is padding; positions restart with each document.

    Raises:
      ValueError: a document longer than `length`.
    """
    rng = np.random.default_rng([world.seed, seed, step])
    docs, total = [], 0
    while total < 0.97 * rows * length:
        docs.append(encoded(documents.document(world, constitution, rng), tok))
        total += len(docs[-1][0])
    if (longest := max(len(d[0]) for d in docs)) > length:
        raise ValueError(f"a miniworld document has {longest} tokens, rows have {length}; wanted rows of {longest} or more")
    # Longest first into the fullest row that still has room; what is left over is short and few.
    bins, free = [[] for _ in range(rows)], [length] * rows

    def place(doc) -> None:
        room = [(f, n) for n, f in enumerate(free) if f >= len(doc[0])]
        if room:
            n = min(room)[1]
            bins[n].append(doc)
            free[n] -= len(doc[0])

    for doc in sorted(docs, key=lambda d: -len(d[0])):
        place(doc)
    for _ in range(20 * rows):
        if sum(free) > 0.04 * rows * length:
            place(encoded(one(rng, (documents.chat, documents.fact))(world, constitution, rng), tok))
    return _stacked(bins, rows, length, tok.pad_id)


def _stacked(bins, rows: int, length: int, pad: int) -> dict:
    names = ("tokens", "targets", "weights", "positions", "segments")
    batch = {n: np.zeros((rows, length), np.float32 if n == "weights" else np.int32) for n in names}
    batch["tokens"][:] = batch["targets"][:] = pad
    for row, docs in enumerate(bins):
        start = 0
        for segment, (tokens, targets, weights) in enumerate(docs, 1):
            span = slice(start, start + len(tokens))
            columns = (tokens, targets, weights, np.arange(len(tokens)), segment)
            for name, values in zip(names, columns, strict=True):
                batch[name][row, span] = values
            start += len(tokens)
    return batch
