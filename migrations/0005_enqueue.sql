-- Four answers to a conflict, pauses, later and regular runs, idempotency keys, enqueueing from SQL.
-- Safe beside a replica of the version before: it knows reject only, claims what is paused, and does not start what is
-- scheduled; the slot is handed on by a trigger, whoever frees it. It does not say that it is there either: while only such
-- replicas serve, a queued holder is said to have no_worker.

alter table workflow_revisions
    add column on_conflict text    not null default 'reject',
    add column max_waiting integer not null default 100,
    add column schedule    jsonb,
    add constraint workflow_revisions_on_conflict_known check (on_conflict in ('reject', 'return_existing', 'wait', 'replace')),
    add constraint workflow_revisions_max_waiting check (max_waiting between 1 and 10000),
    add constraint workflow_revisions_schedule check (
        jsonb_path_exists(schedule, 'strict $ ? (@.cron.type() == "string" && @.time_zone.type() == "string")'));
comment on column workflow_revisions.on_conflict is 'What a run does when the slot is taken, unless its enqueue says otherwise: reject, return_existing, wait or replace.';
comment on column workflow_revisions.max_waiting is 'How many runs may wait for one slot.';
comment on column workflow_revisions.schedule is 'When it runs by itself: cron, time_zone, missed (skip or run_once), input. Null: never.';

alter table test_runs
    add column blocked_by uuid,
    add column tick_at    timestamptz;
comment on column test_runs.blocked_by is 'The run that held the slot when this one was skipped for it.';
comment on column test_runs.tick_at is 'The tick of the workflow''s schedule that it was made for; null where somebody asked for it.';
comment on column test_runs.reason is 'Why, where the status alone does not say it: backoff, expired, conflict, paused, superseded, too_many_waiting, shutdown, timeout, unkillable, worker_lost, requested, forced, ...';

create table pauses (
    kind      text        not null,
    name      text        not null,
    reason    text,
    paused_by text        not null,
    paused_at timestamptz not null default now(),

    constraint pauses_pkey primary key (kind, name),
    constraint pauses_kind_known check (kind in ('workflow', 'queue'))
);
comment on table pauses is 'What is paused: no run of it is started. A row exists while the pause lasts.';
comment on column pauses.kind is 'workflow or queue.';
comment on column pauses.name is 'The workflow id or the queue. A definition''s pause holds for its instances too.';
comment on column pauses.reason is 'Why, in somebody''s words.';
comment on column pauses.paused_by is 'Who paused it.';
comment on column pauses.paused_at is 'Since when.';

create table idempotency_keys (
    owner       text        not null,
    workflow_id text        not null,
    key         text        not null,
    fingerprint bytea       not null,
    run_id      uuid        not null,
    joined      boolean     not null default false,
    expires_at  timestamptz not null,

    constraint idempotency_keys_pkey primary key (owner, workflow_id, key)
);
create index idempotency_keys_expired on idempotency_keys (expires_at);
comment on table idempotency_keys is 'Accepted requests by their Idempotency-Key, so that a repetition gets the same answer.';
comment on column idempotency_keys.owner is 'The API key it was given under; empty where there is none.';
comment on column idempotency_keys.workflow_id is 'The full workflow id.';
comment on column idempotency_keys.key is 'What the caller chose.';
comment on column idempotency_keys.fingerprint is 'SHA-256 of what was asked for: the same key with another request is a mistake.';
comment on column idempotency_keys.run_id is 'The run that was the answer.';
comment on column idempotency_keys.joined is 'It was there already: on_conflict return_existing.';
comment on column idempotency_keys.expires_at is 'From then on the key may be used anew.';

create table workflow_schedules (
    workflow_id text        not null,
    revision    integer     not null,
    since       timestamptz not null,
    next_at     timestamptz,

    constraint workflow_schedules_pkey primary key (workflow_id)
);
comment on table workflow_schedules is 'Where each schedule stands. What it says is in workflow_revisions.';
comment on column workflow_schedules.workflow_id is 'The workflow.';
comment on column workflow_schedules.revision is 'The revision whose schedule it is.';
comment on column workflow_schedules.since is 'Ticks count from here: when the schedule was last changed.';
comment on column workflow_schedules.next_at is 'The next tick to fire; null until a replica has worked it out.';

create table workflow_figures (
    workflow_id     text             not null,
    typical_seconds double precision,
    computed_at     timestamptz      not null default now(),

    constraint workflow_figures_pkey primary key (workflow_id)
);
comment on table workflow_figures is 'What is worked out from a workflow''s history now and then, so that nobody has to while a caller waits.';
comment on column workflow_figures.workflow_id is 'The full workflow id.';
comment on column workflow_figures.typical_seconds is 'Median duration of its last 20 succeeded runs among its last 500, in seconds; null where none succeeded.';
comment on column workflow_figures.computed_at is 'When.';

create table workers (
    name           text        not null,
    executor_types text[]      not null,
    queues         text[],
    workflows      text[],
    seen_at        timestamptz not null default now(),

    constraint workers_pkey primary key (name)
);
comment on table workers is 'Who asks for runs to execute: replicas and pull workers. A row is removed when its worker stops, or was not seen for a day.';
comment on column workers.name is 'As in worker of test_runs. One name has one subscription: the last that was told.';
comment on column workers.executor_types is 'The kinds of runs it takes.';
comment on column workers.queues is 'The queues it serves; null for all.';
comment on column workers.workflows is 'The workflows, or definitions, it takes runs of; null for all.';
comment on column workers.seen_at is 'When it last asked for runs, or had a heartbeat of one, to within half a minute.';

