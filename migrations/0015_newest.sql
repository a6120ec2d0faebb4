-- By itself: while it is built, which takes some seconds per ten million runs, nobody can write to test_runs; but it can be read, so
-- that leases are renewed and no worker stops what it runs.
--
-- The same order, read from its end: new rows now come last in it, where Postgres adds them without searching, and fills its pages.
-- With the newest first each page was split in the middle: two thirds more of them, and a tenth more time for each run.
drop index test_runs_newest;
create index test_runs_newest on test_runs (created_at, id);
comment on index test_runs_newest is 'The list, newest first: read backwards.';
