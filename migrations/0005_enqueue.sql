-- Four answers to a conflict, pauses, later and regular runs, idempotency keys, enqueueing from SQL.
-- Safe beside a replica of the version before: it knows reject only, claims what is paused, and does not start what is
-- scheduled; the slot is handed on by a trigger, whoever frees it.

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

create index test_runs_waiting on test_runs (workflow_id, next_in_line desc, priority desc, created_at, id) where status = 'waiting';
create index test_runs_due on test_runs (run_at, id) where status = 'scheduled';
create unique index test_runs_one_per_tick on test_runs (workflow_id, tick_at) where tick_at is not null;
comment on index test_runs_waiting is 'Who is next, when a slot comes free.';
comment on index test_runs_due is 'Scheduled runs in the order in which they are due.';
comment on index test_runs_one_per_tick is 'However many replicas see a tick of a schedule, it fires once.';

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
    typical_seconds double precision not null,
    computed_at     timestamptz      not null default now(),

    constraint workflow_figures_pkey primary key (workflow_id)
);
comment on table workflow_figures is 'What is worked out from a workflow''s history now and then, so that nobody has to while a caller waits.';
comment on column workflow_figures.workflow_id is 'The full workflow id.';
comment on column workflow_figures.typical_seconds is 'Median duration of its last 20 succeeded runs, in seconds.';
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
comment on column workers.name is 'As in worker of test_runs.';
comment on column workers.executor_types is 'The kinds of runs it takes.';
comment on column workers.queues is 'The queues it serves; null for all.';
comment on column workers.workflows is 'The workflows, or definitions, it takes runs of; null for all.';
comment on column workers.seen_at is 'When it last asked, to within a few seconds; a replica tells with each heartbeat.';

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

-- What can be asked for the end of a run: the same for people, the API, and a run that replaces another.
create function cancel_run(run_id uuid, actor text, reason text) returns text language plpgsql set search_path from current as $$
declare
    run test_runs;
begin
    select * into run from test_runs where id = cancel_run.run_id for update;
    if not found then
        return 'not-found';
    elsif run.status in ('scheduled', 'waiting', 'queued') then
        -- told first: the update may hand the slot on
        insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
        values (run.id, run.status, 'cancelled', run.attempt, run.fence, cancel_run.actor, cancel_run.reason);
        update test_runs
        set status = 'cancelled', reason = cancel_run.reason, cancel_requested_at = now(),
            finished_at = greatest(now(), started_at), version = version + 1
        where id = run.id;
        return 'cancelled';
    elsif run.status = 'running' then
        if run.cancel_requested_at is null then
            update test_runs set cancel_requested_at = now(), version = version + 1 where id = run.id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            values (run.id, 'running', 'running', run.attempt, run.fence, cancel_run.actor, 'cancel_requested');
        end if;
        perform pg_notify('singletrack_cancel', run.id::text);
        return 'cancel-requested';
    end if;
    return 'already-final';
end $$;
comment on function cancel_run(uuid, text, text) is 'Cancels a run as cancel_run(uuid) does, in the name of actor; reason is what a run says that had not started.';

create or replace function cancel_run(run_id uuid, actor text) returns text language plpgsql set search_path from current as $$
begin
    return cancel_run(run_id, actor, 'requested');
end $$;

-- Gives a free slot to whoever is next. Called in the very transaction that freed it: an enqueuer that is about to wait has the
-- holder locked until its own run can be seen, so either this one sees it, or it sees that the slot is free.
create function promote(workflow_id text) returns uuid language plpgsql set search_path from current as $$
declare
    next test_runs;
begin
    -- Somebody who has a waiter locked must not keep the slot from the others; the sweep is the net.
    select r.* into next
    from test_runs r
    where r.workflow_id = promote.workflow_id and r.status = 'waiting'
    order by r.next_in_line desc, r.priority desc, r.created_at, r.id
    limit 1
    for update skip locked;
    if not found then
        return null;
    end if;
    -- Locked, so that a resume comes before or after as a whole: then it promotes by itself.
    perform from pauses p where p.kind = 'workflow' and p.name in (next.workflow_id, next.definition) for share;
    if found then
        return null;
    end if;
    update test_runs r
    set status = 'queued', available_at = now(), next_in_line = false, has_waiters = true, version = r.version + 1
    where r.id = next.id;
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
    values (next.id, 'waiting', 'queued', next.attempt, next.fence, 'promoter');
    return next.id;
end $$;
comment on function promote(text) is 'Queues the workflow''s next waiting run, if there is one and the workflow is not paused. The slot must be free.';

