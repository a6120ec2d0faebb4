with given as materialized (
    select *
    from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::jsonb[]) with ordinality as g (run_id, fence, secret, progress, position)
),
held as materialized (
    select g.position, g.progress, r.id, r.fence, r.cancel_requested_at is not null as cancel_requested,
           r.started_at + make_interval(secs => r.timeout_seconds) < now() as overdue
    from given g
    join test_runs r on r.id = g.run_id and r.status = 'running' and r.fence = g.fence and r.lease_secret = g.secret
),
locked as materialized (
    select l.run_id
    from run_leases l
    where l.run_id in (select id from held)
    order by l.run_id -- two batches that lock in different orders deadlock
    for update of l skip locked
),
renewed as (
    update run_leases l
    set fence = h.fence,
        heartbeat_at = now(),
        -- What the attempt before left there is not this one's.
        progress = coalesce(h.progress, case when l.fence = h.fence then l.progress end),
        held_until = case when l.fence = h.fence then l.held_until end
    -- A lease may have been brought twice, by a heartbeat that was sent again: what it last said counts.
    from (select distinct on (id) * from held order by id, progress is null, position desc) h
    join locked k on k.run_id = h.id
    where l.run_id = h.id and l.fence <= h.fence -- a larger one is the reaper's: it shut this claim out meanwhile
    returning l.run_id, l.held_until
),
-- The first renewal of a run. Where somebody else was faster, the next one tells.
begun as (
    insert into run_leases (run_id, fence, heartbeat_at, progress)
    select distinct on (id) id, fence, now(), progress
    from held h
    where not exists (select from run_leases l where l.run_id = h.id)
    order by id, progress is null, position desc
    on conflict do nothing
    returning run_id
)
select (h.id is not null) as "current!",
       (n.run_id is not null or b.run_id is not null) as "renewed!",
       (k.run_id is not null) as "locked!",
       coalesce(h.cancel_requested, false) as "cancel_requested!",
       -- What an http target has taken over may last as long as that one was given.
       coalesce(n.held_until < now(), h.overdue, false) as "overdue!"
from given g
left join held h on h.position = g.position
left join locked k on k.run_id = h.id
left join renewed n on n.run_id = h.id
left join begun b on b.run_id = h.id
order by g.position
