-- Several attempts per run, claims over HTTP, leases handed over to an http target, cancelling by the API.
-- Safe beside a replica of the version before: it inserts and settles without these columns, which is one attempt. Its
-- reaper does not know held_until, nor unconfirmed leases, and ends such runs as stale: until the last of them is gone, a run
-- of an http target that answered 202, or of a pull worker, may end early; never do two of one workflow run.

alter table workflow_revisions
    add column max_attempts integer not null default 1,
    add column retry_on     text[]  not null default '{failed,timed_out,stale}',
    add column backoff      jsonb   not null default '{"initial_seconds": 5, "factor": 2, "max_seconds": 3600, "jitter": 0.2}',
    add constraint workflow_revisions_max_attempts check (max_attempts between 1 and 1000),
    add constraint workflow_revisions_retry_on check (retry_on <@ '{failed,timed_out,stale}'),
    -- What can't be computed with would make every settling of its runs fail.
    add constraint workflow_revisions_backoff check (
        jsonb_path_exists(backoff, 'strict $ ? (@.initial_seconds >= 0 && @.initial_seconds <= 86400 && @.factor >= 1 && @.factor <= 100
                                         && @.max_seconds >= 0 && @.max_seconds <= 604800 && @.jitter >= 0 && @.jitter <= 1)'));
comment on column workflow_revisions.max_attempts is 'How many attempts its runs may have, unless their enqueue says otherwise.';
comment on column workflow_revisions.retry_on is 'After which ends of an attempt there is another one: some of failed, timed_out, stale.';
comment on column workflow_revisions.backoff is 'Wait before the next attempt: initial_seconds after the first, times factor after each further one, at most max_seconds, varied by the share jitter.';

alter table test_runs
    add column claim_position integer;
comment on column test_runs.claim_position is 'Which of the runs of its claim request it was, from 1; so that a request sent twice at once claims once. Not shown by the API.';
-- Only runs that were claimed over HTTP under a claim_id have an entry.
create unique index test_runs_claimed_once on test_runs (worker, claim_id, claim_position) where claim_id is not null;
comment on index test_runs_claimed_once is 'A claim request that is repeated finds what it got, and can''t claim a second time.';

comment on column test_runs.lease_secret is 'Random part of the lease token of the running attempt; null otherwise. Not shown by the API.';
comment on column test_runs.worker is 'Who runs it, or ran its last attempt; null while it is to be started.';

alter table run_leases
    add column held_until timestamptz;
comment on column run_leases.held_until is 'An http target answered that it finishes the run itself: until then no worker has to renew it, and then it is timed_out.';

alter table run_attempts
    add column lease_secret uuid,
    add column verdict      text;
comment on column run_attempts.lease_secret is 'Random part of the lease that its own worker settled it under, so that a repetition is known; null when somebody else ended it.';
comment on column run_attempts.verdict is 'How its own worker said that it ended; status is what that came to.';

-- Tells the workers, who listen, to look at once; what counts is the row.
create function cancel_run(run_id uuid, actor text) returns text language plpgsql set search_path from current as $$
declare
    run test_runs;
begin
    select * into run from test_runs where id = cancel_run.run_id for update;
    if not found then
        return 'not-found';
    elsif run.status in ('scheduled', 'waiting', 'queued') then
        update test_runs
        set status = 'cancelled', reason = 'requested', cancel_requested_at = now(),
            finished_at = greatest(now(), started_at), version = version + 1
        where id = run.id;
        insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
        values (run.id, run.status, 'cancelled', run.attempt, run.fence, cancel_run.actor, 'requested');
        return 'cancelled';
    elsif run.status = 'running' then
        if run.cancel_requested_at is null then
            update test_runs set cancel_requested_at = now(), version = version + 1 where id = run.id;
            insert into run_events (run_id, from_status, to_status, attempt, fence, actor, reason)
            values (run.id, 'running', 'running', run.attempt, run.fence, cancel_run.actor, 'cancel_requested');
        end if;
        perform pg_notify('singletrack_cancel', run.id::text);
        return 'cancel-requested';
    end if;
    return 'already-final';
end $$;
comment on function cancel_run(uuid, text) is 'Cancels a run as cancel_run(uuid) does, in the name of actor.';

create or replace function cancel_run(run_id uuid) returns text language plpgsql set search_path from current as $$
begin
    return cancel_run(run_id, session_user::text);
end $$;

create or replace view active_runs as
select r.id, r.workflow_id, r.status, r.reason, r.attempt, r.max_attempts, r.fence, r.worker, r.queue, r.priority,
       r.created_at, r.run_at, r.available_at, r.started_at, r.requested_by, r.cancel_requested_at,
       case when r.status = 'running' then coalesce(l.heartbeat_at, r.started_at) end as heartbeat_at,
       case when r.status = 'running'
            then coalesce(l.held_until, coalesce(l.heartbeat_at, r.started_at) + make_interval(secs => r.heartbeat_timeout_seconds))
       end as stale_at,
       now() - coalesce(r.started_at, r.created_at) as age
from test_runs r
left join run_leases l on l.run_id = r.id and l.fence >= r.fence -- a smaller one is of an attempt before this
where r.status in ('scheduled', 'waiting', 'queued', 'running');
comment on column active_runs.stale_at is 'When the run ends unless its worker renews the lease before; where an http target has taken it over, unless that one finishes it before.';

create or replace view invariant_violations as
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
      + make_interval(secs => r.heartbeat_timeout_seconds) + interval '1 minute' < now()
  and coalesce(l.held_until + interval '1 minute' < now(), true);
