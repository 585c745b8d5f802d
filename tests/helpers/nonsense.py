"""What no record may say: a field by its dotted path, and its value (...: it is missing)."""

import copy

NONSENSE = [
    ("schedule", ...),
    ("noise", ...),
    ("shape", ...),
    ("codec", ["a"]),
    ("world", []),
    ("world", "x"),
    ("world.fps", "x"),
    ("world.fps", 0),
    ("world.fps", -3),
    ("world.fps", 10**400),
    ("world.fps", float("inf")),
    ("world.fps", float("nan")),
    ("world.actions", 5),
    ("world.actions", ["a", "a"]),
    ("world.camera", 5),
    ("world.camera", {"x": 1}),
    ("world.temporal", -1),
    ("text", ["a"]),
    ("text", {"kind": "umt5"}),
    ("text", {"kind": "ngrams", "depth": 1}),
    ("text", {"kind": ["ngrams"]}),
    ("audio", ["a"]),
    ("audio", {"kind": "mel", "rate": 10**400}),
    ("given_frames", "x"),
    ("given_frames", 10**9),
    ("schedule.given_chunks", 10**9),
    ("schedule.given_chunks", 40),
    ("schedule.pattern", "2" * 100_000),
    ("schedule.levels", [1.0] * 100_000),
    ("shape.height", 10**9),
    ("dit.layers", 10**9),
    ("dit.width", 10**9),
    ("dit.heads", 0),
    ("dit.eps", float("nan")),
    ("dit.later", 1),
    ("later", 1),
    ("student.memory.frames", 10**8),
    ("student.chunk", 10**6),
    ("guidance", "much"),
    ("card", 5),
]


def change(record, path, value):
    """`record` with the field at a dotted path set; ...: removed."""
    record = copy.deepcopy(record)
    *way, last = path.split(".")
    at = record
    for name in way:
        at = at[name]
    if value is ...:
        at.pop(last)
    else:
        at[last] = value
    return record
