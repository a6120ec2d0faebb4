with given as materialized (
    select g.*
    -- What a trigger may wait for, when a slot is handed on.
    from (select set_config('lock_timeout', '100ms', true)) as patience,
         unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::integer[], $7::jsonb[], $8::text[], $10::float8[], $9::text[])
             with ordinality as g (run_id, fence, secret, said, reason, exit_code, output, error, retry_after, actor, position)
),
-- Nobody's lock is waited for: one run that somebody keeps locked must not hold up the others. One by one by their key, whatever the
-- planner thinks that there is in the table.
held as materialized (
    select g.*, r.tid, r.status, r.attempt, r.max_attempts, r.definition, r.revision, r.worker, r.started_at,
           r.status = 'running' and r.fence = g.fence and (g.secret is null or r.lease_secret = g.secret) as is_held,
           r.cancel_requested_at is not null and g.said <> 'succeeded' as cancelled,
           -- A pull worker learns of its time limit by its heartbeats, and may only say how the work ended.
           r.executor_type = 'pull' and g.said in ('failed', 'cancelled')
               and r.started_at + make_interval(secs => r.timeout_seconds) < now() as too_late
    from given g
    left join lateral (
        select ctid as tid, status, fence, lease_secret, attempt, max_attempts, definition, revision, worker, started_at,
               cancel_requested_at, executor_type, timeout_seconds
        from test_runs where id = g.run_id limit 1 for update skip locked
    ) r on true
),
-- Of two ends brought together the first counts.
ended as materialized (
    select distinct on (h.run_id)
           h.position, h.run_id, h.tid, h.status, h.attempt, h.fence, h.secret, h.said, h.worker, h.started_at, h.exit_code, h.output,
           h.error, h.actor, h.retry_after, d.verdict, d.why,
           coalesce(d.verdict = any(v.retry_on), false) as again,
           least(
               -- the power as one that can't overflow, also for attempt 1000
               b.initial_seconds * exp(least((h.attempt - 1) * ln(b.factor), 500)) * (1 + b.jitter * (2 * random() - 1)),
               b.max_seconds) as wait
    from held h
    -- The one decision: what the attempt's end comes to. See domain/status.rs.
    cross join lateral (
        select case when h.cancelled then 'cancelled' when h.too_late then 'timed_out' else h.said end as verdict,
               case
                   when h.cancelled then coalesce(h.reason, 'requested')
                   when h.too_late then 'timeout'
                   when h.said = 'cancelled' then coalesce(h.reason, 'by_worker')
                   else h.reason
               end as why
    ) d
    left join lateral (
        select retry_on, backoff
        from workflow_revisions
        where workflow_id = h.definition and revision = h.revision and h.attempt < h.max_attempts
        limit 1
    ) v on true
    cross join lateral (
        -- Rounded: with the smallest numbers that a double can be, the product would underflow, which is an error.
        select round((v.backoff->>'initial_seconds')::numeric, 6)::float8 as initial_seconds,
               round((v.backoff->>'factor')::numeric, 6)::float8 as factor,
               round((v.backoff->>'max_seconds')::numeric, 6)::float8 as max_seconds,
               round((v.backoff->>'jitter')::numeric, 6)::float8 as jitter
    ) b
    where h.is_held
    order by h.run_id, h.position
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
    -- By its place, for it is locked; one that was changed before we had it is missed, and looked for again by a new statement.
    where r.ctid = e.tid and r.id is not distinct from e.run_id and r.status = e.status and r.fence = e.fence
    returning e.position, e.run_id, e.attempt, e.fence, e.secret, e.said, e.worker, e.started_at, e.exit_code, e.error, e.actor, e.verdict, e.why,
              r.status as becomes, r.reason as because
),
attempted as (
    insert into run_attempts (run_id, fence, attempt, status, reason, worker, started_at, finished_at, exit_code, error,
                              lease_secret, verdict)
    select run_id, fence, attempt, verdict, why, worker, started_at, greatest(now(), started_at), exit_code, error, secret,
           case when secret is not null then said end
    from settled
    on conflict do nothing -- a slot must come free, whatever was done to its run by hand
),
recorded as (
    insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
    select run_id, 'running', becomes, attempt, fence, coalesce(actor, worker), because
    from settled
)
-- What was settled, and how each was found. One without a status is locked, one that does not exist is not there.
select position as "position!", true as "recorded!", becomes as "status?: Status", false as "already!", false as "held!"
from settled
union all
select position, false, status,
       -- The same lease, and the same said by it: an answer was lost.
       status is not null and not is_held and exists (
           select
           from run_attempts a
           where a.run_id = h.run_id and a.fence = h.fence and a.lease_secret = h.secret and a.verdict = h.said
       ),
       coalesce(is_held, false)
from held h
-- Not `exists`, which the planner may answer by reading the whole table once.
where status is not null or (select r.id from test_runs r where r.id = h.run_id limit 1) is not null
