-- Why each index is there: every change of a run's status writes an entry into each of those that it is in.

comment on index test_runs_pkey is
    'A run by its id: all that is said of a run by its worker, its callers and its events; and an id is given once, however often a lost enqueue is repeated.';
comment on index test_runs_claimable is
    'What is claimed next, in the order of claims: queued runs only, so that its size is the length of the queue.';
comment on index test_runs_by_workflow is
    'The history of a workflow, newest first; a claim looks there for when the run before ended, and nothing else could say so cheaply.';
comment on index test_runs_pending is
    'What waits behind a slot or is yet to come, by workflow: empty unless something waits.';
comment on index run_leases_pkey is
    'The lease of a run. The time of the last heartbeat is in no index, so that a renewal writes no entry in any.';
comment on index run_attempts_pkey is
    'The attempts of a run, in order; and each claim ends once.';
comment on index run_events_pkey is
    'Events in the order of their numbers. Always written at its right end, which costs little.';
comment on index run_events_by_run is
    'The events of a run, in order.';
comment on index run_logs_pkey is
    'The log of an attempt, in order; and a piece that is sent again is not doubled.';
