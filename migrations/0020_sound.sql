-- The same rules for less. Postgres reads every check constraint anew for every statement that writes, and twenty of them were four
-- tenths of what a statement by itself cost; a function is read once per connection. Safe beside a replica of the version before:
-- what is refused, and under which name, stays.

-- No `set search_path` here: it would cost as much as the rules, and nothing is called but what is
-- built in, which comes first in every path that does not put it elsewhere by name.
create function run_is_sound(
    workflow_id text, status text, on_conflict text, priority smallint, labels jsonb,
    attempt integer, max_attempts integer, timeout_seconds integer, heartbeat_timeout_seconds integer,
    fence bigint, settled_fence bigint, lease_secret uuid, worker text,
    created_at timestamptz, run_at timestamptz, available_at timestamptz, started_at timestamptz, finished_at timestamptz,
    cancel_requested_at timestamptz
) returns boolean language plpgsql immutable parallel safe as $$
declare
    -- One expression, for each that is evaluated costs as much as a few rules; the statuses in the order of how often they are written.
    broken constant text := coalesce(
        case
            when attempt < 0 or max_attempts < 1 or attempt > max_attempts then 'test_runs_attempt_range'
            when status in ('queued', 'scheduled', 'waiting') then case
                when finished_at is not null then 'test_runs_final_has_finished_at'
                when attempt >= max_attempts then 'test_runs_startable'
                when lease_secret is not null then 'test_runs_unstarted_without_lease'
                when worker is not null then 'test_runs_unstarted_without_worker'
                when status = 'queued' and available_at is null then 'test_runs_queued_has_available_at'
                when status = 'scheduled' and run_at is null then 'test_runs_scheduled_has_run_at'
            end
            when status = 'running' then case
                when finished_at is not null then 'test_runs_final_has_finished_at'
                when fence <= 0 or attempt < 1 or lease_secret is null or worker is null or started_at is null
                    or timeout_seconds is null or heartbeat_timeout_seconds is null then 'test_runs_running_has_lease'
            end
            when status in ('succeeded', 'failed', 'timed_out') then case
                when finished_at is null then 'test_runs_final_has_finished_at'
                when started_at is null or attempt < 1 or fence <= 0 then 'test_runs_ended_attempt_had_start'
            end
            when status in ('cancelled', 'stale') then case
                when finished_at is null then 'test_runs_final_has_finished_at'
            end
            when status = 'skipped' then case
                when finished_at is null then 'test_runs_final_has_finished_at'
                when attempt <> 0 then 'test_runs_skipped_never_started'
                when lease_secret is not null then 'test_runs_unstarted_without_lease'
                when worker is not null then 'test_runs_unstarted_without_worker'
            end
            else 'test_runs_status_known'
        end,
        case
            when attempt = 0 and started_at is not null then 'test_runs_unstarted_without_start'
            when settled_fence > fence then 'test_runs_settled_fence_known'
            when finished_at < started_at then 'test_runs_finish_after_start'
            when timeout_seconds <= 0 or heartbeat_timeout_seconds <= 0 then 'test_runs_limits_positive'
            when priority < -100 or priority > 100 then 'test_runs_priority_range'
            when on_conflict not in ('reject', 'return_existing', 'wait', 'replace') then 'test_runs_on_conflict_known'
            when labels <> '{}'
                and (jsonb_typeof(labels) <> 'object' or jsonb_path_exists(labels, '$.*?(@.type() != "string")'))
                then 'test_runs_labels_object'
            when least(created_at, run_at, available_at, started_at, finished_at, cancel_requested_at) < '1970-01-01 00:00:00+00'
                or greatest(created_at, run_at, available_at, started_at, finished_at, cancel_requested_at) >= '10000-01-01 00:00:00+00'
                then 'test_runs_times_sayable'
            -- No bounded repetition, which would make it twenty times as expensive.
            when workflow_id !~ '^[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9][A-Za-z0-9._-]*)?$'
                or octet_length(workflow_id) > 64
                    and (length(split_part(workflow_id, '@', 1)) > 128 or length(split_part(workflow_id, '@', 2)) > 64)
                then 'test_runs_workflow_id_form'
        end);
