-- Views for people.

create view active_runs as
select r.id, r.workflow_id, r.status, r.reason, r.attempt, r.max_attempts, r.fence, r.worker, r.queue, r.priority,
       r.created_at, r.run_at, r.available_at, r.started_at, r.requested_by, r.cancel_requested_at,
       case when r.status = 'running' then coalesce(l.heartbeat_at, r.started_at) end as heartbeat_at,
       case when r.status = 'running'
            then coalesce(l.heartbeat_at, r.started_at) + make_interval(secs => r.heartbeat_timeout_seconds)
       end as stale_at,
       now() - coalesce(r.started_at, r.created_at) as age
from test_runs r
left join run_leases l on l.run_id = r.id and l.fence >= r.fence -- a smaller one is of an attempt before this
where r.status in ('scheduled', 'waiting', 'queued', 'running');
comment on view active_runs is 'Runs that are not final: who holds which slot, since when, and when its lease runs out.';
comment on column active_runs.heartbeat_at is 'The last sign of life of a running run''s worker.';
comment on column active_runs.stale_at is 'When the run becomes stale unless its worker renews the lease before.';
comment on column active_runs.age is 'Time since its start, or since its enqueue where it has not started.';

create view run_history as
select r.id, r.workflow_id, r.definition, r.revision, r.status, r.reason, r.attempt, r.exit_code, r.error, r.output,
       r.worker, r.requested_by, r.created_at, r.started_at, r.finished_at,
       r.started_at - r.created_at as waited,
       r.finished_at - r.started_at as took
from test_runs r
where r.status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped');
comment on view run_history is 'Runs that are over.';
comment on column run_history.waited is 'From the enqueue to the start of the last attempt.';
comment on column run_history.took is 'How long the last attempt took; null where it never started.';

create view workflow_stats as
select r.workflow_id,
       count(*) as runs,
       count(*) filter (where r.status = 'succeeded') as succeeded,
       count(*) filter (where r.status = 'failed') as failed,
       count(*) filter (where r.status = 'timed_out') as timed_out,
       count(*) filter (where r.status = 'stale') as stale,
       count(*) filter (where r.status = 'cancelled') as cancelled,
       count(*) filter (where r.status = 'skipped') as skipped,
       round(count(*) filter (where r.status = 'succeeded')::numeric
             / nullif(count(*) filter (where r.status in ('succeeded', 'failed', 'timed_out', 'stale')), 0), 4) as success_rate,
       percentile_cont(0.5) within group (order by extract(epoch from r.finished_at - r.started_at))
           filter (where r.status = 'succeeded') as p50_seconds,
       percentile_cont(0.95) within group (order by extract(epoch from r.finished_at - r.started_at))
           filter (where r.status = 'succeeded') as p95_seconds,
       max(r.finished_at) as last_finished_at
from test_runs r
where r.finished_at is not null
group by r.workflow_id;
comment on view workflow_stats is 'Per workflow, over all kept history.';
comment on column workflow_stats.runs is 'Runs that are over.';
comment on column workflow_stats.succeeded is 'Those that succeeded.';
comment on column workflow_stats.failed is 'Those that failed.';
comment on column workflow_stats.timed_out is 'Those that were stopped at their time limit.';
comment on column workflow_stats.stale is 'Those whose worker was lost, or had to stop.';
comment on column workflow_stats.cancelled is 'Those whose end was asked for.';
comment on column workflow_stats.skipped is 'Those that were never started.';
comment on column workflow_stats.last_finished_at is 'When the last one became final.';
comment on column workflow_stats.success_rate is 'Succeeded runs by succeeded, failed, timed out and stale ones; null where there is none of them.';
comment on column workflow_stats.p50_seconds is 'Median duration of the last attempt of succeeded runs, in seconds.';
comment on column workflow_stats.p95_seconds is '95th percentile of the same, in seconds.';

