-- The tables of the promise. Forward only; every later migration must be safe while this version still runs.

create sequence run_fence as bigint cache 1;
comment on sequence run_fence is
    'One number per claim, over all workflows. CACHE 1, so that a later claim always has the larger fence.';

create table workflows (
    id          text        not null,
    revision    integer     not null,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    deleted_at  timestamptz,

    constraint workflows_pkey primary key (id),
    constraint workflows_id_form check (id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$'),
    constraint workflows_revision_positive check (revision > 0)
);
comment on table workflows is 'Workflow definitions: which revision is the current one. What it says is in workflow_revisions.';
comment on column workflows.id is 'The id callers use. deploy@prod here is a definition of its own, which then wins over deploy.';
comment on column workflows.revision is 'The revision that new runs take. It only grows, also when a deleted id comes back.';
comment on column workflows.created_at is 'When the id was defined for the first time.';
comment on column workflows.updated_at is 'When the current revision, or the deletion, was written.';
comment on column workflows.deleted_at is 'When it was deleted: hidden and not startable, its history stays. Null while it is in use.';

create table workflow_revisions (
    workflow_id               text        not null,
    revision                  integer     not null,
    executor_type             text        not null,
    executor                  jsonb       not null,
    timeout_seconds           integer,
    heartbeat_timeout_seconds integer,
    start_within_seconds      integer,
    priority                  smallint    not null default 0,
    queue                     text        not null default 'default',
    labels                    jsonb       not null default '{}',
    created_at                timestamptz not null default now(),
    created_by                text        not null,

    constraint workflow_revisions_pkey primary key (workflow_id, revision),
    constraint workflow_revisions_timeout check (timeout_seconds > 0),
    constraint workflow_revisions_heartbeat_timeout check (heartbeat_timeout_seconds > 0),
    constraint workflow_revisions_start_within check (start_within_seconds > 0),
    constraint workflow_revisions_priority check (priority between -100 and 100),
    constraint workflow_revisions_labels
        check (jsonb_typeof(labels) = 'object' and not jsonb_path_exists(labels, '$.* ? (@.type() != "string")'))
);
comment on table workflow_revisions is 'What a workflow said at each revision. Rows are never changed: a run keeps the revision it was enqueued with.';
comment on column workflow_revisions.workflow_id is 'The definition this is a revision of.';
comment on column workflow_revisions.revision is 'Counts from 1.';
comment on column workflow_revisions.executor_type is 'What runs it: command, http, pull or handler.';
comment on column workflow_revisions.executor is 'The executor as it was given, type included.';
comment on column workflow_revisions.timeout_seconds is 'Longest one attempt may take, in seconds. Null: the setting SINGLETRACK_RUN_TIMEOUT of the worker.';
comment on column workflow_revisions.heartbeat_timeout_seconds is 'Silence of the worker after which a run is stale, in seconds. Null: SINGLETRACK_HEARTBEAT_TIMEOUT.';
comment on column workflow_revisions.start_within_seconds is 'Longest a queued run may stay unstarted, in seconds. Null: SINGLETRACK_START_WITHIN.';
comment on column workflow_revisions.priority is 'Default priority of its runs: -100 to 100, higher first.';
comment on column workflow_revisions.queue is 'The queue its runs are put in.';
comment on column workflow_revisions.labels is 'Labels its runs start with: an object of strings.';
comment on column workflow_revisions.created_at is 'When this revision was written.';
comment on column workflow_revisions.created_by is 'Who wrote it: see requested_by of test_runs.';

create table test_runs (
    id                        uuid        not null,
    workflow_id               text        not null,
    definition                text        not null,
    revision                  integer     not null,
    status                    text        not null,
    reason                    text,
    executor_type             text        not null,
    queue                     text        not null default 'default',
    priority                  smallint    not null default 0,
    labels                    jsonb       not null default '{}',
    input                     jsonb,
    on_conflict               text        not null default 'reject',
    attempt                   integer     not null default 0,
    max_attempts              integer     not null default 1,
    fence                     bigint      not null default 0,
    lease_secret              uuid,
    settled_fence             bigint,
    claim_id                  text,
    worker                    text,
    created_at                timestamptz not null default now(),
    run_at                    timestamptz,
    available_at              timestamptz,
    started_at                timestamptz,
    finished_at               timestamptz,
    timeout_seconds           integer,
    heartbeat_timeout_seconds integer,
    cancel_requested_at       timestamptz,
    has_waiters               boolean     not null default false,
    next_in_line              boolean     not null default false,
    exit_code                 integer,
    output                    jsonb,
    error                     text,
    rerun_of                  uuid,
    requested_by              text        not null default session_user,
    traceparent               text,
    version                   integer     not null default 0,

    constraint test_runs_pkey primary key (id),
    constraint test_runs_workflow_id_form
        check (workflow_id ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$'),
    constraint test_runs_status_known check (status in (
        'scheduled', 'waiting', 'queued', 'running',
        'succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')),
    constraint test_runs_on_conflict_known check (on_conflict in ('reject', 'return_existing', 'wait', 'replace')),
    constraint test_runs_labels_object
        check (jsonb_typeof(labels) = 'object' and not jsonb_path_exists(labels, '$.* ? (@.type() != "string")')),
    -- What RFC 3339 can say: another time would make the row, and every list with it, unreadable over the API.
    constraint test_runs_times_sayable check (
        least(created_at, run_at, available_at, started_at, finished_at, cancel_requested_at) >= '1970-01-01 00:00:00+00'
        and greatest(created_at, run_at, available_at, started_at, finished_at, cancel_requested_at)
            < '10000-01-01 00:00:00+00'),
    constraint test_runs_priority_range check (priority between -100 and 100),
    constraint test_runs_attempt_range check (attempt >= 0 and max_attempts >= 1 and attempt <= max_attempts),
    constraint test_runs_limits_positive check (timeout_seconds > 0 and heartbeat_timeout_seconds > 0),
    constraint test_runs_scheduled_has_run_at check (status <> 'scheduled' or run_at is not null),
    constraint test_runs_queued_has_available_at check (status <> 'queued' or available_at is not null),
    constraint test_runs_running_has_lease check (status <> 'running' or (
        fence > 0 and lease_secret is not null and worker is not null and started_at is not null and attempt >= 1
        and timeout_seconds is not null and heartbeat_timeout_seconds is not null)),
    -- Before its attempt it has no lease; after it the secret stays, so that a repeated finish is known again.
    constraint test_runs_unstarted_without_lease check (
        status not in ('scheduled', 'waiting', 'queued', 'skipped') or lease_secret is null),
    constraint test_runs_unstarted_without_start check (attempt > 0 or started_at is null),
    -- Else a claim would fail on it, and on all that it meant to take with it.
    constraint test_runs_startable check (
        status not in ('scheduled', 'waiting', 'queued') or attempt < max_attempts),
    constraint test_runs_unstarted_without_worker check (
        status not in ('scheduled', 'waiting', 'queued', 'skipped') or worker is null),
    constraint test_runs_ended_attempt_had_start check (
        status not in ('succeeded', 'failed', 'timed_out') or (started_at is not null and attempt >= 1 and fence > 0)),
    constraint test_runs_skipped_never_started check (status <> 'skipped' or attempt = 0),
    constraint test_runs_final_has_finished_at check (
        (status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')) = (finished_at is not null)),
    constraint test_runs_finish_after_start check (finished_at >= started_at),
    constraint test_runs_settled_fence_known check (settled_fence <= fence)
);

comment on table test_runs is 'One row is one run. While it is queued or running, the row IS the slot of its workflow.';
comment on column test_runs.id is 'UUIDv7 given at enqueue. Order runs by created_at, id.';
comment on column test_runs.workflow_id is 'The full id that has the slot: deploy or deploy@prod.';
comment on column test_runs.definition is 'The workflow whose definition it uses: deploy for deploy@prod, unless that one is defined itself.';
comment on column test_runs.revision is 'The revision of that definition; kept for the run''s whole life.';
comment on column test_runs.status is 'scheduled, waiting, queued, running; final: succeeded, failed, cancelled, timed_out, stale, skipped.';
comment on column test_runs.reason is 'Why, where the status alone does not say it: expired, shutdown, timeout, unkillable, worker_lost, requested, forced, ...';
comment on column test_runs.executor_type is 'What runs it: command, http, pull or handler.';
comment on column test_runs.queue is 'The queue it waits in; workers choose which queues they serve.';
comment on column test_runs.priority is '-100 to 100, higher first.';
comment on column test_runs.labels is 'Free labels for filtering: an object of strings.';
comment on column test_runs.input is 'What the caller handed over, as JSON; null when nothing.';
comment on column test_runs.on_conflict is 'What its enqueue asked for when the slot is taken: reject, return_existing, wait or replace.';
comment on column test_runs.attempt is 'How many attempts have begun; 0 before the first.';
comment on column test_runs.max_attempts is 'How many attempts it may have.';
comment on column test_runs.fence is 'Number of the last claim; grows with every claim. 0 before the first. Whoever sees a larger one must refuse the smaller.';
comment on column test_runs.lease_secret is 'Random part of the lease token of the running attempt, or of the last one if its own worker settled it. Not shown by the API.';
comment on column test_runs.settled_fence is 'The fence whose attempt was settled last. An UPDATE that leaves running must set it to fence.';
comment on column test_runs.claim_id is 'The claim request that took it, so that a repeated request gets the same answer. Not shown by the API.';
comment on column test_runs.worker is 'Who runs it, or ran its last attempt; null before the first start.';
comment on column test_runs.created_at is 'When it was enqueued, by the database''s clock.';
comment on column test_runs.run_at is 'When a scheduled run becomes due; null when it was meant for now.';
comment on column test_runs.available_at is 'From when on a queued run may be claimed: its enqueue, or the end of a retry''s backoff.';
comment on column test_runs.started_at is 'Start of the current or last attempt; never before the finish of the workflow''s run before it.';
comment on column test_runs.finished_at is 'When it became final.';
comment on column test_runs.timeout_seconds is 'Longest one attempt may take, in seconds. Filled at the first claim where the workflow says nothing.';
comment on column test_runs.heartbeat_timeout_seconds is 'Silence of the worker after which it is stale, in seconds. Filled at the first claim where the workflow says nothing.';
comment on column test_runs.cancel_requested_at is 'When somebody asked a running run to be cancelled. It stays running until its process is gone.';
comment on column test_runs.has_waiters is 'Another run waits for this one''s slot. Not shown by the API.';
comment on column test_runs.next_in_line is 'It goes before all other waiters. Not shown by the API.';
comment on column test_runs.exit_code is 'Exit code of the last attempt''s command; null when a signal ended it or nothing was started.';
comment on column test_runs.output is 'The JSON object that the last attempt ended its standard output with, or its worker gave.';
comment on column test_runs.error is 'One line on why the last attempt did not succeed.';
comment on column test_runs.rerun_of is 'The run this one repeats.';
comment on column test_runs.requested_by is 'Who enqueued it: the name given on trust in Singletrack-Actor, else the peer''s address; in SQL the session''s user.';
comment on column test_runs.traceparent is 'W3C trace context of the enqueue.';
comment on column test_runs.version is 'Grows with each write of the service. A status change that leaves it alone was made by hand and gets its event from a trigger.';

-- The promise. Their predicates are frozen: changing one would break version N beside version N+1.
create unique index test_runs_one_running on test_runs (workflow_id) where status = 'running';
create unique index test_runs_one_slot on test_runs (workflow_id) where status in ('queued', 'running');
comment on index test_runs_one_running is 'At most one running run per workflow.';
comment on index test_runs_one_slot is 'At most one run per workflow that holds the slot, so that the refusal is given at enqueue, not at claim.';

-- Claiming: due rows in the order in which they are to start.
create index test_runs_claimable on test_runs (priority desc, available_at, id) where status = 'queued';
-- The list, newest first; and one workflow's history, which claiming also asks for its previous finish.
create index test_runs_newest on test_runs (created_at desc, id desc);
create index test_runs_by_workflow on test_runs (workflow_id, created_at desc, id desc);

-- Runs that hold no slot yet: few, and no other run has an entry here.
create index test_runs_pending on test_runs (workflow_id) where status in ('scheduled', 'waiting');

create table run_leases (
    run_id       uuid        not null,
    fence        bigint      not null,
    heartbeat_at timestamptz not null,
    progress     jsonb,

    constraint run_leases_pkey primary key (run_id)
) with (fillfactor = 80); -- room on the page, so that a renewal stays a HOT update
comment on table run_leases is 'Renewals of running runs, apart from test_runs so that a lock somebody holds on a run never costs it its lease. A row exists from the first renewal on.';
comment on column run_leases.run_id is 'The run.';
comment on column run_leases.fence is 'The claim that is renewed; or a larger number, taken by the reaper to shut that claim out.';
comment on column run_leases.heartbeat_at is 'The last renewal. Before the first one started_at of the run counts.';
comment on column run_leases.progress is 'What the worker last said about how far it is.';

create table run_attempts (
    run_id      uuid        not null,
    fence       bigint      not null,
    attempt     integer     not null,
    status      text        not null,
    reason      text,
    worker      text        not null,
    started_at  timestamptz not null,
    finished_at timestamptz not null,
    exit_code   integer,
    error       text,

    constraint run_attempts_pkey primary key (run_id, fence),
    constraint run_attempts_status_known check (status in (
        'succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'released')),
    constraint run_attempts_finish_after_start check (finished_at >= started_at)
);
comment on table run_attempts is 'One row per settled attempt. The open one is the run''s own row.';
comment on column run_attempts.run_id is 'The run.';
comment on column run_attempts.fence is 'The claim; unique over all runs.';
comment on column run_attempts.attempt is 'Counts from 1; a released attempt''s number is used again.';
comment on column run_attempts.status is 'How it ended: succeeded, failed, cancelled, timed_out, stale; or released: given back unstarted, not counted.';
comment on column run_attempts.reason is 'Why, where the status alone does not say it.';
comment on column run_attempts.worker is 'Who ran it.';
comment on column run_attempts.started_at is 'When it was claimed.';
comment on column run_attempts.finished_at is 'When it was settled.';
comment on column run_attempts.exit_code is 'Exit code of its command, if it exited.';
comment on column run_attempts.error is 'One line on why it did not succeed.';

create table run_events (
    seq         bigint      generated always as identity,
    xid         xid8        not null default pg_current_xact_id(),
    run_id      uuid        not null,
    from_status text,
    to_status   text        not null,
    attempt     integer     not null,
    fence       bigint      not null,
    actor       text        not null,
    reason      text,
    at          timestamptz not null default now(),

    constraint run_events_pkey primary key (seq)
);
create index run_events_by_run on run_events (run_id, seq);
comment on table run_events is 'Append-only log of every status change, and of each request to cancel a running run (from running to running).';
comment on column run_events.seq is 'Grows; in order within one run. Over all runs a number may become visible after a larger one.';
comment on column run_events.xid is 'The transaction that wrote it.';
comment on column run_events.run_id is 'The run.';
comment on column run_events.from_status is 'The status before; null for the first event.';
comment on column run_events.to_status is 'The status from then on.';
comment on column run_events.attempt is 'The run''s attempt at that moment.';
comment on column run_events.fence is 'The run''s fence at that moment; 0 before its first claim.';
comment on column run_events.actor is 'Who did it: a requester, a worker, reaper, or the session''s user for a change by hand.';
comment on column run_events.reason is 'Why, where the statuses alone do not say it.';
comment on column run_events.at is 'When, by the database''s clock.';

create table run_logs (
    fence  bigint      not null,
    stream text        not null,
    seq    bigint      not null,
    at     timestamptz not null default now(),
    text   text        not null,

    constraint run_logs_pkey primary key (fence, stream, seq),
    constraint run_logs_stream_known check (stream in ('stdout', 'stderr', 'system'))
);
comment on table run_logs is 'What attempts printed, in pieces. Read one attempt''s log in the order of seq.';
comment on column run_logs.fence is 'The attempt: see fence of run_attempts and test_runs.';
comment on column run_logs.stream is 'stdout or stderr of the command; system: remarks of the worker, such as that the log was cut.';
comment on column run_logs.seq is 'Order of arrival, counted over all streams of the attempt.';
comment on column run_logs.at is 'When the piece was stored.';
comment on column run_logs.text is 'The text. Bytes that are not UTF-8, and NUL, were replaced by U+FFFD.';

create table run_refusals (
    run_id      uuid        not null,
    requester   text        not null,
    refusals    bigint      not null,
    first_at    timestamptz not null,
    last_at     timestamptz not null,

    constraint run_refusals_pkey primary key (run_id, requester)
);
comment on table run_refusals is 'Requests that were refused, or joined to a run, because it held the slot; bounded per run.';
comment on column run_refusals.run_id is 'The run that held the slot.';
comment on column run_refusals.requester is 'Who asked.';
comment on column run_refusals.refusals is 'How often.';
comment on column run_refusals.first_at is 'The first time.';
comment on column run_refusals.last_at is 'The last time.';
