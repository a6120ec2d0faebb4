with current as materialized (
    select w.deleted_at, v.*
    from workflows w
    join workflow_revisions v on v.workflow_id = w.id and v.revision = w.revision
    where w.id = $1
    for update of w -- two edits at once take turns
),
same as materialized (
    select *
    from current
    where deleted_at is null
      and executor = $3
      and timeout_seconds is not distinct from $4
      and heartbeat_timeout_seconds is not distinct from $5
      and start_within_seconds is not distinct from $6
      and priority = $7
      and queue = $8
      and labels = $9
      and max_attempts = $11
      and retry_on = $12
      and backoff = $13
      and on_conflict = $14
      and max_waiting = $15
      and schedule is not distinct from $16
),
-- Where an edit was waited for, the revision it made can't be seen by this statement: no row comes out of it.
made as (
    insert into workflows (id, revision)
    select $1, 1
    where not exists (select from current)
    on conflict do nothing
    returning id, revision
),
changed as (
    update workflows w
    set revision = w.revision + 1, deleted_at = null, updated_at = now()
    from current c
    where w.id = c.workflow_id and not exists (select from same)
    returning w.id, w.revision
),
next as (
    select id, revision from made
    union all
    select id, revision from changed
),
written as (
    insert into workflow_revisions (workflow_id, revision, executor_type, executor, timeout_seconds,
                                    heartbeat_timeout_seconds, start_within_seconds, priority, queue, labels, created_by,
                                    max_attempts, retry_on, backoff, on_conflict, max_waiting, schedule)
    select id, revision, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16
    from next
    returning *
),
audited as (
    insert into audit_log (actor, action, object, detail)
    select created_by, 'workflow-put', workflow_id, jsonb_build_object('revision', revision, 'executor_type', executor_type)
    from written
),
-- A schedule that still says when as it did goes on where it stands; what it gives its runs may have changed.
going_on as (
    select
    from written w, current c
    where c.deleted_at is null and w.schedule - 'input' = c.schedule - 'input'
),
placed as (
    insert into workflow_schedules as s (workflow_id, revision, since)
    select workflow_id, revision, now()
    from written
    where schedule is not null
    on conflict (workflow_id) do update
    set revision = excluded.revision,
        since = case when exists (select from going_on) then s.since else excluded.since end,
        next_at = case when exists (select from going_on) then s.next_at end
),
dropped as (
    delete from workflow_schedules s
    using written w
    where s.workflow_id = w.workflow_id and w.schedule is null
),
answer as (
    select to_jsonb(w) || jsonb_build_object('id', w.workflow_id) as revision from written w
    union all
    select to_jsonb(s) || jsonb_build_object('id', s.workflow_id) from same s
)
select revision as "revision!: Json<Revision>",
       not exists (select from current where deleted_at is null) as "created!"
from answer
