-- What the database itself refuses, and the functions for people who must act by hand.

create function refuse_run_change() returns trigger language plpgsql set search_path from current as $$
begin
    if old.status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped') then
        raise exception 'run % is % and final: a final run is never changed', old.id, old.status
            using errcode = 'restrict_violation', constraint = 'test_runs_final_is_final',
                  hint = 'Enqueue a new run instead.';
    elsif old.id <> new.id or old.workflow_id <> new.workflow_id then
        raise exception 'run %: id and workflow_id never change', old.id
            using errcode = 'restrict_violation', constraint = 'test_runs_identity',
                  hint = 'End this run with select cancel_run(id) and enqueue a new one.';
    elsif new.fence < old.fence or (new.status = 'running' and old.status <> 'running' and new.fence = old.fence) then
        raise exception 'run %: its fence is %, and the next can''t be %', old.id, old.fence, new.fence
            using errcode = 'restrict_violation', constraint = 'test_runs_fence_grows',
                  hint = 'A fence is given by a claim only. To free the slot: select force_release_run(id, reason).';
    elsif old.status = 'running' and new.status = 'running' then
        raise exception 'run % is running under fence %: its lease belongs to its worker', old.id, old.fence
            using errcode = 'restrict_violation', constraint = 'test_runs_lease_stays',
                  hint = 'To stop it: select cancel_run(id). To free the slot although its process may still run: '
                      || 'select force_release_run(id, reason).';
    else
        raise exception 'run % is running under fence %: leaving running must name that lease', old.id, old.fence
            using errcode = 'restrict_violation', constraint = 'test_runs_settles_its_lease',
                  hint = 'To stop it: select cancel_run(id). To free the slot although its process may still run: '
                      || 'select force_release_run(id, reason). Else set settled_fence = fence in the same UPDATE.';
    end if;
end $$;
comment on function refuse_run_change() is 'Trigger: says why a change of a run is refused, and what to do instead.';

-- The conditions stand in WHEN, so that a permitted update never enters the function.
create trigger test_runs_refuse_change before update on test_runs for each row
    when (old.status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')
        or (old.status = 'running' and new.status <> 'running' and new.settled_fence is distinct from old.fence)
        or new.fence < old.fence
        or (new.status = 'running' and old.status <> 'running' and new.fence = old.fence)
        or (old.status = 'running' and new.status = 'running'
            and (old.fence, old.lease_secret, old.worker, old.settled_fence)
                is distinct from (new.fence, new.lease_secret, new.worker, new.settled_fence))
        or old.id <> new.id
        or old.workflow_id <> new.workflow_id)
    execute function refuse_run_change();

create function refuse_run_delete() returns trigger language plpgsql set search_path from current as $$
begin
    raise exception 'run % is %: a live run can''t be deleted', old.id, old.status
        using errcode = 'restrict_violation', constraint = 'test_runs_live_stays',
              hint = 'End it first: select cancel_run(id), or force_release_run(id, reason).';
end $$;
comment on function refuse_run_delete() is 'Trigger: a live run is ended, not deleted.';

create trigger test_runs_refuse_delete before delete on test_runs for each row
    when (old.status in ('scheduled', 'waiting', 'queued', 'running'))
    execute function refuse_run_delete();

create function refuse_run_truncate() returns trigger language plpgsql set search_path from current as $$
begin
    if exists (select from test_runs where status in ('scheduled', 'waiting', 'queued', 'running')) then
        raise exception 'test_runs holds live runs and can''t be truncated'
            using errcode = 'restrict_violation', constraint = 'test_runs_live_stays',
                  hint = 'End them first: select cancel_run(id), or force_release_run(id, reason).';
    end if;
    return null;
end $$;
comment on function refuse_run_truncate() is 'Trigger: a live run is ended, not deleted.';

create trigger test_runs_refuse_truncate before truncate on test_runs for each statement
    execute function refuse_run_truncate();