create function hand_on_slot() returns trigger language plpgsql set search_path from current as $$
begin
    perform promote(old.workflow_id);
    return null;
end $$;
comment on function hand_on_slot() is 'Trigger: gives the slot that came free to the next waiting run.';

create trigger test_runs_hand_on_slot after update on test_runs for each row
    when (old.has_waiters and old.status in ('queued', 'running') and new.status not in ('queued', 'running'))
    execute function hand_on_slot();

create function promote_if_free(workflow_id text) returns uuid language plpgsql set search_path from current as $$
declare
    holder  test_runs;
    blocked constant text := promote_if_free.workflow_id;
begin
    for look in 1..8 loop
        select * into holder from test_runs r where r.workflow_id = blocked and r.status in ('queued', 'running');
        if found then
            -- It hands the slot on, if it knows that somebody waits. One that does is not locked: it may wait for our pause.
            exit when holder.has_waiters
                or not exists (select from test_runs r where r.workflow_id = blocked and r.status = 'waiting');
            update test_runs r set has_waiters = true, version = r.version + 1
            where r.id = holder.id and r.status in ('queued', 'running');
            exit when found;
        else
            begin
                return promote(blocked);
            exception when unique_violation then -- somebody took the slot: look again
            end;
        end if;
    end loop;
    return null;
end $$;
comment on function promote_if_free(text) is 'Queues the workflow''s next waiting run if its slot is free, else sees to it that the holder hands it on.';

create function resume_workflow(workflow_id text) returns boolean language plpgsql set search_path from current as $$
declare
    stopped text;
begin
    delete from pauses p where p.kind = 'workflow' and p.name = resume_workflow.workflow_id;
    if not found then
        return false;
    end if;
    for stopped in
        select distinct r.workflow_id
        from test_runs r
        where r.status = 'waiting' and resume_workflow.workflow_id in (r.workflow_id, r.definition)
        order by 1
    loop
        perform promote_if_free(stopped);
    end loop;
    return true;
end $$;
comment on function resume_workflow(text) is 'Ends the pause of a workflow, and queues its next waiting run. False where it was not paused.';

-- What a run meets that wants a slot now. For wait and replace the holder stays locked until the caller's transaction ends: it
-- can't hand the slot on before the caller's run can be seen to wait.
create function meet_slot(workflow_id text, definition text, on_conflict text, max_waiting integer, out verdict text, out holder uuid)
language plpgsql set search_path from current as $$
declare
    names   constant text[] := array[meet_slot.workflow_id, meet_slot.definition];
    waiting bigint;
begin
    if exists (select from pauses p where p.kind = 'workflow' and p.name = any(names)) then
        if on_conflict <> 'wait' then
            verdict := 'workflow-paused';
            return;
        end if;
        -- A resume promotes what it sees: it must come before this run or after it. And one at a time may count.
        perform from pauses p where p.kind = 'workflow' and p.name = any(names) order by p.name for no key update;
        if found then
            verdict := 'waiting';
        end if;
    end if;
    if verdict is null then
        select r.id into holder from test_runs r where r.workflow_id = names[1] and r.status in ('queued', 'running');
        if not found then
            verdict := 'free';
            return;
        elsif on_conflict = 'reject' then
            verdict := 'slot-taken';
            return;
        elsif on_conflict = 'return_existing' then
            verdict := 'existing';
            return;
        end if;
        select r.id into holder from test_runs r
        where r.workflow_id = names[1] and r.status in ('queued', 'running')
        for no key update;
        if not found then
            verdict := 'free'; -- or somebody else's by now, whom only a new look can see
            return;
        elsif on_conflict = 'wait' then
            verdict := 'waiting';
        else
            verdict := 'replace';
        end if;
    end if;
    if verdict = 'waiting' then
        select count(*) into waiting from test_runs r where r.workflow_id = names[1] and r.status = 'waiting' and not r.next_in_line;
        if waiting >= max_waiting then
            verdict := 'too-many-waiting';
            return;
        end if;
    end if;
    update test_runs r set has_waiters = true, version = r.version + 1 where r.id = holder and not r.has_waiters;
end $$;
comment on function meet_slot(text, text, text, integer) is
    'What a run that wants the slot now comes to: free, waiting, replace, existing, slot-taken, workflow-paused or too-many-waiting.';

