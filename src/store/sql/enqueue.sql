with entry as materialized (
    select e.*
    -- Before anything is locked, and for this statement alone: one slot that somebody keeps locked must not hold up the others.
    from (select set_config('lock_timeout', $11, true)) as patience,
         unnest($1::uuid[], $2::text[], $3::jsonb[], $4::smallint[], $5::jsonb[], $6::text[], $8::integer[], $9::uuid[], $10::text[])
             with ordinality as e (id, workflow_id, input, priority, labels, requested_by, max_attempts, rerun_of, on_conflict, position)
),
-- The definition: of the id itself, else of what stands before its @. A rerun keeps what it repeats, revision included.
-- And who has the slot: reading comes before writing, so that a refusal writes nothing, and takes no transaction id.
-- Each is looked up entry by entry, by an index: whatever the planner thinks that there is in the tables.
known as materialized (
    select e.id, e.workflow_id, e.requested_by, e.rerun_of, e.position, w.id as definition, v.revision, v.executor_type, v.queue,
           v.timeout_seconds, v.heartbeat_timeout_seconds,
           coalesce(e.input, o.input) as input,
           coalesce(e.priority, o.priority, v.priority) as effective_priority,
           coalesce(o.labels, v.labels) || e.labels as all_labels,
           coalesce(e.max_attempts, o.max_attempts, v.max_attempts) as effective_max_attempts,
           coalesce(e.on_conflict, v.on_conflict) as policy,
           exists (select from pauses p where p.kind = 'workflow' and p.name in (e.workflow_id, w.id)) as paused,
           h.holder, s.run as sent_before
    from entry e
    left join lateral (select * from test_runs where id = e.rerun_of limit 1) o on true
    left join lateral (
        select id, revision
        from workflows
        where id = any(case when o.id is null then array[e.workflow_id, split_part(e.workflow_id, '@', 1)] else array[o.definition] end)
          and deleted_at is null and (e.rerun_of is null or o.id is not null)
        order by length(id) desc
        limit 1
    ) w on true
    left join lateral (
        select * from workflow_revisions where workflow_id = w.id and revision = coalesce(o.revision, w.revision) limit 1
    ) v on true
    left join lateral (select to_jsonb(t) as holder from slot_holders t where t.workflow_id = e.workflow_id limit 1) h on true
    -- The same request, sent before: looked for only when it may be there.
    left join lateral (select row_to_json(m) as run from test_runs m where $7::boolean and m.id = e.id limit 1) s on true
),
inserted as (
    insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, priority, labels, input,
                           on_conflict, available_at, timeout_seconds, heartbeat_timeout_seconds, requested_by, max_attempts, rerun_of, version)
    select id, workflow_id, definition, revision, 'queued', executor_type, queue, effective_priority, all_labels, input,
           policy, now(), timeout_seconds, heartbeat_timeout_seconds, requested_by, effective_max_attempts, rerun_of, 1
    from known k
    where revision is not null and not paused and holder is null
    order by workflow_id, position -- two batches that lock in different orders deadlock; of several for one slot the first has it
    on conflict do nothing -- whatever index it is: REINDEX CONCURRENTLY brings one of another name
    returning *
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
    select id, null, status, attempt, fence, requested_by
    from inserted
),
-- One hint per statement and kind of worker, not per run: commits that notify are made one after the other.
told as materialized (
    select count(pg_notify('singletrack_queued', kind || ' ' || coalesce(current_setting('singletrack.replica', true), ''))) as hints
    from (select distinct case executor_type when 'pull' then 'pull' else 'worker' end as kind from inserted) k
)
-- What was inserted, and what was found instead. Of those that are in neither the slot was taken while we looked.
select id as "id!", hints > 0 as "inserted!", definition, revision, executor_type, queue, priority,
       labels as "labels?: Json<BTreeMap<String, String>>", input as "input?: Json<Box<RawValue>>",
       on_conflict as "policy?: OnConflict", max_attempts, created_at, timeout_seconds, heartbeat_timeout_seconds,
       false as "paused!", null::jsonb as "holder?: Json<Holder>", null::json as "sent_before?: Json<Run>"
from inserted
cross join told
union all
select id, false, definition, revision, null, null, null, null, null, policy, null, null, null, null, paused, holder, sent_before
from known
where revision is null or paused or holder is not null or sent_before is not null