begin
    if broken is null then
        return true;
    end if;
    raise exception 'a run of % can''t be written as %: it would break %', workflow_id, status, broken
        using errcode = 'check_violation', table = 'test_runs', constraint = broken,
              hint = case broken
                  when 'test_runs_status_known' then 'status is one of scheduled, waiting, queued, running, succeeded, failed, cancelled, '
                      || 'timed_out, stale and skipped.'
                  when 'test_runs_final_has_finished_at' then 'finished_at is set with a final status, and only then.'
                  when 'test_runs_startable' then 'What is yet to start has an attempt left: attempt < max_attempts.'
                  when 'test_runs_unstarted_without_lease' then 'lease_secret is null before a run starts.'
                  when 'test_runs_unstarted_without_worker' then 'worker is null before a run starts.'
                  when 'test_runs_queued_has_available_at' then 'Set available_at: now() to have it start at once.'
                  when 'test_runs_scheduled_has_run_at' then 'Set run_at: when it becomes due.'
                  when 'test_runs_running_has_lease' then 'A run starts by a claim, which sets fence, lease_secret, worker, started_at, '
                      || 'attempt, timeout_seconds and heartbeat_timeout_seconds: insert it as queued.'
                  when 'test_runs_ended_attempt_had_start' then 'What has ended this way was started: attempt, fence and started_at are set.'
                  when 'test_runs_skipped_never_started' then 'A skipped run has attempt 0.'
                  when 'test_runs_attempt_range' then 'attempt is from 0 to max_attempts, which is 1 or more.'
                  when 'test_runs_unstarted_without_start' then 'started_at is null as long as attempt is 0.'
                  when 'test_runs_settled_fence_known' then 'settled_fence is a fence that was given: at most fence.'
                  when 'test_runs_finish_after_start' then 'finished_at is not before started_at.'
                  when 'test_runs_limits_positive' then 'timeout_seconds and heartbeat_timeout_seconds are 1 or more.'
                  when 'test_runs_priority_range' then 'priority is from -100 to 100.'
                  when 'test_runs_on_conflict_known' then 'on_conflict is one of reject, return_existing, wait and replace.'
                  when 'test_runs_labels_object' then 'labels is an object whose values are strings.'
                  when 'test_runs_times_sayable' then 'Times are from 1970 to 9999.'
                  when 'test_runs_workflow_id_form' then 'A workflow is named by letters, digits, dots, underscores and hyphens, at most 128 of '
                      || 'them, the first a letter or digit; after an @ an instance of it likewise, at most 64.'
              end;
end $$;
comment on function run_is_sound is
    'Check of test_runs: true, or an error that names the rule that the row would break as its constraint, and what to do instead.';

-- Not validated here, which would keep writers out while ten million rows are read: they were checked by the same rules.
alter table test_runs
    drop constraint test_runs_workflow_id_form,
    drop constraint test_runs_status_known,
    drop constraint test_runs_on_conflict_known,
    drop constraint test_runs_labels_object,
    drop constraint test_runs_times_sayable,
    drop constraint test_runs_priority_range,
    drop constraint test_runs_attempt_range,
    drop constraint test_runs_limits_positive,
    drop constraint test_runs_scheduled_has_run_at,
    drop constraint test_runs_queued_has_available_at,
    drop constraint test_runs_running_has_lease,
    drop constraint test_runs_unstarted_without_lease,
    drop constraint test_runs_unstarted_without_start,
    drop constraint test_runs_startable,
    drop constraint test_runs_unstarted_without_worker,
    drop constraint test_runs_ended_attempt_had_start,
    drop constraint test_runs_skipped_never_started,
    drop constraint test_runs_final_has_finished_at,
    drop constraint test_runs_finish_after_start,
    drop constraint test_runs_settled_fence_known,
    add constraint test_runs_sound check (run_is_sound(
        workflow_id, status, on_conflict, priority, labels, attempt, max_attempts, timeout_seconds, heartbeat_timeout_seconds,
        fence, settled_fence, lease_secret, worker,
        created_at, run_at, available_at, started_at, finished_at, cancel_requested_at)) not valid;

-- Conditions are read anew likewise, so they are told in fewer words. What has a finish is final.
create or replace trigger test_runs_refuse_change before update on test_runs for each row
    when (old.finished_at is not null
        or new.fence < old.fence
        or old.id <> new.id
        or old.workflow_id <> new.workflow_id
        or case
               when old.status <> 'running' then new.status = 'running' and new.fence = old.fence
               when new.status <> 'running' then new.settled_fence is distinct from old.fence
               else (old.fence, old.lease_secret, old.worker, old.settled_fence)
                   is distinct from (new.fence, new.lease_secret, new.worker, new.settled_fence)
           end)
    execute function refuse_run_change();

-- Waiters are rare, and so the rest is for the function.
create or replace function hand_on_slot() returns trigger language plpgsql set search_path from current as $$
begin
    if old.status in ('queued', 'running') and new.status not in ('queued', 'running') then
        perform promote(old.workflow_id);
    end if;
    return null;
end $$;
create or replace trigger test_runs_hand_on_slot after update on test_runs for each row
    when (old.has_waiters and old.status <> new.status)
    execute function hand_on_slot();
