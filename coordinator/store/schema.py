"""The tables, and the steps that bring an older database up to them.

Owns: the schema and its version. Must not know: what the rows mean to anybody. A migration is a script that
is run once, in order, inside one transaction with the version it leads to; a script that has been released
is never edited, the next change is a new script at the end.

Times are seconds since the epoch. Stages, rounds and versions are the protocol's numbers; peers are ids in
text; digests, lineages and signed envelopes are blobs.
"""

from __future__ import annotations

import sqlite3

from protocol.errors import StorageError

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

    CREATE TABLE peers (
        peer TEXT PRIMARY KEY,
        session INTEGER NOT NULL,       -- of its latest life
        name TEXT NOT NULL,
        capability BLOB NOT NULL,
        admission BLOB NOT NULL,
        presence TEXT NOT NULL CHECK (presence IN ('live', 'lost', 'left')),
        state TEXT NOT NULL,
        reason TEXT NOT NULL,
        stages TEXT NOT NULL,           -- JSON list: what it is asked to host
        wanted TEXT NOT NULL,           -- JSON list: what its volunteer asked for
        addresses TEXT NOT NULL,        -- JSON list
        joined_s REAL NOT NULL,
        seen_s REAL NOT NULL,
        acknowledged INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;

    CREATE TABLE replicas (
        peer TEXT NOT NULL REFERENCES peers (peer),
        stage INTEGER NOT NULL,
        round INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lineage BLOB NOT NULL,
        ready INTEGER NOT NULL,
        members INTEGER NOT NULL,
        PRIMARY KEY (peer, stage)
    ) WITHOUT ROWID;

    CREATE TABLE charters (
        stage INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        round INTEGER NOT NULL,
        version INTEGER NOT NULL,
        signed BLOB NOT NULL,
        issued_s REAL NOT NULL,
        PRIMARY KEY (stage, generation)
    );

    -- One row per acknowledged report. What it said stands in the tables below it.
    CREATE TABLE reports (
        peer TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        kind TEXT NOT NULL,
        accepted INTEGER NOT NULL,
        received_s REAL NOT NULL,
        PRIMARY KEY (peer, sequence)
    ) WITHOUT ROWID;

    -- A round that was trained again after a restart from a checkpoint has several rows; one is not superseded.
    CREATE TABLE rounds (
        digest BLOB PRIMARY KEY,        -- of the closing
        round INTEGER NOT NULL,
        superseded INTEGER NOT NULL DEFAULT 0,
        tasks_done INTEGER NOT NULL,
        tasks_lost INTEGER NOT NULL,
        loss_sum REAL NOT NULL,
        tokens INTEGER NOT NULL,
        heldout_loss_sum REAL NOT NULL,
        heldout_tokens INTEGER NOT NULL,
        closed_s REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX rounds_by_number ON rounds (round);

    CREATE TABLE commits (
        digest BLOB PRIMARY KEY,
        stage INTEGER NOT NULL,
        round INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lineage BLOB NOT NULL,
        closing BLOB NOT NULL,
        members INTEGER NOT NULL,
        dropped INTEGER NOT NULL,       -- tokens
        double_counted INTEGER NOT NULL,
        solo INTEGER NOT NULL,
        received_s REAL NOT NULL,
        signed BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX commits_by_stage ON commits (stage, round);
    CREATE INDEX commits_by_closing ON commits (closing);

    -- Who said that it took these committed bytes, and was named in the commit.
    CREATE TABLE commit_takers (
        digest BLOB NOT NULL,
        peer TEXT NOT NULL,
        PRIMARY KEY (digest, peer)
    ) WITHOUT ROWID;

    CREATE TABLE averagings (
        peer TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        stage INTEGER NOT NULL,
        round INTEGER NOT NULL,
        ballot INTEGER NOT NULL,
        members INTEGER NOT NULL,
        asked INTEGER NOT NULL,
        ok INTEGER NOT NULL,
        reason TEXT NOT NULL,
        bytes_sent INTEGER NOT NULL,
        bytes_received INTEGER NOT NULL,
        seconds REAL NOT NULL,
        received_s REAL NOT NULL,
        PRIMARY KEY (peer, sequence)
    ) WITHOUT ROWID;
    CREATE INDEX averagings_by_stage ON averagings (stage, round, ballot);

    CREATE TABLE work (
        peer TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        round INTEGER NOT NULL,
        tasks_fed INTEGER NOT NULL,
        tasks_resent INTEGER NOT NULL,
        hops INTEGER NOT NULL,
        activation_bytes INTEGER NOT NULL,
        target_tokens INTEGER NOT NULL,
        seconds REAL NOT NULL,
        compute_seconds REAL NOT NULL,
        PRIMARY KEY (peer, sequence)
    ) WITHOUT ROWID;
    CREATE INDEX work_by_round ON work (round);

    CREATE TABLE checkpoints (
        round INTEGER PRIMARY KEY,
        bytes INTEGER NOT NULL,
        seconds REAL NOT NULL,
        collected_s REAL NOT NULL
    );

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        at_s REAL NOT NULL,
        kind TEXT NOT NULL,
        peer TEXT,
        detail TEXT NOT NULL
    );
    CREATE INDEX events_by_kind ON events (kind);
    """,
    """
    -- A repetition is known by peers.acknowledged: a row per report was written and never read.
    DROP TABLE reports;

    -- What a restart needs of the commits' envelopes: those of the newest round of every stage. They are most
    -- of a commit's bytes, so the others are not kept.
    CREATE TABLE signed_commits (
        digest BLOB PRIMARY KEY,
        stage INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        round INTEGER NOT NULL,
        signed BLOB NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO signed_commits (digest, stage, generation, round, signed)
        WITH newest_generation AS (SELECT stage, max(generation) AS generation FROM commits GROUP BY stage),
        newest AS (
            SELECT stage, generation, max(round) AS round
            FROM commits JOIN newest_generation USING (stage, generation) GROUP BY stage, generation
        )
        SELECT digest, stage, generation, round, signed FROM commits JOIN newest USING (stage, generation, round);

    -- The same without `signed`, with `tokens`. Older rows had none: what was credited less what was dropped.
    CREATE TABLE new_commits (
        digest BLOB PRIMARY KEY,
        stage INTEGER NOT NULL,
        round INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lineage BLOB NOT NULL,
        closing BLOB NOT NULL,
        members INTEGER NOT NULL,
        tokens INTEGER NOT NULL,        -- accumulated, and part of the update
        dropped INTEGER NOT NULL,       -- tokens
        double_counted INTEGER NOT NULL,
        solo INTEGER NOT NULL,
        received_s REAL NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO new_commits
        SELECT c.digest, c.stage, c.round, c.generation, c.version, c.lineage, c.closing, c.members,
               max(0, coalesce(r.tokens, 0) - c.dropped), c.dropped, c.double_counted, c.solo, c.received_s
        FROM commits AS c LEFT JOIN rounds AS r ON r.digest = c.closing;
    DROP TABLE commits;
    ALTER TABLE new_commits RENAME TO commits;
    CREATE INDEX commits_by_stage ON commits (stage, round);
    CREATE INDEX commits_by_closing ON commits (closing);
    """,
    # Which members averaged together, and how much of that cost nobody any time.
    """
    ALTER TABLE averagings ADD COLUMN reduce_group BLOB NOT NULL DEFAULT x'';
    ALTER TABLE averagings ADD COLUMN hidden_seconds REAL NOT NULL DEFAULT 0;
    """,
    # The tree of commits, so that the halves of a torn swarm can be told apart, and what was given up with one of them.
    """
    ALTER TABLE commits ADD COLUMN parent BLOB NOT NULL DEFAULT x'';
    ALTER TABLE commits ADD COLUMN clock TEXT NOT NULL DEFAULT '';      -- who signed the closing
    ALTER TABLE commits ADD COLUMN vouched INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE commits ADD COLUMN given_up_s REAL;                     -- null: it goes on
    CREATE INDEX commits_by_lineage ON commits (lineage);
    CREATE INDEX commits_by_parent ON commits (parent);
    CREATE INDEX commits_given_up ON commits (given_up_s) WHERE given_up_s IS NOT NULL;
    """,
    """
    CREATE TABLE bans (
        peer TEXT PRIMARY KEY,
        since_s REAL NOT NULL,
        until_s REAL,                   -- null: until it is taken back
        reason TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    # Receipts, and the credits that are booked for them. Entries are never changed: the triggers see to that, and to
    # the balances, which are nothing but their sums.
    """
    CREATE TABLE round_credits (
        closing BLOB NOT NULL,
        round INTEGER NOT NULL,
        stage INTEGER NOT NULL,
        peer TEXT NOT NULL,
        tokens INTEGER NOT NULL,        -- by the signed paths, as the clock added them up
        PRIMARY KEY (closing, stage, peer)
    ) WITHOUT ROWID;
    CREATE INDEX round_credits_by_round ON round_credits (round);

    CREATE TABLE receipts (
        peer TEXT NOT NULL,
        session INTEGER NOT NULL,
        round INTEGER NOT NULL,
        part INTEGER NOT NULL,
        signed BLOB NOT NULL,
        received_s REAL NOT NULL,
        settled INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (round, peer, session, part)
    ) WITHOUT ROWID;
    CREATE INDEX receipts_unsettled ON receipts (round, received_s) WHERE NOT settled;

    CREATE TABLE disputes (
        round INTEGER NOT NULL,
        number INTEGER NOT NULL,
        first_stage INTEGER NOT NULL,
        caller TEXT NOT NULL,
        callee TEXT NOT NULL,
        quarrel TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (round, number, first_stage, caller, callee)
    ) WITHOUT ROWID;

    CREATE TABLE evidence (
        id INTEGER PRIMARY KEY,
        peer TEXT NOT NULL,
        kind TEXT NOT NULL,
        subject TEXT NOT NULL,
        detail TEXT NOT NULL,
        proof BLOB NOT NULL,
        at_s REAL NOT NULL,
        UNIQUE (peer, kind, subject)
    );

    -- Millions of floating-point operations move from one account of a peer to another. `of` is the entry of work
    -- that is released or revoked: each once.
    CREATE TABLE credit_entries (
        id INTEGER PRIMARY KEY,
        at_s REAL NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('work', 'release', 'revoke')),
        peer TEXT NOT NULL,
        debit TEXT NOT NULL CHECK (debit IN ('mint', 'held')),
        credit TEXT NOT NULL CHECK (credit IN ('held', 'free', 'mint')),
        mflop INTEGER NOT NULL CHECK (mflop >= 0),
        tokens INTEGER NOT NULL CHECK (tokens >= 0),
        round INTEGER NOT NULL,
        stage INTEGER NOT NULL,
        of INTEGER UNIQUE REFERENCES credit_entries (id),
        reason TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX credit_entries_by_round ON credit_entries (round) WHERE kind = 'work';
    CREATE INDEX credit_entries_by_peer ON credit_entries (peer);
    CREATE INDEX credit_entries_released ON credit_entries (of) WHERE kind = 'release';

    CREATE TABLE balances (
        peer TEXT NOT NULL,
        account TEXT NOT NULL,
        mflop INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        PRIMARY KEY (peer, account)
    ) WITHOUT ROWID;

    CREATE TRIGGER credit_entries_add_up AFTER INSERT ON credit_entries BEGIN
        INSERT INTO balances VALUES (NEW.peer, NEW.credit, NEW.mflop, NEW.tokens) ON CONFLICT DO UPDATE
            SET mflop = mflop + excluded.mflop, tokens = tokens + excluded.tokens;
        INSERT INTO balances VALUES (NEW.peer, NEW.debit, -NEW.mflop, -NEW.tokens) ON CONFLICT DO UPDATE
            SET mflop = mflop + excluded.mflop, tokens = tokens + excluded.tokens;
    END;
    CREATE TRIGGER credit_entries_stay BEFORE UPDATE ON credit_entries BEGIN
        SELECT RAISE(ABORT, 'credit entries are never changed');
    END;
    CREATE TRIGGER credit_entries_are_kept BEFORE DELETE ON credit_entries BEGIN
        SELECT RAISE(ABORT, 'credit entries are never deleted');
    END;
    """,
    # What audits have found, and where everybody stands by them.
    """
    CREATE TABLE audits (
        id INTEGER PRIMARY KEY,
        at_s REAL NOT NULL,
        peer TEXT NOT NULL,
        auditor TEXT NOT NULL,
        round INTEGER NOT NULL,
        number INTEGER NOT NULL,
        first_stage INTEGER NOT NULL,
        num_stages INTEGER NOT NULL,
        finding TEXT NOT NULL,
        outputs REAL NOT NULL,          -- relative distances from what was recomputed
        returned REAL NOT NULL,
        liars TEXT NOT NULL,            -- JSON lists of peers
        missing TEXT NOT NULL,
        seed BLOB NOT NULL
    );
    CREATE INDEX audits_by_peer ON audits (peer, finding);

    CREATE TABLE standings (
        peer TEXT PRIMARY KEY,
        standing TEXT NOT NULL          -- JSON
    ) WITHOUT ROWID;
    """,
    # Invites, who came in by them, and which key goes on as which other.
    """
    CREATE TABLE invites (
        id TEXT PRIMARY KEY,            -- for people
        secret BLOB NOT NULL UNIQUE,    -- SHA-256 of the token, which is kept nowhere
        note TEXT NOT NULL,
        uses INTEGER NOT NULL,          -- how many peers may come in by it
        created_s REAL NOT NULL,
        expires_s REAL,                 -- null: never
        revoked_s REAL                  -- null: it holds
    ) WITHOUT ROWID;

    CREATE TABLE invite_uses (
        peer TEXT PRIMARY KEY,          -- a peer comes in once, however often it registers
        invite TEXT NOT NULL REFERENCES invites (id),
        used_s REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX invite_uses_by_invite ON invite_uses (invite);

    CREATE TABLE successors (
        peer TEXT PRIMARY KEY,          -- the old key, which nobody comes in with any more
        successor TEXT NOT NULL,
        statement BLOB NOT NULL,        -- signed by the old key
        since_s REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX successors_by_successor ON successors (successor);

    -- Why a peer is on the list: banned, frozen (two processes with one key), rotated (its key was replaced).
    ALTER TABLE bans ADD COLUMN kind TEXT NOT NULL DEFAULT 'banned' CHECK (kind IN ('banned', 'frozen', 'rotated'));
    """,
    # Commits that the run has gone back from.
    """
    ALTER TABLE commits ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX commits_gone ON commits (gone) WHERE gone;
    CREATE TABLE barriers (
        stage INTEGER PRIMARY KEY,
        generation INTEGER NOT NULL,    -- of this charter, or one before,
        version INTEGER NOT NULL,       -- what leads beyond this is gone, whenever we hear of it
        since_s REAL NOT NULL
    );
    """,
    # A run may go back more than once, and of an earlier time there may still be something to hear.
    """
    ALTER TABLE barriers RENAME TO former_barriers;
    CREATE TABLE barriers (
        stage INTEGER NOT NULL,
        generation INTEGER NOT NULL,    -- of this charter, or one before,
        version INTEGER NOT NULL,       -- what leads beyond this is gone, whenever we hear of it
        since_s REAL NOT NULL,
        PRIMARY KEY (stage, generation)
    ) WITHOUT ROWID;
    INSERT INTO barriers SELECT stage, generation, version, since_s FROM former_barriers;
    DROP TABLE former_barriers;
    """,
)

SCHEMA_VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to `SCHEMA_VERSION`, or raise `StorageError` if it is from a newer Handcar."""
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
    version = read_version(connection)
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"the run's database has schema {version}, this version of Handcar knows up to {SCHEMA_VERSION}.",
            hint="Start it with the newer version that wrote it.",
        )
    for target, script in enumerate(MIGRATIONS[version:], start=version + 1):
        # executescript would commit first and then run every statement on its own: a crash in between
        # would leave half a schema under the old version, so the script carries its own transaction
        connection.executescript(
            f"BEGIN IMMEDIATE; {script}; DELETE FROM schema_version; "
            f"INSERT INTO schema_version VALUES ({target}); COMMIT;"
        )


def read_version(connection: sqlite3.Connection) -> int:
    """Return the schema version of an open database, 0 for an empty one."""
    known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'").fetchone()
    row = connection.execute("SELECT version FROM schema_version").fetchone() if known else None
    return int(row[0]) if row else 0
