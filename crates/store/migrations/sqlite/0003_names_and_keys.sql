-- What a fork calls its children; one of a kind among the living of a team.
ALTER TABLE sandboxes ADD COLUMN name TEXT;

CREATE UNIQUE INDEX sandboxes_by_name ON sandboxes (team_id, name)
    WHERE name IS NOT NULL AND state NOT IN ('stopped', 'error');

-- What was made under an Idempotency-Key: sandboxes, or a snapshot. Answers are rendered anew
-- from those, so that no secret of them is kept here.
CREATE TABLE keys_of_all (
    team_id      TEXT NOT NULL REFERENCES teams (id),
    key          TEXT NOT NULL,
    request_hash BLOB NOT NULL,
    -- A JSON list of ids.
    made         TEXT NOT NULL,
    -- 0: the snapshot is being taken, or whoever took it died.
    done         INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (team_id, key)
) STRICT;

INSERT INTO keys_of_all
    SELECT team_id, key, request_hash, json_array(sandbox_id), 1, created_at FROM idempotency_keys;
DROP TABLE idempotency_keys;
ALTER TABLE keys_of_all RENAME TO idempotency_keys;
