with wrong as (
    -- A worker that starts says that it is here at once: a minute is for the one that has just been restarted.
    select 'no-worker' as kind, h.run_id || ' of ' || h.workflow_id || ': ' || r.executor_type || ' in queue ' || r.queue
           || ', to be started since ' || h.available_at as line
    from slot_holders h
    join test_runs r on r.id = h.run_id
    where h.reason = 'no_worker' and h.available_at < now() - interval '1 minute'
    union all
    select 'paused-for-long', p.kind || ' ' || p.name || ': paused since ' || p.paused_at || ' by ' || p.paused_by
           || coalesce(' (' || p.reason || ')', '') || ', ' || count(*) || ' runs wait for it'
    from pauses p
    join test_runs r
        on r.status in ('queued', 'waiting')
        and case p.kind when 'queue' then p.name = r.queue else p.name in (r.workflow_id, r.definition) end
    where p.paused_at < now() - interval '1 day'
    group by p.kind, p.name
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
