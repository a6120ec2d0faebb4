with given as materialized (
    select *
    from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::integer[], $7::jsonb[], $8::text[], $10::float8[])
        with ordinality as g (run_id, fence, secret, status, reason, exit_code, output, error, retry_after, position)
),
-- Locked in one order, so that two batches can't deadlock.
held as materialized (
    select g.*, r.attempt, r.max_attempts, r.definition, r.revision, r.worker, r.started_at,
           r.cancel_requested_at is not null and g.status <> 'succeeded' as cancelled,
           -- A pull worker learns of its time limit by its heartbeats, and may only say how the work ended.
           r.executor_type = 'pull' and g.status in ('failed', 'cancelled')
               and r.started_at + make_interval(secs => r.timeout_seconds) < now() as too_late
    from given g
    join test_runs r
        on r.id = g.run_id and r.status = 'running' and r.fence = g.fence
        and (g.secret is null or r.lease_secret = g.secret)
    order by r.id
    for update of r
),
-- The one decision: what the attempt's end comes to. See domain/status.rs. Of two ends brought together the first counts.
decided as materialized (
    select distinct on (h.run_id) h.*,
           case when h.cancelled then 'cancelled' when h.too_late then 'timed_out' else h.status end as verdict,
           case
               when h.cancelled then coalesce(h.reason, 'requested')
               when h.too_late then 'timeout'
               when h.status = 'cancelled' then coalesce(h.reason, 'by_worker')
               else h.reason
           end as why,
           v.retry_on, v.backoff
    from held h
    left join workflow_revisions v on v.workflow_id = h.definition and v.revision = h.revision
    order by h.run_id, h.position
),
ended as materialized (
    select d.*, d.attempt < d.max_attempts and coalesce(d.verdict = any(d.retry_on), false) as again,
           least(
               -- the power as one that can't overflow, also for attempt 1000
               b.initial_seconds * exp(least((d.attempt - 1) * ln(b.factor), 500)) * (1 + b.jitter * (2 * random() - 1)),
               b.max_seconds) as wait
    from decided d
    cross join lateral (
        -- Rounded: with the smallest numbers that a double can be, the product would underflow, which is an error.
        select round((d.backoff->>'initial_seconds')::numeric, 6)::float8 as initial_seconds,
               round((d.backoff->>'factor')::numeric, 6)::float8 as factor,
               round((d.backoff->>'max_seconds')::numeric, 6)::float8 as max_seconds,
               round((d.backoff->>'jitter')::numeric, 6)::float8 as jitter
    ) b
),
settled as (
    update test_runs r
    set status = case when e.again then 'queued' else e.verdict end,
        reason = case when e.again then 'backoff' else e.why end,
        -- A week at most, whoever asked for the wait: the slot is held meanwhile.
        available_at = case when e.again
                            then now() + make_interval(secs => least(greatest(e.wait, e.retry_after), 604800))
                            else r.available_at end,
        finished_at = case when not e.again then greatest(now(), r.started_at) end,
        exit_code = e.exit_code,
        output = e.output,
        error = e.error,
        settled_fence = r.fence,
        lease_secret = null,
        worker = case when not e.again then r.worker end,
        claim_id = case when not e.again then r.claim_id end,
        claim_position = case when not e.again then r.claim_position end,
        version = r.version + 1
    from ended e
    where r.id = e.run_id and r.status = 'running' and r.fence = e.fence
    returning r.id, r.status, r.reason, r.attempt, r.fence, e.worker, e.position
),
attempted as (
    insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at, exit_code, error,
                              lease_secret, verdict)
    select e.run_id, e.fence, e.attempt, e.verdict, e.why, e.worker, e.started_at, greatest(now(), e.started_at), e.exit_code,
           e.error, e.secret, case when e.secret is not null then e.status end
    from ended e
    join settled s on s.id = e.run_id
    on conflict do nothing -- a slot must come free, whatever was done to its run by hand
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    select id, 'running', status, attempt, fence, coalesce($9, worker), reason
    from settled
)
select coalesce(s.status) as "recorded?: Status",
       -- The same lease, and the same said by it: an answer was lost.
       exists (
           select
           from run_attempts a
           where a.run_id = g.run_id and a.fence = g.fence and a.lease_secret = g.secret and a.verdict = g.status
       ) as "already!",
       (select r.status from test_runs r where r.id = g.run_id) as "current?: Status"
from given g
left join settled s on s.position = g.position
order by g.position