-- The new run is next in line already, and the holder knows that somebody waits: a queued one hands the slot on at once.
create function replace_holder(run_id uuid, workflow_id text, holder uuid, actor text) returns void
language plpgsql set search_path from current as $$
begin
    with superseded as (
        update test_runs r
        set status = 'skipped', reason = 'superseded', finished_at = now(), version = r.version + 1
        where r.workflow_id = replace_holder.workflow_id and r.status = 'waiting' and r.next_in_line
          and r.id <> replace_holder.run_id
        returning r.id, r.attempt, r.fence
    )
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    select s.id, 'waiting', 'skipped', s.attempt, s.fence, replace_holder.actor, 'superseded'
    from superseded s;
    perform cancel_run(holder, actor, 'superseded');
end $$;
comment on function replace_holder(uuid, text, uuid, text) is 'Cancels the holder of a slot in favour of a waiting run that is next in line, and skips whom that one supersedes.';

create function start_due(run_id uuid) returns text language plpgsql set search_path from current as $$
declare
    run     test_runs;
    met     record;
    becomes text;
    why     text;
begin
    select * into run from test_runs r
    where r.id = start_due.run_id and r.status = 'scheduled' and r.run_at <= now()
    for update skip locked;
    if not found then
        return null;
    end if;
    for look in 1..8 loop
        select * into met
        from meet_slot(run.workflow_id, run.definition, run.on_conflict, coalesce(
            (select v.max_waiting from workflow_revisions v where v.workflow_id = run.definition and v.revision = run.revision), 100));
        becomes := case met.verdict when 'free' then 'queued' when 'waiting' then 'waiting' when 'replace' then 'waiting' else 'skipped' end;
        why := case met.verdict when 'slot-taken' then 'conflict' when 'existing' then 'conflict'
                                when 'workflow-paused' then 'paused' when 'too-many-waiting' then 'too_many_waiting' end;
        begin
            update test_runs r
            set status = becomes, reason = why, next_in_line = met.verdict = 'replace', version = r.version + 1,
                blocked_by = case when why = 'conflict' then met.holder end,
                available_at = case when becomes = 'queued' then now() end,
                finished_at = case when becomes = 'skipped' then now() end
            where r.id = run.id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            values (run.id, 'scheduled', becomes, run.attempt, run.fence, 'scheduler', why);
            if met.verdict = 'replace' then
                perform replace_holder(run.id, run.workflow_id, met.holder, run.requested_by);
            end if;
            return becomes;
        exception when unique_violation then -- somebody took the slot: look again
        end;
    end loop;
    return null;
end $$;
comment on function start_due(uuid) is 'Lets a scheduled run that is due meet its slot: it becomes queued, waiting or skipped, which is returned; null where there was nothing to do yet.';

create function new_run_id() returns uuid language sql volatile set search_path from current as $$
    -- a random one, with the time in milliseconds in front, and its version changed from 4 to 7 (RFC 9562)
    select encode(set_bit(set_bit(overlay(
        uuid_send(gen_random_uuid())
        placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
        from 1 for 6), 52, 1), 53, 1), 'hex')::uuid
$$;
comment on function new_run_id() is 'A UUIDv7.';

create function enqueue_run_as(
    id uuid, workflow_id text, input jsonb, on_conflict text, idempotency_key text, priority integer, run_at timestamptz,
    delay_seconds double precision, labels jsonb, max_attempts integer, rerun_of uuid, tick_at timestamptz, requested_by text,
    owner text, key_seconds double precision, repeated boolean,
    out run_id uuid, out outcome text, out holder uuid)
language plpgsql set search_path from current as $$
#variable_conflict use_variable
declare
    known    record;
    kept     idempotency_keys;
    print    bytea;
    met      record;
    due_at   constant timestamptz := coalesce(tick_at, run_at, now() + make_interval(secs => delay_seconds));
    inserted integer;