-- The service writes events and attempts in the statement that makes the change, and bumps version. What did not bump
-- it was typed by somebody, and is recorded here.
create function record_hand_made_change() returns trigger language plpgsql set search_path from current as $$
begin
    if tg_op = 'INSERT' then
        insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
        values (new.id, null, new.status, new.attempt, new.fence, session_user, 'by_hand');
        return null;
    end if;
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    values (new.id, old.status, new.status, new.attempt, new.fence, session_user, coalesce(new.reason, 'by_hand'));
    if old.status = 'running' then
        insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at, exit_code, error)
        values (old.id, old.fence, old.attempt,
                case when new.status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale') then new.status
                     else 'released' end,
                coalesce(new.reason, 'by_hand'), old.worker, old.started_at,
                greatest(now(), old.started_at), new.exit_code, new.error)
        on conflict do nothing;
    end if;
    return null;
end $$;
comment on function record_hand_made_change() is 'Trigger: gives a change made by hand its event and its attempt.';

create trigger test_runs_record_hand_made_insert after insert on test_runs for each row
    when (new.version = 0)
    execute function record_hand_made_change();
create trigger test_runs_record_hand_made_update after update on test_runs for each row
    when (old.status <> new.status and old.version = new.version)
    execute function record_hand_made_change();

create function cancel_run(run_id uuid) returns text language plpgsql set search_path from current as $$
declare
    run test_runs;
begin
    select * into run from test_runs where id = cancel_run.run_id for update;
    if not found then
        return 'not-found';
    elsif run.status in ('scheduled', 'waiting', 'queued') then
        update test_runs
        set status = 'cancelled', reason = 'requested', cancel_requested_at = now(),
            finished_at = greatest(now(), started_at), version = version + 1
        where id = run.id;
        insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
        values (run.id, run.status, 'cancelled', run.attempt, run.fence, session_user, 'requested');
        return 'cancelled';
    elsif run.status = 'running' then
        if run.cancel_requested_at is null then
            update test_runs set cancel_requested_at = now(), version = version + 1 where id = run.id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            values (run.id, 'running', 'running', run.attempt, run.fence, session_user, 'cancel_requested');
        end if;
        return 'cancel-requested';
    end if;
    return 'already-final';
end $$;
comment on function cancel_run(uuid) is
    'Cancels a run. Before it has started: at once (cancelled). Running: asks its worker to stop the process; the slot stays '
    'taken until the process is gone (cancel-requested). Else already-final or not-found.';

create function force_release_run(run_id uuid, reason text) returns text language plpgsql set search_path from current as $$
declare
    run test_runs;
begin
    if coalesce(btrim(reason), '') = '' then
        raise exception 'force_release_run needs a reason'
            using errcode = 'invalid_parameter_value',
                  hint = 'Say why in the second argument: it becomes the run''s error, for whoever reads the history.';
    end if;
    select * into run from test_runs where id = force_release_run.run_id for update;
    if not found then
        return 'not-found';
    elsif run.status not in ('queued', 'running') then
        return 'holds-no-slot';
    end if;
    update test_runs
    set status = 'stale', reason = 'forced', error = force_release_run.reason, lease_secret = null,
        settled_fence = case when run.status = 'running' then fence else settled_fence end,
        finished_at = greatest(now(), started_at), version = version + 1
    where id = run.id;
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    values (run.id, run.status, 'stale', run.attempt, run.fence, session_user, 'forced');
    if run.status = 'running' then
        insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at, error)
        values (run.id, run.fence, run.attempt, 'stale', 'forced', run.worker, run.started_at,
                greatest(now(), run.started_at), force_release_run.reason)
        on conflict do nothing; -- a slot must come free, whatever was done to its run by hand
    end if;
    return 'released';
end $$;
comment on function force_release_run(uuid, text) is
    'Ends the queued or running run that holds a slot as stale, reason forced, and frees the slot AT ONCE. The old process may '
    'still run: nothing waits for it, and the next run can start beside it. Returns released, holds-no-slot or not-found.';
