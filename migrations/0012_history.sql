-- When each table is vacuumed, and how. Storage parameters only: setting one takes a lock that no read and no write waits for, rewrites
-- no row, and means nothing to a replica of the version before. Tables that are not here are small, or changed seldom: the server's own
-- settings are right for them. So is fillfactor where it is: an update of test_runs is never a HOT one (status is in the predicates of
-- its indexes), room on the page would stay empty; run_leases, where every update is one, has had it from the start.

-- Each run leaves two dead rows, and a dead entry at the head of test_runs_claimable, which every claim passes until a vacuum has
-- removed the page: 165 entries each, 1.4 ms for a thousand pages. A vacuum reads every index whole. So both count: 0.2 of ten million
-- rows, the server's own setting, lets 2 million dead rows gather, a million runs, and a claim then passes 6,000 pages; a small number
-- alone would read the indexes of ten million runs every few seconds. With 0.02 each dead row pays for 50 entries of each index, some
-- microseconds, and at ten million a claim passes 600 pages at most. A server looks once a minute (autovacuum_naptime): it is never
-- more often than that.
alter table test_runs set (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 10000, -- while there is little history: 5,000 runs, 30 pages
    -- else a vacuum that finds dead rows on less than a 50th of the pages leaves the entries, and the claims, as they are
    vacuum_index_cleanup = on,
    -- It reads a sample of 30,000 rows, however many there are.
    autovacuum_analyze_scale_factor = 0.02);

-- Small, and every row is written again every few seconds. At the end of a vacuum a table gives empty pages back, under a lock
-- that keeps everybody out: no renewal is to wait for that.
alter table run_leases set (vacuum_truncate = off);

-- Written once, never changed, deleted when they are old. A vacuum after inserts reads the new pages alone, so that often costs no
-- more than seldom: every million rows, some hundred megabytes, while they are still in memory, and not 0.2 of the table at a time. It
-- freezes them at once: nothing is gained by waiting, and no vacuum against wraparound reads years of history later.
-- What retention deletes is at the old end, where nobody looks: the server's own 0.2 is right for it.
alter table run_events set (
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000000, autovacuum_freeze_min_age = 0);
alter table run_attempts set (
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000000, autovacuum_freeze_min_age = 0);
alter table run_logs set (
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000000, autovacuum_freeze_min_age = 0);

-- Deleted in the order of idempotency_keys_expired, whose head every look for expired ones passes: at a million keys a day 70 pages,
-- and not 700.
alter table idempotency_keys set (autovacuum_vacuum_scale_factor = 0.02);

-- Counted up every second while a busy slot's holder stays: with room on the page those updates need no new entry in the index.
alter table run_refusals set (fillfactor = 80);
