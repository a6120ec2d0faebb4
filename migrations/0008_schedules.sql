-- Schedules. Safe beside a replica of the version before, which fires none: what it defines anew, or deletes, leaves a row in
-- workflow_schedules behind that is of no current revision, and is not looked at.

create index workflow_schedules_next on workflow_schedules (next_at);
comment on index workflow_schedules_next is 'Which schedule is next.';

create function advance_schedule(
    workflow_id text, revision integer, seen timestamptz, fire timestamptz, next timestamptz,
    out advanced boolean, out run_id uuid, out outcome text)
language plpgsql set search_path from current
set lock_timeout = '250ms' -- somebody's hand on one workflow is not to keep the other schedules for long
as $$
#variable_conflict use_variable
begin
    -- Another replica that is at it has it locked, and does it.
    perform from workflow_schedules s
    where s.workflow_id = advance_schedule.workflow_id and s.revision = advance_schedule.revision and s.next_at is not distinct from seen
    for update skip locked;
    advanced := found;
    if not advanced then
        return;
    end if;
    update workflow_schedules s set next_at = next where s.workflow_id = advance_schedule.workflow_id;
    if fire is not null then
        select e.run_id, e.outcome into run_id, outcome
        from workflow_revisions v,
             enqueue_run_as(new_run_id(), workflow_id, nullif(v.schedule -> 'input', 'null'), null, null, null, null, null, null, null, null,
                            fire, 'schedule', '', 0, false) e
        where v.workflow_id = advance_schedule.workflow_id and v.revision = advance_schedule.revision;
    end if;
end $$;
comment on function advance_schedule(text, integer, timestamptz, timestamptz, timestamptz) is
    'Moves a schedule from the tick that was seen (null: none was worked out yet) to the next one, and makes the run of tick fire (null: none), '
    'both or neither. advanced is false where the schedule has changed, or another replica is at it. outcome is what became of the run: '
    'queued, waiting, skipped, or scheduled where its slot could not be looked at yet; another word where there is none.';
