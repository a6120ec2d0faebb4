with given as materialized (
    select *
    from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::integer[], $7::jsonb[], $8::text[])
        with ordinality as g (run_id, fence, secret, status, reason, exit_code, output, error, position)
),
-- Locked in one order, so that two batches can't deadlock.
held as materialized (
    select g.*, r.attempt, r.worker, r.started_at, r.cancel_requested_at is not null and g.status <> 'succeeded' as cancelled
    from given g
    join test_runs r
        on r.id = g.run_id and r.status = 'running' and r.fence = g.fence
        and (g.secret is null or r.lease_secret = g.secret)
    order by r.id
    for update of r
),
settled as (
    update test_runs r
    set status = case when h.cancelled then 'cancelled' else h.status end,
        reason = case when h.cancelled then coalesce(h.reason, 'requested') else h.reason end,
        finished_at = greatest(now(), r.started_at),
        exit_code = h.exit_code,
        output = h.output,
        error = h.error,
        settled_fence = r.fence,
        lease_secret = case when h.secret is not null then r.lease_secret end, -- to know its repetition by
        version = r.version + 1
    from held h
    where r.id = h.run_id and r.status = 'running' and r.fence = h.fence
    returning r.id, r.status, r.reason, r.attempt, r.fence, r.worker, r.started_at, r.finished_at, r.exit_code, r.error
),
attempted as (
    insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at, exit_code, error)
    select id, fence, attempt, status, reason, worker, started_at, finished_at, exit_code, error
    from settled
    on conflict do nothing -- a slot must come free, whatever was done to its run by hand
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    select id, 'running', status, attempt, fence, $9, reason
    from settled
)
select s.status as "recorded?: Status",
       coalesce(r.settled_fence = g.fence and r.lease_secret = g.secret and r.status <> 'running', false) as "already!",
       r.status as "current?: Status"
from given g
left join settled s on s.id = g.run_id and s.fence = g.fence
left join test_runs r on r.id = g.run_id
order by g.position
