with running as (
    select r.id, r.workflow_id, r.fence, r.worker, l.fence as leased_fence, l.held_until,
           coalesce(l.heartbeat_at, r.started_at) as heard_at,
           make_interval(secs => r.heartbeat_timeout_seconds) as patience,
           r.started_at + make_interval(secs => r.timeout_seconds) as ends_at
    from test_runs r
    left join run_leases l on l.run_id = r.id and l.fence >= r.fence -- a smaller one is of an attempt before
    where r.status = 'running'
),
wrong as (
    -- A reaper deletes them, those of final runs after five minutes. A run between two attempts has the one of its last.
    select 'orphan-lease' as kind, l.run_id || case
               when r.id is null then ': there is no such run'
               when r.finished_at is not null then ' of ' || r.workflow_id || ': the run is ' || r.status || ' since ' || r.finished_at
               else ' of ' || r.workflow_id || ': the run is ' || r.status || ' and was never claimed'
           end as line
    from run_leases l
    left join test_runs r on r.id = l.run_id
    where r.id is null or r.finished_at < now() - interval '6 minutes' or (r.finished_at is null and r.fence = 0)
    union all
    -- The reaper takes a larger number to shut a claim out, and ends it at once. It does so only with those that are due.
    select 'foreign-lease', o.id || ' of ' || o.workflow_id || ': claimed under fence ' || o.fence || ', leased under ' || o.leased_fence
    from running o
    where o.leased_fence > o.fence and o.held_until is null and o.heard_at + o.patience > now() and o.ends_at + o.patience > now()
    union all
    -- A reaper ends them after one patience, counted from the server's start at the earliest.
    select 'past-time-limit', o.id || ' of ' || o.workflow_id || ': should have ended at ' || o.ends_at || ', and ' || o.worker || ' renews it'
    from running o
    where o.held_until is null and greatest(o.ends_at, pg_postmaster_start_time()) + 2 * o.patience < now()
      and o.heard_at + o.patience > now()
    union all
    -- Live ones renew four times within their patience. What is past it is told of as lease-overdue.
    select 'lost-worker', o.id || ' of ' || o.workflow_id || ': its worker ' || o.worker || ' '
           || coalesce('was last seen at ' || w.seen_at, 'is not known') || ', and its lease lasts until ' || o.heard_at + o.patience
    from running o
    left join workers w on w.name = o.worker
    where o.held_until is null and o.heard_at + o.patience / 2 < now() and o.heard_at + o.patience > now()
      and coalesce(w.seen_at, '-infinity') < now() - interval '1 minute'
),
ranked as (
    select w.kind, w.line, row_number() over (partition by w.kind order by w.line) as place
    from wrong w
)
select r.kind as "kind!",
       array_agg(r.line order by r.place) filter (where r.place <= $1::bigint) as "rows!",
       count(*) as "total!"
from ranked r
group by r.kind
order by r.kind