-- Who holds which slot, with all that a refused caller needs to know.
create view slot_holders as
select r.workflow_id, r.id as run_id, r.status,
       case
           when r.status = 'running' then r.reason
           when exists (select from pauses p
                        where p.kind = 'workflow' and p.name in (r.workflow_id, r.definition)
                           or p.kind = 'queue' and p.name = r.queue) then 'paused'
           when r.available_at > now() then 'backoff'
           when not exists (select from workers w
                            where w.seen_at > now() - interval '1 minute' and r.executor_type = any(w.executor_types)
                              and (w.queues is null or r.queue = any(w.queues))
                              and (w.workflows is null or w.workflows && array[r.workflow_id, r.definition])) then 'no_worker'
       end as reason,
       r.created_at,
       case when r.status = 'queued' then r.available_at end as available_at,
       -- between two attempts it is that of the last one
       case when r.status = 'running' then r.started_at end as started_at,
       case when r.status = 'running'
            then greatest(extract(epoch from now() - coalesce(l.heartbeat_at, r.started_at))::float8, 0)
       end as heartbeat_age_seconds,
       case when r.status = 'running' then l.progress end as progress,
       case when r.status = 'running' then r.started_at + make_interval(secs => f.typical_seconds) end as expected_end_at,
       r.requested_by
from test_runs r
left join run_leases l on l.run_id = r.id and l.fence >= r.fence -- a smaller one is of an attempt before this
left join workflow_figures f on f.workflow_id = r.workflow_id
where r.status in ('queued', 'running');
comment on view slot_holders is 'Who holds which slot, and why others have to wait: what a 409 says.';
comment on column slot_holders.run_id is 'The run that holds it.';
comment on column slot_holders.reason is 'Of a queued run, why it has not started: paused, backoff, or no_worker: nobody who serves its queue was seen for a minute.';
comment on column slot_holders.available_at is 'From when on a queued run may be claimed.';
comment on column slot_holders.started_at is 'When its attempt started; null while it is queued.';
comment on column slot_holders.heartbeat_age_seconds is 'Seconds since its worker''s last sign of life; null while it is queued.';
comment on column slot_holders.progress is 'What its worker last said about how far it is.';
comment on column slot_holders.expected_end_at is 'Its start and the workflow''s typical duration; null where there is no history.';

do $$
declare
    passed_on record;
begin
    for passed_on in
        select v.attname as name, col_description(t.attrelid, t.attnum) as comment
        from pg_attribute v
        join pg_attribute t on t.attrelid = 'test_runs'::regclass and t.attname = v.attname
        where v.attrelid = 'slot_holders'::regclass and col_description(v.attrelid, v.attnum) is null
    loop
        execute format('comment on column slot_holders.%I is %L', passed_on.name, passed_on.comment);
    end loop;
end $$;

-- Bounded per run, and by one writer at a time: the 19 requesters that are seen first by name, the others together.
create function record_refusals(run_ids uuid[], requesters text[], refusals bigint[], first_at timestamptz[], last_at timestamptz[])
returns void language plpgsql set search_path from current as $$
declare
    refused uuid;
begin
    for refused in select distinct unnest(run_ids) order by 1 loop
        perform pg_advisory_xact_lock(hashtextextended('singletrack run_refusals ' || refused, 0));
        with given as (
            select g.requester, g.refusals, g.first_at, g.last_at,
                   (k.run_id is null and g.requester <> '') as new_name,
                   row_number() over (partition by k.run_id is null and g.requester <> '' order by g.refusals desc, g.first_at, g.requester) as rank
            from unnest(record_refusals.run_ids, requesters, record_refusals.refusals, record_refusals.first_at, record_refusals.last_at)
                as g (run_id, requester, refusals, first_at, last_at)
            left join run_refusals k on k.run_id = g.run_id and k.requester = g.requester
            where g.run_id = refused
        ),
        named as (
            select case when new_name and rank > 19 - (select count(*) from run_refusals k where k.run_id = refused and k.requester <> '')
                        then '' else g.requester end as requester,
                   sum(g.refusals) as refusals, min(g.first_at) as first_at, max(g.last_at) as last_at
            from given g
            group by 1
        )
        insert into run_refusals as k (run_id, requester, refusals, first_at, last_at)
        select refused, n.requester, n.refusals, n.first_at, n.last_at
        from named n
        on conflict (run_id, requester) do update
        set refusals = k.refusals + excluded.refusals,
            first_at = least(k.first_at, excluded.first_at),
            last_at = greatest(k.last_at, excluded.last_at);
    end loop;
end $$;
comment on function record_refusals(uuid[], text[], bigint[], timestamptz[], timestamptz[]) is 'Adds to run_refusals what a replica has counted.';
comment on table run_refusals is
    'Requests over HTTP that were refused, or joined to a run, because it held the slot; at most 20 rows per run. Counted in memory and '
    'written within about a second, never twice: what a replica counted since is lost when it is killed, or when its connection breaks '
    'while it writes. Refusals of enqueue_run are not counted: a refusal writes nothing.';
comment on column run_refusals.requester is 'Who asked; empty for all beyond the first 19 together.';
