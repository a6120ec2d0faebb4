-- How a slot is handed on while a pause ends; the functions of 0006 with two races less, both found by tests/checker. Safe beside a
-- replica of the version before, which calls them as ever.
--
-- The end of a holder waited for the pause that a resume was deleting, and the resume for that holder's row: a deadlock. And a resume
-- relied on a holder that knew of waiters although its end had looked for them already: a run waited behind a free slot for the sweep.

create or replace function promote(workflow_id text) returns uuid language plpgsql set search_path from current as $$
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
    -- Locked, so that a resume comes before or after as a whole: then it promotes by itself. One that is under way counts as over:
    -- it may wait for the holder whose end this is. Taken back, it leaves a paused workflow a queued run, which is not claimed.
    perform from pauses p where p.kind = 'workflow' and p.name in (next.workflow_id, next.definition) for share skip locked;
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

create or replace function promote_if_free(workflow_id text) returns uuid language plpgsql set search_path from current as $$
declare
    holder  test_runs;
    blocked constant text := promote_if_free.workflow_id;
begin
    for look in 1..8 loop
        select * into holder from test_runs r where r.workflow_id = blocked and r.status in ('queued', 'running');
        if found then
            -- It hands the slot on, if it knows that somebody waits and has not looked yet: its end may be under way, from before
            -- there was a waiter, or from before the end of our pause. So it is locked, also where it knows.
            exit when not exists (select from test_runs r where r.workflow_id = blocked and r.status = 'waiting');
            perform from test_runs r where r.id = holder.id and r.status in ('queued', 'running') for no key update;
            if found then
                update test_runs r set has_waiters = true, version = r.version + 1 where r.id = holder.id and not r.has_waiters;
                exit;
            end if;
        else
            begin
                return promote(blocked);
            exception when unique_violation then -- somebody took the slot: look again
            end;
        end if;
    end loop;
    return null;
end $$;

-- Holders are locked in the order in which ends are settled: by id.
create or replace function resume_workflow(workflow_id text) returns boolean language plpgsql set search_path from current as $$
declare
    stopped text;
begin
    delete from pauses p where p.kind = 'workflow' and p.name = resume_workflow.workflow_id;
    if not found then
        return false;
    end if;
    for stopped in
        select r.workflow_id
        from test_runs r
        where r.status = 'waiting' and resume_workflow.workflow_id in (r.workflow_id, r.definition)
        group by r.workflow_id
        order by (select h.id from test_runs h where h.workflow_id = r.workflow_id and h.status in ('queued', 'running')), 1
    loop
        perform promote_if_free(stopped);
    end loop;
    return true;
end $$;
