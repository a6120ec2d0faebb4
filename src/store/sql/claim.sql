-- MATERIALIZED, or the planner may run the locking part once per row of the update and lock more than the limit.
with due as materialized (
    select d.tid, d.id, d.status
    -- One priority after the other, so that each begins in the index at the time below, and not at the oldest entry. They come in the
    -- order of the array: there is no other way to join these two.
    from unnest($12::smallint[]) each (priority)
    cross join lateral (
        select ctid as tid, id, status
        from test_runs
        where status = 'queued'
          and priority = each.priority
          and available_at <= now()
          and available_at >= coalesce(now() - $9::interval, '-infinity')
          and executor_type = any($3::text[])
          and ($2::text[] is null or queue = any($2::text[]))
          and ($7::text[] is null or workflow_id = any($7::text[]) or definition = any($7::text[]))
          and ($10::text is null or workflow_id ~ $10)
          -- looked for once where nothing is paused, and not for each run
          and (not exists (select from pauses)
               or not exists (
                   select
                   from pauses p
                   where p.kind = 'workflow' and p.name in (workflow_id, definition) or p.kind = 'queue' and p.name = queue))
          -- A larger one, put there by hand or by a restore, would make the update below fail for all of them.
          and fence <= (select last_value from run_fence)
        order by available_at, id
        limit $4
        for update skip locked
    ) d
    limit $4
),
-- In the order in which they come out of there: to sort them once more would cost as much as to read them.
numbered as (
    select tid, id, status, row_number() over () as position
    from due
),
claimed as (
    update test_runs r
    set status = 'running',
        reason = null,
        attempt = r.attempt + 1,
        fence = nextval('run_fence'),
        lease_secret = gen_random_uuid(),
        worker = $1,
        claim_id = $8,
        claim_position = case when $8::text is not null then n.position end,
        -- never before the finish of the workflow's run before it, though the database's clock may have been set back
        started_at = greatest(now(), (
            select p.finished_at
            from test_runs p
            where p.workflow_id = r.workflow_id and p.finished_at is not null
            order by p.created_at desc, p.id desc
            limit 1)),
        timeout_seconds = coalesce(r.timeout_seconds, $5),
        heartbeat_timeout_seconds = coalesce(r.heartbeat_timeout_seconds, $6),
        exit_code = null,
        output = null,
        error = null,
        version = r.version + 1
    from numbered n
    -- By its place, for it is locked: the planner can't take another way. One that was changed meanwhile is left for the next claim.
    where r.ctid = n.tid and r.id is not distinct from n.id and r.status = n.status
    returning r.id, r.workflow_id, r.definition, r.revision, r.executor_type, r.queue, r.priority, r.labels, r.input, r.on_conflict, r.attempt,
              r.max_attempts, r.fence, r.lease_secret, r.worker, r.created_at, r.run_at, r.available_at, r.started_at, r.timeout_seconds,
              r.heartbeat_timeout_seconds, r.tick_at, r.rerun_of, r.requested_by, r.traceparent
),
-- There the lease begins now all the same, or its silence would be noticed late. Not one that its worker has yet to
-- confirm: a row is the confirmation.
leased as (
    insert into run_leases as l (run_id, fence, heartbeat_at)
    select id, fence, now()
    from claimed
    where started_at > now() and executor_type <> 'pull'
    order by id
    on conflict (run_id) do update
    set fence = excluded.fence, heartbeat_at = excluded.heartbeat_at, progress = null, held_until = null
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor)
    select id, 'queued', 'running', attempt, fence, coalesce($11, worker)
    from claimed
)
select c.id as "id!", c.workflow_id as "workflow_id!", c.definition as "definition!", c.revision as "revision!",
       c.executor_type as "executor_type!", c.queue as "queue!", c.priority as "priority!",
       c.labels as "labels!: Json<BTreeMap<String, String>>", c.input as "input?: Json<Box<RawValue>>", c.on_conflict as "on_conflict!",
       c.attempt as "attempt!", c.max_attempts as "max_attempts!", c.fence as "fence!", c.lease_secret as "lease_secret!", c.worker,
       c.created_at as "created_at!", c.run_at, c.available_at, c.started_at, c.timeout_seconds, c.heartbeat_timeout_seconds,
       c.tick_at, c.rerun_of, c.requested_by as "requested_by!", c.traceparent,
       -- Without its revision it can't be executed, and must be ended by whoever has claimed it.
       coalesce(v.executor, 'null') as "executor!"
from claimed c
left join lateral (select executor from workflow_revisions where workflow_id = c.definition and revision = c.revision limit 1) v on true
order by c.priority desc, c.available_at, c.id
