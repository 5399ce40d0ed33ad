-- What happened to sandboxes, as their hosts told it.
CREATE TABLE sandbox_events (
    -- Grows in the order in which it was told.
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    sandbox_id  TEXT NOT NULL,
    -- The host's log and the number there: the same event is told until it is acknowledged.
    log_id      TEXT NOT NULL,
    seq         INTEGER NOT NULL,
    at          INTEGER NOT NULL,
    kind        TEXT NOT NULL,
    actor       TEXT NOT NULL,
    reason      TEXT,
    -- The death certificate, with the kind `ended`.
    death       TEXT,
    UNIQUE (log_id, seq)
) STRICT;

CREATE INDEX sandbox_events_by_sandbox ON sandbox_events (sandbox_id, id);
CREATE INDEX sandbox_events_by_time ON sandbox_events (at);
