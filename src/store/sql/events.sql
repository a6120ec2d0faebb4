-- There is always a row, for the horizon.
with horizon as materialized (
    select events_horizon() as xmin
),
page as materialized (
    select e.*
    from run_events e
    where (e.xid, e.seq) > ($1::text::xid8, $2) and e.xid < (select xmin from horizon)
    order by e.xid, e.seq
    limit $3
),
-- each run by its key, however many rows the planner takes a page to have
told as (
    select p.*, r.workflow_id, r.definition, r.queue
    from page p
    left join lateral (select workflow_id, definition, queue from test_runs where id = p.run_id offset 0) r on true
)
select h.xmin::text::bigint as "horizon!",
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint as "next!",
       (select extract(epoch from now() - e.at)::float8
        from run_events e
        where e.xid >= h.xmin
        order by e.xid, e.seq
        limit 1) as held_back_seconds,
       exists (select from events_forgotten f where (f.xid, f.seq) > ($1::text::xid8, $2)) as "forgotten!",
       t.xid::text::bigint as "xid?", t.seq as "seq?", t.run_id as "run_id?", t.workflow_id as "workflow_id?",
       t.definition as "definition?", t.queue as "queue?", t.from_status as "from_status?", t.to_status as "to_status?",
       t.attempt as "attempt?", t.fence as "fence?", t.actor as "actor?", t.reason as "reason?", t.at as "at?"
from horizon h
left join told t on true
order by t.xid, t.seq