begin
    select w.id as definition, v.revision, v.executor_type, v.queue, v.timeout_seconds, v.heartbeat_timeout_seconds, v.max_waiting,
           coalesce(enqueue_run_as.on_conflict, v.on_conflict) as on_conflict,
           coalesce(input, o.input) as input,
           coalesce(priority::smallint, o.priority, v.priority) as priority,
           coalesce(o.labels, v.labels) || coalesce(labels, '{}') as labels,
           coalesce(max_attempts, o.max_attempts, v.max_attempts) as max_attempts
    into known
    from (select) one
    left join test_runs o on o.id = rerun_of
    cross join lateral (
        select w.id, w.revision
        from workflows w
        where w.id = any(case when o.id is null then array[workflow_id, split_part(workflow_id, '@', 1)] else array[o.definition] end)
          and w.deleted_at is null
        order by length(w.id) desc
        limit 1
    ) w
    join workflow_revisions v on v.workflow_id = w.id and v.revision = coalesce(o.revision, w.revision)
    where rerun_of is null or o.id is not null;
    if not found then
        outcome := 'not-found';
        return;
    end if;

    if idempotency_key is not null then
        print := sha256(convert_to(jsonb_build_array(input, enqueue_run_as.on_conflict, priority, run_at, delay_seconds,
                                                     coalesce(labels, '{}'), max_attempts, rerun_of)::text, 'UTF8'));
        loop
            begin
                insert into idempotency_keys as k (owner, workflow_id, key, fingerprint, run_id, expires_at)
                values (owner, workflow_id, idempotency_key, print, id, now() + make_interval(secs => key_seconds))
                on conflict do nothing; -- waits for the same request that is under way
                get diagnostics inserted = row_count;
            exception when lock_not_available then
                outcome := 'idempotency-in-flight';
                return;
            end;
            exit when inserted = 1;
            select * into kept from idempotency_keys k
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
            continue when not found;
            if kept.expires_at <= now() or not exists (select from test_runs r where r.id = kept.run_id) then
                delete from idempotency_keys k
                where k.owner = kept.owner and k.workflow_id = kept.workflow_id and k.key = kept.key and k.run_id = kept.run_id;
                continue;
            end if;
            run_id := kept.run_id;
            outcome := case when kept.fingerprint <> print then 'idempotency-mismatch'
                            when kept.joined then 'existing' else 'repeated' end;
            return;
        end loop;
    end if;

    for look in 1..8 loop
        -- The same request, sent before: looked for only when it may be there.
        if repeated or look > 1 then
            perform from test_runs r where r.id = enqueue_run_as.id;
            if found then
                run_id := id;
                outcome := 'repeated';
                return;
            end if;
        end if;
        if due_at > now() or tick_at is not null then
            outcome := 'scheduled';
        else
            select * into met from meet_slot(workflow_id, known.definition, known.on_conflict, known.max_waiting);
            holder := met.holder;
            outcome := case met.verdict when 'free' then 'queued' when 'replace' then 'waiting' else met.verdict end;
        end if;
        exit when outcome not in ('scheduled', 'waiting', 'queued');
        insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, priority, labels, input,
                               on_conflict, run_at, tick_at, available_at, timeout_seconds, heartbeat_timeout_seconds,
                               requested_by, max_attempts, rerun_of, next_in_line, version)
        values (id, workflow_id, known.definition, known.revision, outcome, known.executor_type, known.queue, known.priority,
                known.labels, known.input, known.on_conflict, due_at, tick_at, case when outcome = 'queued' then now() end,
                known.timeout_seconds, known.heartbeat_timeout_seconds, requested_by, known.max_attempts, rerun_of,
                outcome = 'waiting' and met.verdict = 'replace', 1)
        on conflict do nothing; -- whatever index it is: REINDEX CONCURRENTLY brings one of another name
        get diagnostics inserted = row_count;
        if inserted = 1 then
            run_id := id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
            values (id, null, outcome, 0, 0, requested_by);
            if tick_at is not null then
                outcome := coalesce(start_due(id), outcome);
            elsif outcome = 'waiting' and met.verdict = 'replace' then
                perform replace_holder(id, workflow_id, holder, requested_by);
                select r.status into outcome from test_runs r where r.id = enqueue_run_as.id;
            end if;
            return;
        end if;
        outcome := 'contended';
    end loop;

    if outcome = 'existing' then
        run_id := holder;
    end if;
    if idempotency_key is not null then
        if outcome = 'existing' then
            update idempotency_keys k set run_id = enqueue_run_as.holder, joined = true
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
        else -- refusals are not kept
            delete from idempotency_keys k
            where k.owner = enqueue_run_as.owner and k.workflow_id = enqueue_run_as.workflow_id and k.key = idempotency_key;
        end if;
    end if;
end $$;
comment on function enqueue_run_as(uuid, text, jsonb, text, text, integer, timestamptz, double precision, jsonb, integer, uuid, timestamptz, text, text, double precision, boolean) is
    'Enqueues a run in the name of requested_by; what the API calls where one statement over many is not enough. People call enqueue_run.';

create function enqueue_run(
    workflow_id text, input jsonb default null, on_conflict text default null, idempotency_key text default null,
    priority integer default null, run_at timestamptz default null, labels jsonb default null, max_attempts integer default null,
    out run_id uuid, out outcome text, out holder uuid)
