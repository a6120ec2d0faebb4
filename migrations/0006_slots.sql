-- How a slot is handed on, and what a run meets that wants it.

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

create function waiting_for(workflow_id text) returns bigint language sql volatile set search_path from current as $$
    select count(*) from test_runs r where r.workflow_id = waiting_for.workflow_id and r.status = 'waiting' and not r.next_in_line
$$;
comment on function waiting_for(text) is 'How many runs wait for a slot, but for the one that is next in line by on_conflict replace.';

-- What a run meets that wants a slot now. For wait and replace the holder stays locked until the caller's transaction ends: it
-- can't hand the slot on before the caller's run can be seen to wait.
create function meet_slot(workflow_id text, definition text, on_conflict text, max_waiting integer, out verdict text, out holder uuid)
language plpgsql set search_path from current as $$
declare
    names constant text[] := array[meet_slot.workflow_id, meet_slot.definition];
begin
    if exists (select from pauses p where p.kind = 'workflow' and p.name = any(names)) then
        if on_conflict <> 'wait' then
            verdict := 'workflow-paused';
            return;
        end if;
        -- A resume promotes what it sees: it must come before this run or after it.
        perform from pauses p where p.kind = 'workflow' and p.name = any(names) order by p.name for share;
        if found then
            verdict := 'waiting';
            perform pg_advisory_xact_lock(hashtextextended('singletrack waiting ' || names[1], 0)); -- one at a time may count
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
        elsif on_conflict = 'wait' and waiting_for(names[1]) >= max_waiting then
            verdict := 'too-many-waiting'; -- known without a lock, which would keep claims from the holder
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
    if verdict = 'waiting' and waiting_for(names[1]) >= max_waiting then
        verdict := 'too-many-waiting';
        return;
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

create function start_due(run_id uuid) returns text language plpgsql set search_path from current
set lock_timeout = '20ms' -- a transaction that somebody leaves open is not to keep the runs of other workflows
as $$
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
        begin
            select * into met
            from meet_slot(run.workflow_id, run.definition, run.on_conflict, coalesce(
                (select v.max_waiting from workflow_revisions v where v.workflow_id = run.definition and v.revision = run.revision), 100));
            becomes := case met.verdict when 'free' then 'queued' when 'waiting' then 'waiting' when 'replace' then 'waiting' else 'skipped' end;
            why := case met.verdict when 'slot-taken' then 'conflict' when 'existing' then 'conflict'
                                    when 'workflow-paused' then 'paused' when 'too-many-waiting' then 'too_many_waiting' end;
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
        exception
            when unique_violation then -- somebody took the slot: look again
            when lock_not_available then -- somebody is at the slot: the run stays scheduled
                return null;
        end;
    end loop;
    return null;
end $$;
comment on function start_due(uuid) is 'Lets a scheduled run that is due meet its slot: it becomes queued, waiting or skipped, which is returned; null where there was nothing to do yet, or somebody else is at its slot.';

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
