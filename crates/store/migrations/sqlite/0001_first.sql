-- Ids are bare UUIDs as text, times milliseconds since 1970 (UTC), JSON is text.
-- The same tables in PostgreSQL: uuid, timestamptz, jsonb.

CREATE TABLE teams (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE users (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE api_keys (
    id           TEXT PRIMARY KEY,
    team_id      TEXT NOT NULL REFERENCES teams (id),
    created_by   TEXT REFERENCES users (id),
    name         TEXT NOT NULL,
    -- SHA-256 of the key's digits; the key itself is nowhere.
    hash         BLOB NOT NULL UNIQUE,
    prefix       TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER
) STRICT;

CREATE INDEX api_keys_by_team ON api_keys (team_id);

CREATE TABLE sandboxes (
    id                TEXT PRIMARY KEY,
    team_id           TEXT NOT NULL REFERENCES teams (id),
    template          TEXT NOT NULL,
    state             TEXT NOT NULL,
    -- Counts the changes of this row's state; an update names the one it expects.
    generation        INTEGER NOT NULL,
    reason            TEXT,
    vcpus             INTEGER NOT NULL,
    memory_mib        INTEGER NOT NULL,
    disk_mib          INTEGER NOT NULL,
    metadata          TEXT NOT NULL,
    idle_timeout_secs INTEGER NOT NULL,
    end_at            INTEGER,
    secure            INTEGER NOT NULL,
    allow_internet    INTEGER NOT NULL,
    envd_version      TEXT NOT NULL,
    host_id           TEXT,
    created_at        INTEGER NOT NULL,
    started_at        INTEGER,
    stopped_at        INTEGER,
    updated_at        INTEGER NOT NULL
) STRICT;

-- Ids grow with time, so this order is also the order of creation.
CREATE INDEX sandboxes_by_team ON sandboxes (team_id, id);
CREATE INDEX sandboxes_alive ON sandboxes (state) WHERE state NOT IN ('stopped', 'error');

-- What was made under an Idempotency-Key. The answer is rendered anew from the sandbox, so
-- that no secret of it is kept here.
CREATE TABLE idempotency_keys (
    team_id      TEXT NOT NULL REFERENCES teams (id),
    key          TEXT NOT NULL,
    request_hash BLOB NOT NULL,
    sandbox_id   TEXT NOT NULL REFERENCES sandboxes (id),
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (team_id, key)
) STRICT;