language plpgsql set search_path from current set lock_timeout = '2s' as $$
#variable_conflict use_variable
declare
    wrong constant text := case
        when coalesce(workflow_id, '') !~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$'
            then 'workflow_id: ' || coalesce(quote_literal(workflow_id), 'null') || ' is not a workflow id such as deploy or deploy@prod'
        when on_conflict not in ('reject', 'return_existing', 'wait', 'replace')
            then 'on_conflict: ' || quote_literal(on_conflict) || ' is not one of reject, return_existing, wait, replace'
        when length(idempotency_key) not between 1 and 255 then 'idempotency_key: must have 1 to 255 characters'
        when priority not between -100 and 100 then 'priority: ' || priority || ' is out of range: -100 to 100, higher first'
        when run_at < '1970-01-01 00:00:00+00' or run_at >= '10000-01-01 00:00:00+00' then 'run_at: must be in the years 1970 to 9999'
        when max_attempts not between 1 and 1000 then 'max_attempts: ' || max_attempts || ' is out of range: 1 to 1000'
        when jsonb_typeof(labels) <> 'object' or jsonb_path_exists(labels, '$.* ? (@.type() != "string")')
            then 'labels: must be an object of strings'
        when (select count(*) > 64 or bool_or(octet_length(l.key) not between 1 and 63 or octet_length(l.value) > 255)
              from jsonb_each_text(case jsonb_typeof(labels) when 'object' then labels end) l)
            then 'labels: at most 64, names of 1 to 63 bytes, values of at most 255 bytes'
    end;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'enqueue_run needs a READ COMMITTED transaction, this one is %', upper(current_setting('transaction_isolation'))
            using errcode = 'feature_not_supported',
                  hint = 'It must see who took the slot meanwhile, which a snapshot from before does not show. Begin with: begin isolation level read committed.';
    elsif wrong is not null then
        raise exception '%', wrong using errcode = 'invalid_parameter_value', hint = 'See the comment of enqueue_run.';
    end if;
    select e.run_id, e.outcome, e.holder into run_id, outcome, holder
    from enqueue_run_as(new_run_id(), workflow_id, input, on_conflict, idempotency_key, priority, run_at, null, labels, max_attempts,
                        null, null, session_user, '', 86400, false) e;
    if outcome = 'repeated' then
        select r.status into outcome from test_runs r where r.id = enqueue_run.run_id;
    elsif outcome = 'idempotency-mismatch' then
        raise exception 'idempotency_key % was used for another request, which became run %', quote_literal(idempotency_key), run_id
            using errcode = 'invalid_parameter_value', hint = 'Use another key for another request.';
    elsif outcome in ('idempotency-in-flight', 'contended') then
        raise exception '%', case outcome when 'contended' then 'the slot changed hands too fast to be looked at'
                                  else 'a request with this idempotency_key is under way' end
            using errcode = 'lock_not_available', hint = 'Nothing was enqueued. Try again.';
    end if;
end $$;
comment on function enqueue_run(text, jsonb, text, text, integer, timestamptz, jsonb, integer) is
    'Enqueues a run in this transaction, which must be READ COMMITTED. Everything but the first argument may be null: as the workflow '
    'says. outcome: queued, scheduled or waiting (run_id is the new run; with a repeated idempotency_key the run that it became, and its '
    'status), existing (run_id is the run that has the slot), and, with nothing enqueued: slot-taken (holder is the run that has it), '
    'workflow-paused, too-many-waiting, not-found. Until the transaction ends, other requests for the same workflow have to wait.';

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
                   row_number() over (partition by k.run_id is null and g.requester <> '' order by g.refusals desc, g.requester) as rank
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
comment on column run_refusals.requester is 'Who asked; empty for all beyond the first 19 together.';

-- What the sweeps promise: two of them, and nothing is left.
do $$
begin
    execute 'create or replace view invariant_violations as ' || rtrim(pg_get_viewdef('invariant_violations'::regclass), '; ') || $more$
        union all
        select 'stranded-waiter', r.workflow_id, r.id, 'waits for a slot that is free'
        from test_runs r
        where r.status = 'waiting' and r.created_at < now() - interval '1 minute'
          and not exists (select from test_runs h where h.workflow_id = r.workflow_id and h.status in ('queued', 'running'))
          and not exists (select from test_runs h where h.workflow_id = r.workflow_id and h.finished_at > now() - interval '1 minute')
          and not exists (select from pauses p where p.kind = 'workflow' and p.name in (r.workflow_id, r.definition))
        union all
        select 'due-and-scheduled', r.workflow_id, r.id, 'was due at ' || r.run_at
        from test_runs r
        where r.status = 'scheduled' and r.run_at < now() - interval '1 minute'$more$;
end $$;
