-- By themselves, and after the columns: while these are built, which takes some seconds per ten million runs, nobody can write
-- to test_runs; but it can be read, so that leases are renewed and no worker stops what it runs.

create index test_runs_waiting on test_runs (workflow_id, next_in_line desc, priority desc, created_at, id) where status = 'waiting';
create index test_runs_due on test_runs (run_at, id) where status = 'scheduled';
create index test_runs_due_by_workflow on test_runs (workflow_id, run_at, id) where status = 'scheduled';
create unique index test_runs_one_per_tick on test_runs (workflow_id, tick_at) where tick_at is not null;
comment on index test_runs_waiting is 'Who is next, when a slot comes free.';
comment on index test_runs_due is 'Scheduled runs in the order in which they are due.';
comment on index test_runs_due_by_workflow is 'Which run of each workflow is due first.';
comment on index test_runs_one_per_tick is 'However many replicas see a tick of a schedule, it fires once.';