-- Each promise as a query that finds nothing. Live rows and the last 24 hours, so that it stays cheap.
create view invariant_violations as
with recent as (
    select e.*, r.workflow_id
    from run_events e
    join test_runs r on r.id = e.run_id
    where e.at > now() - interval '24 hours'
),
turns as (
    select *, lag(to_status) over w as turn_before, lag(fence) over w as fence_before
    from recent
    where (to_status = 'running') <> (from_status is not distinct from 'running')
    window w as (partition by workflow_id order by seq)
)
select 'two-running' as violation, workflow_id, null::uuid as run_id,
       count(*) || ' running runs' as detail
from test_runs where status = 'running' group by workflow_id having count(*) > 1
union all
select 'two-slots', workflow_id, null, count(*) || ' runs hold the slot'
from test_runs where status in ('queued', 'running') group by workflow_id having count(*) > 1
union all
select 'overlapping-attempts', workflow_id, run_id,
       'started under fence ' || fence || ' before fence ' || fence_before || ' was settled'
from turns where to_status = 'running' and turn_before = 'running'
union all
select 'fence-went-back', workflow_id, run_id, 'fence ' || fence || ' after ' || fence_before
from turns where to_status = 'running' and fence <= fence_before
union all
select 'final-twice', min(workflow_id), run_id, count(*) || ' final events'
from recent
where to_status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')
group by run_id having count(*) > 1
union all
select 'changed-after-final', workflow_id, run_id, 'an event from ' || from_status
from recent
where from_status in ('succeeded', 'failed', 'cancelled', 'timed_out', 'stale', 'skipped')
union all
select 'status-without-event', r.workflow_id, r.id,
       'is ' || r.status || ', its last event says ' || coalesce(last.to_status, 'nothing')
from test_runs r
left join lateral (
    select e.to_status from run_events e where e.run_id = r.id order by e.seq desc limit 1
) last on true
where (r.status in ('scheduled', 'waiting', 'queued', 'running') or r.finished_at > now() - interval '24 hours')
  and last.to_status is distinct from r.status
union all
select 'final-without-attempt', r.workflow_id, r.id, 'no row in run_attempts for fence ' || r.fence
from test_runs r
where r.finished_at > now() - interval '24 hours'
  and r.status in ('succeeded', 'failed', 'timed_out')
  and not exists (select from run_attempts a where a.run_id = r.id and a.fence = r.settled_fence)
union all
select 'lease-overdue', r.workflow_id, r.id,
       'silent for ' || date_trunc('second', now() - coalesce(l.heartbeat_at, r.started_at)) || ', and no replica reaped it'
from test_runs r
left join run_leases l on l.run_id = r.id and l.fence >= r.fence
where r.status = 'running'
  and greatest(coalesce(l.heartbeat_at, r.started_at), pg_postmaster_start_time())
      + make_interval(secs => r.heartbeat_timeout_seconds) + interval '1 minute' < now();
comment on view invariant_violations is 'What must never be: empty, or there is a bug or a superuser. Covers live runs and the last 24 hours.';
comment on column invariant_violations.violation is 'Which promise is broken.';
comment on column invariant_violations.workflow_id is 'The workflow.';
comment on column invariant_violations.run_id is 'The run, where it is one.';
comment on column invariant_violations.detail is 'What was found.';

-- A column of a view that only passes on one of test_runs is described as that one is.
do $$
declare
    passed_on record;
begin
    for passed_on in
        select v.attrelid::regclass as view_name, v.attname as name, col_description(t.attrelid, t.attnum) as comment
        from pg_attribute v
        join pg_attribute t on t.attrelid = 'test_runs'::regclass and t.attname = v.attname
        where v.attrelid in ('active_runs'::regclass, 'run_history'::regclass, 'workflow_stats'::regclass)
          and col_description(v.attrelid, v.attnum) is null
    loop
        execute format('comment on column %s.%I is %L', passed_on.view_name, passed_on.name, passed_on.comment);
    end loop;
end $$;
