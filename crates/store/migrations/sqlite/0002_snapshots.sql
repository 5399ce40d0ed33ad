-- What becomes of a sandbox whose time is over, and of one that is paused and gets traffic.
ALTER TABLE sandboxes ADD COLUMN on_timeout TEXT NOT NULL DEFAULT 'kill';
ALTER TABLE sandboxes ADD COLUMN auto_resume INTEGER NOT NULL DEFAULT 0;

-- Snapshots that were asked for by name: templates of a team, and checkpoints of a sandbox.
CREATE TABLE snapshots (
    id            TEXT PRIMARY KEY,
    team_id       TEXT NOT NULL REFERENCES teams (id),
    kind          TEXT NOT NULL,
    name          TEXT NOT NULL,
    sandbox_id    TEXT NOT NULL,
    -- What the host calls it. Two rows may name the same one.
    host_snapshot TEXT NOT NULL,
    vcpus         INTEGER NOT NULL,
    memory_mib    INTEGER NOT NULL,
    disk_mib      INTEGER NOT NULL,
    size_bytes    INTEGER NOT NULL,
    envd_version  TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    -- Set when it was deleted here and the host may still keep it.
    deleted_at    INTEGER
) STRICT;

CREATE UNIQUE INDEX snapshots_templates ON snapshots (team_id, name)
    WHERE kind = 'template' AND deleted_at IS NULL;
CREATE UNIQUE INDEX snapshots_checkpoints ON snapshots (sandbox_id, name)
    WHERE kind = 'checkpoint' AND deleted_at IS NULL;
CREATE INDEX snapshots_deleted ON snapshots (deleted_at) WHERE deleted_at IS NOT NULL;
