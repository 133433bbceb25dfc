"""Record layouts of training data, one per file.

A layout defines `EXAMPLE`, `matches(record)`, `reads(record)` (the keys that it reads), `read(record)` and optionally
`PASSES_OVER` (keys that it may leave unread although they could decide about a dialogue). Keys that are null do not
stand in the record. A key of the objects in a list is written `messages[].role`.
"""
