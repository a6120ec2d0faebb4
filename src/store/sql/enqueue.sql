with entry as materialized (
    select e.*
    -- Before anything is locked, and for this statement alone: one slot that somebody keeps locked must not hold up the others.
    from (select set_config('lock_timeout', $9, true)) as patience,
         unnest($1::uuid[], $2::text[], $3::jsonb[], $4::smallint[], $5::jsonb[], $6::text[], $7::integer[], $8::text[], $10::text[])
             with ordinality
             as e (id, workflow_id, input, priority, labels, requested_by, max_attempts, on_conflict, traceparent, position)
),
-- The definition: of the id itself, else of what stands before its @. And who has the slot, if anybody: reading comes before writing, so
-- that a refusal writes nothing, and takes no transaction id.
-- Each is looked up entry by entry, by an index: whatever the planner thinks that there is in the tables.
known as materialized (
    select e.id, e.workflow_id, e.requested_by, e.position, e.input, e.traceparent,
           v.workflow_id as definition, v.revision, v.executor_type, v.queue, v.timeout_seconds, v.heartbeat_timeout_seconds,
           coalesce(e.priority, v.priority) as effective_priority,
           v.labels || e.labels as all_labels,
           coalesce(e.max_attempts, v.max_attempts) as effective_max_attempts,
           coalesce(e.on_conflict, v.on_conflict) as policy,
           -- looked for once where nothing is paused, and not for each
           exists (select from pauses)
               and exists (select from pauses p where p.kind = 'workflow' and p.name in (e.workflow_id, v.workflow_id)) as paused,
           -- From the end: before it there are all that had the slot since an old snapshot. Were it `=`, there would be no order to go by.
           (select r.id from test_runs r
            where r.workflow_id between e.workflow_id and e.workflow_id and r.status in ('queued', 'running')
            order by r.workflow_id desc limit 1) as holder
    from entry e
    left join lateral (select id, revision from workflows where id = e.workflow_id and deleted_at is null limit 1) own on true
    left join lateral (
        select id, revision from workflows where own.id is null and id = split_part(e.workflow_id, '@', 1) and deleted_at is null limit 1
    ) base on true
    left join lateral (
        select workflow_id, revision, executor_type, queue, priority, labels, max_attempts, on_conflict, timeout_seconds, heartbeat_timeout_seconds
        from workflow_revisions
        where workflow_id = coalesce(own.id, base.id) and revision = coalesce(own.revision, base.revision)
        limit 1
    ) v on true
),
inserted as (
    insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, priority, labels, input,
                           on_conflict, available_at, timeout_seconds, heartbeat_timeout_seconds, requested_by, max_attempts, traceparent, version)
    select id, workflow_id, definition, revision, 'queued', executor_type, queue, effective_priority, all_labels, input,
           policy, now(), timeout_seconds, heartbeat_timeout_seconds, requested_by, effective_max_attempts, traceparent, 1
    from known k
    where revision is not null and not paused and holder is null
    order by workflow_id, position -- two batches that lock in different orders deadlock; of several for one slot the first has it
    on conflict do nothing -- whatever index it is: REINDEX CONCURRENTLY brings one of another name
    returning id, definition, revision, status, attempt, fence, executor_type, queue, priority, labels, input, on_conflict, max_attempts, created_at,
              timeout_seconds, heartbeat_timeout_seconds, requested_by
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
    select id, null, status, attempt, fence, requested_by
    from inserted
)
-- What was inserted, and what was found instead. Of those that are in neither the slot was taken while we looked.
select id as "id!", true as "inserted!", definition, revision, executor_type, queue, priority,
       labels as "labels?: Json<BTreeMap<String, String>>", input as "input?: Json<Box<RawValue>>",
       on_conflict as "policy?: OnConflict", max_attempts, created_at, timeout_seconds, heartbeat_timeout_seconds,
       false as "paused!", null::uuid as "holder?",
       -- One hint per statement and kind of worker, not per run: commits that notify are made one after the other.
       concat((select pg_notify('singletrack_queued', 'worker ' || coalesce(current_setting('singletrack.replica', true), ''))::text
               from inserted where executor_type <> 'pull' limit 1),
              (select pg_notify('singletrack_queued', 'pull ' || coalesce(current_setting('singletrack.replica', true), ''))::text
               from inserted where executor_type = 'pull' limit 1)) as told
from inserted
union all
select id, false, definition, revision, null, null, null, null, null, policy, null, null, null, null, paused, holder, null
from known
where revision is null or paused or holder is not null
