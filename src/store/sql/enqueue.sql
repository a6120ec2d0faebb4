with entry as materialized (
    select *
    from unnest($1::uuid[], $2::text[], $3::jsonb[], $4::smallint[], $5::jsonb[], $6::text[], $8::integer[], $9::uuid[],
                $10::text[])
        with ordinality as e (id, workflow_id, input, priority, labels, requested_by, max_attempts, rerun_of, on_conflict, position)
),
-- The definition: of the id itself, else of what stands before its @. A rerun keeps what it repeats, revision included.
known as materialized (
    select e.id, e.workflow_id, e.requested_by, e.rerun_of, e.position, w.id as definition, v.revision, v.executor_type, v.queue,
           v.timeout_seconds, v.heartbeat_timeout_seconds,
           coalesce(e.input, o.input) as input,
           coalesce(e.priority, o.priority, v.priority) as effective_priority,
           coalesce(o.labels, v.labels) || e.labels as all_labels,
           coalesce(e.max_attempts, o.max_attempts, v.max_attempts) as effective_max_attempts,
           coalesce(e.on_conflict, v.on_conflict) as policy,
           exists (select from pauses p where p.kind = 'workflow' and p.name in (e.workflow_id, w.id)) as paused
    from entry e
    left join test_runs o on o.id = e.rerun_of
    cross join lateral (
        select id, revision
        from workflows
        where id = any(case when o.id is null then array[e.workflow_id, split_part(e.workflow_id, '@', 1)] else array[o.definition] end)
          and deleted_at is null
        order by length(id) desc
        limit 1
    ) w
    join workflow_revisions v on v.workflow_id = w.id and v.revision = coalesce(o.revision, w.revision)
    where e.rerun_of is null or o.id is not null
),
-- Reading comes before writing: a refusal writes nothing, and takes no transaction id.
holder as materialized (
    select h.*
    from slot_holders h
    where h.workflow_id in (select workflow_id from entry)
),
inserted as (
    insert into test_runs (id, workflow_id, definition, revision, status, executor_type, queue, priority, labels, input,
                           on_conflict, available_at, timeout_seconds, heartbeat_timeout_seconds, requested_by, max_attempts, rerun_of, version)
    select id, workflow_id, definition, revision, 'queued', executor_type, queue, effective_priority, all_labels, input,
           policy, now(), timeout_seconds, heartbeat_timeout_seconds, requested_by, effective_max_attempts, rerun_of, 1
    from known k
    where not paused and not exists (select from holder h where h.workflow_id = k.workflow_id)
    order by workflow_id, position -- two batches that lock in different orders deadlock; of several for one slot the first has it
    on conflict do nothing -- whatever index it is: REINDEX CONCURRENTLY brings one of another name
    returning *
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
    select id, null, status, attempt, fence, requested_by
    from inserted
)
select (k.definition is not null or m.id is not null) as "known!",
       coalesce(to_jsonb(i), to_jsonb(m)) as "run: Json<Run>",
       coalesce(k.paused, false) as "paused!",
       coalesce(k.policy, 'reject') as "policy!: OnConflict",
       case when h.run_id is not null then to_jsonb(h) end as "holder: Json<Holder>"
from entry e
left join known k on k.position = e.position
left join inserted i on i.id = e.id
-- The same request, sent before: looked for only when it may be there.
left join test_runs m on $7::boolean and m.id = e.id
left join holder h on h.workflow_id = e.workflow_id
order by e.position
