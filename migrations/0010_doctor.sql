-- What `singletrack doctor` reads. Safe beside a replica of the version before: the view says what it said, and that replica leaves
-- the new column alone. A role that may read the view alone has to be granted the tables under it, which now it reads for itself.

alter table workers add column version text;
comment on column workers.version is 'Version of the replica that wrote the row: a replica''s own. Null: written by one that did not say it yet.';

-- Each promise as a query that finds nothing. Its body is parsed once: it means these tables whatever the search_path, and is
-- planned as part of the statement that asks. Every column has its name in every part: without, a dump says it differently.
create function invariant_violations_since(since timestamptz)
returns table (violation text, workflow_id text, run_id uuid, detail text)
language sql stable
begin atomic
with recent as (
    select e.*, r.workflow_id
    from run_events e
    join test_runs r on r.id = e.run_id
    where e.at > since
),
turns as (
    select *, lag(to_status) over w as turn_before, lag(fence) over w as fence_before
    from recent
    where (to_status = 'running') <> (from_status is not distinct from 'running')
    window w as (partition by workflow_id order by seq)
)
select 'two-running' as violation, r.workflow_id, null::uuid as run_id, count(*) || ' running runs' as detail
from test_runs r where r.status = 'running' group by r.workflow_id having count(*) > 1
union all
select 'two-slots' as violation, r.workflow_id, null::uuid as run_id, count(*) || ' runs hold the slot' as detail
from test_runs r where r.status in ('queued', 'running') group by r.workflow_id having count(*) > 1
union all
select 'overlapping-attempts' as violation, t.workflow_id, t.run_id,
       'started under fence ' || t.fence || ' before fence ' || t.fence_before || ' was settled' as detail
from turns t where t.to_status = 'running' and t.turn_before = 'running'
union all
select 'fence-went-back' as violation, t.workflow_id, t.run_id, 'fence ' || t.fence || ' after ' || t.fence_before as detail
from turns t where t.to_status = 'running' and t.fence <= t.fence_before
union all
select 'final-twice' as violation, min(e.workflow_id) as workflow_id, e.run_id, count(*) || ' final events' as detail
from recent e
where e.to_status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')
group by e.run_id having count(*) > 1
union all
select 'changed-after-final' as violation, e.workflow_id, e.run_id, 'an event from ' || e.from_status as detail
from recent e
where e.from_status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')
union all
select 'status-without-event' as violation, r.workflow_id, r.id as run_id,
       'is ' || r.status || ', its last event says ' || coalesce(last.to_status, 'nothing') as detail
from test_runs r
left join lateral (
    select e.to_status from run_events e where e.run_id = r.id order by e.seq desc limit 1
) last on true
where (r.status in ('scheduled', 'waiting', 'queued', 'running') or r.finished_at > since)
  and last.to_status is distinct from r.status
union all
select 'final-without-attempt' as violation, r.workflow_id, r.id as run_id, 'no row in run_attempts for fence ' || r.fence as detail
from test_runs r
where r.finished_at > since
  and r.status in ('succeeded', 'failed', 'timed_out')
  and not exists (select from run_attempts a where a.run_id = r.id and a.fence = r.settled_fence)
union all
select 'lease-overdue' as violation, r.workflow_id, r.id as run_id,
       'silent for ' || date_trunc('second', now() - coalesce(l.heartbeat_at, r.started_at)) || ', and no replica reaped it' as detail
from test_runs r
left join run_leases l on l.run_id = r.id and l.fence >= r.fence
where r.status = 'running'
  and greatest(coalesce(l.heartbeat_at, r.started_at), pg_postmaster_start_time())
      + make_interval(secs => r.heartbeat_timeout_seconds) + interval '1 minute' < now()
  and coalesce(l.held_until + interval '1 minute' < now(), true)
union all
select 'stranded-waiter' as violation, r.workflow_id, r.id as run_id, 'waits for a slot that is free' as detail
from test_runs r
where r.status = 'waiting' and r.created_at < now() - interval '1 minute'
  and not exists (select from test_runs h where h.workflow_id = r.workflow_id and h.status in ('queued', 'running'))
  and not exists (select from test_runs h where h.workflow_id = r.workflow_id and h.finished_at > now() - interval '1 minute')
  and not exists (select from pauses p where p.kind = 'workflow' and p.name in (r.workflow_id, r.definition))
union all
select 'due-and-scheduled' as violation, r.workflow_id, r.id as run_id, 'was due at ' || r.run_at as detail
from test_runs r
where r.status = 'scheduled' and r.run_at < now() - interval '1 minute';
end;
comment on function invariant_violations_since(timestamptz) is
    'What must never be, as invariant_violations has it: over all live runs, and the runs and events since then.';

create or replace view invariant_violations as
select v.violation, v.workflow_id, v.run_id, v.detail
from invariant_violations_since(now() - interval '24 hours') v;
